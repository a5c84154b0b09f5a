"""Small hosts, networks and profiles by hand, in round numbers: 1 byte per ns is 1 GB/s."""

from __future__ import annotations

from dataclasses import replace

from sim.host import Costs, Figure, Gpu, Host, Link, Peer
from sim.network import Layer, Network, Read, Storage
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import LayerTiming, Profile, Provenance, Timing

GB = 1e9


def figure(value: float) -> Figure:
    return Figure(float(value), "assumed", "a test")


FREE = Costs(**{name: figure(0) for name in Costs.__dataclass_fields__})
"""Nothing costs anything; reads in place at any rate, equal shares."""
FREE = replace(
    FREE,
    direct_bytes_per_s=figure(1000 * GB),
    direct_weight=figure(1),
    peer_read_bytes_per_s=figure(1000 * GB),
)


def host(
    gpus: int = 1,
    *,
    pcie: float = 1.0,
    nvlink: float = 4.0,
    uplinks: tuple[int, ...] = (),
    uplink: float = 1.0,
    peers: bool = True,
    costs: Costs = FREE,
) -> Host:
    """Rates in GB/s. `uplinks[g]` names the switch of GPU g; all pairs are joined by NVLink unless `peers` is False."""
    links = [Link(f"pcie{g}", figure(pcie * GB)) for g in range(gpus)]
    links += [Link(f"uplink{u}", figure(uplink * GB)) for u in sorted(set(uplinks))]
    lanes = [(f"pcie{g}", f"uplink{uplinks[g]}") if uplinks else (f"pcie{g}",) for g in range(gpus)]
    pairs = [(a, b) for a in range(gpus) for b in range(gpus) if a != b and peers]
    links += [Link(f"nvlink{a}>{b}", figure(nvlink * GB)) for a, b in pairs]
    return Host(
        "test",
        "by hand",
        tuple(Gpu(g, "GPU", 2**34, lanes[g]) for g in range(gpus)),
        tuple(links),
        tuple(Peer(a, b, (f"nvlink{a}>{b}",)) for a, b in pairs),
        costs,
    )


def network(*sizes: int | tuple[int, ...]) -> Network:
    """One layer per argument, reading storages of those bytes; 0 for a layer without weights."""
    layers: list[Layer] = []
    storages: list[Storage] = []
    for index, size in enumerate(sizes):
        reads = []
        for each in (size,) if isinstance(size, int) else size:
            if each:
                reads.append(Read(len(storages), each))
                storages.append(Storage(f"w{len(storages)}", each, "fp32", index))
        layers.append(Layer(f"layer{index}", "Linear", tuple(reads), 0, 0))
    return Network("test", "fp32", 1, None, tuple(layers), tuple(storages))


def profile(
    net: Network,
    machine: Host,
    run: float = 1000,
    direct: float = 5000,
    peer: float = 2000,
    issue: float = 100,
) -> Profile:
    """Every layer alike, nanoseconds."""
    layers = tuple(
        LayerTiming(
            Timing(run),
            Timing(issue),
            tuple(Timing(direct) for _ in layer.reads),
            tuple(Timing(peer) for _ in layer.reads) if machine.peers else (),
        )
        for layer in net.layers
    )
    return Profile("estimated", net, machine.digest, layers, Provenance("test", "GPU", "test", "", ""))


def copied(net: Network, *chunks: Chunk, launch: Launch = Launch.GRAPH, target: int = 0) -> Plan:
    """A plan that copies every read."""
    access = tuple(tuple(Access.COPIED for _ in layer.reads) for layer in net.layers)
    return Plan("test", target, launch, access, chunks)
