"""`hwexec sweep`: one file that the next call goes on from, and random plans that are valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwexec import commands, starts, sweep, sweep_command
from hwexec.cli import cli
from hwexec.cpu import CpuDevice
from hwexec.sweep import SWEEP, random_plan
from hwexec.sweep_report import summarise
from hwexec.verify import as_run
from sim.console import run_command
from sim.errors import InputError
from sim.files import (
    read_record,
)
from sim.plan import Launch
from sim.program import lower
from tests.builders import host, network
from tests.sweeping import AGAIN, ASK, folder_in
from tests.test_hwexec_verify import Stopwatch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder_in(tmp_path, monkeypatch)


def test_a_second_call_goes_on_where_the_first_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2", "--random", "1"]) == 0
    first = read_record(folder / "sweep.yaml", SWEEP).points
    assert [(p.strategy, p.links) for p in first] == [
        *((name, 1) for name in ("demand", "pipeline", "pipeswitch", "dha-static", "dha")),
        ("pt", 2),
        ("pt+dha", 2),
        ("best", 1),
        ("best", 2),
        ("random", 1),
        ("random", 2),
    ]
    assert all(p.outputs_match and p.measured_ns and p.predicted_ns > 0 for p in first)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "summary.txt").read_text() == capsys.readouterr().out
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2", "--random", "2", "--runs", "2"]) == 0
    assert "those have 1 starts; --runs 2 holds for the others" in capsys.readouterr().err
    points = read_record(folder / "sweep.yaml", SWEEP).points
    assert points[: len(first)] == first
    assert [(p.strategy, p.links, p.number) for p in points[len(first) :]] == [
        ("random", 1, 1),
        ("random", 2, 1),
    ]
    assert [len(p.samples_ns) for p in points[len(first) :]] == [2, 2]


def test_points_of_another_seed_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, "hwexec", [*ASK, "--random", "0"]) == 0
    capsys.readouterr()
    assert run_command(cli, "hwexec", [*ASK, "--random", "0", "--seed", "1"]) == 2
    assert "start over with --force" in capsys.readouterr().err
    assert run_command(cli, "hwexec", [*ASK, "--random", "0", "--seed", "1", "--force"]) == 0


def test_a_call_that_finds_all_done_leaves_the_file_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It measured nothing, so the points' provenance is not its own."""
    ask = [*ASK, "--random", "0"]
    assert run_command(cli, "hwexec", ask) == 0
    before = (folder / "sweep.yaml").read_bytes()
    made = commands.made

    def later(*given: Any) -> Any:
        return replace(made(*given), date="2099-01-01T00:00:00Z")

    monkeypatch.setattr(commands, "made", later)
    capsys.readouterr()
    assert run_command(cli, "hwexec", ask) == 0
    assert (folder / "sweep.yaml").read_bytes() == before
    assert capsys.readouterr().out == (folder / "summary.txt").read_text()
    assert run_command(cli, "hwexec", [*ask[:-1], "1"]) == 0
    record = read_record(folder / "sweep.yaml", SWEEP)
    assert (record.provenance.date, record.predicted_by.date) == ("2099-01-01T00:00:00Z",) * 2


def test_points_on_other_gpus_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*gpus: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = run_command(cli, "hwexec", [*ASK, "--random", "0", "-d", *gpus])
        return code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("hwexec:")]

    assert told("0")[0] == 0
    kept = (folder / "sweep.yaml").read_bytes()
    for gpus in (("1",), ("1", "0")):
        said = f"hwexec: here/sweep.yaml: has plans on GPUs 0, and now it is {', '.join(gpus)}; go on with the same --gpus, "
        assert told(*gpus) == (2, [said + "start over with --force, or write elsewhere with --out"])
        assert (folder / "sweep.yaml").read_bytes() == kept
    assert told("0", "2")[0] == 0, "a partner more has more plans"
    assert told("0")[0] == 2


def test_a_wrong_name_among_many_is_told_before_anything_is_run_or_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli, "hwexec", [*ASK, "--model", "resnet5"]) == 2
    told = capsys.readouterr()
    assert "'resnet5': not known" in told.err
    assert "demand" not in told.err
    assert not folder.exists()


