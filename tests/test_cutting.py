"""Where copies are cut: against every way to cut them, and what a search makes of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, combinations, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.cutting import MOST_BOUNDARIES, Cutter
from sim.draft import EVERY, Draft, held_bytes, needed, plan_of, runs_of
from sim.host import Costs
from sim.options import Options
from sim.plan import Launch
from sim.profile import Timing
from sim.program import lower
from sim.search import search
from sim.simulate import simulate
from tests import strategies as some
from tests.builders import FREE, figure, host, network, profile

LATENCY, WAIT, BLOCKED = 3_000.0, 700.0, 4_000.0
COSTS = replace(
    FREE,
    copy_latency_ns=figure(LATENCY),
    wait_ns=figure(WAIT),
    wait_head_ns=figure(WAIT),
    wait_blocked_ns=figure(BLOCKED),
    start_ns=figure(10**9),  # or an eager plan would do as well
)


def test_a_cut_costs_what_a_wait_does_beside_copies_by_launch() -> None:
    _, _, plain = timed([256], [0])
    costs = replace(COSTS, wait_beside_ns=figure(900))
    own = replace(plain, wait=figure(2_000), wait_beside=figure(4_500))
    assert [p.cut_ns(costs, launch) for p in (plain, own) for launch in (Launch.EAGER, Launch.GRAPH)] == [
        900, 900, 900, 4_500,
    ]  # fmt: skip
    assert plain.cut_ns(replace(costs, wait_beside_ns=figure(0)), Launch.GRAPH) == WAIT
    # 12 layers that take as long as their copies: the dearer a wait, the fewer
    machine, _, base = timed([200_000] * 12, [200_000] * 12)
    cheap, dear = (
        search(replace(base, wait=figure(ns), wait_beside=figure(ns)), machine, Options()).best.plan
        for ns in (100, 60_000)
    )
    assert len(dear.chunks) < len(cheap.chunks)


def timed(sizes: list[int], runs: list[int], costs: Costs = COSTS):  # type: ignore[no-untyped-def]
    """One layer per size, each with a time of its own, on a host of one lane at 1 byte per ns."""
    machine, net = host(1, costs=costs), network(*sizes)
    base = profile(net, machine, direct=10**9)
    layers = tuple(replace(t, resident=Timing(run)) for t, run in zip(base.layers, runs, strict=True))
    return machine, net, replace(base, layers=layers)


def ends_after(sizes: list[int], runs: list[int], ends: tuple[int, ...], blocked: float = BLOCKED) -> float:
    """The pipeline by hand: groups that end behind these layers land one after another, and layers run as they land."""
    landed = ran = 0.0
    for start, stop in pairwise((0, *ends)):
        landed += LATENCY + sum(sizes[start:stop])
        ran = max(ran + WAIT, landed + blocked) + sum(runs[start:stop])
    return ran


@settings(deadline=None, max_examples=150)
@given(
    layers=st.lists(
        st.tuples(st.integers(1, 400).map(lambda n: n * 256), st.integers(0, 100_000)), min_size=2, max_size=8
    ),
    groups=st.integers(1, 8),
)
@example([(256, 0), (93952, 0), (512, 7508), (256, 0), (512, 0), (3840, 1902), (256, 7557), (256, 0)], 4)
@example(
    [(5120, 0), (23552, 0), (68864, 77453), (42752, 0), (256, 0), (27392, 0), (256, 6993), (2048, 6096)], 5
)
def test_no_other_cuts_of_as_many_groups_are_better(layers: list[tuple[int, int]], groups: int) -> None:
    sizes, runs = [size for size, _ in layers], [run for _, run in layers]
    machine, net, timings = timed(sizes, runs)
    draft = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,),), groups, head=EVERY)
    cuts = Cutter(draft, timings, machine).cuts(draft)
    count = min(groups, len(sizes))
    assert len(cuts) == count
    totals = {total: at for at, total in enumerate(accumulate(sizes), 1)}
    found = ends_after(sizes, runs, tuple(totals[stop] for _, stop in cuts))
    every = ((*inner, len(sizes)) for inner in combinations(range(1, len(sizes)), count - 1))
    assert found == pytest.approx(min(ends_after(sizes, runs, ends) for ends in every), rel=1e-12)
    assert Cutter(draft, timings, machine).finish_ns(draft) == pytest.approx(found, rel=1e-9)
    plan = plan_of(replace(draft, cuts=cuts), net, machine)
    # beside copies all waits cost as much as one that blocks, which the recurrence leaves out
    assert simulate(lower(plan, net, machine), timings).makespan_ns >= found * (1 - 1e-9)
    alike, net, timings = timed(sizes, runs, replace(COSTS, wait_blocked_ns=COSTS.wait_ns))
    cuts = Cutter(draft, timings, alike).cuts(draft)
    plan = plan_of(replace(draft, cuts=cuts), net, alike)
    ends = tuple(totals[stop] for _, stop in cuts)
    by_hand = ends_after(sizes, runs, ends, blocked=WAIT)
    assert simulate(lower(plan, net, alike), timings).makespan_ns == pytest.approx(by_hand, rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 12), st.sampled_from((None, 100_000, 1_000_000)))
def test_cuts_bring_every_byte_that_is_copied_once(
    data: st.DataObject, groups: int, part_bytes: int | None
) -> None:
    machine = data.draw(some.hosts())
    net = data.draw(some.networks(max_layers=6, max_bytes=10**7))
    timings = data.draw(some.profiles(net, machine))
    reads = [(i, j) for i, layer in enumerate(net.layers) for j in range(len(layer.reads))]
    direct = frozenset(data.draw(st.lists(st.sampled_from(reads), unique=True))) if reads else frozenset()
    paths = ((0,), *((g.index, 0) for g in machine.gpus[1:] if machine.reaches(g.index, 0)))
    draft = Draft(Launch.GRAPH, direct, frozenset(), paths, groups, part_bytes)
    cuts = Cutter(draft, timings, machine).cuts(draft)
    for _, start, stop in needed(draft, net):
        inside = sorted((max(a, start), min(b, stop)) for a, b in cuts if a < stop and start < b)
        assert sum(b - a for a, b in inside) == stop - start
        assert all(b <= c for (_, b), (c, _) in pairwise(inside))
    plan = plan_of(replace(draft, cuts=cuts), net, machine)
    plan.check(net, machine)
    assert plan.held_bytes(net) == held_bytes(draft, net)
    if part_bytes is not None:
        assert (
            all(stop - start <= max(part_bytes, 2 * 65536) + 256 for start, stop in cuts) or len(paths) == 1
        )


def test_a_chunk_never_carries_what_is_read_in_place_between() -> None:
    machine, net, timings = timed([10**6] * 5, [1000] * 5)
    draft = Draft(Launch.GRAPH, frozenset({(2, 0)}), frozenset(), ((0,),), groups=1)
    assert len(runs_of(draft, net)) == 2
    assert Cutter(draft, timings, machine).cuts(draft) == (
        (0, net.offsets[1] + 10**6),
        (net.offsets[3], net.offsets[4] + 10**6),
    )


def test_copies_that_outlast_the_layers_end_in_small_chunks() -> None:
    """Each layer runs for half the time that its copy takes: what is left to run when the last byte lands decides."""
    machine, _net, timings = timed([1_000_192] * 32, [500_000] * 32)
    found = search(timings, machine, Options())
    sizes = [chunk.size_bytes for chunk in found.best.plan.chunks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 4 * sizes[-1]
    assert found.gap < 0.005


def test_layers_of_a_very_long_network_are_taken_together() -> None:
    machine, net, timings = timed([1024] * (3 * MOST_BOUNDARIES), [100] * (3 * MOST_BOUNDARIES))
    draft = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,),), groups=4)
    cutter = Cutter(draft, timings, machine)
    assert len(cutter.stops) <= MOST_BOUNDARIES
    assert cutter.cuts(draft)[-1][1] == net.offsets[len(net.storages) - 1] + 1024
