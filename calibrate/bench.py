"""The bench that cases run on: arenas with a known pattern, streams by name, and timing of work alone and beside copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch

from calibrate.samples import Point
from calibrate.topology import Topology
from hwexec.arena import HostArena
from hwexec.device import POISON, Device, Ready, Stream
from hwexec.executor import ColdStart
from hwexec.preparing import prepare
from hwexec.timing import Mismatch, time_ns
from sim.errors import InputError, require
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.plan import Plan

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
    """Lengths of the chains that waits and first launches are found from."""
    kernels: tuple[int, ...]
    """In the graphs that launches are found from."""
    copies: tuple[int, ...]
    """The same."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """4 KiB to the largest by fours, and between them the sizes that plans cut chunks to."""
        found = {4 * KIB * 4**k for k in range(10)} | {2 * MIB, 8 * MIB, 32 * MIB}
        return tuple(sorted(size for size in found if size <= self.largest_bytes))

    def burst(self, size_bytes: int) -> int:
        return max(1, min(self.burst_copies, self.burst_bytes // size_bytes))


FULL = Effort(10, GIB, 256 * MIB, 64, 8 * GIB, (16, 64, 192), (1, 50, 200, 400), (1, 8, 24, 48))
QUICK = Effort(5, 256 * MIB, 64 * MIB, 32, 2 * GIB, (16, 64, 128), (1, 50, 200, 400), (1, 8, 24, 48))
NO_FIGURES = Effort(3, 4 * MIB, 4 * MIB, 4, 8 * MIB, (4, 8, 16), (1, 4, 8, 12), (1, 2, 3, 4))
"""For a device whose times mean nothing: every step, little of it."""


UNTRUSTED = (
    "the answer of a cold start is not that of a resident run, so none of this host's figures can be trusted; look for "
    "memory or link errors (nvidia-smi -q, dmesg)"
)
BESIDE_BYTES = 8 * MIB
"""Of each copy that something is measured beside."""
MOST_BESIDE = 512
"""Such copies at once: many more than a stream holds, and the host would wait for them."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Work that moves `size_bytes` on one stream while others move theirs."""

    label: str
    stream: Stream
    enqueue: Callable[[], None]
    size_bytes: int


@dataclass(slots=True, eq=False)
class Lane:
    """Copies of host memory to one GPU, back to back, that work on another stream of that GPU is measured beside."""

    device: Device
    stream: Stream
    copy: Ready
    copies: int = 8
    """How many; twice as many each time that the work outlasts them."""
    ahead: Ready | None = None
    """What the stream does before the first of them."""

    def sample(self, stream: Stream, enqueue: Callable[[], object], *, busy: bool = True) -> float:
        """Nanoseconds of `enqueue` on `stream`, from when the first copy is done, while others are under way.

        Not `busy`: the same without copies. Raises InputError where it takes longer than all that can be enqueued.
        """
        device = self.device
        start, stop, ended = (device.event(timing=True) for _ in range(3))
        begun = device.event()

        def work() -> None:
            if busy:
                if self.ahead is not None:
                    self.ahead()
                self.copy()
                device.record(self.stream, begun)
                for _ in range(self.copies):
                    self.copy()
                device.record(self.stream, ended)
                device.wait(stream, begun)
            device.record(stream, start)
            enqueue()
            device.record(stream, stop)

        while True:
            time_ns(work, device, [stream, self.stream], repeats=1, warmup=0)
            took = device.elapsed_ns(start, stop)
            if not busy or not device.figures or device.elapsed_ns(start, ended) > took:
                return took
            require(
                self.copies < MOST_BESIDE,
                f"{took * 1e-6:.0f} ms is longer than {MOST_BESIDE} copies to the same GPU: nothing to measure it beside",
            )
            self.copies = min(2 * self.copies, MOST_BESIDE)


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
        arena = self.filled(source)
        return self.device.view(arena, destination, arena)

    def pushed_view(self, source: int, destination: int) -> torch.Tensor:
        """`destination`'s arena as `source` writes to it. InputError where it cannot."""
        self.device.connect(source, destination)
        arena = self.arena(destination)
        return self.device.view(arena, source, arena)

    def filled(self, gpu: int) -> torch.Tensor:
        """A GPU's arena, with the pattern in it."""
        self.device.copy(self.stream(f"h2d:{gpu}", gpu), self.arena(gpu), self.host.tensor)
        self.device.synchronize()
        return self.arena(gpu)

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

    def lane(self, gpu: int) -> Lane:
        """Copies over a GPU's own lane into the second half of its arena, whose bytes stay the pattern's."""
        half = self.effort.largest_bytes // 2
        size = min(BESIDE_BYTES, half)
        stream = self.stream(f"h2d:{gpu}", gpu)
        to, source = self.arena(gpu)[half : half + size], self.host.tensor[half : half + size]
        return Lane(self.device, stream, self.device.ready_copy(stream, to, source))

    def beside(
        self,
        label: str,
        stream: Stream,
        enqueue: Callable[[], None],
        lane: Lane,
        *,
        size_bytes: int = 0,
        count: int = 1,
        edges: int = 0,
    ) -> Point:
        """The own time of `enqueue` while `lane` brings host memory to the same GPU all along."""
        found = [lane.sample(stream, enqueue) for _ in range(self.effort.repeats + 1)]
        return Point(label, size_bytes, count, tuple(found[1:]), edges)

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


K = TypeVar("K")


def in_turn(
    built: Built,
    network: Network,
    host: Host,
    device: Device,
    plans: Mapping[K, Plan],
    rounds: int,
    measure: Callable[[ColdStart, tuple[torch.Tensor, ...]], Sequence[float]],
) -> dict[K, tuple[float, ...]]:
    """Samples of each plan, prepared anew in each round, one plan after the other: a host's pace drifts, and a module can be
    prepared for one plan at a time."""
    given = built.inputs_on(device.torch_device(0))
    taken: dict[K, list[float]] = {key: [] for key in plans}
    for _ in range(rounds):
        for key, plan in plans.items():
            with prepare(built.module, plan, given, network=network, host=host, device=device) as cold:
                taken[key] += measure(cold, given)
    return {key: tuple(samples) for key, samples in taken.items()}


def never(bench: Bench) -> str | None:
    """Any host can show it."""
    return None


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure. `waived` says why this host cannot show it, None where it can."""

    name: str
    about: str
    measure: Callable[[Bench], tuple[Point, ...]]
    waived: Callable[[Bench], str | None] = never
    seconds: float = 1.0
    """A first guess for the progress bar, on a host of two GPUs."""
    second_look: Literal["", "faster", "steadier"] = ""
    """Measured once more when all others are, if anything, and which look is kept then. Links that others use have slow moments,
    and one of them would slow every prediction; a host has paces that last for minutes, and of one look the spread is too small.
    """


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


def pusher(bench: Bench) -> int | None:
    """A GPU that can push to GPU 0; None where there is none."""
    return next((source for source, destination in peers(bench) if destination == 0), None)


def has_peers(bench: Bench) -> str | None:
    return several_gpus(bench) or (
        None if peers(bench) else "no GPU can read another's memory (no peer access)"
    )