def test_what_was_run_before_an_interruption_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_entry, seen = sweep.run_entry, []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        seen.append(args)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return run_entry(*args)

    monkeypatch.setattr(sweep, "run_entry", interrupted)
    assert run_command(cli, "hwexec", list(ASK)) == 130
    assert len(read_record(folder / "sweep.yaml", SWEEP).points) == 2
    said = f"what ran is kept in {folder.name}/sweep.yaml; the same command goes on from there"
    assert said in capsys.readouterr().err.splitlines()


def test_one_command_at_a_time_goes_on_with_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second one had read the file before the first one wrote, and put it back without the first one's points."""
    run_case, told = sweep_command.run_case, list[tuple[int, str]]()

    def meanwhile(*given: Any) -> Any:
        if not told:
            capsys.readouterr()
            for args in ([*ASK], [*ASK, "--force"], AGAIN):
                told.append((run_command(cli, "hwexec", args), capsys.readouterr().err.splitlines()[-1]))
        return run_case(*given)

    monkeypatch.setattr(sweep_command, "run_case", meanwhile)
    assert run_command(cli, "hwexec", [*ASK, "--random", "0"]) == 0
    assert [code for code, _ in told] == [2, 2, 2]
    assert all("here: another hwexec sweep is writing there; wait for its end" in line for _, line in told)
    assert {p.name for p in folder.iterdir()} == {"sweep.yaml", "sweep.png", "summary.txt"}
    assert run_command(cli, "hwexec", [*ASK, "--random", "1"]) == 0, (
        "a command that has ended keeps nobody out"
    )


def test_on_the_cpu_no_times_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: CpuDevice(gpus))
    assert run_command(cli, "hwexec", [*ASK, "--random", "1"]) == 0
    points = read_record(folder / "sweep.yaml", SWEEP).points
    assert {(p.measured_ns, p.samples_ns, p.issued_ns) for p in points} == {(None, (), None)}
    assert all(0 < (p.predicted_issued_ns or 0) < p.predicted_ns for p in points), "what is predicted is kept"
    assert run_command(cli, "hwexec", AGAIN) == 0
    assert read_record(folder / "sweep.yaml", SWEEP).points == points
    assert {p.name for p in folder.iterdir()} == {"sweep.yaml"}
    assert summarise(points) is None


def test_a_sweep_of_plans_that_this_machine_cannot_run_does_not_speak_of_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: Any) -> None:
        raise InputError("no peer access")

    monkeypatch.setattr(sweep, "run_entry", none)
    assert run_command(cli, "hwexec", [*ASK, "--random", "0"]) == 0
    assert capsys.readouterr().out == "0 plans run, 0 with wrong answers.\n"


def test_random_plans_are_valid_and_follow_their_seed() -> None:
    machine, net = host(3), network(5_000_000, 0, (3_000_000, 100), 9_000_000)
    plans = [random_plan(net, machine, (0, 2), f"{seed}") for seed in range(60)]
    for plan in plans:
        lower(plan, net, machine)
    assert plans[7] == random_plan(net, machine, (0, 2), "7")
    assert len(set(plans)) > 40
    assert {plan.gpus for plan in plans} >= {(0, 2)}
    graphs = [plan for plan in plans if plan.launch is Launch.GRAPH]
    assert {(plan.head > 0) + (plan.head == len(plan.chunks)) + (plan.opening > 0) for plan in graphs} == {
        0,
        1,
        2,
        3,
    }


def test_a_sweep_makes_no_pauses_which_none_of_its_points_would_keep(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    pauses: list[float] = []
    monkeypatch.setattr(starts.time, "sleep", pauses.append)
    assert run_command(cli, "hwexec", [*ASK, "--random", "1"]) == 0
    assert len(read_record(folder / "sweep.yaml", SWEEP).points) > 3
    assert starts.PAUSE_S not in pauses


def test_a_graph_that_cannot_be_captured_is_kept_as_it_ran(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus, fail_at="capture"))
    assert run_command(cli, "hwexec", [*ASK, "--random", "2"]) == 0
    best = next(p for p in read_record(folder / "sweep.yaml", SWEEP).points if p.strategy == "best")
    assert (best.launch, best.plan.head, best.note[:6]) == (Launch.EAGER, 0, "eager:")
    plan = random_plan(network(5_000_000), host(1), (0,), "0")
    assert as_run(replace(plan, launch=Launch.GRAPH, head=1), Launch.EAGER).head == 0
