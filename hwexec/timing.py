"""The one timing core: nvbandwidth's protocol for work on streams, a synchronised clock for whole calls. Samples stay raw."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from hwexec.core import Paced, at_full_pace
from hwexec.device import Device, Ready, Stream, forked
from sim.errors import InputError, require
from sim.hints import error_line, first_line

NOISY = 0.10
"""A spread (interquartile range over median) above this is flagged."""
AGAIN = 2
"""How often what scatters is taken again at most."""

PAUSE_S = 0.1
"""What a start after a pause waits for beforehand, with nothing to do."""

_FIRST_HOLD_NS = 200_000.0
_LONGEST_HOLD_NS = 1e9
_ISSUE_HOLD_NS = 3e6


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of one thing done many times, nanoseconds, in the order they were taken."""

    raw: tuple[float, ...]
    gated: bool = False
    """Whether everything was enqueued before the first of it could start, in every sample."""
    apart: tuple[float, ...] = ()
    """Others, made while the host's core was slowed; not counted."""
    full_pace: bool = True
    """Whether those that count were made at the core's full pace, as far as that is of any account."""

    def __post_init__(self) -> None:
        require(bool(self.raw), "no samples were taken: repeats must be at least 1")

    @classmethod
    def of(cls, found: Paced[T], time_of: Callable[[T], float]) -> Samples:
        """One time of each sample."""
        return cls(
            tuple(map(time_of, found.kept)), apart=tuple(map(time_of, found.apart)), full_pace=found.full
        )

    @property
    def median_ns(self) -> float:
        return statistics.median(self.raw)

    @property
    def minimum_ns(self) -> float:
        return min(self.raw)

    @property
    def iqr_ns(self) -> float:
        """Distance between the quartiles; 0 of a single sample."""
        if len(self.raw) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.raw, n=4, method="inclusive")
        return high - low

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return self.iqr_ns / self.median_ns if self.median_ns > 0 else 0.0

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


class Scatter(Protocol):
    """One thing's samples, here or as `calibrate` keeps them."""

    @property
    def spread(self) -> float: ...

    @property
    def noisy(self) -> bool: ...


class Mismatch(InputError):
    """Bytes that were timed are not those that were sent: nothing of this host can be trusted until it is explained."""


@dataclass(frozen=True, slots=True)
class Takes(Generic[T]):
    """What was taken, once or again, and the one of it that is kept."""

    kept: T
    made: tuple[T, ...]
    failed: str = ""
    """Why the last attempt to take it again came to nothing, in one line; empty where none did."""


def steadiest(
    take: Callable[[], T],
    parts: Callable[[T], Sequence[Scatter]],
    device: Device,
    *,
    waived: tuple[type[Exception], ...] = (),
) -> Takes[T]:
    """The take whose parts scatter least, whatever its times: one that has a noisy part is made again, `AGAIN` times at most,
    where times are figures.

    What fails when it is made again keeps the takes that there are, where the error is one that waives what is timed: InputError,
    the device's `out_of_memory`, or one of `waived`. Wrong bytes (`Mismatch`) end it all the same.

    A host that others share has moments in which nothing repeats. Takes are kept whole: what is told by comparing two parts
    needs both from the same moment. A part that scatters by more than its median counts no more than one that does by that: what
    is left of a difference near nothing may scatter without bound.
    """
    forgiven: tuple[type[Exception], ...] = (InputError, device.out_of_memory, *waived)
    takes, failed = [take()], ""
    while device.figures and any(part.noisy for part in parts(takes[-1])) and len(takes) <= AGAIN:
        try:
            takes.append(take())
        except Mismatch:
            raise
        except forgiven as error:
            failed = first_line(error) if isinstance(error, InputError) else error_line(error)
            break
    kept = min(takes, key=lambda found: sum(min(1.0, part.spread) for part in parts(found)))
    return Takes(kept, tuple(takes), failed)


def time_ns(
    enqueue: Callable[[], object],
    device: Device,
    streams: Sequence[Stream],
    *,
    repeats: int = 10,
    warmup: int = 2,
    gate: bool = True,
    before: Callable[[], None] | None = None,
) -> Samples:
    """Time what `enqueue` puts on `streams`, by events on the first of them; the others are forked from it and joined to it.

    With `gate` the first stream is held until everything is enqueued, so that the host's issue cost does not count; a gate
    that opened too early is tried again, twice as long. `before` runs ahead of each sample, untimed, and is waited for.
    Neither bytes nor results are looked at: that is the caller's duty.
    """
    origin, *others = streams
    hold_ns = _FIRST_HOLD_NS
    raw: list[float] = []
    gated = gate
    taken = 0
    start, stop = device.event(timing=True), device.event(timing=True)
    while taken < warmup + repeats:
        if before is not None:
            before()
        device.synchronize()
        began = time.perf_counter_ns()
        if gate:
            device.gate(origin, hold_ns)
        device.record(origin, start)
        with forked(device, origin, others), device.on(origin):
            enqueue()
        device.record(origin, stop)
        early = gate and device.happened(start)
        issue_ns = time.perf_counter_ns() - began
        device.synchronize()
        if early and hold_ns < _LONGEST_HOLD_NS:
            hold_ns = max(2 * hold_ns, 1.5 * issue_ns)
            continue
        gated = gated and not early
        if taken >= warmup:
            raw.append(device.elapsed_ns(start, stop))
        taken += 1
    return Samples(tuple(raw), gated)


def wall_ns(
    call: Callable[[], object],
    device: Device,
    *,
    gpu: int | None = None,
    repeats: int = 10,
    warmup: int = 2,
    before: Callable[[], None] | None = None,
) -> Samples:
    """Time `call` from an idle device until it is idle again, by the host's clock, or only the caller's stream of one `gpu`.
    `before` as in `time_ns`."""
    found = _from_idle(call, device, repeats, warmup, before, gpu)
    return Samples.of(found, lambda pair: pair[1])


def call_ns(
    call: Callable[[], object],
    device: Device,
    *,
    repeats: int = 10,
    warmup: int = 2,
    before: Callable[[], None] | None = None,
) -> Samples:
    """Time `call` from an idle device until it returns, whatever the device is still doing: the host's own time."""
    found = _from_idle(call, device, repeats, warmup, before)
    return Samples.of(found, lambda pair: pair[0])


def _from_idle(
    call: Callable[[], object],
    device: Device,
    repeats: int,
    warmup: int,
    before: Callable[[], None] | None,
    gpu: int | None = None,
) -> Paced[tuple[float, float]]:
    """Until the call has returned, and until the device is idle again or the caller's stream of `gpu` is."""

    def sample() -> tuple[float, float]:
        if before is not None:
            before()
        device.synchronize()
        began = time.perf_counter_ns()
        call()
        called = time.perf_counter_ns()
        if gpu is None:
            device.synchronize()
        else:
            device.wait_for_caller(gpu)
        return float(called - began), float(time.perf_counter_ns() - began)

    for _ in range(warmup):
        sample()
    return at_full_pace(sample, device, repeats)


def issue_ns(device: Device, streams: Sequence[Stream], call: Ready, count: int) -> float:
    """Host thread, nanoseconds of `count` calls together, while `streams` are held so that the GPU cannot hold up the host."""
    for stream in streams:
        device.gate(stream, _ISSUE_HOLD_NS)
    with device.on(streams[0]):
        began = time.perf_counter_ns()
        for _ in range(count):
            call()
        return float(time.perf_counter_ns() - began)
