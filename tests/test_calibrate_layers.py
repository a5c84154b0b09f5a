"""Layers' times from runs of whole networks, and constants of hosts with shared uplinks, from samples made by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import groupby

import numpy as np
import pytest
import torch

from calibrate.assemble import GpuFacts, assemble
from calibrate.fit import beside_ns
from calibrate.layers import (
    TINY_COPIES,
    LayerRun,
    LayersResult,
    _beside_copies,
    beside_copies,
    everything,
    idle_and_gated,
    issue_times,
    largest,
    layer_times,
    layers_beside,
    small_reads,
    tiny_copies,
    unwatched,
)
from calibrate.samples import CaseResult, Point
from calibrate.show import compare
from calibrate.timings import in_place, launch, launch_copy, slowed, start, timings
from hwexec.cpu import CpuDevice
from hwexec.executor import prepare
from sim.errors import InputError
from sim.host import Figure
from sim.models import Built
from sim.network import Layer, Network, Read, Storage
from sim.plan import Access, Chunk
from sim.profile import Profile, Provenance
from sim.program import Copy, Wait, lower
from sim.timeline import Span, SpanKind, Timeline
from sim.trace import trace
from tests.builders import FREE, figure
from tests.builders import host as toy_host
from tests.builders import network as toy_network
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


def test_a_launch_is_what_a_start_from_idle_takes_beyond_one_behind_a_gate_and_the_hosts_part() -> None:
    assert launch(result(), COSTS) is None
    gated = samples(90_000, 100_000, 400_000)
    idle = samples(*(float(x) for x in range(150_000, 161_000, 1_000)))
    found = launch(replace(result(), idle=idle, gated=gated), COSTS)
    assert found is not None
    assert (found.value, found.low, found.high) == (35_000, 31_000, 39_000)
    assert found.kind == "measured"
    assert "idle" not in found.source
    assert "start_graph_ns" in found.source
    assert launch(replace(result(), idle=idle), COSTS) is None
    less = launch(replace(result(), idle=gated, gated=idle), COSTS)
    assert less is not None
    assert (less.value, less.low) == (0, 0), "no launch takes less than nothing"


def test_what_a_copy_adds_to_a_launch_is_told_by_starts_with_some_and_with_none() -> None:
    whole = replace(
        result(),
        idle=samples(150_000.0),
        gated=samples(100_000.0),
        idle_copies=replace(samples(230_000.0, 240_000.0, 250_000.0), copies=20),
        gated_copies=replace(samples(110_000.0), copies=20),
    )
    found = launch_copy(whole)
    assert found is not None
    # 130 us of launch and start with 20 copies, 50 without
    assert (found.value, found.low, found.high, found.kind) == (4_000, 3_600, 4_400, "measured")
    assert "20 copies" in found.source
    assert launch_copy(replace(whole, idle=None)) is None
    assert launch_copy(result()) is None


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


def test_plans_that_tell_what_copies_cost_leave_every_layer_free_to_run() -> None:
    machine = toy_host()
    busy = lower(beside_copies(NETWORK), NETWORK, machine)
    assert sum(op.size_bytes for op in busy.ops if isinstance(op, Copy)) == NETWORK.arena_bytes
    assert not any(isinstance(op, Wait) and op.stream == "compute:0" for op in busy.ops)
    tiny = lower(tiny_copies(NETWORK), NETWORK, machine)
    assert [op.size_bytes for op in tiny.ops if isinstance(op, Copy)] == [40, 40]
    assert sum(isinstance(op, Wait) for op in tiny.ops) == 2
    many = toy_network(*[4096] * 100)
    assert len(tiny_copies(many).chunks) == TINY_COPIES
    assert tiny_copies(toy_network(0, 0)).chunks == ()


def test_an_eager_start_is_what_the_host_takes_around_the_modules_and_until_the_answer() -> None:
    assert start(result(), COSTS) is None
    around = samples(*(float(x) for x in range(40_000, 51_000, 1_000)))
    found = start(replace(result(), around=around), COSTS)
    assert found is not None
    assert (found.value, found.low, found.high, found.kind) == (48_000, 44_000, 52_000, "measured")


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
    own = replace(plain, launch=figure(700), start=figure(0))
    assert (own.launch_ns(machine.costs), own.start_ns(machine.costs)) == (700, 0)


def built() -> Built:
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval()
    return Built(module, (torch.ones(1, 32),), 1, "fp32", None, "toy")


def test_starts_from_idle_and_behind_a_gate_are_whole_cold_starts() -> None:
    made, device = built(), CpuDevice(1, delay_us=0.0)
    network = trace(made).network
    plan = replace(everything(network, Access.COPIED), chunks=(Chunk(0, network.arena_bytes, (0,)),), head=1)
    with prepare(made.module, plan, made.inputs, network=network, host=toy_host(), device=device) as cold:
        told: list[str] = []
        starts = {
            "plain": lambda: told.append("plain"),
            "cold": lambda: (told.append("cold"), cold(*made.inputs)),
        }
        taken = idle_and_gated(starts, device, 3)
        assert torch.equal(cold._stage.arena, cold._stage.host.tensor)
    # in turn, after a round that warms up; behind a gate that opened too early a start is made again
    assert [label for label, _ in groupby(told)] == ["plain", "cold"] * 4
    assert taken.keys() == starts.keys()
    assert [(p.label, p.count, len(p.samples_ns)) for p in taken["cold"]] == [
        ("start from idle", 1, 3),
        ("start behind a gate", 1, 3),
    ]
    device.close()


@pytest.mark.parametrize("figures", [False, True])
def test_host_times_of_a_whole_start_are_taken_before_the_profiler_runs(figures: bool) -> None:
    """Of a device whose times mean nothing, only what the layers' issue needs."""
    made, device, told = built(), CpuDevice(1, delay_us=0.0), list[str]()
    device.figures = figures
    network = trace(made).network
    found = unwatched(made, network, host=toy_host(), device=device, repeats=2, progress=told.append)
    assert len(found.around.samples_ns) == len(found.issue.whole.samples_ns) == 4
    assert all(taken > 0 for taken in found.around.samples_ns)
    points = (found.idle, found.gated, found.idle_copies, found.gated_copies)
    assert [point is not None for point in points] == [figures] * 4
    assert all(point.copies == 1 for point in points[2:] if point is not None)
    assert told == ["issue", *(["launch, beside copies"] if figures else [])]
    device.close()


