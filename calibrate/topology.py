"""Who is joined to whom: identity or a print of `nvidia-smi topo -m` to GPUs, link names and peers.

A common switch makes a shared uplink likely, not certain: candidates are marked here and decided by links.py, which
measures each pair at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from calibrate.identity import HostIdentity
from sim.errors import InputError, require
from sim.host import Peer

SWITCHES = ("PIX", "PXB")
"""Ancestors that are PCIe switches: GPUs below one may share its uplink."""

HOST_MEMORY = "host memory"
"""What all GPUs share, be it a switch, a socket or the memory itself: at once they get less than their lanes carry."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What joins GPUs `first` < `second`: NVLinks, 0 for none, and the PCIe ancestor, None where it is not told."""

    first: int
    second: int
    nvlinks: int
    ancestor: str | None


@dataclass(frozen=True, slots=True)
class Topology:
    """The skeleton of a Host: everything but figures."""

    gpus: int
    wires: tuple[Wire, ...]
    numa_nodes: tuple[int | None, ...]

    def wire(self, first: int, second: int) -> Wire:
        low, high = sorted((first, second))
        return next(w for w in self.wires if (w.first, w.second) == (low, high))

    @property
    def switch_groups(self) -> tuple[tuple[int, ...], ...]:
        """GPUs below one PCIe switch: candidates for a shared uplink, in order, groups of one left out."""
        group = list(range(self.gpus))
        for wire in self.wires:
            if wire.ancestor in SWITCHES:
                old, new = group[wire.second], group[wire.first]
                group = [new if g == old else g for g in group]
        found = [tuple(g for g in range(self.gpus) if group[g] == lead) for lead in dict.fromkeys(group)]
        return tuple(members for members in found if len(members) > 1)

    @property
    def nvlink_peers(self) -> tuple[Peer, ...]:
        """One directed link for each direction of each pair that NVLink joins."""
        return tuple(
            Peer(a, b, (nvlink(a, b),))
            for a in range(self.gpus)
            for b in range(self.gpus)
            if a != b and self.wire(a, b).nvlinks
        )


def pcie(gpu: int) -> str:
    """Name of the host-to-device direction of a GPU's own lane."""
    return f"pcie{gpu}"


def nvlink(source: int, destination: int) -> str:
    return f"nvlink{source}>{destination}"


def uplink(gpus: tuple[int, ...]) -> str:
    """Name of what these GPUs share on their way to host memory."""
    return f"uplink{'+'.join(map(str, gpus))}"


def from_identity(identity: HostIdentity) -> Topology:
    return Topology(
        len(identity.gpus),
        tuple(Wire(p.first, p.second, p.nvlinks, p.ancestor) for p in identity.pairs),
        tuple(g.numa_node for g in identity.gpus),
    )


def from_topo_text(text: str) -> Topology:
    """Read the matrix that `nvidia-smi topo -m` prints. Raises InputError where there is none.

    An NVLink cell hides the PCIe ancestor; two GPUs that both sit below one network card's switch share that switch.
    """
    rows = [
        [c.strip() for c in re.split(r"\t+| {2,}", re.sub(r"\x1b\[[0-9;]*m", "", line).strip())]
        for line in text.splitlines()
    ]
    head = next((at for at, row in enumerate(rows) if row and re.fullmatch(r"GPU0", row[0])), None)
    require(
        head is not None, "no matrix found: give the whole print of `nvidia-smi topo -m`, header included"
    )
    assert head is not None
    columns = [c for c in rows[head] if re.fullmatch(r"(GPU|NIC|mlx|ib|bnxt|hfi)\w*", c)]
    gpus = sum(1 for c in columns if c.startswith("GPU"))
    cells: dict[tuple[int, int], str] = {}
    numa: list[int | None] = []
    for gpu in range(gpus):
        row = next((r for r in rows[head + 1 :] if r and r[0] == f"GPU{gpu}"), None)
        if row is None or len(row) <= len(columns):
            raise InputError(
                f"`nvidia-smi topo -m`: the row of GPU{gpu} is missing or short; give the whole print"
            )
        cells |= {(gpu, column): cell for column, cell in enumerate(row[1 : len(columns) + 1])}
        numa.append(_numa(rows[head], row, len(columns)))
    wires = []
    for first in range(gpus):
        for second in range(first + 1, gpus):
            cell = cells[first, second]
            joined = re.fullmatch(r"NV(\d+)", cell)
            if joined is None:
                require(
                    cell in ("PIX", "PXB", "PHB", "NODE", "SYS"),
                    f"`nvidia-smi topo -m`: GPU{first} to GPU{second} says {cell!r}; NV#, PIX, PXB, PHB, NODE or SYS was expected",
                )
                wires.append(Wire(first, second, 0, cell))
                continue
            card = any(
                cells[first, column] in SWITCHES and cells[second, column] in SWITCHES
                for column in range(gpus, len(columns))
            )
            wires.append(Wire(first, second, int(joined[1]), "PIX" if card else None))
    return Topology(gpus, tuple(wires), tuple(numa))


def _numa(header: list[str], row: list[str], columns: int) -> int | None:
    """The node of a row; its place is counted in titles, of which the row's label has none."""
    titles = header[columns:]
    if "NUMA Affinity" not in titles:
        return None
    at = columns + 1 + titles.index("NUMA Affinity")
    return int(row[at]) if at < len(row) and row[at].isdigit() else None
