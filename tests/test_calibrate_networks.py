"""Networks of `calibrate run` on a device of threads: what one that fails costs the others, what is timed first, files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibrate import run as calibrate_run
from calibrate import show, unwatched
from calibrate.bench import UNTRUSTED
from calibrate.identity import read_identity
from calibrate.run import Watch, finish, run
from calibrate.store import Store
from hwexec import host_memory
from hwexec.cpu import CpuDevice
from hwexec.timing import Mismatch
from sim.errors import InputError
from sim.files import read_host, read_profile
from tests.calibrating import MODEL, Told, ask, small_cases
from tests.test_calibrate_identity import pair


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2, delay_us=0.0)
    yield made
    made.close()


def test_a_network_that_fails_costs_the_others_nothing(device: CpuDevice, tmp_path: Path) -> None:
    store = Store(tmp_path)
    run(ask(), device, Watch(None), store, Told())
    device._fault, device._countdown = "pin", 1
    with pytest.raises(InputError, match=r"all but 1 of the networks .*refuses to pin"):
        run(ask(MODEL), device, Watch(None), store, Told())
    assert len(run(ask(MODEL), device, Watch(None), store, Told()).profiles) == 1


@pytest.mark.parametrize(
    "refused", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_network_that_the_host_has_no_memory_for_costs_the_others_nothing(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Exception
) -> None:
    """It was called a GPU that failed, ended in a traceback, or filled memory until the process was killed."""

    def refuse(*_: object, **__: object) -> Any:
        raise refused

    store = Store(tmp_path)
    run(ask(), device, Watch(None), store, Told())
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_run, "build", refuse)
        with pytest.raises(InputError, match=r"all but 1 of the networks .*out of host memory \("):
            run(ask(MODEL), device, Watch(None), store, Told())
        patch.setattr(host_memory, "free_bytes", lambda: 1000)
        with pytest.raises(
            InputError, match=r"bytes are needed for 3 times the weights of .*, and 1000 are free"
        ):
            run(ask(MODEL), device, Watch(None), store, Told())
    assert len(run(ask(MODEL), device, Watch(None), store, Told()).profiles) == 1


def test_wrong_bytes_in_a_network_end_a_calibration_that_writes_no_figure(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were told as one network that failed, beside a host and profiles that looked whole."""

    def wrong(*_: object, **__: object) -> Any:
        raise Mismatch(UNTRUSTED)

    for look in ("unwatched", "measure"):
        told = Told()
        with monkeypatch.context() as patch:
            patch.setattr(calibrate_run, look, wrong)
            with pytest.raises(Mismatch, match="none of this host's figures can be trusted"):
                run(ask(MODEL), device, Watch(None), Store(tmp_path), told)
        assert MODEL in told.begun[-1]
        assert {path.name for path in tmp_path.iterdir()} == {"state"}


def test_interrupted_between_its_halves_a_network_goes_on_with_the_second(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first half of every network was made again, minutes of it."""
    story: list[str] = []
    first, second = calibrate_run.unwatched, calibrate_run.measure

    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        calibrate_run, "unwatched", lambda *a, **k: (story.append("first"), first(*a, **k))[1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_run, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(ask(MODEL), device, Watch(None), Store(tmp_path), Told())
    monkeypatch.setattr(
        calibrate_run, "measure", lambda *a, **k: (story.append("second"), second(*a, **k))[1]
    )
    assert len(run(ask(MODEL), device, Watch(None), Store(tmp_path), Told()).profiles) == 1
    assert story == ["first", "second"]
    assert not list((tmp_path / "state").glob("network-*")), "its samples are whole"


def test_a_profile_says_which_call_measured_it(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All had the session's first command and date."""
    for word, models in (("first", ()), ("second", (MODEL,)), ("third", ())):
        monkeypatch.setattr("sys.argv", ["calibrate", word])
        outcome = run(ask(*models), device, Watch(None), Store(tmp_path), Told())
    assert "second" in read_profile(outcome.profiles[0]).provenance.command
    assert "second" in read_profile(finish(Store(tmp_path), keep_bad=True).profiles[0]).provenance.command
    samples = tmp_path / "samples" / "fake"
    (file,) = samples.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("provenance:"))
    rest = next(i for i, line in enumerate(lines[at + 1 :], at + 1) if not line.startswith(" "))
    file.write_text("".join([*lines[:at], *lines[rest:]]))  # as before that was kept
    assert "first" in read_profile(finish(Store(tmp_path), keep_bad=True).profiles[0]).provenance.command


def test_no_host_time_is_taken_after_the_profiler_has_run(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in a process it makes every later launch slower, those of other networks too."""
    story: list[str] = []
    trace, clocked = device.trace, unwatched._issue
    monkeypatch.setattr(device, "trace", lambda call: (story.append("profiler"), trace(call))[1])
    monkeypatch.setattr(unwatched, "_issue", lambda *given: (story.append("issue"), clocked(*given))[1])
    small = "hf:llama-1b:hidden=32,layers=1,heads=2,kv_heads=1,ffn=64,vocab=50"
    run(ask(MODEL, small), device, Watch(None), Store(tmp_path), Told())
    assert story[:2] == ["issue", "issue"]
    assert set(story[2:]) == {"profiler"}


def test_identity_and_flags_reach_the_files(device: CpuDevice, tmp_path: Path) -> None:
    nvml = pair()
    nvml.busy[0] = 50
    told = Told()
    device.figures = True  # as if its times meant something: then flags and refusals are told
    outcome = run(
        replace(ask(), quick=True, keep_bad=True),
        device,
        Watch(nvml),
        Store(tmp_path),
        told,
        cases=small_cases(),
    )
    assert told.notes[0] == "GPU 0 was 50 % busy before measuring: stop its other users"
    assert outcome.flags[0] == told.notes[0]
    host = read_host(outcome.host)
    assert host.about.endswith("PCIe 5.0 x16, NVLink NV18 between GPUs 0 and 1, driver 580.95.05")
    record = show.read(str(outcome.samples))
    assert isinstance(record, show.Calibration)
    assert record.identity == read_identity(nvml)
    assert (len(record.before), len(record.after)) == (2, 2)


def test_a_profile_has_its_networks_own_start(device: CpuDevice, tmp_path: Path) -> None:
    device.figures = True
    given = replace(ask(MODEL), quick=True, keep_bad=True)
    outcome = run(given, device, Watch(pair()), Store(tmp_path), Told(), cases=small_cases())
    profile, costs = read_profile(outcome.profiles[0]), read_host(outcome.host).costs
    assert profile.start is not None
    assert {profile.start.kind, costs.launch_first_ns.kind} == {"measured"}
    assert profile.start.value > costs.start_ns.value
    assert read_profile(finish(Store(tmp_path), keep_bad=True).profiles[0]) == profile
