"""The one timing core: nvbandwidth's protocol for work on streams, a synchronised clock for whole calls. Samples stay raw."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from hwexec.device import Device, Ready, Stream, forked
from sim.errors import InputError, require
from sim.hints import error_line, first_line

NOISY = 0.10
"""A spread (interquartile range over median) above this is flagged."""
AGAIN = 2
"""How often what scatters is taken again at most."""

AWAKE_S, AWAKE_MOST_S = 0.25, 1.0
"""How long a core is kept busy until it runs at its clock, at least and at most; on a virtual machine with two H200 a launch
took 50 us before, and 20 us after."""
PAUSE_S = 0.1
"""What a start after a pause waits for beforehand, with nothing to do."""
_LOOPS = 2_000
"""Of a stretch of work by which a core's pace is told."""
_held = False
"""Whether a thread is held to its core already; sections of sections change nothing."""

_FIRST_HOLD_NS = 200_000.0
_LONGEST_HOLD_NS = 1e9
_ISSUE_HOLD_NS = 3e6


@dataclass(frozen=True, slots=True)
class Samples:
    """Times of one thing done many times, nanoseconds, in the order they were taken."""

    raw: tuple[float, ...]
    gated: bool = False
    """Whether everything was enqueued before the first of it could start, in every sample."""

    def __post_init__(self) -> None:
        require(bool(self.raw), "no samples were taken: repeats must be at least 1")

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


T = TypeVar("T")


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


@contextmanager
def steady(device: Device) -> Iterator[None]:
    """Hold the calling thread on its core, keep that busy until it is up to its clock, and Python's collector away.

    What the host does takes twice as long on a core that has just been idle, and a thread that moves finds such a core. Threads
    made inside would stay on this one core: make none. Where the system cannot hold a thread, it is only kept busy. The
    collector may take milliseconds in the middle of a start.
    """
    if _held:
        yield
        return
    with collector_off():
        if not device.figures:
            yield
            return
        with _on_one_core():
            yield


@contextmanager
def collector_off() -> Iterator[None]:
    """Python's collector away for a while. What is garbage already stays: collecting it all takes 0.15 s with PyTorch loaded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _on_one_core() -> Iterator[None]:
    global _held
    # PyTorch makes its threads at the first work for several: now, not on this one core
    torch.zeros(1 << 20).add_(1)
    before: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core = ctypes.CDLL(None).sched_getcpu() if before else -1
    try:
        _held = True
        if core in before:
            os.sched_setaffinity(0, {core})
        _wake()
        yield
    finally:
        _held = False
        if core in before:
            os.sched_setaffinity(0, before)


def _wake() -> None:
    """Work until a stretch takes little longer than the shortest did."""
    began, fastest_ns = time.perf_counter(), float("inf")
    while True:
        start = time.perf_counter_ns()
        for _ in range(_LOOPS):
            pass
        took = time.perf_counter_ns() - start
        fastest_ns = min(fastest_ns, took)
        busy = time.perf_counter() - began
        if busy > AWAKE_MOST_S or (busy > AWAKE_S and took < 1.1 * fastest_ns):
            return


def wall_ns(
    call: Callable[[], object],
    device: Device,
    *,
    repeats: int = 10,
    warmup: int = 2,
    before: Callable[[], None] | None = None,
) -> Samples:
    """Time `call` from an idle device until it is idle again, by the host's clock. `before` as in `time_ns`."""
    return Samples(tuple(done for _, done in _from_idle(call, device, repeats, warmup, before)))


def call_ns(
    call: Callable[[], object],
    device: Device,
    *,
    repeats: int = 10,
    warmup: int = 2,
    before: Callable[[], None] | None = None,
) -> Samples:
    """Time `call` from an idle device until it returns, whatever the device is still doing: the host's own time."""
    return Samples(tuple(called for called, _ in _from_idle(call, device, repeats, warmup, before)))


def _from_idle(
    call: Callable[[], object], device: Device, repeats: int, warmup: int, before: Callable[[], None] | None
) -> Iterator[tuple[float, float]]:
    """Until the call has returned, and until the device is idle again."""
    for index in range(warmup + repeats):
        if before is not None:
            before()
        device.synchronize()
        began = time.perf_counter_ns()
        call()
        called = time.perf_counter_ns()
        device.synchronize()
        done = time.perf_counter_ns()
        if index >= warmup:
            yield float(called - began), float(done - began)


def issue_ns(device: Device, streams: Sequence[Stream], call: Ready, count: int) -> float:
    """Host thread, nanoseconds of `count` calls together, while `streams` are held so that the GPU cannot hold up the host."""
    for stream in streams:
        device.gate(stream, _ISSUE_HOLD_NS)
    with device.on(streams[0]):
        began = time.perf_counter_ns()
        for _ in range(count):
            call()
        return float(time.perf_counter_ns() - began)
