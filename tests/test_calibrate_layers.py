"""Layers' times from runs of whole networks, and constants of hosts with shared uplinks, from samples made by hand."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from calibrate import beside as side
from calibrate import unwatched as without_profiler
from calibrate.beside import runs_beside_copies
from calibrate.compare import compare
from calibrate.fit import beside_ns
from calibrate.layers import (
    LayerRun,
    LayersResult,
    Unwatched,
    Waited,
    layer_times,
    layers_beside,
)
from calibrate.samples import Point
from calibrate.timings import in_place, slowed, start, timings, waits
from calibrate.unwatched import issue_times, unwatched
from calibrate.ways import (
    MOST_ALONE,
    MOST_CUTS,
    beside_copies,
    cut,
    everything,
    largest,
    places,
    reads_alone,
    small_reads,
)
from hwexec.cpu import CpuDevice
from hwexec.preparing import prepare
from hwexec.starts import SAME, Reference
from hwexec.timing import Mismatch, Samples
from sim.errors import InputError
from sim.host import Figure
from sim.models import Built
from sim.network import Layer, Network, Read, Storage
from sim.ops import Copy, Wait
from sim.plan import Access
from sim.profile import Profile, Provenance
from sim.program import lower
from sim.timeline import Span, SpanKind, Timeline
from sim.trace import trace
from tests.builders import FREE, figure
from tests.builders import host as toy_host
from tests.builders import profile as toy_profile

NETWORK = Network(
    "toy",
    "fp32",
    1,
    None,
    (
        Layer("a", "Linear", (Read(0, 4000), Read(1, 40)), 0, 0),
        Layer("act", "ReLU", (), 0, 0),
        Layer("norm", "LayerNorm", (Read(2, 40), Read(3, 40)), 0, 0),
    ),
    (
        Storage("a.weight", 4000, "fp32", 0),
        Storage("a.bias", 40, "fp32", 0),
        Storage("norm.weight", 40, "fp32", 2),
        Storage("norm.bias", 40, "fp32", 2),
    ),
)


def run(way: str, row: tuple[float, ...], whole: float | None = None) -> LayerRun:
    return LayerRun(way, "graph", (row, row, row), Point(way, 0, 1, (sum(row) if whole is None else whole,)))


def result(*runs: LayerRun) -> LayersResult:
    return LayersResult(NETWORK, runs, None, (), "toy-host", 1.0)


def test_a_layer_lasts_from_its_first_kernel_to_the_next_layers() -> None:
    spans = (
        Span("compute:0", SpanKind.RUN, 100, 130, "", layer=0),
        Span("compute:0", SpanKind.RUN, 140, 150, "", layer=1),
        Span("compute:0", SpanKind.RUN, 155, 185, "", layer=3),
    )
    assert layer_times(Timeline("measured", 185, spans), 4) == (40, 15, 0, 30)
    with pytest.raises(InputError, match="do not add up"):
        layer_times(Timeline("measured", 9, (Span("compute:0", SpanKind.RUN, 0, 9, "all layers"),)), 4)


def test_layers_are_scaled_to_add_up_to_the_run_they_came_from() -> None:
    watched = run("resident", (10.0, 20.0, 30.0), whole=48.0)
    assert watched.ratio == 1.25
    assert [
        t.resident.median_ns
        for t in timings(result(watched, run("issue", (1, 1, 1)), run("direct", (8, 16, 24))))
    ] == [8, 16, 24]


def test_what_small_reads_add_is_theirs_and_the_largest_takes_the_rest() -> None:
    found = timings(
        result(
            run("resident", (10, 20, 30)),
            run("issue", (5, 5, 5)),
            run("direct", (110, 20, 70)),
            run("direct-small", (16, 20, 48)),
            run("peer", (60, 20, 40)),
        )
    )
    assert [t.median_ns for t in found[0].direct] == [94, 6]
    assert found[1].direct == ()
    assert [t.median_ns for t in found[2].direct] == [22, 18]
    # without a run of the small reads alone, by bytes
    assert [t.median_ns for t in found[0].peer] == pytest.approx([50 * 4000 / 4040, 50 * 40 / 4040])


def attention(sizes: tuple[int, ...] = (4000, 40, 400, 20)) -> Network:
    reads = tuple(Read(at, size) for at, size in enumerate(sizes))
    storages = tuple(Storage(f"s{at}", size, "fp32", 0) for at, size in enumerate(sizes))
    return Network("toy", "fp32", 1, None, (Layer("attn", "Attention", reads, 0, 0),), storages)


def test_small_reads_share_by_what_each_adds_alone() -> None:
    """A kernel that reads 40 bytes again and again takes longer in place than one that reads 400 once."""
    runs = [run("resident", (10,)), run("issue", (5,)), run("direct", (150,)), run("direct-small", (50,))]
    alone = [run("direct-alone-1", (14,)), run("direct-alone-2", (46,)), run("direct-alone-3", (9,))]
    found = timings(replace(result(*runs, *alone), network=attention()))
    assert [t.median_ns for t in found[0].direct] == pytest.approx([100, 36, 4, 0])
    assert {type(t.median_ns) for t in found[0].direct} == {float}  # as a profile's reader asks
    # where nobody measured them, or none adds anything, by bytes
    for these in ([], [run("direct-alone-1", (10,)), run("direct-alone-2", (9,))]):
        found = timings(replace(result(*runs, *these), network=attention()))
        assert [t.median_ns for t in found[0].direct] == pytest.approx(
            [100, 40 * 40 / 460, 40 * 400 / 460, 40 * 20 / 460]
        )


def test_more_small_reads_than_runs_share_the_last_by_bytes() -> None:
    network = attention((4000, *(100 - at for at in range(MOST_ALONE + 1))))
    assert places(network, 0) == (0, *range(1, MOST_ALONE + 1), MOST_ALONE)
    plans = reads_alone(network, Access.DIRECT)
    for place, plan in plans.items():
        direct = [at for at, access in enumerate(plan.access[0]) if access is Access.DIRECT]
        assert direct == [at for at, found in enumerate(places(network, 0)) if found == place]
        assert set(plan.access[0]) == {Access.DIRECT, Access.RESIDENT}
    small = [run(f"direct-alone-{place}", (10 + 2 * place,)) for place in plans]
    runs = [run("resident", (10,)), run("issue", (5,)), run("direct", (110,)), run("direct-small", (52,))]
    found = timings(replace(result(*runs, *small), network=network))
    *first, one, other = (t.median_ns for t in found[0].direct[1:])
    assert first == pytest.approx([2, 4, 6, 8, 10])
    assert one + other == pytest.approx(12)
    assert one / other == pytest.approx(95 / 94)
    # of two reads the one is what the other is not, and alike ones cost alike
    assert reads_alone(NETWORK, Access.DIRECT) == {}
    assert reads_alone(attention((64, 64, 64, 64)), Access.DIRECT) == {}


def test_of_equal_reads_that_overlap_none_is_free() -> None:
    """Beside the others the first adds nothing; a search that took that for its price would read it alone, for free."""
    runs = run("direct", (10, 20, 36)), run("direct-small", (10, 20, 36))
    found = timings(result(run("resident", (10, 20, 30)), run("issue", (5, 5, 5)), *runs))
    assert [t.median_ns for t in found[2].direct] == [3, 3]


def test_a_run_in_place_that_came_out_faster_adds_nothing() -> None:
    found = timings(
        result(run("resident", (10, 20, 30)), run("issue", (5, 5, 5)), run("direct", (9, 20, 30)))
    )
    assert [t.median_ns for t in found[0].direct] == [0, 0]


def test_a_network_that_is_not_whole_says_what_lacks() -> None:
    with pytest.raises(InputError, match="toy: no issue run was measured"):
        timings(result(run("resident", (10, 20, 30))))


def test_how_much_copies_slow_layers_is_told_with_its_spread_or_not_at_all() -> None:
    assert slowed(result()) is None
    alone, beside = Point("alone", 0, 1, (100.0,) * 3), Point("beside", 0, 1, (104.0, 105.0, 106.0))
    found = slowed(replace(result(), beside_copies=beside, alone=alone))
    assert found is not None
    assert (found.value, found.kind) == (pytest.approx(0.05), "measured")
    assert (found.low, found.high) == (pytest.approx(0.042), pytest.approx(0.058))
    faster = slowed(replace(result(), beside_copies=alone, alone=beside))
    assert faster is not None
    assert (faster.value, faster.low, faster.high) == (0, 0, 0)


COSTS = replace(FREE, start_graph_ns=figure(20_000), start_ns=figure(3_000))


def samples(*values: float) -> Point:
    return Point("toy", 0, 1, values)


def test_layers_share_what_copies_cost_the_run_by_what_they_cost_each() -> None:
    """Of layers of 10, 20 and 30 us, copies slow the first by 6, the second by nothing beyond noise; the third ran behind."""
    whole = result(
        run("resident", (10e3, 20e3, 30e3)),
        run("issue", (5, 5, 5)),
        run("direct", (10e3, 20e3, 30e3)),
        LayerRun(
            "beside",
            "graph",
            ((16e3, 20.1e3, 30e3), (16e3, 19.9e3, 30e3), (16e3, 20.5e3, 30e3)),
            samples(66e3),
            (2, 2, 2),
        ),
    )
    assert [layer.beside for layer in timings(whole)] == [None] * 3, (
        "nobody knows what the run took unwatched"
    )
    told = timings(replace(whole, alone=samples(60e3), beside_copies=samples(66e3)))
    found = [layer.beside for layer in told]
    assert all(timing is not None for timing in found)
    # 10 % of the run: 6 us of the first layer, and a tenth of the third, scaled to 6 us in all
    assert [t.median_ns for t in found if t] == pytest.approx([4e3, 0, 2e3])
    assert [t.samples for t in found if t] == [3, 3, 0]
    same = timings(replace(whole, alone=samples(60e3), beside_copies=samples(59e3)))
    assert [layer.beside.median_ns for layer in same if layer.beside] == [0, 0, 0]


def test_the_layers_that_copies_ran_beside_are_counted_from_the_first() -> None:
    copy = Span("h2d:0", SpanKind.COPY, 0, 100, "", chunk=0)
    spans = tuple(Span("compute:0", SpanKind.RUN, a, a + 40, "", layer=i) for i, a in enumerate((10, 50, 90)))
    assert layers_beside(Timeline("measured", 130, (copy, *spans))) == 2
    assert layers_beside(Timeline("measured", 130, spans)) == 0
    gap = tuple(
        replace(s, layer=at) for s, at in zip(spans, (0, 2, 4), strict=True)
    )  # 1 and 3 have no kernels
    assert layers_beside(Timeline("measured", 130, (copy, *gap))) == 4
    long = replace(copy, stop_ns=200)
    assert layers_beside(Timeline("measured", 200, (long, *gap))) == 5


def test_plans_that_tell_what_copies_cost_leave_every_layer_free_to_run() -> None:
    machine = toy_host()
    busy = lower(beside_copies(NETWORK), NETWORK, machine)
    assert sum(op.size_bytes for op in busy.ops if isinstance(op, Copy)) == NETWORK.arena_bytes
    assert not any(isinstance(op, Wait) and op.stream == "compute:0" for op in busy.ops)


def test_an_eager_start_is_what_the_host_takes_around_the_modules_and_until_the_answer() -> None:
    assert start(result(), COSTS) is None
    around = samples(*(float(x) for x in range(40_000, 51_000, 1_000)))
    found = start(replace(result(), around=around), COSTS)
    assert found is not None
    assert (found.value, found.low, found.high, found.kind) == (48_000, 44_000, 52_000, "measured")


def test_layers_issue_adds_up_to_a_cold_start_where_there_is_one() -> None:
    """Rows of which no two layers are slow at once: their medians add up to less than any run."""
    rows = ((10_000.0, 10_000.0, 40_000.0), (40_000.0, 10_000.0, 10_000.0), (10_000.0, 40_000.0, 10_000.0))
    issue = LayerRun("issue", "eager", rows, samples(60_000.0))
    loop = replace(result(run("resident", (1, 2, 3)), run("direct", (1, 2, 3))), around=samples(5_000.0))
    loop = replace(loop, runs=(*loop.runs, issue))
    assert sum(layer.issue.median_ns for layer in timings(loop)) == pytest.approx(30_000)
    started = replace(loop, hooked=(samples(95_000.0), samples(200_000.0)))
    assert [layer.issue.median_ns for layer in timings(started)] == pytest.approx([30_000] * 3)
    # less what the start's own copy takes, which a prediction has besides
    assert [layer.issue.median_ns for layer in timings(started, 9_000)] == pytest.approx([27_000] * 3)


def test_reads_in_place_beside_copies_give_a_profile_its_busy_time_and_weight() -> None:
    """Of layers that take 10, 20 and 30 us resident, and of runs with both ways of reading what is not."""
    resident, direct, small = (10e3, 20e3, 30e3), (410e3, 20e3, 180e3), (80e3, 20e3, 60e3)
    added = {
        "direct": np.array([400e3, 150e3]),
        "direct-small": np.array([70e3, 30e3]),
    }
    busy, weight = 5_000, 8.0
    beside = [
        Point(way, 0, 1, (66e3 + float(beside_ns(alone, busy, 0, weight).sum()),))
        for way, alone in added.items()
    ]
    runs = result(run("resident", resident), run("direct", direct), run("direct-small", small))
    whole = replace(runs, beside_copies=samples(66e3), in_place_beside=tuple(beside))
    found = in_place(whole)
    assert found is not None
    assert [f.value for f in found] == pytest.approx([busy, weight], rel=1e-3)
    assert {f.kind for f in found} == {"measured"}
    assert {f.source for f in found} == {"calibrate layers, direct and direct-small beside copies"}
    assert all(f.low <= f.value <= f.high for f in found)  # type: ignore[operator]
    alone = in_place(replace(whole, in_place_beside=tuple(beside[:1])))
    assert alone is not None
    assert alone[0].value == 0
    # nothing to tell them from: no such runs, nothing to compare them with, nothing added
    assert in_place(runs) is None
    assert in_place(replace(whole, beside_copies=None)) is None
    assert in_place(replace(whole, beside_copies=samples(1e9))) is None
    unread = replace(whole, runs=(run("resident", resident), run("direct", resident)))
    assert in_place(unread) is None


def test_a_profile_without_figures_of_its_own_has_the_hosts() -> None:
    machine = toy_host(costs=replace(COSTS, launch_ns=figure(1_000), launch_node_ns=figure(10)))
    plain = toy_profile(NETWORK, machine)
    assert (plain.launch_ns(machine.costs), plain.start_ns(machine.costs)) == (1_030, 3_000)
    own = replace(plain, start=figure(0))
    assert (own.launch_ns(machine.costs), own.start_ns(machine.costs)) == (1_030, 0)


def built() -> Built:
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval()
    return Built(module, (torch.ones(1, 32),), 1, "fp32", None, "toy")


@pytest.mark.parametrize(("made_ns", "kept_ns"), [((3e6, 2e6), 2e6), ((3e6, "no room"), 3e6)])
def test_eager_starts_that_scatter_are_made_again(
    made_ns: tuple[float, float | str], kept_ns: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device = built(), CpuDevice(1, delay_us=0.0)
    device.figures = True
    takes = iter(made_ns)

    def starts(*_: object) -> tuple[Point, ...]:
        found = next(takes)
        if isinstance(found, str):
            raise InputError(found)
        noise = 0.3 * found if found == made_ns[0] else 0.0
        return (Point("in one chunk", 0, 1, tuple(found + k * noise for k in range(5))),)

    monkeypatch.setattr(without_profiler, "eager_starts", starts)
    notes: list[str] = []
    (point,) = without_profiler._steady_starts((made, trace(made).network, toy_host(), device, 5), notes)
    assert point.samples_ns[0] == kept_ns
    failed = "eager cold starts: scatter, and taking them again failed: no room"
    assert notes == ([failed] if "no room" in made_ns else [])


@pytest.mark.parametrize("figures", [False, True])
def test_host_times_of_a_whole_start_are_taken_before_the_profiler_runs(figures: bool) -> None:
    """Of a device whose times mean nothing, only what the layers' issue needs."""
    made, device, told = built(), CpuDevice(1, delay_us=0.0), list[str]()
    device.figures = figures
    network = trace(made).network
    found = unwatched(made, network, host=toy_host(), device=device, repeats=2, progress=told.append)
    assert len(found.around.samples_ns) == len(found.issue.whole.samples_ns) == 4
    assert all(taken > 0 for taken in found.around.samples_ns)
    assert [point is not None for point in (found.alone, found.beside_copies)] == [figures] * 2
    assert told == ["issue", *(["beside copies", "cold starts"] if figures else [])]
    assert [point.label for point in found.hooked] == (["in one chunk", "in a chunk each"] if figures else [])
    assert [point.label for point in found.launched] == (["launched behind its head"] if figures else [])
    assert (found.waited is not None) is figures
    if found.waited is not None:
        said = [(point.label, point.waits) for point in found.waited.waiting]
        assert said == [("waits alone", 1), ("waits beside copies", 1)]
        assert found.waited.without == (found.alone, found.beside_copies)
    device.close()


