"""The plans by which a network is run so that what differs between two runs is what a layer, a copy or a launch costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from calibrate.bench import BESIDE_BYTES
from sim.draft import evenly
from sim.host import Host
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan

BESIDE = "beside"
"""The way in which all is resident while the whole arena is copied."""


def partner_of(host: Host) -> int | None:
    """The GPU that networks are relayed by and read at: the best partner of GPU 0, where there is one."""
    return next(iter(host.partners(0)), None)


def everything(
    network: Network, access: Access, partner: int | None = None, launch: Launch = Launch.GRAPH
) -> Plan:
    """A plan for GPU 0 in which every layer reads every storage alike."""
    rows = tuple(tuple(access for _ in layer.reads) for layer in network.layers)
    return Plan(f"calibrate-{access.value}", 0, launch, rows, _kept(network, partner))


def small_reads(network: Network, access: Access, partner: int | None = None) -> Plan:
    """Each layer's largest read resident, the others by `access`."""
    rows = tuple(
        tuple(Access.RESIDENT if at == largest(network, layer) else access for at in range(len(reads.reads)))
        for layer, reads in enumerate(network.layers)
    )
    return Plan(f"calibrate-{access.value}-small", 0, Launch.GRAPH, rows, _kept(network, partner))


MOST_ALONE = 6
"""Reads of a layer, beside its largest, that are each measured alone; more share the last run."""


def reads_alone(network: Network, access: Access) -> dict[int, Plan]:
    """By place, from 1 on, plans in which each layer's read of that place is by `access` and all others are resident: by size, the
    largest at place 0, which has no such plan. None where no layer is `uneven`."""
    found = [
        places(network, at) if uneven(network, at) else (0,) * len(layer.reads)
        for at, layer in enumerate(network.layers)
    ]
    return {
        place: Plan(f"calibrate-{access.value}-{place}", 0, Launch.GRAPH, _at(place, found, access), ())
        for place in range(1, max((max(row, default=0) for row in found), default=0) + 1)
    }


def uneven(network: Network, layer: int) -> bool:
    """Whether a layer has small reads of different sizes: alike ones, as BatchNorm's four, cost alike."""
    small = sorted(read.touched_bytes for read in network.layers[layer].reads)[:-1]
    return len(set(small)) > 1


def _at(place: int, found: Sequence[Sequence[int]], access: Access) -> tuple[tuple[Access, ...], ...]:
    return tuple(tuple(access if at == place else Access.RESIDENT for at in row) for row in found)


def places(network: Network, layer: int) -> tuple[int, ...]:
    """By read of a layer, its place in `reads_alone`."""
    reads = network.layers[layer].reads
    ordered = sorted(range(len(reads)), key=lambda at: (-reads[at].touched_bytes, at))
    return tuple(min(ordered.index(at), MOST_ALONE) for at in range(len(reads)))


def beside_copies(network: Network) -> Plan:
    """All resident, while every byte of it is copied to where it lies already: no layer waits for that."""
    size = max(BESIDE_BYTES, -(-network.arena_bytes // 16))
    cuts = [*range(0, network.arena_bytes, size), network.arena_bytes]
    chunks = tuple(Chunk(a, b, (0,)) for a, b in pairwise(cuts))
    return replace(everything(network, Access.RESIDENT), name=f"calibrate-{BESIDE}", chunks=chunks)


MOST_CUTS = 32
"""Layers that wait, in the run that waits are timed by: about as many as large networks' best plans have."""


def cut(network: Network) -> Plan:
    """A graph whose bytes come ahead of it over the own lane, cut where layers begin that need most of them, as best plans are.

    Waits for what a partner pushes cost as much (results/h200-pair-2/trials/pushes.txt)."""
    needed: list[tuple[int, int]] = []
    seen: set[int] = set()
    for layer in network.layers:
        new = {read.storage for read in layer.reads} - seen
        if new:
            size = sum(network.storages[storage].size_bytes for storage in new)
            needed.append((-size, min(network.offsets[storage] for storage in new)))
        seen |= new
    largest = sorted(needed)[:MOST_CUTS]
    cuts = sorted({0, network.arena_bytes, *(start for _, start in largest)})
    chunks = tuple(Chunk(a, b, (0,)) for a, b in pairwise(cuts))
    return replace(everything(network, Access.COPIED), name="calibrate-cut", chunks=chunks, head=len(chunks))


def in_one(network: Network) -> Plan:
    """An eager start whose bytes come in one copy, ahead of all layers."""
    plan = everything(network, Access.COPIED, launch=Launch.EAGER)
    return replace(plan, chunks=(Chunk(0, network.arena_bytes, (0,)),) if network.arena_bytes else ())


def in_each(network: Network, partner: int | None = None) -> Plan:
    """An eager start whose bytes come in a chunk for each storage, straight or over `partner`: each layer waits for its own."""
    path = (0,) if partner is None else (partner, 0)
    chunks = tuple(Chunk(a, b, path) for a, b in pairwise(sorted({*network.offsets, network.arena_bytes})))
    return replace(everything(network, Access.COPIED, launch=Launch.EAGER), chunks=chunks)


def over_lanes(network: Network, partner: int | None) -> Plan:
    """A graph start whose bytes come ahead of the graph: half over the own lane and half over a partner's, where there is one."""
    paths = ((0,),) if partner is None else ((0,), (partner, 0))
    parts = evenly((0, network.arena_bytes), len(paths))
    chunks = tuple(Chunk(a, b, path) for (a, b), path in zip(parts, paths, strict=False))
    return replace(everything(network, Access.COPIED), chunks=chunks, head=len(chunks))


def _kept(network: Network, partner: int | None) -> tuple[Chunk, ...]:
    """The whole arena on a partner, in one chunk: it lands before the first layer, so no copy runs beside a layer."""
    return () if partner is None else (Chunk(0, network.arena_bytes, (partner,)),)


def largest(network: Network, layer: int) -> int:
    """Which of a layer's reads touches most bytes; the first of equals. -1 where it reads nothing."""
    found = places(network, layer)
    return found.index(0) if found else -1
