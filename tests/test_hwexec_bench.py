"""`hwexec bench` as a command: what runs, what is waived, and what is kept where it is stopped. Nothing needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hwexec import bench, bench_record, commands, limit, starts
from hwexec.cli import cli, parse_gpus
from hwexec.cpu import CpuDevice
from hwexec.peers import PEERS, Peer, Ready, Scene
from hwexec.timing import Samples
from sim.cli import cli as sim_cli
from sim.console import run_command
from sim.errors import InputError
from sim.files import read_plan, read_record, write_plan
from tests.test_hwexec_verify import MODEL, Stopwatch

ON_CPU = ("bench", "--model", MODEL, "--device", "cpu")
ALL = ("warm", "demand", "pipeline", "pipeswitch", "dha", "pt", "pt+dha", "best", "best")


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Hwexec = Callable[..., Run]


@pytest.fixture
def hwexec(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hwexec:
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Run:
        code = run_command(cli, "hwexec", args)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


# The command


def test_every_strategy_on_the_cpu_gives_right_answers_and_no_times(hwexec: Hwexec) -> None:
    done = hwexec(*ON_CPU, "-d", "0", "2", "--runs", "2", "--out", "b.yaml")
    assert done.code == 0, done.err
    assert "times are no figures" in done.out
    assert " ms" not in done.out
    found = read_record("b.yaml", bench_record.BENCH)
    assert tuple(row.name for row in found.rows) == ALL
    assert [row.links for row in found.rows][-4:] == [2, 2, 1, 2]
    assert all(row.outputs_match and row.samples_ns == () and row.runs == 2 for row in found.rows)
    assert [row.name for row in found.rows if row.plan is None] == ["warm"], "others can be predicted again"
    assert {(row.predicted_ns, row.predicted_issued_ns) for row in found.rows} == {(None, None)}
    assert found.limits == ()


def with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads whose times are taken for figures, and little to wait for."""
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    monkeypatch.setattr(limit, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(starts, "WAKE_S", 0.0)


def test_rows_have_their_copies_alone_and_say_where_starts_scattered(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_figures(monkeypatch)
    monkeypatch.setattr(Samples, "noisy", True)
    said = (
        "bench",
        "--model",
        MODEL,
        "--host",
        "p3.8xlarge",
        "-d",
        "0,2",
        "-e",
        "warm,pt",
        "--runs",
        "3",
        "--peers",
    )
    assert hwexec(*said, "--out", "b.yaml").code == 0
    rows = {row.name: row for row in read_record("b.yaml", bench_record.BENCH).rows}
    assert {name: row.copies_ns is None for name, row in rows.items()} == {
        "warm": True,
        "pt": False,
        "peer:cuda": True,
    }
    assert (rows["pt"].copies_ns or 0) > 0
    assert (rows["pt"].lanes, rows["warm"].lanes) == (2, 1)
    assert all("taken 3 times, the steadiest kept" in row.note for row in rows.values())
    monkeypatch.setattr(Samples, "noisy", False)
    assert hwexec(*said, "--out", "b.yaml", "--force").code == 0
    assert not any("taken" in row.note for row in read_record("b.yaml", bench_record.BENCH).rows)


def test_json_has_the_keys_that_others_read(hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch) -> None:
    with_figures(monkeypatch)
    done = hwexec(
        "bench",
        "--model",
        MODEL,
        "--host",
        "p3.8xlarge",
        "-d",
        "0,2",
        "-e",
        "best,pt",
        "--runs",
        "2",
        "--json",
    )
    assert done.code == 0, done.err
    assert "not of this machine" in done.err
    found = json.loads(done.out)
    keys = [
        "model",
        "dtype",
        "batch",
        "seq",
        "gpus",
        "device",
        "warm_graph_ms",
        "limit_ms",
        "complete",
        "not_run",
        "waived",
        "results",
    ]
    assert list(found) == keys
    assert (found["complete"], found["not_run"], found["waived"]) == (True, [], {})
    assert set(found["limit_ms"]) == {"1", "2"}
    assert [(r["name"], r["links"]) for r in found["results"]] == [
        ("warm", 1),
        ("best", 1),
        ("best", 2),
        ("pt", 2),
    ]
    for row in found["results"]:
        keys = [
            "name",
            "links",
            "predicted_ms",
            "median_ms",
            "min_ms",
            "after_pause_ms",
            "runs",
            "runs_asked",
            "copied_bytes",
            "outputs_match",
            "note",
        ]
        assert list(row) == keys
        assert (row["runs"], row["runs_asked"]) == (2, 2)
        assert row["median_ms"] >= row["min_ms"] > 0
    assert min(found["limit_ms"].values()) >= found["warm_graph_ms"]


def test_a_plan_file_runs_beside_the_strategies(hwexec: Hwexec, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(sim_cli, "sim", ["search", "--model", MODEL, "--out", "plan.yaml"])
    capsys.readouterr()
    done = hwexec(*ON_CPU, "-e", "plan.yaml", "--runs", "1", "--json")
    assert [r["name"] for r in json.loads(done.out)["results"]] == ["warm", "best"]
    odd = hwexec("bench", "--model", "resnet18", "--device", "cpu", "-e", "plan.yaml")
    assert (odd.code, "batch 1, not for resnet18, fp32, batch 1; pass" in odd.err) == (2, True)
    file = read_plan("plan.yaml")
    write_plan("odd.yaml", replace(file, plan=replace(file.plan, chunks=())))
    odd = hwexec(*ON_CPU, "-e", "odd.yaml")
    assert (odd.code, "odd.yaml: plan 'best'" in odd.err) == (2, True), "it is none, whatever the machine has"


def test_plan_files_say_which_gpus_and_others_that_are_named_are_refused(
    hwexec: Hwexec, capsys: pytest.CaptureFixture[str]
) -> None:
    for gpus, path in (("0,2", "pair.yaml"), ("1", "one.yaml"), ("0,3", "other.yaml")):
        run_command(sim_cli, "sim", ["search", "--model", MODEL, "--gpus", gpus, "--out", path])
    capsys.readouterr()
    ask = (*ON_CPU, "--runs", "1", "--json")

    def gpus_of(*args: str) -> list[int]:
        done = hwexec(*ask, *args)
        assert done.code == 0, done.err
        return json.loads(done.out)["gpus"]  # type: ignore[no-any-return]

    assert gpus_of("-e", "warm") == [0]
    assert gpus_of("-e", "one.yaml") == [1]
    assert gpus_of("-e", "other.yaml,pair.yaml") == [0, 2, 3]
    assert gpus_of("-e", "pair.yaml", "-d", "0,1,2") == [0, 1, 2]
    assert gpus_of("-e", "pair.yaml", "--gpus", "0,1,2") == [0, 1, 2], "as sim and calibrate call it"
    for args, part in (
        (("-e", "pair.yaml", "-d", "0"), "pair.yaml: a plan for -d 0 2, not for -d 0; leave -d out"),
        (("-e", "pair.yaml", "-d", "2", "0"), "a plan for -d 0 2, not for -d 2 0"),
        (("-e", "warm,one.yaml", "-d", "0"), "one.yaml: a plan for -d 1, not for -d 0"),
        (("-e", "pair.yaml,one.yaml"), "one.yaml: a plan for GPU 1, and pair.yaml is one for GPU 0"),
    ):
        done = hwexec(*ask, *args)
        assert (done.code, done.out) == (2, "")
        assert part in done.err.splitlines()[-1]


def test_plan_files_of_one_name_are_told_apart_by_their_paths(
    hwexec: Hwexec, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(sim_cli, "sim", ["search", "--model", MODEL, "--gpus", "0", "--out", "a.yaml"])
    file = read_plan("a.yaml")
    write_plan("b.yaml", file)
    write_plan("c.yaml", replace(file, plan=replace(file.plan, name="warm")))
    write_plan("d.yaml", replace(file, plan=replace(file.plan, name="mine")))
    capsys.readouterr()

    def rows(strategies: str) -> list[str]:
        done = hwexec(*ON_CPU, "--runs", "1", "--json", "-e", strategies)
        return [row["name"] for row in json.loads(done.out)["results"]]

    assert rows("best,a.yaml,a.yaml,d.yaml") == ["warm", "best", "best (a.yaml)", "mine"]
    assert rows("a.yaml,b.yaml,c.yaml") == ["warm", "best (a.yaml)", "best (b.yaml)", "warm (c.yaml)"]


def test_fewer_runs_than_asked_for_are_told_with_the_reason(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BUDGET_S", 0.0)
    monkeypatch.setattr(bench, "PEER_BUDGET_S", 0.0)
    ask = (*ON_CPU, "-e", "dha", "--peers", "--runs", "5")
    done = hwexec(*ask, "--out", "b.yaml")
    assert "dha, 1 link: done (3 of 5 runs)" in done.err
    assert "dha: 3 of 5 runs, since those of a row may take 0 s together" in done.out
    assert "3 of 5 runs, since a peer gets 10 at most and 0 s for them" in done.out
    assert [line.count("3 of 5") for line in done.out.splitlines() if "equal" in line] == [1, 1, 1]
    rows = read_record("b.yaml", bench_record.BENCH).rows
    assert {(row.runs, row.asked, "3 of 5 runs" in row.note) for row in rows} == {(3, 5, True)}
    found = json.loads(hwexec(*ask, "--json").out)["results"]
    assert {(r["runs"], r["runs_asked"], "3 of 5 runs" in r["note"]) for r in found} == {(3, 5, True)}
    monkeypatch.setattr(bench, "BUDGET_S", 60.0)
    assert " of " not in hwexec(*ON_CPU, "-e", "dha", "--runs", "4").err


@pytest.mark.parametrize(
    ("how", "code", "why"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("the GPU is lost\nand more"), None, "RuntimeError: the GPU is lost"),
    ],
)
def test_what_had_run_before_a_bench_was_stopped_is_kept_and_shown(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch, how: BaseException, code: int | None, why: str
) -> None:
    run_entry = bench.run_entry

    def stopped(task: bench.Task, entry: bench.Entry, *given: Any) -> bench_record.Row:
        if entry.label == "best over 1":
            raise how
        return run_entry(task, entry, *given)

    monkeypatch.setattr(bench, "run_entry", stopped)
    ask = (
        *ON_CPU,
        "-d",
        "0,2",
        "-e",
        "dha,best",
        "--runs",
        "1",
        "--peers",
    )
    for args in (("--out", "b.yaml"), ("--json",)):
        if code is None:
            with pytest.raises(RuntimeError, match="the GPU is lost"):
                hwexec(*ask, *args)
        else:
            done = hwexec(*ask, *args)
            assert (done.code, done.err.splitlines()[-1]) == (code, "hwexec: interrupted")
            if args == ("--json",):
                found = json.loads(done.out)
                assert (found["complete"], len(found["results"]), len(found["not_run"])) == (False, 2, 6)
            else:
                assert (
                    "INCOMPLETE: interrupted; still to run were best over 1, best over 2, peer:cuda"
                    in done.out
                )
                assert "wrote b.yaml, incomplete" in done.err
    kept = read_record("b.yaml", bench_record.BENCH)
    assert [row.name for row in kept.rows] == ["warm", "dha"]
    assert (kept.stopped, kept.not_run[:2]) == (why, ("best over 1", "best over 2"))


def test_rows_that_can_no_longer_be_written_are_shown_all_the_same(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_entry = bench.run_entry

    def meanwhile(*given: Any) -> bench_record.Row:
        Path("b.yaml").write_text("another's")
        return run_entry(*given)

    monkeypatch.setattr(bench, "run_entry", meanwhile)
    done = hwexec(*ON_CPU, "-e", "dha", "--runs", "1", "--out", "b.yaml")
    assert (done.code, done.err.splitlines()[-1]) == (
        2,
        "hwexec: b.yaml: exists; choose another path or pass --force",
    )
    assert "dha" in done.out
    assert Path("b.yaml").read_text() == "another's"


def test_a_bench_that_is_stopped_before_its_first_row_leaves_nothing(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_entry", stopped)
    done = hwexec(*ON_CPU, "--out", "b.yaml")
    assert (done.code, done.out, Path("b.yaml").exists()) == (130, "", False)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (("-e", ""), "names no strategy; leave -e out for all"),
        (("-e", "pipelined"), "nearest: pipeline"),
        (("-d", "7"), "GPUs 0 to 3"),
        (("-d", "0", "best"), "strategies as -e best"),
        (("-d", "0", "0"), "named twice"),
        (("--out", "no/such/folder.yaml"), "there is no folder"),
        (("--model", "resnet5"), "nearest"),
    ],
)
def test_bad_options_are_one_line(hwexec: Hwexec, args: tuple[str, ...], part: str) -> None:
    done = hwexec(*ON_CPU, "--runs", "1", *args)
    assert (done.code, done.out) == (2, "")
    assert part in done.err.splitlines()[-1]


def test_a_machine_that_nobody_knows(hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    done = hwexec("bench", "--model", MODEL)
    assert (done.code, "calibrate run" in done.err, "--host" in done.err) == (2, True, True)


def test_gpus() -> None:
    assert parse_gpus(("0", "1")) == parse_gpus(("0,1",)) == (0, 1)
    with pytest.raises(InputError):
        parse_gpus(("-1",))


def test_without_a_partner_parallel_transmission_is_waived(hwexec: Hwexec) -> None:
    done = hwexec(*ON_CPU, "-e", "pt,best", "--runs", "1")
    assert done.code == 0
    assert "waived: pt (it needs a second GPU" in done.out


def test_a_plan_that_the_machine_cannot_run_is_waived_alone(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    strangers = frozenset({(2, 0)})
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: CpuDevice(gpus, strangers=strangers))
    done = hwexec(*ON_CPU, "-d", "0", "2", "-e", "pt,pipeline", "--runs", "1")
    assert done.code == 0
    assert "waived: pt (GPU 0 cannot read GPU 2's memory" in done.out
    assert "pipeline" in done.out


def test_of_two_best_plans_the_one_that_cannot_run_is_waived_by_its_links(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_entry = bench.run_entry

    def refused(task: bench.Task, entry: bench.Entry, *given: Any) -> bench_record.Row:
        if (entry.name, entry.links) == ("best", 2):
            raise InputError("no room")
        return run_entry(task, entry, *given)

    monkeypatch.setattr(bench, "run_entry", refused)
    done = hwexec(
        *ON_CPU,
        "-d",
        "0",
        "2",
        "-e",
        "best",
        "--runs",
        "1",
        "--out",
        "b.yaml",
    )
    assert done.code == 0
    assert "waived: best over 2 (no room)" in done.out
    found = read_record("b.yaml", bench_record.BENCH)
    assert [row.label for row in found.rows] == ["warm", "best over 1"]
    assert [(waived.name, waived.reason) for waived in found.waived] == [("best over 2", "no room")]


def test_a_peer_that_fails_is_waived_with_its_reason(hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def broken(given: Scene) -> Iterator[Ready]:
        def call() -> Any:
            given.module.table.weight.data = torch.zeros(1)  # type: ignore[union-attr]
            raise RuntimeError("no such luck\nand more")

        yield Ready(lambda: None, call, "broken 1.0")

    @contextmanager
    def wrong(given: Scene) -> Iterator[Ready]:
        yield Ready(lambda: None, lambda: given.module(*given.inputs) * 2, "wrong 1.0")

    made = (Peer("peer:broken", "", broken), Peer("peer:wrong", "", wrong), PEERS[0])
    monkeypatch.setattr(bench, "PEERS", made)
    done = hwexec(*ON_CPU, "-e", "best", "--peers", "--runs", "1")
    assert "waived: peer:broken (RuntimeError: no such luck)" in done.out
    assert done.code == 1  # the wrong one's answer differs
    assert [line.split()[1] for line in done.out.splitlines() if "peer:" in line and "DIFFERENT" in line] == [
        "peer:wrong"
    ]
