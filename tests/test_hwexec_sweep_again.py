"""`hwexec sweep --again`: every kept plan predicted by the present model without a GPU, and what each mechanism of it buys."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from hwexec import commands
from hwexec.ablate import ABLATION, MECHANISMS, Model
from hwexec.cli import cli
from hwexec.sweep import SWEEP, Point, SweepRecord, random_plan
from hwexec.sweep_report import summarise
from sim.baselines import BASELINES, Setting
from sim.catalog import Request, find_host, obtain_profile, profile_name
from sim.console import run_command
from sim.files import (
    read_record,
    write_host,
    write_profile,
    write_record,
)
from sim.host import Costs
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import Timing
from tests.builders import figure, host, network, profile
from tests.sweeping import AGAIN, ASK, folder_in
from tests.test_hwexec_verify import MODEL, Stopwatch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return folder_in(tmp_path, monkeypatch)


# Predicted again


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> SweepRecord:
    """A sweep's record, on a machine that has no device from now on."""
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2", "--random", "2", *more]) == 0

    def none(*_: object) -> None:
        raise AssertionError("a device was opened")

    monkeypatch.setattr(commands, "open_device", none)
    return read_record(folder / "sweep.yaml", SWEEP)


def without_predictions(points: tuple[Point, ...]) -> list[Point]:
    return [replace(p, predicted_ns=0.0, predicted_issued_ns=None) for p in points]


def test_again_needs_no_device_and_predicts_alike_while_the_model_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = swept(folder, monkeypatch)
    capsys.readouterr()
    assert run_command(cli, "hwexec", AGAIN) == 0
    again = read_record(folder / "sweep.yaml", SWEEP)
    assert replace(again, predicted_by=first.predicted_by) == first
    assert again.predicted_by.inputs == (f"host:{first.host_digest}",)
    bought = read_record(folder / "ablation.yaml", ABLATION)
    assert {row.without for row in bought.rows} == {None, *MECHANISMS}
    assert bought.measured_by == first.provenance
    assert bought.rows[0].errors == summarise(first.points).errors  # type: ignore[union-attr]
    out = capsys.readouterr().out
    assert "with one mechanism of the model off" in out
    assert (folder / "summary.txt").read_text() == out


def test_what_a_host_takes_to_issue_is_predicted_again_where_nobody_looked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = swept(folder, monkeypatch)
    assert all(p.issued_ns and p.predicted_issued_ns for p in first.points)
    before = tuple(replace(p, issued_ns=None, predicted_issued_ns=None) for p in first.points)
    write_record(folder / "sweep.yaml", SWEEP, replace(first, points=before), force=True)
    assert run_command(cli, "hwexec", AGAIN) == 0
    again = read_record(folder / "sweep.yaml", SWEEP).points
    assert again == tuple(replace(p, issued_ns=None) for p in first.points)
    found = summarise(again)
    assert found is not None
    assert found.by_pace == (), "a prediction alone says nothing of the host's pace"


def test_a_sweep_that_was_cut_off_is_never_taken_for_a_whole_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(folder, monkeypatch)
    file = folder / "sweep.yaml"
    points = file.read_text().split("\n- ")  # whole points that end where the next begins
    for count in range(1, len(points)):
        file.write_text(cut := "\n- ".join(points[:count]) + "\n")
        capsys.readouterr()
        assert run_command(cli, "hwexec", AGAIN) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert file.read_text() == cut


