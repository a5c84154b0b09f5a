"""From decisions to a plan: which bytes are needed when, where to cut them, and which link takes each piece.

The search varies a Draft; `plan_of` turns one into a Plan. Nothing here is searched or predicted.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sim.host import Host
from sim.network import ALIGNMENT_BYTES, Network
from sim.plan import Access, Chunk, Launch, Plan

ReadKey = tuple[int, int]
"""A layer and the position of one of its reads."""
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Draft:
    """`direct` reads happen in place from host memory; storages in `peer` stay on a partner and are read there.

    `paths` are the routes chunks may take; `chunk_bytes` is the size aimed at. With `ramp` the first chunks are small
    and double, so that the first layers start early; with `taper` the last are small, so that little is left to do
    when the last one lands. `cuts`, where given, are the ranges themselves.
    """

    launch: Launch
    direct: frozenset[ReadKey]
    peer: frozenset[int]
    paths: tuple[tuple[int, ...], ...]
    chunk_bytes: int
    ramp: bool = True
    taper: bool = True
    cuts: tuple[Range, ...] | None = None
    head: int = 0
    """Chunks issued before the graph is launched."""


SMALLEST_CHUNK_BYTES = 64 * 1024
"""Below this a copy costs more latency than it moves bytes on every PCIe generation measured."""


def plan_of(draft: Draft, network: Network, host: Host, name: str = "best") -> Plan:
    """A plan; it may still be refused where a path has no route or a peer read no holder."""
    target = draft.paths[0][-1]
    access = tuple(
        tuple(
            Access.DIRECT
            if (i, j) in draft.direct
            else Access.PEER
            if r.storage in draft.peer
            else Access.COPIED
            for j, r in enumerate(layer.reads)
        )
        for i, layer in enumerate(network.layers)
    )
    stay = tuple((a, b) for _, a, b in sorted(needed(draft, network, peer=True)))
    first = {a: layer for peer in (False, True) for layer, a, _ in needed(draft, network, peer=peer)}
    chunks = deal(_by_need(ranges_of(draft, network), stay, first), draft.paths, host)
    dealt = tuple(chunks)
    head = min(draft.head, len(dealt)) if draft.launch is Launch.GRAPH else 0
    return Plan(name, target, draft.launch, access, dealt, head=head)


def _by_need(
    copied: tuple[Range, ...], stay: tuple[Range, ...], first: dict[int, int]
) -> list[tuple[Range, bool]]:
    """Ranges to the target and ranges that stay on the partner (True), in the order in which layers need them."""
    if not stay:
        return [(r, False) for r in copied]
    starts = sorted(first)

    def layer(piece: Range) -> int:
        return first[starts[max(0, bisect_right(starts, piece[0]) - 1)]]

    marked = [(layer(r), at, r, False) for at, r in enumerate(copied)]
    marked += [(layer(r), at, r, True) for at, r in enumerate(stay)]
    marked.sort(key=lambda row: (row[0], row[3], row[1]))
    return [(r, at_peer) for _, _, r, at_peer in marked]


def needed(draft: Draft, network: Network, *, peer: bool = False) -> Iterator[tuple[int, int, int]]:
    """(first layer that waits for it, start, stop) of each storage that must be copied to the target, or to a partner."""
    first: dict[int, int] = {}
    for i, layer in enumerate(network.layers):
        for j, read in enumerate(layer.reads):
            if (i, j) not in draft.direct and (read.storage in draft.peer) is peer:
                first.setdefault(read.storage, i)
    for storage, layer_index in first.items():
        start = network.offsets[storage]
        size = network.storages[storage].size_bytes
        if size:
            yield layer_index, start, start + size


def ranges_of(draft: Draft, network: Network) -> tuple[Range, ...]:
    """Byte ranges to copy to the target, in the order in which layers need them."""
    if draft.cuts is not None:
        return draft.cuts
    runs = _contiguous(sorted(needed(draft, network)), _taken(draft, network))
    total = sum(stop - start for run in runs for start, stop in run)
    cut: list[Range] = []
    done = 0
    lanes = len(draft.paths)
    for run in runs:
        begin: int | None = None
        for start, stop in run:
            begin = start if begin is None else begin
            while True:
                aim = _aim(draft, done, total, lanes)
                if stop - begin < aim:
                    break
                end = stop if stop - begin < 1.5 * aim else _aligned(begin + aim)
                end = min(end, stop)
                cut.append((begin, end))
                done += end - begin
                begin = end
                if begin >= stop:
                    break
            if begin >= stop:
                begin = None
        if begin is not None:
            cut.append((begin, run[-1][1]))
            done += run[-1][1] - begin
    return tuple(cut)


def _aim(draft: Draft, done: int, total: int, lanes: int) -> int:
    aim = draft.chunk_bytes
    floor = min(aim, max(SMALLEST_CHUNK_BYTES, aim // 16))
    if draft.ramp:
        aim = min(aim, max(floor, done // lanes))
    if draft.taper:
        aim = min(aim, max(floor, (total - done) // (2 * lanes)))
    return aim


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _taken(draft: Draft, network: Network) -> list[Range]:
    """Arena ranges that no chunk to the target may carry along: storages that stay on a partner."""
    return sorted((a, b) for _, a, b in needed(draft, network, peer=True))


def _contiguous(wanted: list[tuple[int, int, int]], taken: list[Range]) -> list[list[Range]]:
    """Storages grouped into runs that one copy may cross: in need order, with no more than small holes between."""
    runs: list[list[Range]] = []
    owned = sorted([(a, b) for _, a, b in wanted] + taken)
    following = {a: n for (a, _), (n, _) in itertools.pairwise(owned)}
    previous: Range | None = None
    for _, start, stop in wanted:
        joins = (
            previous is not None
            and 0 <= start - previous[1] <= HOLE_BYTES
            and following.get(previous[0]) == start
        )
        if joins:
            runs[-1].append((start, stop))
        else:
            runs.append([(start, stop)])
        previous = (start, stop)
    return runs


HOLE_BYTES = 32 * 1024
"""Bytes worth carrying along rather than starting another copy: about one copy's latency at PCIe rates."""


