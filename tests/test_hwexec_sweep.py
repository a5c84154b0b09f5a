"""`hwexec sweep`: one file that the next call goes on from, random plans that are valid, and what the points say together."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwexec import bench, commands, sweep
from hwexec.cli import cli
from hwexec.cpu import CpuDevice
from hwexec.sweep import Point, random_plan
from hwexec.sweep_report import draw, summarise, summary_words
from sim.console import run_command
from sim.files import read_record
from sim.program import lower
from tests.builders import host, network
from tests.test_hwexec_verify import MODEL, Stopwatch

ASK = ("sweep", "--model", MODEL, "--host", "p3.8xlarge", "--runs", "1", "--out", "here")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "WAKE_S", 0.0)
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    return tmp_path / "here"


def test_a_second_call_goes_on_where_the_first_stopped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2", "--random", "1"]) == 0
    first = read_record(folder / "sweep.yaml", sweep.SWEEP).points
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
    out = capsys.readouterr().out
    assert "Kendall's tau" in out
    assert "regret" in out
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2", "--random", "2"]) == 0
    points = read_record(folder / "sweep.yaml", sweep.SWEEP).points
    assert points[: len(first)] == first
    assert [(p.strategy, p.links, p.number) for p in points[len(first) :]] == [
        ("random", 1, 1),
        ("random", 2, 1),
    ]


def test_points_of_another_seed_are_not_mixed_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, "hwexec", [*ASK, "--random", "0"]) == 0
    capsys.readouterr()
    assert run_command(cli, "hwexec", [*ASK, "--random", "0", "--seed", "1"]) == 2
    assert "start over with --force" in capsys.readouterr().err
    assert run_command(cli, "hwexec", [*ASK, "--random", "0", "--seed", "1", "--force"]) == 0


def test_what_was_run_before_an_interruption_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_entry, seen = sweep.run_entry, []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        seen.append(args)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return run_entry(*args)

    monkeypatch.setattr(sweep, "run_entry", interrupted)
    assert run_command(cli, "hwexec", list(ASK)) == 130
    assert len(read_record(folder / "sweep.yaml", sweep.SWEEP).points) == 2


def test_on_the_cpu_no_times_are_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: CpuDevice(gpus))
    assert run_command(cli, "hwexec", [*ASK, "--random", "1"]) == 0
    points = read_record(folder / "sweep.yaml", sweep.SWEEP).points
    assert {(p.measured_ns, p.samples_ns) for p in points} == {(None, ())}
    assert not (folder / "sweep.png").exists()
    assert summarise(points) is None


def test_random_plans_are_valid_and_follow_their_seed() -> None:
    machine, net = host(3), network(5_000_000, 0, (3_000_000, 100), 9_000_000)
    plans = [random_plan(net, machine, (0, 2), f"{seed}") for seed in range(60)]
    for plan in plans:
        lower(plan, net, machine)
    assert plans[7] == random_plan(net, machine, (0, 2), "7")
    assert len(set(plans)) > 40
    assert {plan.gpus for plan in plans} >= {(0, 2)}


def point(strategy: str, links: int, predicted: float, measured: float, *, match: bool = True) -> Point:
    return Point(
        "m", "fp32", 1, None, "d", "measured", links, strategy, 0, "graph", 1, 1, 0, match, predicted, measured, "", (measured,)
    )  # fmt: skip


def test_errors_ranks_and_regret() -> None:
    points = (
        point("best", 1, 1.9e6, 2.0e6),
        point("pt", 2, 3.0e6, 3.0e6),
        point("best", 2, 1.0e6, 1.1e6, match=False),
        point("random", 1, 2.2e6, 1.6e6),
    )
    found = summarise(points)
    assert found is not None
    (case,) = found.cases
    assert (found.points, found.mismatches) == (4, 1)
    assert found.median_error == pytest.approx((0.05 + 1 / 11) / 2)
    assert found.worst_error == pytest.approx(0.375)
    assert case.tau == pytest.approx(2 / 3)
    assert case.regrets == ((1, pytest.approx(1.25)), (2, 1.0))
    assert "regret 1.250 over 1, 1.000 over 2" in "\n".join(summary_words(found, "4 plans"))
    assert draw(points, "about").startswith(b"\x89PNG")
