"""The processor core that a thread runs on: held there, woken, and told apart when others slow it.

A host that others share gives each of its cores' two hardware threads to somebody. While the other one works, a core has half
its pace, for 10 ms or for minutes, and so has everything that the host does for a start: on two H100 a launch took 150 us or 300,
an eager start 10 ms or 18, as the loops right behind it took 14 ns or 27 (results/h100-pair-3/trials/pace.txt). Ahead of a
sample such loops would take the driver out of the core's caches; behind it they cost it nothing. So a sample behind which the core
turns out slow is set apart, and made again on a core that is not.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from hwexec.device import Device

AWAKE_S, AWAKE_MOST_S = 0.25, 1.0
"""How long a core is kept busy until it runs at its clock, at least and at most."""
SLOWED = 1.25
"""A core whose loops take so many times as long as any core's did of late is slowed."""
MOST = 4
"""Samples made for each that is asked for, at most."""
FEWEST = 3
"""Samples made however slow they are, and such at full pace that are enough."""
_LOOPS, _STRETCHES = 1_000, 3
_LEARNED_FROM = 16
"""Cores that are looked at to know what full pace is: one alone might be slow all the while."""
RECENT_S = 30.0
"""What full pace was longer ago, twice this at most, is forgotten: a processor's clock falls as it warms up."""

T = TypeVar("T")


@dataclass(slots=True)
class _State:
    """What is known of the cores, by this process."""

    held: bool = False
    """Whether a thread is held to its core already; sections of sections change nothing."""
    free: frozenset[int] = frozenset()
    """Cores that the held thread might have run on before it was."""
    allowed: tuple[int, ...] = ()
    """Cores that the held thread may be moved to, near the one where it was found."""
    fastest_ns: float = float("inf")
    """The fastest that a loop has been since `since_s`, and in the `RECENT_S` before that."""
    before_ns: float = float("inf")
    since_s: float = float("-inf")
    apart: int = 0
    """Samples set apart so far."""
    never: int = 0
    """Times that too few samples were made at full pace, so that others count as well."""

    @property
    def stale(self) -> bool:
        return time.monotonic() - self.since_s > RECENT_S

    def full_ns(self, now_ns: float) -> float:
        """The fastest that a loop has been of late, `now_ns` the latest."""
        if self.stale:
            long_ago = time.monotonic() - self.since_s > 2 * RECENT_S
            self.before_ns = float("inf") if long_ago else self.fastest_ns
            self.fastest_ns, self.since_s = float("inf"), time.monotonic()
        self.fastest_ns = min(self.fastest_ns, now_ns)
        return min(self.fastest_ns, self.before_ns)


_state = _State()


@dataclass(frozen=True, slots=True)
class Paced(Generic[T]):
    """Samples made one after another, those that count and those that are set apart."""

    kept: tuple[T, ...]
    apart: tuple[T, ...] = ()
    full: bool = True
    """Whether those kept were made at the core's full pace; false where there were too few of those, and all count."""


def at_full_pace(
    sample: Callable[[], T],
    device: Device,
    count: int,
    most: int = MOST,
    budget_ns: float = float("inf"),
    took_ns: Callable[[T], float] = lambda _: 0.0,
) -> Paced[T]:
    """`count` samples made while nobody slowed the core, `most` times as many in all at most; fewer where they took longer than
    `budget_ns` together. Where times are no figures, just `count`.
    """
    made: list[T] = []
    good: list[bool] = []
    spent_ns, moved = 0.0, False
    while sum(good) < count and len(made) < most * count and (len(made) < FEWEST or spent_ns <= budget_ns):
        if moved:
            sample()  # another core's caches have nothing of it
        made.append(sample())
        spent_ns += took_ns(made[-1])
        good.append(not (device.figures and slowed()))
        moved = not good[-1] and _seek()
    if sum(good) < min(count, FEWEST):
        _state.never += 1
        return Paced(tuple(made), (), False)
    _state.apart += good.count(False)
    pairs = list(zip(made, good, strict=True))
    return Paced(tuple(m for m, ok in pairs if ok), tuple(m for m, ok in pairs if not ok))


