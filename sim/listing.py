"""What there is: hosts with their figures, layers of a network and what plans do with them, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from sim.baselines import Setting, dha, dha_static, published_partner
from sim.hints import size_words
from sim.host import Figure, Host
from sim.network import Network
from sim.origins import figures, origins
from sim.plan import Access
from sim.report import MIB, Answer, subject


def hosts_table(hosts: tuple[Host, ...]) -> Table:
    columns = ("host", "GPUs", "PCIe GB/s", "NVLink GB/s", "GPU pairs", "figures from")
    table = _table("Hosts", columns, "lrrrrl")
    for host in hosts:
        lanes = _range([host.rate(gpu.h2d) for gpu in host.gpus])
        wires = _range([host.rate(peer.links) for peer in host.peers])
        pairs = {frozenset((peer.source, peer.destination)) for peer in host.peers}
        kinds = (f"{origin.count} {origin.kind}" for origin in origins(host))
        name = f"{len(host.gpus)}x {host.gpus[0].name}"
        _row(table, host.name, name, lanes, wires, str(len(pairs)), ", ".join(kinds))
    return table


def _range(bytes_per_s: list[float]) -> str:
    """Lowest and highest, once where they print alike; empty where there are none."""
    ends = (min(bytes_per_s), max(bytes_per_s)) if bytes_per_s else ()
    return " to ".join(dict.fromkeys(f"{rate / 1e9:.4g}" for rate in ends))


def host_table(host: Host) -> Table:
    """Every figure of a host, with its unit, range, kind and source."""
    table = _table(f"{host.name}: {host.about}", ("figure", "value", "range", "from", "source"), "lrrll")
    for link in host.links:
        users = [f"GPU {gpu.index}" for gpu in host.gpus if link.name in gpu.h2d]
        users += [f"GPU {p.source} to {p.destination}" for p in host.peers if link.name in p.links]
        _figure(table, f"link {link.name} ({', '.join(users) or 'unused'})", "bytes_per_s", link.bytes_per_s)
    for name, figure in figures(host):
        _figure(table, name, name, figure)
    return table


def _figure(table: Table, label: str, name: str, figure: Figure) -> None:
    ends = tuple(end for end in (figure.low, figure.high) if end is not None)
    spread = _value(name, *ends) if ends else ""
    _row(table, label, _value(name, figure.value), spread, figure.kind, figure.source)


def _value(name: str, *values: float) -> str:
    """A figure, or its range, with the unit that its name carries."""
    for ending, scale, unit in (
        ("flops_per_s", 1e12, "TFLOP/s"),
        ("bytes_per_s", 1e9, "GB/s"),
        ("_ns", 1e3, "us"),
    ):
        if name.endswith(ending):
            return f"{' to '.join(f'{value / scale:.4g}' for value in values)} {unit}"
    return " to ".join(f"{value:.4g}" for value in values)


def layers_table(network: Network) -> Table:
    title = f"{subject(network)}: {len(network.layers)} layers, {size_words(network.total_bytes)}"
    table = _table(title, ("layer", "name", "kind", "MiB", "MFLOP", "storages"), "rllrrl")
    for index, layer in enumerate(network.layers):
        storages = ", ".join(network.storages[read.storage].name for read in layer.reads)
        size, work = f"{network.layer_bytes(index) / MIB:.3f}", f"{layer.flops / 1e6:.1f}"
        _row(table, str(index), layer.name, layer.kind, size, work, storages)
    return table


def layers_json(network: Network) -> str:
    return json.dumps(
        {
            "model": network.model,
            "dtype": network.dtype,
            "batch": network.batch,
            "seq": network.seq,
            "total_bytes": network.total_bytes,
            "layers": [
                {
                    "index": index,
                    "name": layer.name,
                    "kind": layer.kind,
                    "bytes": network.layer_bytes(index),
                    "flops": layer.flops,
                    "storages": [network.storages[read.storage].name for read in layer.reads],
                }
                for index, layer in enumerate(network.layers)
            ],
        }
    )


def _table(title: str, columns: tuple[str, ...], align: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name, side in zip(columns, align, strict=True):
        table.add_column(name, justify="left" if side == "l" else "right")
    return table


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(cell) for cell in cells))


def layer_choices(answer: Answer) -> Iterator[str]:
    """DeepPlan's layer table: `0-Conv2d (0.036 MB) | O | X (direct-host-access) | O`, one column per plan.

    MB are 2**20 bytes of all the storages a layer reads, as published. O: copied to the GPU. X: read in place. A layer
    that does both has both. `-`: no weights (the published tables count those as not loaded).
    """
    network, target = answer.profile.network, answer.options.target
    setting = Setting(answer.profile, answer.host, target, published_partner(answer.host, target))
    columns = {
        "static plan": dha_static(setting),
        "adaptive plan": dha(setting),
        "best plan": answer.outcome.best.plan,
    }
    yield " | ".join(["layer", *columns])
    for index, layer in enumerate(network.layers):
        cells = [f"{index}-{layer.kind} ({network.layer_bytes(index) / MIB:.3f} MB)"]
        yield " | ".join([*cells, *(_choice(plan.access[index]) for plan in columns.values())])


def _choice(row: tuple[Access, ...]) -> str:
    marks = {
        Access.COPIED: "O",
        Access.RESIDENT: "O (stays)",
        Access.DIRECT: "X (direct-host-access)",
        Access.PEER: "X (peer-direct-access)",
    }
    return " + ".join(marks[access] for access in marks if access in row) or "-"
