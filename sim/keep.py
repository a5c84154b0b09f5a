"""Which weights to keep on a GPU between starts, so that the next one is sooner. Knows no search.

Those that layers need first: they hold all layers up, where the wires are slower than the layers any byte less is as good, and
what is still copied stays neighbours. What a plan reads in place takes little of the wires, so it comes last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from sim.memory import gaps, packed_bytes
from sim.network import Network
from sim.plan import Access, Plan

Kept = frozenset[int]
"""Storages that stay on the target."""
CLOSE = 0.01
"""Of all weights, how near the fewest that will do are looked for."""


def order(plan: Plan, network: Network) -> list[int]:
    """Storages as they are worth keeping, by a plan that keeps none: those that it copies in need order, then the others."""
    copied: dict[int, None] = {}
    others: dict[int, None] = {}
    for layer, accesses in zip(network.layers, plan.access, strict=True):
        for read, access in zip(layer.reads, accesses, strict=True):
            if network.storages[read.storage].size_bytes:
                (copied if access is Access.COPIED else others).setdefault(read.storage)
    return [*copied, *(storage for storage in others if storage not in copied)]


def prefixes(storages: Sequence[int], network: Network, most_bytes: float) -> list[Kept]:
    """The first of `storages`, none to all, as long as they take no more than `most_bytes`, packed."""

    def taken(count: int) -> int:
        return packed_bytes(network.ranges(storages[:count]))

    count = bisect_right(range(len(storages) + 1), most_bytes, key=taken)
    return [frozenset(storages[:n]) for n in range(count)]


def fewest(choices: Sequence[Kept], network: Network, enough: Callable[[Kept], bool]) -> Kept | None:
    """The smallest of `choices`, each with the one before it, that is enough, to within `CLOSE` where more is never worse; None
    where the largest is not."""

    def size(at: int) -> int:
        return sum(stop - start for start, stop in network.ranges(choices[at]))

    low, high = 0, len(choices) - 1
    if enough(choices[low]):
        return choices[low]
    if not enough(choices[high]):
        return None
    while high - low > 1 and size(high) - size(low) > CLOSE * network.arena_bytes:
        middle = (low + high) // 2
        if enough(choices[middle]):
            high = middle
        else:
            low = middle
    return choices[high]


def keeping(plan: Plan, storages: Iterable[int], network: Network) -> Plan:
    """The plan with these staying on the target: its chunks bring what else it needs, cut where that begins and ends."""
    kept = frozenset(storages)

    def how(storage: int, before: Access) -> Access:
        if storage in kept:
            return Access.RESIDENT
        nowhere = before is Access.PEER and not network.storages[storage].size_bytes
        return Access.DIRECT if nowhere else before

    access = tuple(
        tuple(how(read.storage, before) for read, before in zip(layer.reads, row, strict=True))
        for layer, row in zip(network.layers, plan.access, strict=True)
    )
    needed = list(
        network.ranges(at for at, readers in enumerate(network.readers) if readers and at not in kept)
    )
    slots = [slot for at, slot in enumerate(pairwise(network.offsets)) if at in kept]
    pieces = [
        [
            replace(chunk, start_bytes=start, stop_bytes=stop)
            for start, stop in gaps(slots, chunk.start_bytes, chunk.stop_bytes)
            if any(low < stop and start < high for low, high in needed)
        ]
        for chunk in plan.chunks
    ]
    chunks = tuple(piece for found in pieces for piece in found)
    return replace(plan, access=access, chunks=chunks, head=sum(map(len, pieces[: plan.head])))
