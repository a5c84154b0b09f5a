"""From decisions to a plan: which bytes are needed when, where to cut them, which paths to use and which piece takes which.

The search varies a Draft; `plan_of` turns one into a Plan. Nothing here is searched or predicted.
"""

from __future__ import annotations

import itertools
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from sim.host import Host
from sim.memory import PADDING_BYTES, PartnerRoom, packed_bytes, room_bytes
from sim.network import ALIGNMENT_BYTES, Network
from sim.plan import Access, Chunk, Launch, Plan
from sim.program import calls_of

ReadKey = tuple[int, int]
"""A layer and the position of one of its reads."""
Range = tuple[int, int]
Path = tuple[int, ...]
"""GPUs whose links a chunk crosses, first to last, as in Chunk.path."""
EVERY = sys.maxsize
"""As Draft.head: all chunks."""


@dataclass(frozen=True, slots=True)
class Draft:
    """`direct` reads happen in place from host memory; storages in `peer` stay on a partner and are read there, those in `kept`
    on the target between starts.

    `paths` are those chunks may take. Layers wait for `groups` groups of neighbours that are copied, and for one more at each
    gap between them; each group is split among the paths, into parts of at most `part_bytes`. `cuts` are the ranges that come
    of it (sim/cutting.py), in the order in which they are needed.
    """

    launch: Launch
    direct: frozenset[ReadKey]
    peer: frozenset[int]
    paths: tuple[Path, ...]
    groups: int = 1
    part_bytes: int | None = None
    head: int = 0
    """Chunks issued before the graph is launched; all, where there are no more."""
    opening: int = 0
    """First layers launched as a graph of their own, where all chunks are issued ahead of the graph."""
    cuts: tuple[Range, ...] | None = None
    """None: not cut yet."""
    kept: frozenset[int] = frozenset()


SMALLEST_CHUNK_BYTES = 64 * 1024
"""Below this a copy costs more latency than it moves bytes on every PCIe generation measured."""


def plan_of(draft: Draft, network: Network, host: Host, name: str = "best") -> Plan:
    """The plan of a draft that has its cuts; it may still be refused where a path has no route or a peer read no holder."""
    assert draft.cuts is not None
    target = draft.paths[0][-1]
    access = tuple(
        tuple(
            Access.RESIDENT
            if r.storage in draft.kept
            else Access.DIRECT
            if (i, j) in draft.direct
            else Access.PEER
            if r.storage in draft.peer
            else Access.COPIED
            for j, r in enumerate(layer.reads)
        )
        for i, layer in enumerate(network.layers)
    )
    pieces = _by_need(draft.cuts, draft, network)
    eager = draft.launch is Launch.EAGER
    chunks = tuple(deal(pieces, draft.paths, host, EVERY if eager else draft.head))
    head = 0 if eager else min(draft.head, len(chunks))
    able = not eager and head == len(chunks)
    opening = min(draft.opening, len(network.layers) - 1) if able else 0
    return Plan(name, target, draft.launch, access, chunks, head=head, opening=opening)


def _by_need(copied: tuple[Range, ...], draft: Draft, network: Network) -> list[tuple[Range, bool]]:
    """Ranges to the target and ranges that stay on a partner (True), in the order in which layers need them."""
    if not draft.peer:
        return [(r, False) for r in copied]
    stay = [(a, b) for _, a, b in sorted(needed(draft, network, peer=True))]
    first = {a: layer for peer in (False, True) for layer, a, _ in needed(draft, network, peer=peer)}
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
            if read.storage in draft.kept:
                continue
            if (i, j) not in draft.direct and (read.storage in draft.peer) is peer:
                first.setdefault(read.storage, i)
    for storage, layer_index in first.items():
        start = network.offsets[storage]
        size = network.storages[storage].size_bytes
        if size:
            yield layer_index, start, start + size


