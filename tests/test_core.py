"""The core of the thread that is timed: held, awake and free again afterwards; and samples set apart while others slow it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hwexec import core
from hwexec.arena import HostArena
from hwexec.core import Paced, at_full_pace, once_at_full_pace, slowed, steady
from hwexec.cpu import CpuDevice

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
    """How often a core was woken."""
    told: list[str] = []
    wake = core._wake
    monkeypatch.setattr(core, "_wake", lambda: (told.append("woken"), wake())[1])
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


def test_pythons_collector_is_off_while_something_is_timed_and_on_again_after(device: CpuDevice) -> None:
    assert gc.isenabled()
    for figures in (True, False):
        device.figures = figures
        with steady(device):
            assert not gc.isenabled()
            with steady(device):
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled()
    gc.disable()
    try:
        with steady(device):
            pass
        assert not gc.isenabled(), "whoever had it off keeps it off"
    finally:
        gc.enable()


def numbered() -> Callable[[], int]:
    """Samples 0, 1, 2 ..."""
    made = iter(range(1000))
    return lambda: next(made)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the next looks at the core will say; it is at full pace when the list has run out."""
    coming: list[bool] = []
    monkeypatch.setattr(core, "slowed", lambda: coming.pop(0) if coming else False)
    return coming


def test_samples_behind_which_the_core_is_slow_are_set_apart_and_made_again(
    device: CpuDevice, told: list[bool]
) -> None:
    before = core.tally()
    told += [False, True, True, False, False]
    assert at_full_pace(numbered(), device, 3) == Paced((0, 3, 4), (1, 2))
    assert core.tally() == (before[0] + 2, before[1])
    assert at_full_pace(numbered(), device, 3) == Paced((0, 1, 2))


def test_where_the_core_is_hardly_ever_at_full_pace_all_samples_count(
    device: CpuDevice, told: list[bool]
) -> None:
    before = core.tally()
    told += [True, True, False, True, True, True, False, *[True] * 5]
    assert at_full_pace(numbered(), device, 3) == Paced(tuple(range(12)), (), False)
    assert core.tally() == (before[0], before[1] + 1), "none of them is set apart"
    told += [True] * 4
    assert once_at_full_pace(numbered(), device) == 3, (
        "the last of four, where it is taken in turn with others"
    )
    assert core.tally() == (before[0] + 3, before[1] + 2)


def test_where_times_mean_nothing_nobody_looks_at_the_core(device: CpuDevice, told: list[bool]) -> None:
    device.figures = False
    told += [True] * 3
    assert at_full_pace(numbered(), device, 2) == Paced((0, 1))
    assert told == [True] * 3


def test_slow_samples_are_stopped_by_a_budget_of_time_but_three_are_made(device: CpuDevice) -> None:
    assert at_full_pace(numbered(), device, 9, budget_ns=2.0, took_ns=float).kept == (0, 1, 2)
    assert at_full_pace(numbered(), device, 9, budget_ns=9.0, took_ns=float).kept == (0, 1, 2, 3, 4)


