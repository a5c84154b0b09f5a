"""Every plan of a small network, so that a search among them is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, permutations, product

from sim.draft import Draft, needed, plan_of
from sim.host import Host
from sim.network import ALIGNMENT_BYTES, Network
from sim.plan import Chunk, Launch, Plan

MOST_PLANS = 4000
"""Networks with more plans than this are not enumerated."""


def every_plan(
    network: Network,
    host: Host,
    target: int,
    partners: tuple[int, ...],
    fits: Callable[[Plan], bool],
    kept: frozenset[int] = frozenset(),
) -> list[Plan] | None:
    """All plans cut at storage boundaries, None if they are too many. `fits` says which have room; storages in `kept` stay on the
    target.

    All of: each read copied or in place from host memory, the order of storages, which neighbours one chunk joins, the
    path of each chunk (straight, or over one partner), the launch, and a graph's head and opening.
    """
    keys = [
        (i, j)
        for i, layer in enumerate(network.layers)
        for j, read in enumerate(layer.reads)
        if read.storage not in kept
    ]
    paths = [(target,), *((p, target) for p in partners)]
    copied = sum(
        1
        for s, readers in enumerate(network.readers)
        if readers and network.storages[s].size_bytes and s not in kept
    )
    roughly = 2 ** len(keys)
    for n in range(1, copied + 1):
        roughly *= n * len(paths) * 2
    if roughly > MOST_PLANS * 16:
        return None
    plans: list[Plan] = []
    for chosen in product((False, True), repeat=len(keys)):
        direct = frozenset(k for k, yes in zip(keys, chosen, strict=True) if yes)
        draft = Draft(Launch.GRAPH, direct, frozenset(), (paths[0],), cuts=(), kept=kept)
        access = plan_of(draft, network, host).access
        pieces = [(a, b) for _, a, b in sorted(needed(draft, network))]
        for ranges in _arrangements(pieces):
            for ways in product(paths, repeat=len(ranges)):
                chunks = tuple(Chunk(a, b, way) for (a, b), way in zip(ranges, ways, strict=True))
                eager = Plan("best", target, Launch.EAGER, access, chunks)
                if fits(eager):
                    plans.append(eager)
                    plans += [replace(eager, launch=Launch.GRAPH, head=n) for n in range(len(chunks) + 1)]
                    plans += [replace(plans[-1], opening=n) for n in range(1, len(network.layers))]
        if len(plans) > MOST_PLANS:
            return None
    return plans


def _arrangements(pieces: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every order of the pieces, neighbours in the arena joined or not."""
    seen: set[tuple[tuple[int, int], ...]] = set()
    for order in permutations(pieces):
        joints = [at for at, (a, b) in enumerate(pairwise(order)) if 0 <= b[0] - a[1] < ALIGNMENT_BYTES]
        for joined in product((False, True), repeat=len(joints)):
            glue = {at for at, yes in zip(joints, joined, strict=True) if yes}
            ranges: list[tuple[int, int]] = []
            for at, piece in enumerate(order):
                if at - 1 in glue and ranges:
                    ranges[-1] = (ranges[-1][0], piece[1])
                else:
                    ranges.append(piece)
            key = tuple(ranges)
            if key not in seen:
                seen.add(key)
                yield key