def first_half(made: Built, device: CpuDevice) -> Unwatched:
    """As if the times of threads were figures."""
    device.figures = True
    network = trace(made).network
    return unwatched(made, network, host=toy_host(), device=device, repeats=2, progress=lambda _: None)


def test_cold_starts_that_cannot_be_made_cost_a_network_its_own_figures_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, device = built(), CpuDevice(1, delay_us=0.0)

    def refused(*_: object) -> tuple[Point, ...]:
        raise InputError("GPU 1: no room")

    monkeypatch.setattr(without_profiler, "graph_starts", refused)
    found = first_half(made, device)
    assert (len(found.hooked), found.launched) == (2, ())
    assert "cold starts by graph: not measured (GPU 1: no room); the host's costs hold" in found.notes
    assert device.pinned == {}
    device.close()


def test_a_wrong_answer_of_a_cold_start_ends_a_networks_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = built(), CpuDevice(1, delay_us=0.0)
    monkeypatch.setattr(Reference, "of", classmethod(lambda cls, *_: cls([], SAME)))
    with pytest.raises(Mismatch, match="not that of a resident run"):
        first_half(made, device)
    assert device.pinned == {}
    device.close()


def test_warm_runs_are_taken_in_turn_alone_andrun_beside_copies() -> None:
    module, inputs = (
        torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval(),
        (torch.ones(1, 32),),
    )
    built = Built(module, inputs, 1, "fp32", None, "toy")
    network, device = trace(built).network, CpuDevice(1, delay_us=0.0)
    plan = everything(network, Access.RESIDENT)
    with prepare(module, plan, inputs, network=network, host=toy_host(), device=device) as cold:
        cold(*inputs)
        (pair,) = runs_beside_copies({"whole": lambda: cold.warm(*inputs)}, device, 3)
    assert [(p.label, len(p.samples_ns)) for p in pair] == [("whole alone", 3), ("whole beside copies", 3)]
    assert device.pinned == {}
    device.close()