def test_warm_runs_are_taken_in_turn_alone_and_beside_copies() -> None:
    module, inputs = (
        torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU()).eval(),
        (torch.ones(1, 32),),
    )
    built = Built(module, inputs, 1, "fp32", None, "toy")
    network, device = trace(built).network, CpuDevice(1, delay_us=0.0)
    plan = everything(network, Access.RESIDENT)
    with prepare(module, plan, inputs, network=network, host=toy_host(), device=device) as cold:
        cold(*inputs)
        points = _beside_copies(lambda: cold.warm(*inputs), device, 3)
    assert [(p.label, len(p.samples_ns)) for p in points] == [("whole alone", 3), ("whole beside copies", 3)]
    assert device.pinned == {}
    device.close()


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


def test_layers_that_changed_are_told_from_noise() -> None:
    made = Provenance("h", "g", "c", "d", "x")
    runs = [
        timings(
            result(run("resident", (r, 2000, 3000)), run("issue", (5, 5, 5)), run("direct", (r, 2000, 3000)))
        )
        for r in (1000, 1010, 1200)
    ]
    before, same, changed = (Profile("measured", NETWORK, "h", layers, made) for layers in runs)
    assert not any(c.beyond for c in compare(before, same))
    assert [c.what for c in compare(before, changed) if c.beyond] == ["layer 0 a resident, ns"]
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
        "launch": 30e3,
        "launch_copy": 3e3,
        "start": 50e3,
    }
    before = replace(plain, **{name: told(value) for name, value in own.items()})
    assert {f.name for f in fields(Profile) if f.type == "Figure | None"} == own.keys()
    first = len(own)
    near = compare(before, replace(before, **{name: told(1.15 * value) for name, value in own.items()}))
    assert [c.before for c in near[:first]] == list(own.values())
    assert not any(c.beyond for c in near)
    far = compare(before, replace(before, **{name: told(1.5 * value) for name, value in own.items()}))
    assert [c.what for c in far if c.beyond] == [
        "slowed beside copies, part",
        "direct_busy, ns",
        "direct_weight",
        "launch, ns",
        "launch per copy, ns",
        "start, ns",
    ]
    assert len(compare(before, plain)) == len(compare(plain, before)) == len(near) - first
    assert len(compare(before, replace(plain, launch=told(1)))) == len(near) - first + 1


# Hosts ---------------------------------------------------------------------------------------------------------------


