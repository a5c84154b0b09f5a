"""Random records, composed small to big: figures, links, hosts, networks, profiles, plans that fit both."""

from __future__ import annotations

import string
from dataclasses import fields, replace
from itertools import pairwise

from hypothesis import strategies as st

from sim.host import Costs, Figure, FigureKind, Gpu, Host, Link, Peer, Roofline
from sim.network import Layer, Network, Read, Storage
from sim.plan import Access, Chunk, Launch, Plan, Sync, covered
from sim.profile import LayerTiming, Profile, ProfileKind, Provenance, Timing

KINDS: tuple[FigureKind, ...] = ("measured", "published", "derived", "fitted", "assumed")

names = st.text(string.ascii_lowercase + string.digits + "_.", min_size=1, max_size=8)
words = st.text(max_size=12)
"""Any text a file can hold."""
digests = st.text("0123456789abcdef", min_size=64, max_size=64)


def figures(low: float = 0.0, high: float = 1e6) -> st.SearchStrategy[Figure]:
    return st.builds(Figure, st.floats(low, high), st.sampled_from(KINDS), words)


durations = st.floats(0.0, 1e5)
"""Nanoseconds: up to 0.1 ms."""
rates = figures(1e8, 1e11)
"""Bytes per second, 0.1 to 100 GB/s."""
weights = figures(0.25, 4.0)
"""Shares of a link for each share that a copy takes."""
costs = st.builds(
    Costs,
    **{
        field.name: rates
        if field.name.endswith("bytes_per_s")
        else weights
        if field.name == "direct_weight"
        else figures(0.0, 1e5)
        for field in fields(Costs)
    },
)
rooflines = st.builds(Roofline, **{field.name: figures(1.0, 1e13) for field in fields(Roofline)})


@st.composite
def hosts(
    draw: st.DrawFn, max_gpus: int = 4, roofline: bool = False, min_gpus: int = 1, joined: bool = False
) -> Host:
    """1 to 4 GPUs, each with a lane of its own; pairs may share an uplink; any two may be joined, either way, or all are."""
    count = draw(st.integers(min_gpus, max_gpus))
    links = [Link(f"pcie{g}", draw(rates)) for g in range(count)]
    uplink = [draw(st.none() | st.integers(0, 1)) for _ in range(count)]
    links += [Link(f"uplink{u}", draw(rates)) for u in sorted({u for u in uplink if u is not None})]
    gpus = [
        Gpu(g, "GPU", 2**34, (f"pcie{g}",) if uplink[g] is None else (f"pcie{g}", f"uplink{uplink[g]}"))
        for g in range(count)
    ]
    peers = []
    for source in range(count):
        for destination in range(count):
            if source != destination and (joined or draw(st.booleans())):
                links.append(Link(f"nvlink{source}>{destination}", draw(rates)))
                peers.append(Peer(source, destination, (links[-1].name,)))
    roof = draw(rooflines) if roofline else draw(st.none() | rooflines)
    return Host(draw(names), draw(words), tuple(gpus), tuple(links), tuple(peers), draw(costs), roof)


@st.composite
def networks(draw: st.DrawFn, max_layers: int = 8, max_bytes: int = 4_000_000) -> Network:
    """1 to 8 layers; storages that several layers read, or none."""
    count = draw(st.integers(1, max_layers))
    storages = tuple(
        Storage(
            f"s{index}.{draw(names)}",
            draw(st.integers(0, max_bytes)),
            draw(st.sampled_from(("fp32", "fp16", "int64"))),
            draw(st.integers(-1, count - 1)),
        )
        for index in range(draw(st.integers(0, 2 * count)))
    )
    layers = []
    for index in range(count):
        read = draw(st.lists(st.integers(0, len(storages) - 1), unique=True, max_size=3)) if storages else []
        reads = tuple(Read(s, draw(st.integers(0, storages[s].size_bytes))) for s in read)
        kind = draw(st.sampled_from(("Conv2d", "Linear", "Embedding", "ReLU")))
        layers.append(
            Layer(f"layer{index}", kind, reads, draw(st.integers(0, 10**9)), draw(st.integers(0, 10**7)))
        )
    first: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for each in layer.reads:
            first.setdefault(each.storage, index)
    storages = tuple(replace(s, home=first.get(at, s.home)) for at, s in enumerate(storages))
    seq = draw(st.none() | st.integers(1, 512))
    dtype = draw(st.sampled_from(("fp32", "fp16", "bf16")))
    return Network(draw(names), dtype, draw(st.integers(1, 8)), seq, tuple(layers), storages)