def test_a_run_that_outlasts_its_copies_has_larger_ones_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads in place took 17 ms alone and 96 at least beside copies."""
    device, sizes = CpuDevice(1, delay_us=0.0), []

    def beside(of: object, on: CpuDevice, stream: object, rounds: int, size: int) -> side.Pairs:
        sizes.append(size)
        if size < most:
            raise InputError("longer than 512 copies")
        return ((Point("alone", 0, 1, (1.0,)), Point("beside", 0, 1, (6.0,))),)

    monkeypatch.setattr(side, "_beside", beside)
    monkeypatch.setattr(device, "figures", True)
    most, runs = side.LARGEST_TIMES * side.BESIDE_BYTES, {"in place": lambda: None}
    assert runs_beside_copies(runs, device, 3)[0][1].samples_ns == (6.0,)
    assert sizes == [side.BESIDE_BYTES, most]
    most *= 2
    with pytest.raises(InputError, match="longer than 512"):
        runs_beside_copies(runs, device, 3)
    device.close()


def test_of_several_runs_the_longest_says_how_large_the_copies_beside_them_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, sizes = CpuDevice(1, delay_us=0.0), list[int]()
    took = iter((side.LONG_NS / 2, 2.5 * side.LONG_NS))
    monkeypatch.setattr(side, "time_ns", lambda *_, **__: Samples((next(took),)))

    def beside(of: object, on: CpuDevice, stream: object, rounds: int, size: int) -> side.Pairs:
        sizes.append(size)
        return ()

    monkeypatch.setattr(side, "_beside", beside)
    runs_beside_copies({"short": lambda: None, "long": lambda: None}, device, 3)
    assert sizes == [3 * side.BESIDE_BYTES]
    device.close()


def test_a_gpu_without_room_for_copies_beside_a_run_costs_that_figure_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, device = built(), CpuDevice(1, delay_us=0.0)
    allocate = device.allocate

    def small(size: int, gpu: int) -> torch.Tensor:
        if size >= side.BESIDE_BYTES:
            raise device.out_of_memory(f"tried to allocate {size}")
        return allocate(size, gpu)

    monkeypatch.setattr(device, "allocate", small)
    found = first_half(made, device)
    assert (found.alone, found.waited) == (None, None)
    assert any("not measured (no room on GPU 0 for copies of" in note for note in found.notes)
    assert len(found.hooked) == 2
    assert device.pinned == {}
    device.close()


@pytest.mark.parametrize("why", ["no weights", "no graph"])
def test_a_network_without_waits_has_its_runs_alone_and_beside_copies_all_the_same(why: str) -> None:
    module: torch.nn.Module = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh())
    if why == "no graph":
        module = Branching()
    made = Built(module.eval(), (torch.ones(1, 32),), 1, "fp32", None, "toy")
    device = CpuDevice(1, delay_us=0.0)
    found = first_half(made, device)
    assert found.waited is None
    assert found.alone is not None
    assert [len(point.samples_ns) for point in (found.alone, found.beside_copies) if point] == [4, 4]
    device.close()


class Branching(torch.nn.Module):
    """What it does hangs on its data, so no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y if y.is_meta or float(y.sum()) > 0 else y + 1


