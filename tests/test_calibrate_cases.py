"""Cases of `calibrate run` on a device of threads: what they vary and compare, what waives them, and bytes that do not arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibrate import bench, launches, overheads
from calibrate.bench import FULL, NO_FIGURES, QUICK, Bench, Case, has_peers
from calibrate.beside import h2d_together, p2p
from calibrate.cases import CASES, measure_cases, unsteady
from calibrate.launches import START_ROUNDS, launch, start
from calibrate.links import h2d
from calibrate.overheads import blocked
from calibrate.run import Watch, run
from calibrate.samples import Point
from calibrate.store import Store
from calibrate.topology import Topology
from hwexec import timing
from hwexec.cpu import CpuDevice
from hwexec.executor import ColdStart
from hwexec.starts import tensors
from hwexec.timing import Mismatch, Samples
from sim.errors import InputError
from sim.files import read_host, read_profile
from tests.calibrating import MODEL, PAIR, Told, ask, broken, good


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2, delay_us=0.0)
    yield made
    made.close()


def test_a_case_that_this_host_cannot_show_is_waived_with_its_reason(tmp_path: Path) -> None:
    strangers = CpuDevice(2, delay_us=0.0, strangers=frozenset({(0, 1), (1, 0)}))
    assert (
        has_peers(Bench(strangers, PAIR, NO_FIGURES)) == "no GPU can read another's memory (no peer access)"
    )
    strangers.close()
    small = CpuDevice(1, delay_us=0.0, memory_bytes=2**20)
    store = Store(tmp_path)
    with pytest.raises(InputError):
        run(
            ask(),
            small,
            Watch(None),
            store,
            Told(),
            cases=[c for c in CASES if c.name in ("h2d", "h2d-together")],
        )
    small.close()
    together, alone = store.case("h2d-together"), store.case("h2d")
    assert together is not None
    assert alone is not None
    assert together.waived == "one GPU: there is nothing beside it"
    assert "not enough GPU memory" in str(alone.waived)


def test_a_host_of_one_gpu_is_measured_without_peers(tmp_path: Path) -> None:
    single = CpuDevice(1, delay_us=0.0)
    outcome = run(ask(MODEL), single, Watch(None), Store(tmp_path), Told())
    single.close()
    host = read_host(outcome.host)
    assert (len(host.gpus), host.peers) == (1, ())
    assert host.costs.wait_land_ns.source.startswith("no peers here")
    assert {host.costs.start_graph_ns.kind, host.costs.launch_first_ns.kind} == {"assumed"}
    assert host.costs.peer_latency_ns.source.startswith("no peers here")
    assert read_profile(outcome.profiles[0]).layers[0].peer == ()


class Liar(CpuDevice):
    """Loses the last byte of every copy."""

    def copy(self, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        super().copy(stream, destination[:-1], source[:-1])


@pytest.mark.parametrize(
    "case",
    [
        lambda b: h2d(b, False),
        lambda b: p2p(b, False),
        lambda b: p2p(b, True),
        h2d_together,
        launch,
        lambda b: blocked(b, False),
        lambda b: blocked(b, True),
    ],
)
def test_bytes_that_do_not_arrive_are_noticed(case: Any, tmp_path: Path) -> None:
    liar = Liar(2, delay_us=0.0)
    with pytest.raises(InputError, match="the bytes that arrived differ from those sent"):
        run(
            ask(),
            liar,
            Watch(None),
            Store(tmp_path),
            Told(),
            cases=[Case("h2d", "", case)],
        )
    liar.close()
    assert Store(tmp_path).case("h2d") is None


@pytest.mark.parametrize("pushed", [False, True])
def test_a_chain_that_blocks_is_made_of_the_copies_and_kernels_that_are_timed_alone(
    device: CpuDevice, pushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, copies = Bench(device, PAIR, NO_FIGURES), Counter[tuple[str, int]]()
    made = CpuDevice.copy

    def copy(self: CpuDevice, stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        copies[stream.name, destination.numel()] += 1
        made(self, stream, destination, source)

    monkeypatch.setattr(CpuDevice, "copy", copy)
    points = {(p.label, p.edges or p.count): p for p in blocked(bench, pushed)}
    few, many = NO_FIGURES.chains[:2]
    assert set(points) == {(label, n) for n in (few, many) for label in ("copies", "kernels")} | {
        ("chain", 2 * few),
        ("chain", 2 * many),
    }
    assert {(p.label, p.copies, p.count - p.copies) for p in points.values()} == {
        case for n in (few, many) for case in (("copies", n, 0), ("kernels", 0, n), ("chain", n + 1, n))
    }
    assert bench.verified
    (size,) = {p.size_bytes for p in points.values() if p.label == "copies"}
    assert [stream for stream, bytes_ in copies if bytes_ == size] == ["p2p:1>0" if pushed else "h2d:0"]


def test_waits_beside_copies_are_those_for_a_head_with_copies_behind_it(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same chains; each sample's lane brings what they wait for, and goes on with copies of its own."""
    lanes: list[int] = []
    copy = device.copy

    def told(stream: Any, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert stream.name == "h2d:0"
        lanes.append(destination.numel())
        copy(stream, destination, source)

    beside, head = (next(c for c in CASES if c.name == name) for name in ("wait-beside", "wait-head"))
    laid = Bench(device, PAIR, NO_FIGURES)
    assert beside.waived(laid) is None
    monkeypatch.setattr(device, "copy", told)
    points = beside.measure(laid)
    assert {p.label for p in points} == {"wait beside"}
    assert {len(p.samples_ns) for p in points} == {NO_FIGURES.repeats}
    ahead, behind = [overheads.SMALL] * max(NO_FIGURES.chains[:2]), [NO_FIGURES.largest_bytes // 2] * 9
    each = ahead + behind
    assert lanes == ahead + each * (len(lanes) // len(each)), "once for the capture, then for each start"
    assert len(lanes) > len(each) * (NO_FIGURES.repeats + 1) * len(points)
    assert [(p.count, p.edges) for p in points] == [(p.count, p.edges) for p in head.measure(laid)]
    laid.close()


def test_starts_are_the_executors_own_with_their_copy_ahead_of_the_graph_and_in_it(device: CpuDevice) -> None:
    ahead, inside = start(Bench(device, PAIR, NO_FIGURES))
    assert [p.label for p in (ahead, inside)] == ["copy ahead", "copy in the graph"]
    assert ahead.size_bytes == inside.size_bytes > 0
    assert [len(p.samples_ns) for p in (ahead, inside)] == [START_ROUNDS * NO_FIGURES.repeats] * 2
    assert min(*ahead.samples_ns, *inside.samples_ns) >= 1
    assert device.pinned == {}


def test_each_start_finds_the_arenas_filled_and_its_answer_is_compared(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hwexec verify` makes them: a start right behind another finds the host's caches warm, and no request does."""
    filled = []
    fill = ColdStart.evict
    monkeypatch.setattr(ColdStart, "evict", lambda cold: (filled.append(cold.plan.head), fill(cold)))
    start(Bench(device, PAIR, NO_FIGURES))
    each = NO_FIGURES.repeats + 2  # one when it is prepared, one that warms up
    assert filled == [*[1] * each, *[0] * each] * START_ROUNDS
    monkeypatch.setattr(launches, "kept", lambda output: [torch.zeros_like(t) for t in tensors(output)])
    with pytest.raises(Mismatch, match="the answer of a cold start is not that of a resident run"):
        start(Bench(device, PAIR, NO_FIGURES))
    assert device.pinned == {}


def test_what_the_host_does_in_a_start_is_timed_as_it_finds_the_host_behind_another(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(device, "gate", lambda stream, hold_ns: told.append(f"{stream.name} {hold_ns:g} ns"))
    monkeypatch.setattr(device, "synchronize", lambda: told.append("wait"))
    bench = Bench(device, PAIR, NO_FIGURES)
    stream = bench.stream("compute:0", 0)
    launches._as_behind_a_start(device, stream, lambda: told.append("evict"))
    assert told == ["evict"], "threads have no caches that matter"
    monkeypatch.setattr(device, "figures", True)
    launches._as_behind_a_start(device, stream, lambda: told.append("evict"))
    assert told[1:] == ["compute:0 3e+06 ns", "wait", "evict"]


def test_heads_of_starts_differ_by_copies_alone(device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: dict[tuple[str, int], Any] = {}
    made = bench.prepare

    def seen(*args: Any, **kwargs: Any) -> ColdStart:
        cold = made(*args, **kwargs)
        plan = cold.plan
        programs["own" if len(plan.chunks[0].path) == 1 else "relayed", plan.head] = cold.program
        return cold

    monkeypatch.setattr(bench, "prepare", seen)
    points = {(p.label, p.copies): p for p in launches.head(Bench(device, PAIR, NO_FIGURES))}
    few, many = launches.HEAD_CHUNKS
    assert sorted(points) == [
        ("head own", few),
        ("head own", many),
        ("head relayed", 2 * few),
        ("head relayed", 2 * many),
    ]
    assert {len(p.samples_ns) for p in points.values()} == {START_ROUNDS * NO_FIGURES.repeats}
    for way, copies, events in (("own", 1, 0), ("relayed", 2, 2)):
        less, more = (Counter(type(op).__name__ for op in programs[way, k].ops) for k in (few, many))
        more.subtract(less)
        added = many - few
        assert +more == +Counter(Copy=copies * added, Record=events // 2 * added, Wait=events // 2 * added)
        assert all(p.head_ops == len(p.ops) - 2 for (w, _), p in programs.items() if w == way), (
            "a wait and a layer"
        )
    single = Bench(device, Topology(1, (), (None,)), NO_FIGURES)
    assert {p.label for p in launches.head(single)} == {"head own"}
    assert device.pinned == {}


def test_launches_vary_kernels_copies_waits_and_edges_apart_from_each_other(device: CpuDevice) -> None:
    bench = Bench(device, PAIR, NO_FIGURES)
    rows = [(1, p.count, p.copies, p.waits, p.edges) for p in launch(bench)]
    assert np.linalg.matrix_rank(np.array(rows)) == 5
    single = Bench(device, Topology(1, (), (None,)), NO_FIGURES)
    rows = [(1, p.count, p.copies, p.waits) for p in launch(single)]
    assert np.linalg.matrix_rank(np.array(rows)) == 4


def test_what_copies_add_to_a_launch_is_the_hosts_own_call_with_copies_as_large_as_plans_have(
    device: CpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, moved = Bench(device, PAIR, NO_FIGURES), list[int]()
    monkeypatch.setattr(launches, "call_ns", lambda *_, **__: Samples((7.0,)))
    monkeypatch.setattr(Bench, "verify", lambda _, found, *__: moved.append(found.numel()))
    points = launch(bench)
    size = NO_FIGURES.largest_bytes // 64
    assert moved == [size * (p.copies - p.edges) for p in points]
    assert FULL.largest_bytes // 64 > launches.LAUNCH_COPY_BYTES == 256 * 1024
    assert {p.samples_ns == (7.0,) for p in points if p.copies or p.waits} == {True}
    assert {(p.label, p.samples_ns == (7.0,)) for p in points if not (p.copies or p.waits)} == {
        ("graph", False)
    }


CALM, WILD, WORSE = (100.0, 101.0, 102.0), (100.0, 150.0, 200.0), (100.0, 300.0, 500.0)


@pytest.mark.parametrize(
    ("takes", "figures", "kept", "count"),
    [
        ((CALM, WILD), True, CALM, 1),
        ((WILD, CALM, WORSE), True, CALM, 2),
        ((WORSE, WILD, WORSE, CALM), True, WILD, 3),
        ((WORSE, CALM), False, WORSE, 1),
    ],
)
def test_a_case_that_scatters_is_measured_again_and_the_steadiest_take_kept(
    device: CpuDevice,
    tmp_path: Path,
    takes: tuple[tuple[float, ...], ...],
    figures: bool,
    kept: tuple[float, ...],
    count: int,
) -> None:
    device.figures = figures
    left = [*takes]
    case = Case("h2d", "", lambda bench: (Point("a", 1, 1, CALM), Point("b", 1, 1, left.pop(0))))
    with pytest.raises(InputError):  # one case is no host
        run(ask(), device, Watch(None), Store(tmp_path), Told(), cases=[case])
    found = Store(tmp_path).case("h2d")
    assert found is not None
    assert (found.points[1].samples_ns, found.takes, len(left)) == (kept, count, len(takes) - count)


def test_a_case_that_scatters_and_then_fails_keeps_what_it_had_and_says_so(
    device: CpuDevice, tmp_path: Path
) -> None:
    device.figures = True
    for error, waived in ((InputError("no room"), True), (Mismatch("other bytes"), False)):
        left = [WILD]

        def measure(_: Bench, left: list[Any] = left, error: Exception = error) -> tuple[Point, ...]:
            if not left:
                raise error
            return (Point("a", 1, 1, left.pop()),)

        store = Store(tmp_path / str(waived))
        with pytest.raises(InputError, match="points cannot give" if waived else "other bytes"):
            run(ask(), device, Watch(None), store, Told(), cases=[Case("h2d", "", measure)])
        found = store.case("h2d")
        assert (found is not None) is waived
        if found is not None:
            assert (found.points[0].samples_ns, found.takes, found.failed) == (WILD, 1, "no room")
            (line,) = unsteady((found,))
            assert line.endswith("most a (1 bytes): 33%; taking it again failed: no room")


@pytest.mark.parametrize(
    ("how", "first", "second", "kept"),
    [
        ("faster", (9.0,), (7.0, 7.5), 1),
        ("faster", (7.0,), (9.0,), 0),
        ("faster", (7.0,), None, 0),
        ("steadier", (7.0, 8.0, 9.0), (9.0, 9.1, 9.2), 1),
        ("steadier", (9.0, 9.1, 9.2), (7.0, 8.0, 9.0), 0),
    ],
)
def test_some_cases_are_looked_at_again_when_all_else_is_measured(
    device: CpuDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Any,
    first: tuple[float, ...],
    second: tuple[float, ...] | None,
    kept: int,
) -> None:
    looks, told = iter([first, second]), Told()

    def measure(_: Bench) -> tuple[Point, ...]:
        if (found := next(looks)) is None:
            raise InputError("no room")
        return (Point("h2d:0", 1, 1, found),)

    cases = [Case("h2d-graph", "links", measure, second_look=how), good("issue", [])]
    store = Store(tmp_path)
    device.figures = True
    monkeypatch.setattr(timing, "AGAIN", 0)
    results = measure_cases(device, PAIR, NO_FIGURES, cases, store, told, 1.0)
    assert told.begun == ["h2d-graph", "issue", "h2d-graph again"]
    every = (first, second)
    assert results[0].points[0].samples_ns == every[kept]
    assert [p.samples_ns for p in results[0].other] == [x for x in (every[1 - kept],) if x is not None]
    assert results[1].other == ()
    assert store.case("h2d-graph") == results[0]
    again = Told()
    assert measure_cases(device, PAIR, NO_FIGURES, cases, store, again, 1.0) == results
    assert again.begun == [], "what was looked at twice before is not a third time"
    quick = Told()
    measure_cases(
        device,
        PAIR,
        QUICK,
        [replace(good("h2d-graph", []), second_look=how)],
        Store(tmp_path / "quick"),
        quick,
        0.3,
    )
    assert quick.begun == ["h2d-graph"], "a quick calibration has a minute in all"


def test_second_looks_that_an_interruption_left_out_are_made_by_the_next_run(
    device: CpuDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.figures = True
    monkeypatch.setattr(timing, "AGAIN", 0)
    found: dict[str, list[Any]] = {
        "h2d": [9.0, 7.0],
        "h2d-graph": [8.0, InputError("no room")],
        "d2h": [KeyboardInterrupt(), 6.0, KeyboardInterrupt(), 5.0],
    }

    def case(name: str) -> Case:
        def measure(_: Bench) -> tuple[Point, ...]:
            if isinstance(took := found[name].pop(0), BaseException):
                raise took
            return (Point(f"{name}:0", 1, 1, (took,)),)

        return Case(name, "links", measure, second_look="faster")

    cases, store = [*map(case, found)], Store(tmp_path)
    stories = []
    for ends in (KeyboardInterrupt, KeyboardInterrupt, None, None):
        told = Told()
        with pytest.raises(ends) if ends is not None else nullcontext():
            measure_cases(device, PAIR, FULL, cases, store, told, 1.0)
        stories.append(told.begun)
    assert stories == [
        ["h2d", "h2d-graph", "d2h"],
        ["d2h", "h2d again", "h2d-graph again", "d2h again"],
        ["d2h again"],
        [],
    ], "one that came to nothing is not tried again"
    kept = [store.case(name) for name in found]
    assert [(c.points[0].samples_ns, c.looks) for c in kept if c is not None] == [
        ((7.0,), 2),
        ((8.0,), 2),
        ((5.0,), 2),
    ]


def test_a_run_that_goes_on_plans_for_the_second_looks_that_are_left(
    device: CpuDevice, tmp_path: Path
) -> None:
    device.figures = True
    looked = replace(good("h2d", []), seconds=10.0, second_look="faster")
    told = Told()
    with pytest.raises(KeyboardInterrupt):
        run(
            ask(),
            device,
            Watch(None),
            Store(tmp_path),
            told,
            cases=[looked, broken("d2h", KeyboardInterrupt())],
        )
    assert told.planned == 10 + 10 + 1
    with pytest.raises(InputError, match="points cannot give"):
        run(ask(), device, Watch(None), Store(tmp_path), told, cases=[looked, good("d2h", [])])
    assert told.planned == 10 + 1
