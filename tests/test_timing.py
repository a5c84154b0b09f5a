"""The host's thread while it is timed: on one core, which is awake; and free again afterwards, whatever happened."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hwexec import timing
from hwexec.cpu import CpuDevice
from hwexec.timing import steady

holds = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system holds no thread")


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    """As if its times meant something."""
    made = CpuDevice(1, delay_us=0.0)
    made.figures = True
    yield made
    made.close()


@pytest.fixture(autouse=True)
def woken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often a core was woken; each time for one stretch only."""
    monkeypatch.setattr(timing, "AWAKE_S", 0.0)
    monkeypatch.setattr(timing, "AWAKE_MOST_S", 0.0)
    told: list[str] = []
    wake = timing._wake
    monkeypatch.setattr(timing, "_wake", lambda: (told.append("woken"), wake())[1])
    return told


def allowed() -> set[int]:
    """Cores that the calling thread may run on."""
    return set(os.sched_getaffinity(0))


@holds
def test_a_thread_is_held_on_one_core_and_may_go_where_it_could_before(
    device: CpuDevice, woken: list[str]
) -> None:
    before = allowed()
    with steady(device):
        held = allowed()
        assert len(held) == 1
        assert held <= before
        assert woken or held == before, "with one core only it is held from the beginning"
    assert allowed() == before


@holds
def test_a_thread_is_let_go_where_what_was_timed_fails(device: CpuDevice) -> None:
    before = allowed()
    with pytest.raises(RuntimeError, match="lost"), steady(device):
        raise RuntimeError("the GPU is lost")
    assert allowed() == before


@holds
def test_held_already_it_stays_held(device: CpuDevice, woken: list[str]) -> None:
    before = allowed()
    with steady(device):
        held, seen = allowed(), list(woken)
        with steady(device):
            assert allowed() == held
        assert allowed() == held
        assert woken == seen
    assert allowed() == before


def test_where_no_thread_can_be_held_the_core_is_only_woken(
    device: CpuDevice, woken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with steady(device):
        assert woken == ["woken"]


@holds
def test_where_times_mean_nothing_nothing_is_held(device: CpuDevice, woken: list[str]) -> None:
    before = allowed()
    device.figures = False
    with steady(device):
        assert allowed() == before
    assert woken == []