def test_the_largest_read_stays_resident_where_the_small_ones_are_measured() -> None:
    assert [largest(NETWORK, layer) for layer in range(3)] == [0, -1, 0]
    assert small_reads(NETWORK, Access.DIRECT).access == (
        (Access.RESIDENT, Access.DIRECT),
        (),
        (Access.RESIDENT, Access.DIRECT),
    )


def test_issue_time_is_shared_where_a_layer_has_no_call_of_its_own() -> None:
    seen = [("(root)", 0), ("a", 10), ("block", 40), ("b", 60), ("(end)", 100)]
    assert issue_times(seen, ["a", "b"]) == (60, 40)
    assert issue_times(seen, ["a", "(root)", "b"]) == (30, 30, 40)
    assert issue_times(seen, ["(root)", "a", "b"]) == (10, 50, 40)


def test_what_a_wait_costs_is_what_layers_take_longer_by_in_each_round() -> None:
    """Ten waits; the rounds are 1, 2 and 3 us slow, runs with waits and without alike."""

    def point(label: str, base: float, waits: int = 0) -> Point:
        return Point(label, 0, 1, tuple(base + slow for slow in (1e3, 2e3, 3e3)), waits=waits)

    without = (point("alone", 1e6), point("beside", 1.1e6))
    found = waits(Waited(without, (point("w", 1.02e6, 10), point("b", 1.15e6, 10))))
    assert found is not None
    assert [figure.value for figure in found] == pytest.approx([2e3, 5e3])
    assert found[0].source == "calibrate layers, w less alone, 10 waits, 3 rounds"
    quicker = waits(Waited(without, (point("w", 0.9e6, 10), point("b", 1.15e6, 10))))
    assert quicker is not None
    assert quicker[0].value == 0
    assert waits(None) is None, "nobody measured it"