def deal(ranges: list[tuple[Range, bool]], paths: tuple[tuple[int, ...], ...], host: Host) -> Iterator[Chunk]:
    """Give each range, in order, to the path on which it would land first; those marked True stay on the first partner."""
    costs = host.costs
    rates = _path_rates(paths, host)
    lane_free = dict.fromkeys((path[0] for path in paths), 0.0)
    hop_free = [0.0] * len(paths)
    for (start, stop), stays in ranges:
        size = stop - start
        landings: list[tuple[float, int, float]] = []
        for at, path in enumerate(paths):
            lane = lane_free[path[0]] + costs.copy_latency_ns.value + size / rates[at]
            landed = lane
            for source, destination in pairwise(path):
                hop = host.rate(host.peer_route(source, destination)) * 1e-9
                landed = (
                    max(landed, hop_free[at]) + costs.wait_ns.value + costs.peer_latency_ns.value + size / hop
                )
            landings.append((landed, at, lane))
        landed, best, lane = landings[1] if stays else min(landings)
        path = paths[best]
        lane_free[path[0]] = lane
        if stays:
            path = path[:1]
        else:
            hop_free[best] = landed
        yield Chunk(start, stop, path)


def _path_rates(paths: tuple[tuple[int, ...], ...], host: Host) -> list[float]:
    """Bytes per ns of each path's first hop with all of them busy: a shared link is split evenly."""
    sharers: dict[str, int] = {}
    for path in paths:
        for link in host.h2d_route(path[0]):
            sharers[link] = sharers.get(link, 0) + 1
    return [
        min(host.bandwidth[link] / sharers[link] for link in host.h2d_route(path[0])) * 1e-9 for path in paths
    ]
