"""Which weights to keep on a GPU between starts, so that the next one is sooner. Knows no search.

Those that layers need first: they hold all layers up, where the wires are slower than the layers any byte less is as good, and
what is still copied stays neighbours. What a plan reads in place takes little of the wires, so it comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from sim.memory import PADDING_BYTES
from sim.network import Network
from sim.plan import Access, Plan

T = TypeVar("T")
CLOSE = 0.01
"""Of all weights, how near the least that will do is looked for."""


def order(plan: Plan, network: Network) -> list[int]:
    """Storages as they are worth keeping, by a plan that keeps none: those that it copies in need order, then the others."""
    copied: dict[int, None] = {}
    others: dict[int, None] = {}
    for layer, accesses in zip(network.layers, plan.access, strict=True):
        for read, access in zip(layer.reads, accesses, strict=True):
            if network.storages[read.storage].size_bytes:
                (copied if access is Access.COPIED else others).setdefault(read.storage)
    return [*copied, *(storage for storage in others if storage not in copied)]


def prefixes(storages: Sequence[int], network: Network, most_bytes: float) -> list[frozenset[int]]:
    """The first of `storages`, none to all, as many as take no more than `most_bytes` however they are packed."""
    sizes = [network.storages[at].size_bytes for at in storages]
    taken = accumulate(size + PADDING_BYTES for size in sizes)
    count = sum(so_far - PADDING_BYTES <= most_bytes for so_far in taken)
    return [frozenset(storages[:n]) for n in range(count + 1)]


def least(
    choices: Sequence[frozenset[int]],
    network: Network,
    tried: Callable[[frozenset[int]], T],
    enough: Callable[[T], bool],
) -> T:
    """What came of trying the smallest of `choices`, each with the one before it, that is enough, to within `CLOSE`; of the
    largest, where none is."""

    def size(at: int) -> int:
        return sum(stop - start for start, stop in network.ranges(choices[at]))

    low, high = 0, len(choices) - 1
    found = tried(choices[low])
    if low == high or enough(found):
        return found
    found = tried(choices[high])
    if not enough(found):
        return found
    while high - low > 1 and size(high) - size(low) > CLOSE * network.arena_bytes:
        middle = (low + high) // 2
        other = tried(choices[middle])
        if enough(other):
            high, found = middle, other
        else:
            low = middle
    return found