def test_the_run_that_waits_are_timed_by_is_cut_where_layers_begin_to_need_bytes() -> None:
    plan, second = cut(NETWORK), NETWORK.offsets[2]
    assert [(c.start_bytes, c.stop_bytes) for c in plan.chunks] == [
        (0, second),
        (second, NETWORK.arena_bytes),
    ]
    assert plan.head == len(plan.chunks), "all ahead of the graph, which makes no copy"
    count = 3 * MOST_CUTS
    sizes = [4096 if at % 3 else 8192 for at in range(count)]
    reads = tuple(Layer(f"l{at}", "Linear", (Read(at, size),), 0, 0) for at, size in enumerate(sizes))
    storages = tuple(Storage(f"s{at}", size, "fp32", at) for at, size in enumerate(sizes))
    long = Network("toy", "fp32", 1, None, reads, storages)
    waited = [op for op in lower(cut(long), long, toy_host()).ops if isinstance(op, Wait)]
    assert len(waited) == MOST_CUTS
    assert [c.start_bytes for c in cut(long).chunks] == list(long.offsets[:count:3]), "where layers need most"


def test_layers_that_changed_are_told_from_noise() -> None:
    made = Provenance("h", "g", "c", "d", "x")
    runs = [
        timings(
            result(run("resident", (r, 2000, 3000)), run("issue", (5, 5, 5)), run("direct", (r, 2000, 3000)))
        )
        for r in (1000, 1010, 1200)
    ]
    before, same, changed = (Profile("measured", NETWORK, "h", layers, made) for layers in runs)
    assert not any(c.beyond for c in compare(before, same).changes)
    assert [c.what for c in compare(before, changed).changes if c.beyond] == ["layer 0 a resident, ns"]
    with pytest.raises(InputError, match="not of one kind"):
        compare(before, result())