timings = st.builds(Timing, durations, durations, st.integers(0, 100))
provenances = st.builds(
    Provenance, words, words, words, words, words, words, words, words, st.lists(words, max_size=2).map(tuple)
)


@st.composite
def profiles(draw: st.DrawFn, network: Network, host: Host) -> Profile:
    """Timings that fit the network, with peer reads where the host has peers."""
    layers = []
    for layer in network.layers:
        direct = tuple(draw(timings) for _ in layer.reads)
        peer = tuple(draw(timings) for _ in layer.reads) if host.peers else ()
        layers.append(LayerTiming(draw(timings), draw(timings), direct, peer, draw(st.none() | timings)))
    kinds: tuple[ProfileKind, ...] = ("estimated", "measured", "played")
    kind, slowed = draw(st.sampled_from(kinds)), draw(st.none() | figures(0.0, 0.5))
    known = {name: draw(st.none() | figures(0.0, 1e6)) for name in ("start", "hook", "relay", "launch")}
    known["slowed"] = slowed
    if draw(st.booleans()):
        known |= {name: draw(figures(0.0, 1e5)) for name in ("wait", "wait_beside")}
    if draw(st.booleans()):
        known |= {"direct_busy": draw(figures(0.0, 1e6)), "direct_weight": draw(weights)}
    return Profile(kind, network, host.digest, tuple(layers), draw(provenances), **known)


@st.composite
def paths(draw: st.DrawFn, host: Host, target: int) -> tuple[int, ...]:
    """A way bytes may take: to the target, or to a partner that the target can read."""
    ends = [target, *(g.index for g in host.gpus if host.reaches(g.index, target))]
    path = [draw(st.sampled_from(ends))]
    while True:
        before = [g.index for g in host.gpus if g.index not in path and host.reaches(g.index, path[0])]
        if not before or draw(st.booleans()):
            return tuple(path)
        path.insert(0, draw(st.sampled_from(before)))


@st.composite
def plans(draw: st.DrawFn, network: Network, host: Host, launch: Launch | None = None) -> Plan:
    """Plans that `Plan.check` passes: cut anywhere, in any order, over any routes; reads as the chunks allow."""
    target = draw(st.integers(0, len(host.gpus) - 1))
    arena = network.arena_bytes
    cuts = draw(st.lists(st.sampled_from(network.offsets) | st.integers(0, arena), max_size=8))
    edges = sorted({0, arena, *cuts})
    chunks = [
        Chunk(start, stop, draw(paths(host, target)))
        for start, stop in pairwise(edges)
        if draw(st.integers(0, 5))
    ]
    chunks = draw(st.permutations(chunks)) if len(chunks) > 1 else chunks
    launch = draw(st.sampled_from(Launch)) if launch is None else launch
    sync = draw(st.sampled_from(Sync)) if launch is Launch.EAGER else Sync.STREAM
    bare = Plan("bare", target, launch, (), tuple(chunks), sync)
    landed = sorted((c.start_bytes, c.stop_bytes) for c in chunks if c.path[-1] == target)
    kept = draw(st.sets(st.sampled_from(range(len(network.storages))))) if network.storages else set()
    access = []
    for layer in network.layers:
        row = []
        for read in layer.reads:
            start = network.offsets[read.storage]
            able = [Access.DIRECT]
            if covered(landed, start, start + network.storages[read.storage].size_bytes):
                able.insert(0, Access.COPIED)
            if bare.holder(network, read.storage) is not None:
                able.append(Access.PEER)
            if read.storage in kept:
                able = [Access.DIRECT, Access.RESIDENT]
            row.append(draw(st.sampled_from(able)))
        access.append(tuple(row))
    head = draw(st.integers(0, len(chunks))) if launch is Launch.GRAPH else 0
    opened = launch is Launch.GRAPH and head == len(chunks)
    opening = draw(st.integers(0, len(network.layers) - 1)) if opened else 0
    return Plan(draw(names), target, launch, tuple(access), tuple(chunks), sync, head, opening)


def headed(plan: Plan, head: int) -> Plan:
    """A plan with another head; only one of all chunks may have an opening."""
    return replace(plan, head=head, opening=plan.opening if head == len(plan.chunks) else 0)
