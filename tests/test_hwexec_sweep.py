"""`hwexec sweep`: one file that the next call goes on from, random plans that are valid, and what the points say together."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwexec import bench, commands, sweep, sweep_command
from hwexec.ablate import ABLATION, MECHANISMS, UNCHARGED, AblationRecord, Model, ablation, ablation_parts
from hwexec.cli import cli
from hwexec.cpu import CpuDevice
from hwexec.sweep import SWEEP, Point, SweepRecord, as_run, random_plan
from hwexec.sweep_plan import KeptPlan, keep
from hwexec.sweep_report import as_text, draw, summarise, summary_parts
from sim.baselines import BASELINES, Setting
from sim.catalog import Request, find_host, obtain_profile, profile_name
from sim.console import run_command
from sim.errors import InputError
from sim.files import (
    FileKind,
    format_record,
    parse_record,
    read_record,
    write_host,
    write_profile,
    write_record,
)
from sim.host import Costs
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.profile import Provenance, Timing
from sim.program import lower
from tests import golden
from tests import strategies as some
from tests.builders import figure, host, network, profile
from tests.test_hwexec_verify import MODEL, Stopwatch

ASK = ("sweep", "--model", MODEL, "--host", "p3.8xlarge", "--runs", "1", "--out", "here")
AGAIN = ("sweep", "--again", "here", "--model", MODEL)


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
    assert {(p.measured_ns, p.samples_ns) for p in points} == {(None, ())}
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


def test_a_graph_that_cannot_be_captured_is_kept_as_it_ran(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus, fail_at="capture"))
    assert run_command(cli, "hwexec", [*ASK, "--random", "2"]) == 0
    best = next(p for p in read_record(folder / "sweep.yaml", SWEEP).points if p.strategy == "best")
    assert (best.launch, best.plan.head, best.note[:6]) == (Launch.EAGER, 0, "eager:")
    plan = random_plan(network(5_000_000), host(1), (0,), "0")
    assert as_run(replace(plan, launch=Launch.GRAPH, head=1), Launch.EAGER).head == 0


# Plans as they are kept

KEPT = FileKind("kept", 1, KeptPlan)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_plan_comes_back_from_its_text(data: st.DataObject) -> None:
    machine, net = data.draw(some.hosts()), data.draw(some.networks())
    plan = data.draw(some.plans(net, machine))
    kept = parse_record(format_record(KEPT, keep(plan)).encode(), KEPT)
    assert kept.plan(net) == plan


def test_kept_plans_can_be_read_by_eye_and_lose_nothing() -> None:
    access = ((Access.COPIED,), (Access.COPIED, Access.DIRECT), (), (Access.PEER,))
    chunks = (Chunk(0, 512, (0,)), Chunk(512, 768, (2, 0)), Chunk(1024, 2048, (2,)))
    kept = keep(Plan("odd", 0, Launch.GRAPH, access, chunks, head=1))
    assert (kept.access, kept.chunks) == ("c2 d1 p1", "+512 +256@2>0 1024+1024@2")
    assert [f.name for f in fields(KeptPlan)] == [
        "name",
        "target",
        "launch",
        "sync",
        "head",
        "access",
        "chunks",
        "opening",
    ]
    assert {f.name for f in fields(KeptPlan)} == {f.name for f in fields(Plan)}


def test_a_kept_plan_of_another_network_or_with_odd_words_is_refused() -> None:
    kept = keep(random_plan(network(512, 512), host(1), (0,), "0"))
    with pytest.raises(InputError, match="access for 2 reads, but test has 3"):
        kept.plan(network(512, 512, 512))
    with pytest.raises(InputError, match="'x3' in its access; words there are as in 'c4 d1 c12'"):
        replace(kept, access="c1 x3")
    with pytest.raises(InputError, match="'12' in its chunks"):
        replace(kept, chunks="12")


def test_six_hundred_plans_of_four_hundred_layers_stay_within_a_few_mib() -> None:
    net, machine = network(*((400_000, 2_000) for _ in range(400))), host(2)
    plans = [keep(random_plan(net, machine, (0, 1), f"{seed}")) for seed in range(30)]
    one = point("random", 1, 1.0, 1.0)
    points = tuple(replace(one, number=at, plan=plan) for at, plan in enumerate(plans))
    text = format_record(SWEEP, record(points)).encode()
    assert len(text) * 600 / 30 < 3 * 2**20
    assert parse_record(text, SWEEP).points == points


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
    assert run_command(cli, "hwexec", [*AGAIN, "--host", "slower.yaml"]) == 0
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
    whole = Model(machine, replace(profile(net, machine, run=20_000), slowed=figure(0.5)))
    lacks = MECHANISMS[name](whole)
    plans = [random_plan(net, machine, (0, 1), f"{seed}") for seed in range(8)]
    plans += [b.make(Setting(whole.profile, machine, 0, 1)) for b in BASELINES]
    access = (*[(Access.DIRECT,)] * 7, (Access.COPIED,))
    chunk = Chunk(net.offsets[7], net.arena_bytes, (0,))
    plans.append(Plan("mostly in place", 0, Launch.GRAPH, access, (chunk,)))
    assert any(lacks.predict(plan).makespan_ns != whole.predict(plan).makespan_ns for plan in plans)
    assert MECHANISMS[name](lacks) == lacks


# What the points say together

MADE = Provenance("test", "GPU X", "hwexec sweep", "2026-01-01T00:00:00Z", "0" * 40)


def point(
    strategy: str,
    links: int,
    predicted: float,
    measured: float,
    *,
    match: bool = True,
    model: str = "m",
    launch: Launch = Launch.GRAPH,
) -> Point:
    plan = KeptPlan(strategy, 0, launch, Sync.STREAM, 0, "c1", "+1")
    return Point(
        model, "fp32", 1, None, "d", "measured", links, strategy, 0, 1, 1, 0, match, predicted, measured, "", plan, (measured,)
    )  # fmt: skip


def record(points: tuple[Point, ...]) -> SweepRecord:
    return SweepRecord("pair", "0" * 64, "cuda", True, 0, MADE, MADE, points)


POINTS = (
    point("best", 1, 1.9e6, 2.0e6),
    point("pt", 2, 3.0e6, 3.0e6, launch=Launch.EAGER),
    point("best", 2, 1.0e6, 1.1e6, match=False),
    point("random", 1, 2.2e6, 1.6e6),
)
"""Of one network; the search picked wrongly over one link."""


def test_errors_ranks_and_regret() -> None:
    found = summarise(POINTS)
    assert found is not None
    (case,) = found.cases
    assert (found.errors.points, found.mismatches) == (4, 1)
    assert found.errors.median == pytest.approx((0.05 + 1 / 11) / 2)
    assert found.errors.worst == pytest.approx(0.375)
    assert case.errors.tau == pytest.approx(2 / 3)
    assert case.regrets == ((1, pytest.approx(1.25)), (2, 1.0))
    assert [(launch, errors.points, errors.tau) for launch, errors in found.by_launch] == [
        (Launch.GRAPH, 3, pytest.approx(1 / 3)),
        (Launch.EAGER, 1, None),
    ]
    assert found.by_pace == ()
    assert draw(POINTS, "about").startswith(b"\x89PNG")


def test_prints_of_summary_and_ablation() -> None:
    good = tuple(
        point(name, links, 1e6 * at, 1e6 * at * 1.01, model="n")
        for at, (name, links) in enumerate((("best", 2), ("best", 1), ("pt", 2), ("dha", 1)), 2)
    )
    points = (*POINTS, *(replace(p, plan=good[0].plan) for p in good))
    # two that the host issued as fast as predicted, one that it did not, and five when nobody looked
    paced = zip(points[:3], (1_000.0, 1_250.0, 1_260.0), strict=True)
    points = (*(replace(p, issued_ns=ns, predicted_issued_ns=1_000.0) for p, ns in paced), *points[3:])
    found = summarise(points)
    assert found is not None
    off = [replace(p, predicted_ns=0.8 * p.predicted_ns) for p in points]
    rows = tuple(ablation((points, *(off for _ in MECHANISMS))))[: 3 * 3]
    bought = AblationRecord("pair", "0" * 64, MADE, MADE, UNCHARGED, rows)
    parts = (*summary_parts(found, "8 plans on pair (GPU X)"), *ablation_parts(bought))
    golden.compare("hwexec_sweep", as_text(*parts))


def test_a_target_is_met_or_not_by_what_was_found_unrounded() -> None:
    def verdicts(points: tuple[Point, ...]) -> list[str]:
        found = summarise(points)
        assert found is not None
        lines = as_text(*summary_parts(found, "some")).splitlines()
        at = next(i for i, line in enumerate(lines) if "median absolute error" in line)
        return [line.split("│")[4].strip() for line in lines[at : at + 5]]

    exact = tuple(point(n, 1, p, 100.0) for n, p in (("best", 102.9), ("pt", 97.1), ("dha", 109.9)))
    assert verdicts(exact)[:2] == ["met", "met"]
    off = tuple(replace(p, predicted_ns=103.001) for p in exact[:2])
    assert verdicts((*off, *exact[2:]))[:2] == ["not met", "met"]
    assert verdicts(exact[1:2]) == ["met", "met", "met", "-", "-"]
