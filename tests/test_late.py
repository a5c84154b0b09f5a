"""Best plans that come late for no known cause: what `hwexec bench` finds out about them in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hwexec import bench, commands, late, limit, starts
from hwexec.bench_record import BENCH, BenchReport, Looked, Row
from hwexec.cli import cli
from hwexec.cpu import OutOfMemory
from hwexec.peers import Peer, Ready, Scene
from hwexec.verify import OpRow
from sim.console import run_command
from sim.files import read_record
from sim.ops import Copy, Run
from sim.plan import Chunk
from sim.program import lower
from tests.builders import copied, host, network
from tests.test_hwexec_verify import MODEL, Stopwatch

# In a bench


@pytest.fixture
def benched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BenchReport]:
    """`hwexec bench` on threads whose times are taken for figures, where the best plan over two links comes late."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    monkeypatch.setattr(limit, "PROBE_BYTES", 2**20)
    monkeypatch.setattr(starts, "WAKE_S", 0.0)
    monkeypatch.setattr(late, "is_late", lambda row, *_: (row.name, row.links) == ("best", 2))

    def run(*more: str, code: int = 0) -> BenchReport:
        args = ("bench", "--model", MODEL, "--host", "p3.8xlarge", "-d", "0,2", "-e", "best", "--runs", "3")
        assert run_command(cli, "hwexec", (*args, "--out", "b.yaml", *more)) == code
        return read_record("b.yaml", BENCH)

    return run


