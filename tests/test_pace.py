"""How fast the host is while something is measured, beside how fast it was when it was calibrated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwexec.cpu import CpuDevice
from hwexec.pace import SLOWER, Pace, calibrated_ns, issue_ns, words
from sim.host import Figure
from tests.builders import FREE


def test_issuing_a_copy_is_timed_without_waiting_for_it_and_nothing_stays_behind() -> None:
    device = CpuDevice(2, delay_us=2_000.0)
    device.figures = True
    with Pace(device, 1) as pace:
        found = [pace.issue_copy_ns() for _ in range(2)]
    assert all(ns is not None and 0 < ns < 1e6 for ns in found), "a copy itself takes up to 2 ms there"
    assert device.pinned == {}
    device.close()


def test_where_times_are_no_figures_there_is_no_pace() -> None:
    device = CpuDevice(1)
    with Pace(device, 0) as pace:
        assert pace.issue_copy_ns() is None
    assert device.pinned == {}
    device.close()


def test_calls_are_made_as_often_as_asked() -> None:
    device, told = CpuDevice(1, delay_us=0.0), list[int]()
    streams = [device.stream(name, 0) for name in ("a", "b")]
    assert issue_ns(device, streams, lambda: told.append(1), 7) > 0
    assert len(told) == 7
    device.synchronize()
    device.close()


def test_only_a_measured_host_has_a_pace_to_compare_with() -> None:
    assert calibrated_ns(FREE) is None
    assert calibrated_ns(replace(FREE, issue_copy_ns=Figure(1850.0, "measured", "here"))) == 1850
    assert calibrated_ns(replace(FREE, issue_copy_ns=Figure(9000.0, "fitted", "elsewhere"))) is None
    assert calibrated_ns(replace(FREE, issue_copy_ns=Figure(0.0, "measured", "here"))) is None


@pytest.mark.parametrize(
    ("now", "then", "said"),
    [
        (None, 1850.0, ""),
        (1850.0, None, ""),
        (1850.0, 1850.0, "Host: 1.85 us to issue a copy, 1.85 when it was calibrated."),
        (SLOWER * 2000, 2000.0, "Host: 2.50 us to issue a copy, 2.00 when it was calibrated."),
        (
            4730.0,
            1850.0,
            "Host: 4.73 us to issue a copy, 1.85 when it was calibrated: it is slower now, and launches, eager layers and "
            "first copies later than predicted.",
        ),
    ],
)
def test_a_host_that_is_slower_than_when_calibrated_is_told(
    now: float | None, then: float | None, said: str
) -> None:
    assert words(now, then) == said