def test_again_takes_new_constants_and_leaves_what_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = swept(folder, monkeypatch)
    shipped = find_host("p3.8xlarge")
    slower = replace(shipped, costs=replace(shipped.costs, copy_latency_ns=figure(1e6)))
    write_host("slower.yaml", slower)
    capsys.readouterr()
    assert run_command(cli, "hwexec", [*AGAIN, "--host", "slower.yaml"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "sweep.yaml: planned by other constants of p3.8xlarge than those that it is predicted by now;" in said
    )
    again = read_record(folder / "sweep.yaml", SWEEP)
    assert again.host_digest == slower.digest != first.host_digest
    assert without_predictions(again.points) == without_predictions(first.points)
    assert all(b.predicted_ns > a.predicted_ns for a, b in zip(first.points, again.points, strict=True))
    assert again.provenance == first.provenance
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    capsys.readouterr()
    assert run_command(cli, "hwexec", [*ASK, "-d", "0", "2"]) == 2  # constants are never mixed
    assert "with --again" in capsys.readouterr().err


def test_a_folder_of_profiles_without_the_one_that_is_needed_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swept(folder, monkeypatch)
    before = (folder / "sweep.yaml").read_bytes()
    Path("empty").mkdir()
    capsys.readouterr()
    assert run_command(cli, "hwexec", [*AGAIN, "--profiles", "empty"]) == 2
    assert "--profiles empty: has no " in capsys.readouterr().err
    assert (folder / "sweep.yaml").read_bytes() == before


def test_again_takes_profiles_from_a_folder_and_says_which(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = swept(folder, monkeypatch)
    request = Request(MODEL, 1, "fp32")
    known = obtain_profile(find_host("p3.8xlarge"), request)
    slower = replace(known, layers=tuple(replace(t, resident=Timing(1e7)) for t in known.layers))
    Path("cal").mkdir()
    write_profile(Path("cal", profile_name(request, None)), slower)
    assert run_command(cli, "hwexec", [*AGAIN, "--profiles", "cal"]) == 0
    again = read_record(folder / "sweep.yaml", SWEEP)
    assert all(p.predicted_ns > 1e7 * len(known.layers) for p in again.points)
    assert without_predictions(again.points) == without_predictions(first.points)
    assert [text.partition(":")[0] for text in again.predicted_by.inputs] == ["host", "profile"]


def test_again_refuses_another_network_and_an_estimate_where_a_measured_profile_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = swept(folder, monkeypatch)
    one, plan = first.points[0], first.points[0].plan
    for odd, words in (
        (replace(one, network_digest="0" * 64), "another network in its profile"),
        (replace(one, profile_kind="measured"), "none ships for p3.8xlarge"),
        (replace(one, plan=replace(plan, access="c1")), "access for 1 reads"),
        (replace(one, plan=replace(plan, chunks="")), "no chunks bring all of it"),
    ):
        write_record(
            folder / "sweep.yaml", SWEEP, replace(first, points=(odd, *first.points[1:])), force=True
        )
        before = (folder / "sweep.yaml").read_bytes()
        capsys.readouterr()
        assert run_command(cli, "hwexec", AGAIN) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "tests.test_hwexec_verify:toy, fp32, batch 1" in said
        assert (folder / "sweep.yaml").read_bytes() == before
        assert not (folder / "ablation.yaml").exists()


def test_code_that_a_sweep_names_runs_only_where_the_user_names_it_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = swept(folder, monkeypatch)
    Path("planted.py").write_text("open('ran', 'w')\n")
    named = replace(first, points=tuple(replace(p, model="planted:toy") for p in first.points))
    write_record(folder / "sweep.yaml", SWEEP, named, force=True)

    def said(*args: str) -> str:
        capsys.readouterr()
        assert run_command(cli, "hwexec", ["sweep", "--again", "here", *args]) == 2
        return capsys.readouterr().err

    assert (
        "made for planted:toy, which would be imported and called to trace it; pass --model planted" in said()
    )
    assert f"--model {MODEL}: here/sweep.yaml has plans of planted:toy alone" in said("--model", MODEL)
    Path("empty").mkdir()
    assert "--profiles empty: has no planted-toy" in said("--profiles", "empty"), "and then none is imported"
    assert not Path("ran").exists()
    assert "'planted' has no 'toy'" in said("--model", "planted:toy")
    assert Path("ran").exists()
    write_record(folder / "sweep.yaml", SWEEP, replace(first, host="./slower.yaml"), force=True)
    assert "host './slower.yaml', which does not ship; pass its file with --host" in said("--model", MODEL)


def test_again_takes_no_option_that_says_what_to_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*args: str) -> str:
        assert run_command(cli, "hwexec", ["sweep", *args]) == 2
        return capsys.readouterr().err

    assert "leave out GPUs, --runs" in said("--again", "here", "--runs", "3", "--model", "m", "1")
    assert "there is no such file" in said("--again", "nowhere")
    assert "Missing option '--model'" in said("--out", "here")
    assert "Missing option '--out'" in said("--model", MODEL)
    assert "--seq 4: none of the models is an hf: one" in said(*ASK[1:], "--seq", "4")
    assert "--profiles nowhere: there is no such folder" in said(*ASK[1:], "--profiles", "nowhere")
    assert not folder.exists()


# What each mechanism buys


def test_without_sharing_every_flow_has_its_whole_link() -> None:
    net, machine = network(5000, 10_000), host(1)
    whole = Model(machine, profile(net, machine, run=1000, direct=5000))
    chunk = Chunk(net.offsets[1], net.arena_bytes, (0,))
    plan = Plan("both", 0, Launch.GRAPH, ((Access.DIRECT,), (Access.COPIED,)), (chunk,))
    padding = chunk.size_bytes - 10_000
    assert whole.predict(plan).makespan_ns == pytest.approx(5000 + 10_000 + padding + 1000)
    assert MECHANISMS["sharing"](whole).predict(plan).makespan_ns == pytest.approx(10_000 + padding + 1000)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_that_is_off_changes_some_prediction(name: str) -> None:
    costs = Costs(**{f.name: figure(0.5 if f.name == "direct_weight" else 1000) for f in fields(Costs)})
    # 1000 would be just what a read in place gains by a copy's share of the link for its first stretch
    costs = replace(costs, direct_busy_ns=figure(3000))
    net = network(*[60_000] * 8)
    machine = host(2, costs=costs)
    # layers so long that some copies land while none of them waits: what is slowed then makes the whole later
    own = {name: figure(2000) for name in ("wait", "wait_beside", "launch", "hook", "relay", "start")}
    whole = Model(machine, replace(profile(net, machine, run=20_000), slowed=figure(0.5), **own))
    lacks = MECHANISMS[name](whole)
    plans = [random_plan(net, machine, (0, 1), f"{seed}") for seed in range(8)]
    plans += [b.make(Setting(whole.profile, machine, 0, 1)) for b in BASELINES]
    access = (*[(Access.DIRECT,)] * 7, (Access.COPIED,))
    chunk = Chunk(net.offsets[7], net.arena_bytes, (0,))
    plans.append(Plan("mostly in place", 0, Launch.GRAPH, access, (chunk,)))
    assert any(lacks.predict(plan).makespan_ns != whole.predict(plan).makespan_ns for plan in plans)
    assert MECHANISMS[name](lacks) == lacks
    off = {
        "wait": ("wait", "wait_beside"),
        "launch": ("launch",),
        "issue": ("hook", "relay"),
        "start": ("start",),
    }
    for figure_of in own:
        told = getattr(lacks.profile, figure_of)
        assert told.value == (0 if figure_of in off.get(name, ()) else 2000)
