"""Case results to a host: which constant comes from which case, and what GPUs share on their way to host memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calibrate.assemble import GpuFacts, assemble
from calibrate.samples import CaseResult, Point
from calibrate.sharing import groups
from sim.bound import intake
from sim.draft import shares
from sim.errors import InputError
from sim.host import Figure


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
                "call" if c + w else "graph",
                0,
                k,
                (20e3 + 50.0 * k + 3e3 * c + 1e3 * w + 15e3 * bool(c + w),),
                copies=c,
                waits=w,
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


def headed(gpus: int) -> CaseResult:
    """Heads of starts: 30,000, 5,000 a copy, and relayed 1,000 an event."""
    points = [Point("head own", 2**20, 1, (30e3 + 5e3 * k,), copies=k) for k in (4, 24)]
    if gpus > 1:
        points += [Point("head relayed", 2**20, 1, (40e3 + 12e3 * k,), copies=2 * k) for k in (4, 24)]
    return CaseResult("head", "head", tuple(points))


def test_calls_come_from_whole_starts_where_those_were_made() -> None:
    for gpus, event_ns, of in ((1, 4000, "issue (issue record)"), (2, 1000, "head (an event more)")):
        costs = assemble("x", "", facts(gpus), [*cases(gpus, {}), headed(gpus)]).host.costs
        assert (costs.issue_copy_ns.value, costs.issue_event_ns.value) == pytest.approx((5000, event_ns))
        assert costs.issue_copy_ns.source == "calibrate case head (a copy more)"
        assert costs.issue_event_ns.source == f"calibrate case {of}"
        assert costs.issue_hook_ns.value == pytest.approx(17_000 - 5000 - 2 * event_ns)


def test_another_look_widens_ranges_and_moves_no_constant() -> None:
    one = cases(1, {})
    (launch,) = (c for c in one if c.case == "launch")
    slower = tuple(replace(p, samples_ns=tuple(2 * s for s in p.samples_ns)) for p in launch.points)
    twice = [replace(launch, other=slower) if c is launch else c for c in one]
    once, both = (assemble("x", "", facts(1), found).host for found in (one, twice))
    assert both.digest == once.digest, "the values are those of the look that was kept"
    narrow, wide = once.costs.launch_copy_ns, both.costs.launch_copy_ns
    assert narrow.high is not None
    assert wide.high is not None
    assert (wide.value, wide.low) == (narrow.value, narrow.low)
    assert wide.high >= 2 * narrow.value > narrow.high
    assert both.costs.wait_ns == once.costs.wait_ns


def blocking(case: str, wait: float, copy: float = 8000.0) -> CaseResult:
    """Chains of copies and kernels of 1,500 each, every one of which waits for the one before, and their parts."""
    base = 5000.0
    points = [
        p
        for n in (16, 64)
        for p in (
            Point("copies", 2**18, n, (base + copy * n,), copies=n),
            Point("kernels", 0, n, (base + 1500.0 * n,)),
            Point("chain", 0, 2 * n + 1, (base + copy * (n + 1) + (1500.0 + 2 * wait) * n,), 2 * n, n + 1),
        )
    ]
    return CaseResult(case, case, tuple(points))


def told(figure: Figure) -> tuple[float, str]:
    return round(figure.value), figure.source


def test_a_wait_that_blocks_is_what_a_chain_takes_beyond_its_copies_and_kernels() -> None:
    same, cross = blocking("wait-blocked", 4350), blocking("wait-cross-blocked", 3500, copy=3600.0)
    costs = assemble("two", "", facts(2), [*cases(2, {}), same, cross]).host.costs
    assert told(costs.wait_blocked_ns) == (4350, "calibrate case wait-blocked (wait_ns)")
    assert told(costs.wait_cross_blocked_ns) == (3500, "calibrate case wait-cross-blocked (wait_ns)")
    low, high = costs.wait_blocked_ns.low, costs.wait_blocked_ns.high
    assert low is not None
    assert high is not None
    assert 4000 < low < 4350 < high < 4700
    assert costs.wait_blocked_ns.kind == "measured"


def test_a_wait_that_blocks_costs_no_less_than_one_that_is_over() -> None:
    over = (3000, "calibrate case wait-graph (wait_ns)")
    across = (3000, "calibrate case wait-cross-graph (wait_ns)")
    before = assemble("one", "", facts(1), cases(1, {})).host.costs
    assert told(before.wait_blocked_ns) == over, "an earlier calibration did not measure it"
    quick = assemble("one", "", facts(1), [*cases(1, {}), blocking("wait-blocked", 2000)]).host.costs
    assert (told(quick.wait_blocked_ns), told(quick.wait_cross_blocked_ns)) == (over, over)
    waived = CaseResult("wait-cross-blocked", "", waived="one GPU")
    alone = assemble("one", "", facts(1), [*cases(1, {}), blocking("wait-blocked", 4350), waived]).host.costs
    assert told(alone.wait_cross_blocked_ns) == (4350, "calibrate case wait-blocked (wait_ns)")
    both = [blocking("wait-blocked", 4350), blocking("wait-cross-blocked", 1000)]
    quick = assemble("two", "", facts(2), [*cases(2, {}), *both]).host.costs
    assert told(quick.wait_cross_blocked_ns) == across


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


def test_what_three_get_is_less_than_what_all_get_and_more_lanes_are_worth_it() -> None:
    """Four H100 on one host: two lanes carried 107 GB/s, three 141, all four 162 (results/h100-quad)."""
    pairs = {(a, b): 23.6 for a in range(4) for b in range(a + 1, 4)}
    threes = {(a, b, c): 30.8 for a in range(4) for b in range(a + 1, 4) for c in range(b + 1, 4)}
    host = assemble(
        "four",
        "",
        facts(4),
        cases(4, {**pairs, **threes, (0, 1, 2, 3): 35.4}, pushed=((1, 0), (2, 0), (3, 0))),
    ).host
    assert host.gpus[0].h2d == (
        "pcie0",
        "host memory 0+1+2",
        "host memory 0+1+3",
        "host memory 0+2+3",
        "host memory",
    )
    for count, carried in ((1, 12e9), (2, 24e9), (3, 30.8e9), (4, 35.4e9)):
        routes = [host.h2d_route(g) for g in range(count)]
        assert sum(shares(routes, host)) == pytest.approx(carried, rel=0.001)
        assert intake(host, tuple(range(count))) >= 0.999 * carried, "a bound"
    one = assemble("four", "", facts(4), cases(4, {**pairs, **threes})).host
    assert "host memory" not in one.bandwidth, "what nobody measured is not made up"
    free = assemble("four", "", facts(4), cases(4, {**pairs, **dict.fromkeys(threes, 35.9)})).host
    assert {len(g.h2d) for g in free.gpus} == {1}


def test_of_many_gpus_pairs_and_all_are_measured() -> None:
    assert groups((0, 1)) == [(0,), (1,), (0, 1)]
    assert [len(members) for members in groups(range(4))] == [1] * 4 + [2] * 6 + [3] * 4 + [4]
    assert [len(members) for members in groups(range(8))] == [1] * 8 + [2] * 28 + [8]


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


def test_launches_of_an_earlier_version_are_not_what_is_measured_now() -> None:
    found = cases(1, {})
    old = next(c for c in found if c.case == "launch")
    old = replace(old, points=tuple(replace(p, label="graph") for p in old.points))
    with pytest.raises(InputError, match=r"case 'launch' was measured by an earlier version.*--fresh"):
        assemble("one", "", facts(1), [old if c.case == "launch" else c for c in found])


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


def test_a_refused_fit_is_told_of_its_own_cases_figures_and_not_of_one_whose_name_begins_alike() -> None:
    found = cases(1, {})
    beside = next(c for c in found if c.case == "direct-beside-copy")
    wild = [
        replace(p, samples_ns=(p.samples_ns[0] * (40 if at % 2 else 1),))
        if p.label == "in-place beside:0"
        else p
        for at, p in enumerate(beside.points)
    ]
    found = [replace(c, points=tuple(wild)) if c is beside else c for c in found]
    made = assemble("one", "", facts(1), found, keep_bad=True)
    (line,) = made.refused
    assert line.startswith("direct-beside-copy:")
    costs = made.host.costs
    assert costs.direct_weight.source.endswith("; its fit was refused")
    assert costs.direct_bytes_per_s.source == "calibrate case direct (bytes_per_s)"


def beside_copies(wait: float, kernel: float = 9e3) -> CaseResult:
    """Chains that wait for a head, while copies slow their kernels too."""
    chain = [(64, 0), (128, 0), (64, 16), (64, 64)]
    points = [Point("wait beside", 0, k, (5e3 + kernel * k + wait * w,), edges=w) for k, w in chain]
    return CaseResult("wait-beside", "", tuple(points))


def test_a_wait_beside_copies_is_what_it_takes_there_and_no_less_than_without_any() -> None:
    before = assemble("one", "", facts(1), cases(1, {})).host.costs
    assert before.wait_beside_ns == before.wait_ns, "an earlier calibration did not measure it"
    slow = assemble("one", "", facts(1), [*cases(1, {}), beside_copies(4200)]).host.costs
    assert told(slow.wait_beside_ns) == (4200, "calibrate case wait-beside (wait_ns)")
    assert slow.wait_ns == before.wait_ns
    quick = assemble("one", "", facts(1), [*cases(1, {}), beside_copies(1500)]).host.costs
    assert told(quick.wait_beside_ns) == (3000, "calibrate case wait-graph (wait_ns)")
    lost = CaseResult("wait-beside", "", waived="longer than all copies")
    assert assemble("one", "", facts(1), [*cases(1, {}), lost]).host.costs == before


def test_a_case_that_every_host_needs_is_asked_for() -> None:
    with pytest.raises(
        InputError, match="nothing was measured for 'issue copy' of case 'issue'; run `calibrate run` again"
    ):
        assemble("one", "", facts(1), [c for c in cases(1, {}) if c.case != "issue"])