def cases(
    gpus: int,
    shared: dict[tuple[int, ...], float],
    lane: float = 12.0,
    pushed: tuple[tuple[int, int], ...] = (),
) -> list[CaseResult]:
    """Samples of a host whose lanes carry `lane` GB/s alone, and groups of GPUs what `shared` says (bytes per ns)."""
    sizes = (4096, 2**20, 2**26)

    def route(label: str, rate: float, latency: float = 2000.0) -> list[Point]:
        return [Point(label, s, 1, (latency + s / rate,)) for s in sizes]

    size = 2**29
    together = [
        Point(f"together:{'+'.join(map(str, group))}", size, len(group), (len(group) * size / total,))
        for group, total in shared.items()
    ]
    chain = [(64, 0), (128, 0), (64, 16), (64, 64)]
    reads = {2**k: 1000 + 2**k / 10.0 for k in (12, 16, 18, 20, 22, 24)}
    added = {"in-place alone": reads, "resident alone": dict.fromkeys(reads, 0.0)}
    added["in-place beside"] = {
        s: 6000 + 2 * min(t, 40e3) + 1.1 * max(0.0, t - 40e3) for s, t in reads.items()
    }
    added["resident beside"] = dict.fromkeys(reads, 500.0)
    shapes = [(k, 0, 0) for k in (1, 50, 200, 400)] + [(200, c, 0) for c in (1, 4, 16, 32)]
    shapes += [(50, 8, 0), (400, 16, 8), (200, 0, 8), (200, 0, 24)]
    points = {
        "h2d-graph": [p for g in range(gpus) for p in route(f"h2d:{g}", lane)],
        "h2d-together": together,
        "direct": [p for g in range(gpus) for p in route(f"direct:{g}", 10.0)],
        "direct-beside-copy": [
            Point(f"{what}:0", s, 4, (4 * (3000 + t),)) for what, row in added.items() for s, t in row.items()
        ],
        "issue": [Point(f"issue {w}", 0, 100, (400_000.0,)) for w in ("copy", "record", "wait", "kernel")],
        "answer": [
            Point("rounds", 0, 1, (40_000.0,)),
            Point("rounds", 0, 20, (600_000.0,)),
            Point("kernel", 0, 1, (8_000.0,)),
            Point("issue", 0, 50, (250_000.0,)),
        ],
        "hook": [Point("hooked", 0, 10, (250_000.0,)), Point("unhooked", 0, 10, (80_000.0,))],
        "wait-head": [Point("wait same head", 0, k, (5e3 + 8e3 * k + 6e3 * w,), edges=w) for k, w in chain],
        "wait-graph": [Point("wait same graph", 0, k, (5e3 + 8e3 * k + 3e3 * w,), edges=w) for k, w in chain],
        "wait-cross-stream": [
            Point("wait cross stream", 0, k, (5e3 + 8e3 * k + 2e3 * w,), edges=w)
            for k, w in chain
            if gpus > 1
        ],
        "launch": [
            # a graph with anything but kernels is launched in another way, which takes 15,000 more
            Point(
                "graph", 0, k, (20e3 + 50.0 * k + 3e3 * c + 1e3 * w + 15e3 * bool(c + w),), copies=c, waits=w
            )
            for k, c, w in shapes
        ],
        "start": [
            Point("copy ahead", 2**20, 1, (24_000.0, 25_000.0, 26_000.0)),
            Point("copy in the graph", 2**20, 1, (40_000.0, 43_000.0, 46_000.0)),
        ],
        "p2p-beside-h2d": [p for a, b in pushed for p in route(f"p2p:{a}>{b}", 40.0, 12_000.0)],
    }
    return [CaseResult(name, name, tuple(p)) for name, p in points.items()]


def facts(gpus: int) -> list[GpuFacts]:
    return [GpuFacts("V100", 2**34)] * gpus


def test_constants_come_from_their_cases() -> None:
    host = assemble("one", "", facts(1), cases(1, {})).host
    costs = host.costs
    assert host.rate(("pcie0",)) == pytest.approx(12e9, rel=1e-3)
    assert costs.copy_latency_ns.value == pytest.approx(2000, rel=0.01)
    assert (costs.issue_copy_ns.value, costs.issue_event_ns.value) == (4000, 4000)
    assert (costs.start_ns.value, costs.host_sync_ns.value) == (27_000, 17_000)
    assert costs.wait_ns.value == pytest.approx(3000, rel=0.01)
    assert costs.wait_cross_ns.value == costs.wait_ns.value
    assert costs.wait_head_ns.value == pytest.approx(6000, rel=0.01)
    # no second GPU: nothing lands from there
    assert costs.wait_land_ns.value == 0
    # 17,000 more per layer, less a copy, a record and a wait
    assert costs.issue_hook_ns.value == pytest.approx(5000)
    grows = (costs.launch_node_ns.value, costs.launch_copy_ns.value, costs.launch_wait_ns.value)
    assert (costs.launch_ns.value, *grows) == pytest.approx((20_000, 50, 3000, 1000), rel=0.02)
    assert costs.start_graph_ns.value == 25_000
    # as wide as both allow: 40.6 - 25.8 to 45.4 - 24.2
    first = costs.launch_first_ns
    assert (first.value, first.low, first.high) == pytest.approx((18_000, 14_800, 21_200), rel=0.02)
    assert first.source == "calibrate case start (first copy)"
    assert costs.launch_cross_ns.value == 0
    direct = (costs.direct_busy_ns.value, costs.direct_ramp_ns.value, costs.direct_weight.value)
    assert direct == pytest.approx((5500, 40_000, 10), rel=0.02)
    assert costs.wait_ns.kind == "measured"
    assert costs.wait_ns.source == "calibrate case wait-graph (wait_ns)"


