"""Layers' times from runs of whole networks, and constants of hosts with shared uplinks, from samples made by hand."""

from __future__ import annotations

import pytest

from calibrate.assemble import GpuFacts, assemble, contention
from calibrate.layers import LayerRun, LayersResult, issue_times, largest, layer_times, small_reads, timings
from calibrate.samples import CaseResult, Point
from calibrate.show import compare
from sim.errors import InputError
from sim.network import Layer, Network, Read, Storage
from sim.plan import Access
from sim.profile import Profile, Provenance
from sim.timeline import Span, SpanKind, Timeline

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


def test_a_run_in_place_that_came_out_faster_adds_nothing() -> None:
    found = timings(
        result(run("resident", (10, 20, 30)), run("issue", (5, 5, 5)), run("direct", (9, 20, 30)))
    )
    assert [t.median_ns for t in found[0].direct] == [0, 0]


def test_a_network_that_is_not_whole_says_what_lacks() -> None:
    with pytest.raises(InputError, match="toy: no issue run was measured"):
        timings(result(run("resident", (10, 20, 30))))


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


# Hosts ---------------------------------------------------------------------------------------------------------------


def cases(gpus: int, shared: dict[tuple[int, ...], float], lane: float = 12.0) -> list[CaseResult]:
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
    beside = [("read", "alone", 10.0), ("copy", "alone", lane), ("read", "both", 8.0), ("copy", "both", 6.0)]
    points = {
        "h2d-graph": [p for g in range(gpus) for p in route(f"h2d:{g}", lane)],
        "h2d-together": together,
        "direct": [p for g in range(gpus) for p in route(f"direct:{g}", 10.0)],
        "direct-beside-copy": [
            Point(f"{w}:0 {when}, 16 MiB", 2**28, 1, (2**28 / r,)) for w, when, r in beside
        ],
        "issue": [Point(f"issue {w}", 0, 100, (400_000.0,)) for w in ("copy", "record", "wait", "kernel")],
        "answer": [
            Point("rounds", 0, 1, (40_000.0,)),
            Point("rounds", 0, 20, (600_000.0,)),
            Point("kernel", 0, 1, (8_000.0,)),
            Point("issue", 0, 50, (250_000.0,)),
        ],
        "wait-graph": [Point("wait same graph", 0, k, (5e3 + 8e3 * k + 3e3 * w,), edges=w) for k, w in chain],
        "launch": [Point("launch", 0, n, (20e3 + 500.0 * n,)) for n in (4, 64, 256, 768)],
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
    assert (costs.launch_ns.value, costs.launch_node_ns.value) == pytest.approx((20_000, 500), rel=0.01)
    assert costs.wait_ns.kind == "measured"
    assert costs.wait_ns.source == "calibrate case wait-graph (wait_ns)"


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
    assert {g.h2d[1:] for g in host.gpus} == {("uplink0+1+2+3",)}
    assert host.bandwidth["uplink0+1+2+3"] == pytest.approx(30e9)
    free = assemble("four", "", facts(4), cases(4, {**pairs, (0, 1, 2, 3): 47.0})).host
    assert {len(g.h2d) for g in free.gpus} == {1}


def test_a_refused_fit_stops_the_host_unless_it_is_kept_and_then_says_so() -> None:
    found = cases(1, {})
    wild = CaseResult(
        "launch",
        "",
        tuple(Point("launch", 0, n, (t,)) for n, t in ((4, 9e5), (64, 1e3), (256, 8e6), (768, 2.0))),
    )
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


def test_whoever_ends_last_did_the_rest_alone() -> None:
    size = 1000
    alone = Point("r", size, 1, (100.0,)), Point("c", size, 1, (100.0,))
    seen = contention("x", *alone, Point("r", size, 1, (125.0,)), Point("c", size, 1, (200.0,)))
    assert (seen.direct_bytes_per_s, seen.copy_bytes_per_s) == pytest.approx((8e9, 2e9))
    turned = contention("x", *alone, Point("r", size, 1, (200.0,)), Point("c", size, 1, (125.0,)))
    assert (turned.direct_bytes_per_s, turned.copy_bytes_per_s) == pytest.approx((2e9, 8e9))