@holds
def test_the_thread_moves_on_to_a_core_that_nobody_slows_and_makes_one_sample_for_its_caches(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, slow = [1], {1, 2}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {here[-1]})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: here.extend(cores))
    monkeypatch.setattr(core, "slowed", lambda: here[-1] in slow)
    monkeypatch.setattr(core._state, "allowed", (0, 1, 2, 3))
    assert at_full_pace(numbered(), device, 2) == Paced((2, 3), (0,)), (
        "the sample right after the move is none"
    )
    assert here == [1, 2, 3]
    slow |= {0, 3}
    assert not at_full_pace(numbered(), device, 1).full
    assert here[-1] == 3, "where all are slow it stays"
    here.append(7)
    slow.add(7)
    assert not core._seek(), "somebody else has moved the thread"
    assert here[-1] == 7


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing is known of the cores, and the time is what the test says."""
    now = [1000.0]
    monkeypatch.setattr(core, "_state", core._State())
    monkeypatch.setattr(core.time, "monotonic", lambda: now[-1])
    return now


def test_a_core_is_slow_by_the_fastest_that_any_has_been_of_late(
    monkeypatch: pytest.MonkeyPatch, unknown: list[float]
) -> None:
    clock, loop_ns = [0], [10]

    def now() -> int:
        clock[0] += core._LOOPS * loop_ns[0]  # a stretch is from one look at the clock to the next
        return clock[0]

    monkeypatch.setattr(core.time, "perf_counter_ns", now)
    assert not slowed(), "nobody knows better yet"
    for loop_ns[0], slow in ((12, False), (20, True), (8, False), (12, True)):
        assert slowed() == slow
    unknown.append(1000.0 + core.RECENT_S + 1)
    assert slowed(), "half a minute ago some core was faster"
    unknown.append(1000.0 + 2 * (core.RECENT_S + 1))
    assert not slowed(), "a minute ago is long ago: clocks fall"
    loop_ns[0] = 24
    assert slowed()
    unknown.append(5000.0)
    assert not slowed(), "nobody looked for an hour"


@holds
def test_full_pace_is_learned_from_other_cores_as_well(
    monkeypatch: pytest.MonkeyPatch, unknown: list[float]
) -> None:
    here, pace = [0], {0: 27, 1: 27, 2: 14}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {here[-1]})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: here.extend(cores))
    monkeypatch.setattr(core._state, "allowed", (0, 1, 2))
    monkeypatch.setattr(
        core, "slowed", lambda: pace[here[-1]] > core.SLOWED * core._state.full_ns(pace[here[-1]])
    )
    core._choose()
    assert here[-1] == 2
    looked = len(here)
    core._choose()
    assert len(here) == looked, "what is known need not be looked at again"


def test_cores_near_one_another_are_those_of_its_numa_node() -> None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    for at in sorted(allowed)[:2]:
        near = core._near(at)
        assert at in near
        assert near <= allowed
    assert core.cpus_of(10**6) == set()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """Two NUMA nodes of four cores, and where the thread may run, the latest last: anywhere but on core 7; it is on core 1."""
    for node, cores in enumerate(("0-1,4-5", "2-3,6-7")):
        at = tmp_path / f"sys/devices/system/node/node{node}"
        at.mkdir(parents=True)
        (at / "cpulist").write_text(cores + "\n")
    told = [{0, 1, 2, 3, 4, 5, 6}]
    monkeypatch.setattr(core, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(core.ctypes, "CDLL", lambda _: SimpleNamespace(sched_getcpu=lambda: 1))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: told[-1])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: told.append(set(cores)))
    return told


@holds
def test_a_held_thread_knows_all_cores_of_a_node_that_it_might_have_run_on(
    device: CpuDevice, machine: list[set[int]]
) -> None:
    """It knew its own alone, so that memory which was asked for meanwhile lay on its node, and not on the GPU's."""
    free = ({0, 1, 4, 5}, {2, 3, 6}, set())
    assert tuple(map(core.cpus_of, range(3))) == free
    with steady(device):
        assert machine[-1] == {1}
        assert tuple(map(core.cpus_of, range(3))) == free
        with steady(device):
            assert core.cpus_of(1) == {2, 3, 6}
    machine.append({0, 2})
    assert core.cpus_of(1) == {2}, "what held for a held thread is forgotten"


@holds
def test_memory_pinned_meanwhile_is_touched_by_cores_of_the_gpus_node(
    device: CpuDevice, machine: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "numa_node", lambda _: 1)
    with steady(device):
        HostArena(device, 10, 0)
        assert machine[-2:] == [{1}, {2, 3, 6}], "by a thread of its own, which ends there"
        machine.append({1})
    assert machine[-1] == {0, 1, 2, 3, 4, 5, 6}