def runs_of(draft: Draft, network: Network) -> list[list[tuple[int, int, int]]]:
    """What is copied to the target, as `needed` has it, in need order; a chunk may join neighbours of one run, not of two."""
    return _contiguous(sorted(needed(draft, network)), _taken(draft, network))


def held_bytes(draft: Draft, network: Network) -> int:
    """What the draft takes of the target's memory for weights, wherever they are cut."""
    brought = ((run[0][1], run[-1][2]) for run in runs_of(draft, network))
    return packed_bytes(chain(brought, network.ranges(draft.kept)))


def aligned(at: int) -> int:
    """The next place where a storage could start."""
    return -(-at // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def evenly(piece: Range, count: int) -> Iterator[Range]:
    """A range in so many parts, cut where storages could start; fewer where it is too small for that."""
    start, stop = piece
    marks = [start, *(aligned(start + (stop - start) * at // count) for at in range(1, count)), stop]
    return ((a, b) for a, b in pairwise(marks) if a < b)


def _taken(draft: Draft, network: Network) -> list[Range]:
    """Arena ranges that no chunk to the target may carry along: storages that stay on a partner, or on the target."""
    staying = [(a, b) for _, a, b in needed(draft, network, peer=True)] if draft.peer else []
    return sorted([*staying, *network.ranges(draft.kept)])


def _contiguous(wanted: list[tuple[int, int, int]], taken: list[Range]) -> list[list[tuple[int, int, int]]]:
    """Storages grouped into runs that one copy may cross: in need order, with no more than small holes between."""
    runs: list[list[tuple[int, int, int]]] = []
    owned = sorted([(a, b) for _, a, b in wanted] + taken)
    following = {a: n for (a, _), (n, _) in itertools.pairwise(owned)}
    previous: Range | None = None
    for layer, start, stop in wanted:
        joins = (
            previous is not None
            and 0 <= start - previous[1] <= HOLE_BYTES
            and following.get(previous[0]) == start
        )
        if joins:
            runs[-1].append((layer, start, stop))
        else:
            runs.append([(layer, start, stop)])
        previous = (start, stop)
    return runs


HOLE_BYTES = 32 * 1024
"""Bytes worth carrying along rather than starting another copy: about one copy's latency at PCIe rates."""


def deal(
    pieces: Sequence[tuple[Range, bool]], paths: tuple[Path, ...], host: Host, head: int
) -> Iterator[Chunk]:
    """Give each range, in order, to the path on which it would land first; one marked True to a partner, to stay there.
    Partners take what they have room for; the rest goes straight.

    The first `head` can start when the host thread has issued them, one by one; the others when the graph's launch has come
    to them.
    """
    costs = host.costs
    rates = shares([host.h2d_route(path[0]) for path in paths], host)
    ways = list(zip(paths, rates, strict=True))
    beside = [(path[:-1], rate) for path, rate in ways if len(path) > 1]
    free: dict[Path, float] = {}
    thread = 0.0
    room = _room(pieces, paths, host)
    for index, ((start, stop), stays) in enumerate(pieces):
        if index == head:
            thread += costs.launch_first_ns.value
        if index < head:
            thread += costs.issue_copy_ns.value  # its first copy can start then
        open_ways = beside if stays else ways
        if room is not None:
            able = [way for way in open_ways if room.has(_partners(way[0], stays), stop - start, stays=stays)]
            open_ways = able or open_ways  # a plan that fits nowhere is refused where it is checked
        tried = [_landings(path, stop - start, rate, thread, free, host) for path, rate in open_ways]
        ends = min(tried, key=lambda landings: max(landings.values()))
        free |= ends
        path = tuple(stream[-1] for stream in ends)
        if room is not None:
            room.take(_partners(path, stays), stop - start, stays=stays)
        if index < head:
            copies, others = calls_of(path)
            thread += (copies - 1) * costs.issue_copy_ns.value + others * costs.issue_event_ns.value
        else:
            thread += len(path) * costs.launch_copy_ns.value
        yield Chunk(start, stop, path)


def _room(pieces: Sequence[tuple[Range, bool]], paths: tuple[Path, ...], host: Host) -> PartnerRoom | None:
    """None where any partner could take all."""
    ways = [path[:-1] for path in paths if len(path) > 1]
    most = sum(stop - start + PADDING_BYTES for (start, stop), _ in pieces)
    if all(most <= room_bytes(host, gpu) for way in ways for gpu in way):
        return None
    return PartnerRoom(host, ways, (stop - start for (start, stop), stays in pieces if stays))


def _partners(path: Path, stays: bool) -> Path:
    return path if stays else path[:-1]


def _landings(
    path: Path, size_bytes: int, bytes_per_s: float, thread: float, free: Mapping[Path, float], host: Host
) -> dict[Path, float]:
    """When a chunk would have landed on each GPU of a path, by the stream that brings it: (2,), then (2, 0)."""
    costs = host.costs
    start = max(thread, free.get(path[:1], 0.0))
    now = start + costs.copy_latency_ns.value + size_bytes / bytes_per_s * 1e9
    ends = {path[:1]: now}
    for hop in pairwise(path):
        now = max(now, free.get(hop, 0.0)) + costs.wait_ns.value + costs.peer_latency_ns.value
        now += size_bytes / host.rate(host.peer_route(*hop)) * 1e9
        ends[hop] = now
    return ends


def paths_of(host: Host, target: int, others: Sequence[int]) -> tuple[Path, ...]:
    """Paths worth taking, best first: straight, then each time the one that lets most bytes more leave host memory.

    Equal ones: fewer hops first, then the faster, then lower indices. GPUs that add nothing are left out, as are those
    without a route; where none adds anything, the best of them is named all the same.
    """
    chosen: list[Path] = [(target,)]
    unit = host.rate(host.h2d_route(target))
    left = dict.fromkeys(g for g in others if g != target)
    while left:
        now = _intake(chosen, host)
        rows = [
            (
                -round((_intake([*chosen, path], host) - now) / unit, 2),
                len(path),
                _ns_per_byte(path, host),
                path,
            )
            for gpu in left
            for path in onward(host, gpu, target, others)
        ]
        if not rows:
            break
        more, *_, best = min(rows)
        if more >= 0 and len(chosen) > 1:
            break
        chosen.append(best)
        del left[best[0]]
    return tuple(chosen)


def onward(host: Host, gpu: int, target: int, others: Sequence[int]) -> Iterator[Path]:
    """The path from a GPU's memory to the target's; where there is no wire between the two, paths over one of `others`."""
    if host.reaches(gpu, target):
        yield gpu, target
        return
    for via in others:
        if host.reaches(gpu, via) and host.reaches(via, target):
            yield gpu, via, target


def _intake(paths: Sequence[Path], host: Host) -> float:
    routes = []
    for path in paths:
        hops = [host.peer_route(*hop) for hop in pairwise(path)]
        routes.append((*host.h2d_route(path[0]), *(link for hop in hops for link in hop)))
    return sum(shares(routes, host))


def _ns_per_byte(path: Path, host: Host) -> float:
    return sum(1e9 / host.rate(host.peer_route(*hop)) for hop in pairwise(path))


def shares(routes: Sequence[tuple[str, ...]], host: Host) -> list[float]:
    """Bytes per second of each route with all of them busy."""
    return fair(routes, host.bandwidth)


def fair(routes: Sequence[tuple[str, ...]], bandwidth: Mapping[str, float]) -> list[float]:
    """What each route gets of links with these rates: the fullest link is split evenly first, then the next."""
    rates = [0.0] * len(routes)
    left = dict(bandwidth)
    still = set(range(len(routes)))
    while still:
        sharers = Counter(link for at in still for link in routes[at])
        level, full = min((left[link] / count, link) for link, count in sharers.items())
        for at in [at for at in still if full in routes[at]]:
            rates[at] = level
            still.remove(at)
            for link in routes[at]:
                left[link] = max(0.0, left[link] - level)
    return rates