def test_what_another_device_pushed_ahead_of_a_graph_lands_as_a_wait_in_a_stream_does() -> None:
    costs = assemble("two", "", facts(2), cases(2, {(0, 1): 24.0})).host.costs
    assert costs.wait_land_ns.value == pytest.approx(2000, rel=0.01)
    assert costs.wait_land_ns.source == "calibrate case wait-cross-stream (wait_ns)"


def test_two_pairs_behind_two_switches_are_found() -> None:
    pairs = {(a, b): 24.0 for a in range(4) for b in range(a + 1, 4)} | {(0, 1): 12.6, (2, 3): 12.4}
    host = assemble("four", "", facts(4), cases(4, {**pairs, (0, 1, 2, 3): 25.0})).host
    assert [g.h2d for g in host.gpus] == [
        ("pcie0", "uplink0+1"),
        ("pcie1", "uplink0+1"),
        ("pcie2", "uplink2+3"),
        ("pcie3", "uplink2+3"),
    ]
    assert host.bandwidth["uplink0+1"] == pytest.approx(12.6e9)


def test_what_all_share_is_found_though_no_pair_shares_it() -> None:
    pairs = {(a, b): 24.0 for a in range(4) for b in range(a + 1, 4)}
    host = assemble("four", "", facts(4), cases(4, {**pairs, (0, 1, 2, 3): 30.0})).host
    assert {g.h2d[1:] for g in host.gpus} == {("host memory",)}
    assert host.bandwidth["host memory"] == pytest.approx(30e9)
    free = assemble("four", "", facts(4), cases(4, {**pairs, (0, 1, 2, 3): 47.9})).host
    assert {len(g.h2d) for g in free.gpus} == {1}


def test_three_percent_less_at_once_is_charged_whatever_the_copies_latencies() -> None:
    """Copies of 8 MiB get 54.4 GB/s of a lane of 55.2, alone; at once each gets 3 % less."""
    alone = {(0,): 54.4, (1,): 54.4}
    host = assemble("two", "", facts(2), cases(2, {**alone, (0, 1): 2 * 52.8}, lane=55.2)).host
    assert [g.h2d for g in host.gpus] == [("pcie0", "host memory"), ("pcie1", "host memory")]
    assert host.bandwidth["host memory"] == pytest.approx(2 * 55.2e9 * 52.8 / 54.4, rel=0.002)
    free = assemble("two", "", facts(2), cases(2, {**alone, (0, 1): 2 * 54.2}, lane=55.2)).host
    assert [link.name for link in free.links] == ["pcie0", "pcie1"]


def test_peer_routes_are_what_pushes_take_while_the_lane_is_at_work() -> None:
    host = assemble("two", "", facts(2), cases(2, {}, pushed=((0, 1), (1, 0)))).host
    assert [(p.source, p.destination) for p in host.peers] == [(0, 1), (1, 0)]
    assert host.costs.peer_latency_ns.value == pytest.approx(12_000, rel=0.01)
    assert host.bandwidth["nvlink0>1"] == pytest.approx(40e9, rel=0.01)
    assert host.costs.peer_latency_ns.source == "calibrate case p2p-beside-h2d (latency_ns)"


def test_a_refused_fit_stops_the_host_unless_it_is_kept_and_then_says_so() -> None:
    found = cases(1, {})
    wild = CaseResult(
        "launch",
        "",
        tuple(Point("graph", 0, n, (t,)) for n, t in ((4, 9e5), (64, 1e3), (256, 8e6), (768, 2.0))),
    )
    copying = next(tuple(p for p in c.points if p.copies or p.waits) for c in found if c.case == "launch")
    wild = replace(wild, points=wild.points + copying)
    found = [wild if c.case == "launch" else c for c in found]
    with pytest.raises(InputError, match=r"launch: time = launch .* misses half"):
        assemble("one", "", facts(1), found)
    kept = assemble("one", "", facts(1), found, keep_bad=True)
    assert len(kept.refused) == 1
    assert kept.host.costs.launch_ns.source.endswith("its fit was refused")
    assert kept.host.costs.wait_ns.source.endswith("(wait_ns)")


def test_a_case_that_every_host_needs_is_asked_for() -> None:
    with pytest.raises(
        InputError, match="nothing was measured for 'issue copy' of case 'issue'; run `calibrate run` again"
    ):
        assemble("one", "", facts(1), [c for c in cases(1, {}) if c.case != "issue"])
