"""The bench that link cases run on: arenas with a known pattern, streams by name, and timing of flows side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from calibrate.samples import Point
from calibrate.topology import Topology
from hwexec.arena import HostArena
from hwexec.device import POISON, Device, Stream
from hwexec.timing import time_ns
from sim.errors import InputError

KIB, MIB, GIB = 2**10, 2**20, 2**30
PATTERN_PERIOD = 251
"""Prime, so that a copy shifted by any power of two is seen."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure. `largest_bytes` is also the size of the arenas."""

    repeats: int
    largest_bytes: int
    burst_bytes: int
    """Copies of one size go back to back until this many bytes are moved, or `burst_copies`."""
    burst_copies: int
    footprint_bytes: int
    chains: tuple[int, ...]
    """Lengths of the chains that waits and launches are found from."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """4 KiB to the largest by fours, and between them the sizes that plans cut chunks to."""
        found = {4 * KIB * 4**k for k in range(10)} | {2 * MIB, 8 * MIB, 32 * MIB}
        return tuple(sorted(size for size in found if size <= self.largest_bytes))

    def burst(self, size_bytes: int) -> int:
        return max(1, min(self.burst_copies, self.burst_bytes // size_bytes))


FULL = Effort(10, GIB, 256 * MIB, 64, 8 * GIB, (16, 64, 192))
QUICK = Effort(5, 256 * MIB, 64 * MIB, 32, 2 * GIB, (16, 64, 128))
NO_FIGURES = Effort(3, 4 * MIB, 4 * MIB, 4, 8 * MIB, (4, 8, 16))
"""For a device whose times mean nothing: every step, little of it."""


class Mismatch(InputError):
    """Bytes that were timed are not those that were sent: nothing of this host can be trusted until it is explained."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Work that moves `size_bytes` on one stream while others move theirs."""

    label: str
    stream: Stream
    enqueue: Callable[[], None]
    size_bytes: int


@dataclass(slots=True, eq=False)
class Bench:
    """A device laid out for measuring. Arenas are made when first asked for and filled with a pattern."""

    device: Device
    topology: Topology
    effort: Effort
    verified: bool | None = None
    _host: HostArena | None = None
    _arenas: dict[int, torch.Tensor] = field(default_factory=dict)
    _streams: dict[str, Stream] = field(default_factory=dict)

    @property
    def gpus(self) -> range:
        return range(self.topology.gpus)

    @property
    def host(self) -> HostArena:
        if self._host is None:
            self._host = HostArena(self.device, self.effort.largest_bytes, 0)
            pattern = torch.arange(PATTERN_PERIOD, dtype=torch.uint8)
            whole = self.effort.largest_bytes // PATTERN_PERIOD * PATTERN_PERIOD
            self._host.tensor[:whole].view(-1, PATTERN_PERIOD).copy_(pattern)
        return self._host

    def arena(self, gpu: int) -> torch.Tensor:
        if gpu not in self._arenas:
            self._arenas[gpu] = self.device.allocate(self.effort.largest_bytes, gpu)
        return self._arenas[gpu]

    def peer_view(self, source: int, destination: int) -> torch.Tensor:
        """`source`'s arena, filled with the pattern, as `destination` reads it. InputError where it cannot."""
        self.device.connect(source, destination)
        arena = self.arena(source)
        self.device.copy(self.stream(f"h2d:{source}", source), arena, self.host.tensor)
        self.device.synchronize()
        return self.device.view(arena, destination, arena)

    def stream(self, name: str, gpu: int) -> Stream:
        if name not in self._streams:
            self._streams[name] = self.device.stream(name, gpu)
        return self._streams[name]

    def poison(self, gpu: int) -> None:
        self.device.fill(self.stream(f"h2d:{gpu}", gpu), self.arena(gpu), POISON)
        self.device.synchronize()

    def verify(self, found: torch.Tensor, want: torch.Tensor, what: str) -> None:
        """Raise Mismatch where bytes that were timed are not those that were sent."""
        self.device.synchronize()
        if not torch.equal(found.cpu(), want.cpu()):
            raise Mismatch(
                f"{what}: the bytes that arrived differ from those sent, so none of its figures can be trusted; "
                "look for memory or link errors (nvidia-smi -q, dmesg)"
            )
        self.verified = True

    def timed(
        self,
        label: str,
        streams: Sequence[Stream],
        enqueue: Callable[[], None],
        *,
        size_bytes: int = 0,
        count: int = 1,
        edges: int = 0,
        gate: bool = True,
    ) -> Point:
        """hwexec's timing core over `enqueue`."""
        samples = time_ns(enqueue, self.device, streams, repeats=self.effort.repeats, gate=gate)
        return Point(label, size_bytes, count, samples.raw, edges)

    def captured(
        self,
        label: str,
        streams: Sequence[Stream],
        enqueue: Callable[[], None],
        *,
        size_bytes: int = 0,
        count: int = 1,
        edges: int = 0,
    ) -> Point:
        """The same as one captured graph. `enqueue` forks and joins the streams beside the first itself."""
        with self.device.capture(streams[0]) as graph:
            enqueue()
        try:
            return self.timed(
                label, streams[:1], graph.replay, size_bytes=size_bytes, count=count, edges=edges
            )
        finally:
            graph.close()

    def together(self, flows: Sequence[Flow]) -> tuple[Point, ...]:
        """Flows started at once; each flow's own time, events on its own stream.

        A flow's label is kept. Whoever ends first was never alone; the others' tails are their reader's business.
        """
        device = self.device
        events = [(device.event(timing=True), device.event(timing=True)) for _ in flows]
        samples: list[list[float]] = [[] for _ in flows]

        def enqueue() -> None:
            for flow, (start, stop) in zip(flows, events, strict=True):
                device.record(flow.stream, start)
                flow.enqueue()
                device.record(flow.stream, stop)

        streams = [flow.stream for flow in flows]
        for index in range(self.effort.repeats + 1):
            time_ns(enqueue, device, streams, repeats=1, warmup=0)
            if index:
                for found, (start, stop) in zip(samples, events, strict=True):
                    found.append(device.elapsed_ns(start, stop))
        return tuple(
            Point(flow.label, flow.size_bytes, 1, tuple(found))
            for flow, found in zip(flows, samples, strict=True)
        )

    def close(self) -> None:
        """Give everything back; a device that is lost cannot, and says so elsewhere."""
        self._arenas.clear()
        if self._host is not None:
            self._host.close()
            self._host = None
        for stream in self._streams.values():
            self.device.close_stream(stream)
        self._streams.clear()


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure. `waived` says why this host cannot show it, None where it can."""

    name: str
    about: str
    measure: Callable[[Bench], tuple[Point, ...]]
    waived: Callable[[Bench], str | None] = lambda bench: None
    seconds: float = 1.0
    """A first guess for the progress bar, on a host of two GPUs."""


def several_gpus(bench: Bench) -> str | None:
    return None if len(bench.gpus) > 1 else "one GPU: there is nothing beside it"


def peers(bench: Bench) -> tuple[tuple[int, int], ...]:
    """Ordered pairs that have peer access; asked of the device, since a topology only suggests it."""
    found = []
    for source in bench.gpus:
        for destination in bench.gpus:
            if source == destination:
                continue
            try:
                bench.device.connect(source, destination)
            except InputError:
                continue
            found.append((source, destination))
    return tuple(found)


def has_peers(bench: Bench) -> str | None:
    return several_gpus(bench) or (
        None if peers(bench) else "no GPU can read another's memory (no peer access)"
    )