def test_a_profiles_own_figures_are_compared_where_both_have_them() -> None:
    def told(value: float) -> Figure:
        return Figure(value, "measured", "toy", 0.9 * value, 1.1 * value)

    plain = toy_profile(NETWORK, toy_host())
    own = {
        "slowed": 0.05,
        "direct_busy": 40e3,
        "direct_weight": 8.0,
        "start": 50e3,
        "hook": 7e3,
        "relay": 4e3,
        "launch": 60e3,
        "wait": 3e3,
        "wait_beside": 5e3,
    }
    before = replace(plain, **{name: told(value) for name, value in own.items()})
    assert {f.name for f in fields(Profile) if f.type == "Figure | None"} == own.keys()
    first = len(own)
    near = compare(
        before, replace(before, **{name: told(1.15 * value) for name, value in own.items()})
    ).changes
    assert [c.before for c in near[:first]] == list(own.values())
    assert not any(c.beyond for c in near)
    far = compare(before, replace(before, **{name: told(1.5 * value) for name, value in own.items()})).changes
    assert [c.what for c in far if c.beyond] == [
        "slowed beside copies, part",
        "direct_busy, ns",
        "direct_weight",
        "start, ns",
        "hook, ns",
        "relay, ns",
        "launch, ns",
        "wait, ns",
        "wait_beside, ns",
    ]
    lost, found = compare(before, plain), compare(plain, before)
    assert len(lost.changes) == len(found.changes) == len(near) - first
    assert lost.gone == found.new == tuple(c.what for c in far if c.beyond)
    assert (lost.new, found.gone) == ((), ())
    assert len(compare(before, replace(plain, start=told(1))).changes) == len(near) - first + 1
