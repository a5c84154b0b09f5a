"""Local moves of the search: drafts one step from a draft, those first that treat where its timeline stalls longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from sim.draft import Draft, Range, ReadKey, ranges_of
from sim.network import Network
from sim.plan import Chunk, Plan
from sim.timeline import SpanKind, Timeline


def neighbours(
    draft: Draft, plan: Plan, timeline: Timeline, network: Network, reads: Sequence[ReadKey]
) -> Iterator[Draft]:
    """Drafts one move from `draft`, those that treat its longest stalls first. `reads` are in order of cost in place."""
    stalls = [s for s in timeline.of(SpanKind.STALL) if s.chunk >= 0 and s.stream.startswith("comp")]
    stalls.sort(key=lambda s: (-s.duration_ns, s.start_ns))
    ranges = ranges_of(draft, network)
    for stall in stalls[:6]:
        chunk = plan.chunks[stall.chunk]
        yield from _in_place_instead(draft, chunk, network, reads)
        if (chunk.start_bytes, chunk.stop_bytes) in ranges:
            yield from _split(draft, ranges, (chunk.start_bytes, chunk.stop_bytes), network)
    for key in reversed([k for k in reads if k in draft.direct][-8:]):
        yield replace(draft, direct=draft.direct - {key}, cuts=None)
    yield from _merge(draft, ranges)


def _in_place_instead(
    draft: Draft, chunk: Chunk, network: Network, reads: Sequence[ReadKey]
) -> Iterator[Draft]:
    """Read in place what a stalling chunk carries, cheapest read first."""
    carried = {
        s
        for s, storage in enumerate(network.storages)
        if network.offsets[s] < chunk.stop_bytes
        and network.offsets[s] + storage.size_bytes > chunk.start_bytes
    }
    found = [
        (i, j)
        for i, j in reads
        if (i, j) not in draft.direct and network.layers[i].reads[j].storage in carried
    ]
    for key in found[:3]:
        yield replace(draft, direct=draft.direct | {key}, cuts=None)


def _split(draft: Draft, ranges: tuple[Range, ...], piece: Range, network: Network) -> Iterator[Draft]:
    at = ranges.index(piece)
    start, stop = piece
    inside = [o for o in network.offsets if start < o < stop]
    middle = min(inside, key=lambda o: (abs(2 * o - start - stop), o), default=0)
    if middle:
        yield replace(draft, cuts=(*ranges[:at], (start, middle), (middle, stop), *ranges[at + 1 :]))


def _merge(draft: Draft, ranges: tuple[Range, ...]) -> Iterator[Draft]:
    pairs = [(b - start, at) for at, ((start, stop), (a, b)) in enumerate(pairwise(ranges)) if a == stop]
    for _, at in sorted(pairs)[:6]:
        joined = (ranges[at][0], ranges[at + 1][1])
        yield replace(draft, cuts=(*ranges[:at], joined, *ranges[at + 2 :]))
