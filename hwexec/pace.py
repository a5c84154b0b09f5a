"""How fast the host is right now. A machine that others share has slow hours, in which nothing that its processor paces is as
fast as it was when it was calibrated: launches, eager layers, the first copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from hwexec.arena import HostArena
from hwexec.device import Device, Ready, Stream
from hwexec.timing import steady
from sim.host import Costs

SLOWER = 1.25
"""A host that takes so many times as long to issue a copy as when it was calibrated is called slow: predictions miss by as much
where it is the host that layers wait for."""
_HOLD_NS = 3e6
_BYTES, _CALLS, _SAMPLES = 4096, 50, 3


def issue_ns(device: Device, streams: Sequence[Stream], call: Ready, count: int) -> float:
    """Host thread, nanoseconds of `count` calls together, while `streams` are held so that the GPU cannot hold up the host."""
    for stream in streams:
        device.gate(stream, _HOLD_NS)
    with device.on(streams[0]):
        began = time.perf_counter_ns()
        for _ in range(count):
            call()
        return float(time.perf_counter_ns() - began)


class Pace:
    """A small copy to a GPU, at hand to be issued between other work. A context manager; holds 4 KiB on either side."""

    def __init__(self, device: Device, gpu: int) -> None:
        self.device = device
        self._stack = ExitStack()
        if not device.figures:
            return
        with ExitStack() as stack:
            host = HostArena(device, _BYTES, gpu)
            stack.callback(host.close)
            self._stream = device.stream("h2d:pace", gpu)
            stack.callback(device.close_stream, self._stream)
            self._arena = device.allocate(_BYTES, gpu)  # a copy made ready knows addresses only
            self._copy = device.ready_copy(self._stream, self._arena, host.tensor)
            self._stack = stack.pop_all()  # all of it is there: from here on it is given back at the end

    def issue_copy_ns(self) -> float | None:
        """What the host takes to issue a copy, as `Costs.issue_copy_ns`; None where times are no figures."""
        device = self.device
        if not device.figures:
            return None
        samples = []
        with steady(device):
            for _ in range(_SAMPLES + 1):
                device.synchronize()
                samples.append(issue_ns(device, [self._stream], self._copy, _CALLS) / _CALLS)
        device.synchronize()
        return statistics.median(samples[1:])  # the first warms up

    def __enter__(self) -> Pace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.device.synchronize()
        self._stack.close()


def calibrated_ns(costs: Costs) -> float | None:
    """What issuing a copy took when the host was measured; None where nobody did."""
    figure = costs.issue_copy_ns
    return figure.value if figure.kind == "measured" and figure.value > 0 else None


def words(now_ns: float | None, then_ns: float | None) -> str:
    """The host's pace beside that of its calibration; empty where either is unknown."""
    if now_ns is None or then_ns is None:
        return ""
    said = f"Host: {now_ns / 1e3:.2f} us to issue a copy, {then_ns / 1e3:.2f} when it was calibrated"
    if now_ns <= SLOWER * then_ns:
        return f"{said}."
    return f"{said}: it is slower now, and launches, eager layers and first copies later than predicted."
