"""GPU memory as the executor takes it: how arena bytes are packed into a GPU's buffer, and what a GPU has room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sim.host import Host
from sim.network import ALIGNMENT_BYTES, Network

HEADROOM_BYTES = 256 * 2**20
"""Left free on a GPU beside its arena, for library workspaces and graphs; on the target activations come on top."""
PADDING_BYTES = 2 * ALIGNMENT_BYTES
"""More than packing adds to a range."""


def pack(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, where in the buffer) of arena ranges, sorted: neighbours stay neighbours, each byte keeps its alignment.

    The buffer ends with the last of them.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    at = 0
    for start, stop in merged:
        at = -(-at // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + start % ALIGNMENT_BYTES
        yield start, stop, at
        at += stop - start


def packed_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """The buffer's size."""
    return max((at + stop - start for start, stop, at in pack(ranges)), default=0)


def gaps(ranges: Iterable[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """What sorted ranges leave of [start, stop)."""
    for low, high in ranges:
        if start < min(low, stop):
            yield start, min(low, stop)
        start = max(start, high)
    if start < stop:
        yield start, stop


def activation_bytes(network: Network) -> int:
    """What running takes on the target beside weights and headroom: the largest layer's activations, twice."""
    return 2 * max(layer.activation_bytes for layer in network.layers)


def beside_bytes(runs: Network | None) -> int:
    """What a GPU keeps free beside weights: headroom and, where a network `runs` on it, its activations."""
    return HEADROOM_BYTES + (0 if runs is None else activation_bytes(runs))


def room_bytes(host: Host, gpu: int, runs: Network | None = None) -> int:
    """What a GPU can hold of weights, its own and those that cross it; with `runs`, where that network runs on it."""
    return max(0, host.gpu(gpu).memory_bytes - beside_bytes(runs))


Way = tuple[int, ...]
"""Partners that a path crosses, first to last."""


def apart(ways: Iterable[Way]) -> tuple[list[Way], int]:
    """Ways of which no two share a GPU, short ones first, and how many of those one way crosses at most."""
    found: list[Way] = []
    by_length = sorted(set(ways), key=lambda way: (len(way), way))
    for way in by_length:
        if all(set(way).isdisjoint(other) for other in found):
            found.append(way)
    crossed = (sum(not set(way).isdisjoint(other) for other in found) for way in by_length)
    return found, max(crossed, default=1)


class PartnerRoom:
    """What is left on partners while pieces of an arena are dealt to paths; what crosses a partner lies there to the end.

    Enough is kept back for the pieces that are still to come and stay: wherever they go, each will find a partner.
    """

    def __init__(self, host: Host, ways: Iterable[Way], staying: Iterable[int]) -> None:
        ways = list(ways)
        self.left = {gpu: room_bytes(host, gpu) for way in ways for gpu in way}
        self.apart, self.crossed = apart(ways)
        """A piece takes its size of so many ways at most, whichever it goes; a way has what its fullest GPU has."""
        self.sizes = [size + PADDING_BYTES for size in staying]
        self.kept = sum(self.sizes) * self.crossed
        self.scattered = (len(self.apart) - 1) * max(self.sizes, default=0)
        """Where a piece fits nowhere, each of n ways has less than its size left: n - 1 sizes are lost at most."""

    def has(self, partners: Way, size_bytes: int, *, stays: bool) -> bool:
        size = size_bytes + PADDING_BYTES
        if any(self.left[gpu] < size for gpu in partners):
            return False
        if stays or not self.kept or not partners:
            return True
        left = {**self.left, **{gpu: self.left[gpu] - size for gpu in partners}}
        return sum(min(left[gpu] for gpu in way) for way in self.apart) >= self.kept + self.scattered

    def take(self, partners: Way, size_bytes: int, *, stays: bool) -> None:
        for gpu in partners:
            self.left[gpu] -= size_bytes + PADDING_BYTES
        if stays:
            self.kept -= (size_bytes + PADDING_BYTES) * self.crossed
