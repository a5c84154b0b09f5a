"""Moves of the search: one decision of a draft varied as a whole, or one step where its timeline stalls longest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from sim.draft import EVERY, Draft, Path, Range, ReadKey, aligned
from sim.network import Network
from sim.plan import Chunk, Launch, Plan
from sim.timeline import SpanKind, Timeline

PART_BYTES = (32 * 2**20, 16 * 2**20, 8 * 2**20, 4 * 2**20)
"""Sizes that groups are split to where a relay is to be under way while the next part leaves host memory."""

SHRINK_BY = (8, 32)
"""A piece that stalls gives up one in so many of its bytes: coarsely, then finely."""


def _heads(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    """So many chunks for each link, or all, ahead of the graph."""
    for each in (0, 1, 2, 3, 4, 8, 16, EVERY):
        yield replace(draft, launch=Launch.GRAPH, head=min(each * len(draft.paths), EVERY))


OPENINGS = (0, 8, 24, 48)
"""First layers tried as a graph of their own."""


def _openings(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    """With all chunks ahead of the graph, so many layers launched before the others; with the launch out of the way, more waits
    may pay."""
    for layers in OPENINGS:
        yield replace(draft, launch=Launch.GRAPH, head=EVERY, opening=layers)
    yield replace(
        draft, launch=Launch.GRAPH, head=EVERY, opening=24, groups=draft.groups * 3 // 2 + 1, cuts=None
    )


def _groups(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    """More waits or fewer."""
    now = draft.groups
    for groups in sorted({now - 2, now - 1, now + 1, now + 2, now * 3 // 4, now * 3 // 2} - {now}):
        if groups > 0:
            yield replace(draft, groups=groups)


def _parts(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    """How much of a group goes at once; over one link it is all the same."""
    for part_bytes in (None, *PART_BYTES) if len(draft.paths) > 1 else ():
        yield replace(draft, part_bytes=part_bytes)


def _links(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    """One link fewer, or one more; what stays on a partner needs one."""
    for count in (len(draft.paths) - 1, len(draft.paths) + 1):
        if (2 if draft.peer else 1) <= count <= len(paths):
            parts = draft.part_bytes if count > 1 else None
            yield replace(draft, paths=tuple(paths[:count]), part_bytes=parts)


def _launches(draft: Draft, paths: Sequence[Path]) -> Iterator[Draft]:
    for launch in Launch:
        yield replace(draft, launch=launch)


VARIATIONS: tuple[Callable[[Draft, Sequence[Path]], Iterator[Draft]], ...] = (
    _heads,
    _openings,
    _groups,
    _parts,
    _links,
    _launches,
)
"""Each makes the drafts that differ from one in one decision; the paths are those worth taking, best first."""


def neighbours(
    draft: Draft, plan: Plan, timeline: Timeline, network: Network, reads: Sequence[ReadKey]
) -> Iterator[Draft]:
    """Drafts one move from `draft`, which has its cuts, those that treat its longest stalls first. `reads` are in order of cost
    in place."""
    stalls = [s for s in timeline.of(SpanKind.STALL) if s.chunk >= 0 and s.stream.startswith("comp")]
    stalls.sort(key=lambda s: (-s.duration_ns, s.start_ns))
    ranges = draft.cuts or ()
    for stall in stalls[:6]:
        chunk = plan.chunks[stall.chunk]
        yield from _in_place_instead(draft, chunk, network, reads)
        if (chunk.start_bytes, chunk.stop_bytes) in ranges:
            yield from _split(draft, ranges, (chunk.start_bytes, chunk.stop_bytes), network)
            yield from _shrink(draft, ranges, (chunk.start_bytes, chunk.stop_bytes))
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


def _shrink(draft: Draft, ranges: tuple[Range, ...], piece: Range) -> Iterator[Draft]:
    """Let the piece before it, or the one behind it, have a part of its bytes."""
    at = ranges.index(piece)
    start, stop = piece
    for one_in in SHRINK_BY:
        less = aligned((stop - start) // one_in)
        if less == 0 or start + less >= stop:
            continue
        if at > 0 and ranges[at - 1][1] == start:
            moved = ((ranges[at - 1][0], start + less), (start + less, stop))
            yield replace(draft, cuts=(*ranges[: at - 1], *moved, *ranges[at + 1 :]))
        if at + 1 < len(ranges) and ranges[at + 1][0] == stop:
            moved = ((start, stop - less), (stop - less, ranges[at + 1][1]))
            yield replace(draft, cuts=(*ranges[:at], *moved, *ranges[at + 2 :]))


def _merge(draft: Draft, ranges: tuple[Range, ...]) -> Iterator[Draft]:
    pairs = [(b - start, at) for at, ((start, stop), (a, b)) in enumerate(pairwise(ranges)) if a == stop]
    for _, at in sorted(pairs)[:6]:
        joined = (ranges[at][0], ranges[at + 1][1])
        yield replace(draft, cuts=(*ranges[:at], joined, *ranges[at + 2 :]))