def once_at_full_pace(sample: Callable[[], T], device: Device) -> T:
    """One sample, for what is taken in turn with others: the last of `MOST` where none was made at full pace."""
    found = at_full_pace(sample, device, 1)
    _state.apart += len(found.kept) - 1
    return found.kept[-1]


def tally() -> tuple[int, int]:
    """Samples set apart in this process so far, and how often too few were left."""
    return _state.apart, _state.never


def slowed() -> bool:
    """Whether the core that the calling thread is on runs at less than its full pace."""
    taken = []
    for _ in range(_STRETCHES):
        start = time.perf_counter_ns()
        for _ in range(_LOOPS):
            pass
        taken.append(time.perf_counter_ns() - start)
    now_ns = statistics.median(taken) / _LOOPS
    return now_ns > SLOWED * _state.full_ns(now_ns)


def _seek() -> bool:
    """Move the held thread to the next core that runs at full pace, if there is one. Whether it moved."""
    if len(_state.allowed) < 2:
        return False
    held = os.sched_getaffinity(0)
    here = min(held)
    if len(held) > 1 or here not in _state.allowed:
        return False  # somebody else has moved the thread
    at = _state.allowed.index(here)
    for core in (*_state.allowed[at + 1 :], *_state.allowed[:at]):
        with suppress(OSError):  # a core that has been taken away
            os.sched_setaffinity(0, {core})
            if not slowed():
                return True
    with suppress(OSError):
        os.sched_setaffinity(0, held)
    return False


@contextmanager
def steady(device: Device) -> Iterator[None]:
    """Hold the calling thread on a core, keep that busy until it is up to its clock, and Python's collector away.

    A thread that the system moves finds nothing of its own in the caches, and a core that has just been idle may be slow. Threads
    made inside would stay on this one core: make none. Where the system cannot hold a thread, it is only kept busy. The
    collector may take milliseconds in the middle of a start.
    """
    if _state.held:
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
    # PyTorch makes its threads at the first work for several: now, not on this one core
    torch.zeros(1 << 20).add_(1)
    before: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core = ctypes.CDLL(None).sched_getcpu() if before else -1
    try:
        _state.held, _state.free = True, frozenset(before)
        if core in before:
            _state.allowed = tuple(sorted(_near(core) & before)) or (core,)
            os.sched_setaffinity(0, {core})
        _wake()
        _choose()
        yield
    finally:
        _state.held, _state.free, _state.allowed = False, frozenset(), ()
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


def _choose() -> None:
    """Stay on the core where the thread was found, or go on with the next that nobody slows."""
    if len(_state.allowed) < 2:
        return
    if _state.stale:
        (here,) = os.sched_getaffinity(0)
        for core in _state.allowed[:: -(-len(_state.allowed) // _LEARNED_FROM)]:
            os.sched_setaffinity(0, {core})
            slowed()
        os.sched_setaffinity(0, {here})
    if slowed():
        _seek()


def cpus_of(node: int) -> set[int]:
    """The processors of a NUMA node that this thread may use, or might before it was held to one; none where nobody tells."""
    try:
        text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
        parts = [part.partition("-") for part in text.split(",") if part]
        found = {cpu for low, _, high in parts for cpu in range(int(low), int(high or low) + 1)}
        return found & (_state.free or os.sched_getaffinity(0))
    except (OSError, ValueError):
        return set()


def _near(core: int) -> set[int]:
    """Cores on the NUMA node of `core`, itself among them: from others the way to a GPU is longer."""
    try:
        nodes = [
            int(at.name.removeprefix("node")) for at in Path("/sys/devices/system/node").glob("node[0-9]*")
        ]
    except (OSError, ValueError):
        nodes = []
    return next((cpus for node in nodes if core in (cpus := cpus_of(node))), {core})