def test_a_late_plan_is_prepared_anew_timed_and_watched_after_all_else(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    story: list[str] = []
    trace, gated = Stopwatch.trace, late._gated_ns

    def watched(device: Stopwatch, call: Callable[[], None]) -> Any:
        story.append("watched")
        return trace(device, call)

    @contextmanager
    def peer(scene: Scene) -> Iterator[Ready]:
        story.append("peer")
        yield Ready(lambda: None, lambda: scene.module(*scene.inputs), "1.0")

    monkeypatch.setattr(Stopwatch, "trace", watched)
    monkeypatch.setattr(late, "_gated_ns", lambda *given: (story.append("gated"), gated(*given))[1])
    monkeypatch.setattr(bench, "PEERS", (Peer("peer:one", "", peer),))
    report = benched("--peers")
    assert story == ["peer", "gated", "watched"], "the profiler slows whatever follows it"
    (look,) = report.looked
    assert (look.name, look.links, len(look.samples_ns), look.note) == ("best", 2, 3, "")
    row = next(row for row in report.rows if (row.name, row.links) == ("best", 2))
    assert look.predicted_ns == row.predicted_ns
    assert look.predicted_issued_ns == row.predicted_issued_ns
    assert min(look.issued_ns or 0, look.gated_ns or 0, look.watched_ns or 0) > 0
    assert {op.kind for op in look.ops} == {"copy", "run"}
    said = " ".join(capsys.readouterr().out.split())
    assert "Looked into best over 2: prepared anew it took" in said


def test_a_plan_in_time_is_not_looked_into(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(*_: object) -> None:
        raise AssertionError("nothing is to be looked into")

    monkeypatch.setattr(late, "is_late", lambda row, *_: False)
    monkeypatch.setattr(Stopwatch, "trace", watched)
    assert benched().looked == ()


def test_what_an_estimate_says_makes_no_plan_late(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(late, "is_late", lambda row, rates, kind: kinds.append(kind) is not None)
    assert benched().looked == ()
    assert set(kinds) == {"estimated"}


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (OutOfMemory("no 5 bytes left"), "ended early: out of GPU memory (no 5 bytes left)"),
        (RuntimeError("no such luck\nand more"), "ended early: RuntimeError: no such luck"),
    ],
)
def test_what_fails_in_a_look_ends_it_alone(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch, error: Exception, note: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Stopwatch, "trace", fails)
    report = benched()
    (look,) = report.looked
    assert look.note.startswith(note)
    assert (len(look.samples_ns), look.watched_ns, look.ops) == (3, None, ())
    assert (report.stopped, len(report.rows)) == ("", 3)
    monkeypatch.setattr(late, "start_cold", fails)
    (look,) = benched("--force").looked
    assert (look.samples_ns, look.note.startswith(note)) == ((), True)


def test_a_wrong_answer_in_a_look_fails_the_bench(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = late.start_cold

    def differs(*given: Any, **more: Any) -> starts.Starts:
        return replace(started(*given, **more), worst=starts.Likeness(False, 1e-6))

    monkeypatch.setattr(late, "start_cold", differs)
    report = benched(code=1)
    assert all(row.outputs_match for row in report.rows)
    (look,) = report.looked
    assert (look.outputs_match, look.note) == (False, "answers DIFFER")


def test_a_second_look_says_that_the_profiler_came_before_it(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "is_late", lambda row, *_: row.name == "best")
    assert [(look.links, look.note) for look in benched().looked] == [
        (1, ""),
        (2, "timed after another look, whose profiler slows launches"),
    ]


def test_an_interrupted_look_leaves_all_that_was_measured(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stopwatch, "trace", stopped)
    report = benched(code=130)
    assert [(row.name, row.links) for row in report.rows] == [("warm", 1), ("best", 1), ("best", 2)]
    assert (report.stopped, report.not_run, report.looked) == (
        "interrupted",
        ("a look into best over 2",),
        (),
    )


def test_a_plan_that_is_eager_this_time_is_not_watched(
    benched: Callable[..., BenchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, made = bench._prepared, []

    def other(task: Any, plan: Any, device: Stopwatch, inputs: Any) -> Any:
        made.append(plan)
        if len(made) == 4:  # warm, best over 1, best over 2, the look
            device._fault, device._countdown = "capture", 1
        return prepared(task, plan, device, inputs)

    monkeypatch.setattr(bench, "_prepared", other)
    (look,) = benched().looked
    assert look.note.startswith("eager this time: layer 0")
    assert (len(look.samples_ns), look.gated_ns, look.watched_ns) == (3, None, None)


# Which rows


def test_where_times_are_no_figures_nothing_is_late() -> None:
    row = Row("best", 2, "graph", 1, 0, 1e6, None, True, True, 0.0, "", 3, ())
    assert not late.is_late(row, (1e9, 1e9), "measured")


def test_late_is_what_took_six_hundredths_longer_than_measured_times_say() -> None:
    row = Row("best", 2, "graph", 1, 0, 1e6, None, True, True, 0.0, "", 3, (1.07e6,) * 3)
    assert late.is_late(row, (1e9, 1e9), "measured")
    assert not late.is_late(replace(row, samples_ns=(1.05e6,) * 3), (1e9, 1e9), "measured")
    assert not late.is_late(row, (1e9, 1e9), "estimated")


def test_what_host_and_links_took_longer_is_no_riddle() -> None:
    """A start that was to take 10 ms and took 11.2, its 550 MB over a lane of 55 GB/s."""
    row = Row("best", 1, "graph", 550_000_000, 0, 1e7, None, True, True, 0.0, "", 3, (1.12e7,) * 3)

    def unknown(**more: float) -> bool:
        return late.is_late(replace(row, lanes=1, predicted_issued_ns=1e5, **more), (55e9,), "measured")

    assert unknown(copies_ns=1e7, issued_ns=1e5)
    assert not unknown(copies_ns=1.07e7, issued_ns=1e5)
    assert not unknown(copies_ns=1e7, issued_ns=8e5)
    assert not unknown(copies_ns=1.04e7, issued_ns=4e5)
    assert unknown(copies_ns=1.02e7, issued_ns=2e5)


# What was first late


def timeline(*behind_us: float, watched_us: float) -> Looked:
    """Layers that were to begin every 100 us, each so much late; 900 us were predicted, and 100 until all is issued."""
    ops = tuple(
        OpRow(9 - at, "run", f"{at}-Linear", "compute:0", 1e5 * at, 1e5, 1e5 * at + 1e3 * behind, 1e5)
        for at, behind in enumerate(behind_us)
    )
    return Looked("best", 2, 9e5, watched_ns=1e3 * watched_us, predicted_issued_ns=1e5, ops=ops[::-1])


def test_the_first_to_begin_late_is_found_in_the_order_of_the_prediction() -> None:
    found = late.first_late(timeline(0, 50, 200, 310, 900, 900, watched_us=1800))
    assert found is not None
    assert found.label == "3-Linear", "300 us is a third of what the start was late by"


def test_a_watched_start_in_time_has_nothing_late() -> None:
    look = timeline(0, 50, 190, 190, watched_us=950)
    assert (late.late_by_ns(look), late.first_late(look)) == (0.0, None)
    assert late.first_late(replace(look, watched_ns=None)) is None


def test_a_start_that_is_late_at_its_end_has_no_operation_that_began_late() -> None:
    look = timeline(0, 50, 190, 190, watched_us=1800)
    assert late.late_by_ns(look) == 9e5
    assert late.first_late(look) is None


def test_what_the_profiler_makes_the_host_slower_by_does_not_count() -> None:
    look = replace(timeline(400, 450, 690, 720, 1300, watched_us=2200), watched_issued_ns=5e5)
    assert (late.host_ns(look), late.late_by_ns(look)) == (4e5, 9e5)
    found = late.first_late(look)
    assert found is not None
    assert found.label == "3-Linear"
    in_time = replace(look, watched_ns=1.3e6)
    assert (late.late_by_ns(in_time), late.first_late(in_time)) == (0.0, None)
    assert late.host_ns(replace(look, watched_issued_ns=5e4)) == 0.0, "a faster host makes nothing late"


def test_the_copies_that_an_operation_is_the_first_to_wait_for() -> None:
    net = network(100, 100, 0)
    second = net.offsets[1]
    chunks = (Chunk(0, second, (0,)), Chunk(second, net.arena_bytes, (1, 0)))
    program = lower(copied(net, *chunks), net, host(2))
    at = {
        (type(op), getattr(op, "chunk", getattr(op, "layer", -1)), op.stream): i
        for i, op in enumerate(program.ops)
    }
    own, relayed = at[Copy, 0, "h2d:0"], at[Copy, 1, "p2p:1>0"]
    assert late.waited_for(program, at[Run, 0, "compute:0"]) == (own,)
    assert late.waited_for(program, at[Run, 1, "compute:0"]) == (relayed,)
    assert late.waited_for(program, at[Run, 2, "compute:0"]) == ()
    assert late.waited_for(program, relayed) == (at[Copy, 1, "h2d:1"],)
    assert late.waited_for(program, own) == ()
