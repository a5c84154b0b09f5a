"""What stays on a GPU between starts: which weights, how few will do, and what plans then cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.bound import bound_ns, warm_ns
from sim.errors import InputError
from sim.keep import CLOSE, fewest, keeping, order, prefixes
from sim.memory import packed_bytes
from sim.options import Options
from sim.plan import Access, Chunk
from sim.program import lower
from sim.search import search
from sim.simulate import simulate
from tests import strategies as some
from tests.builders import copied, host, network, profile

NET = network(400_000, 400_000, 400_000, 400_000)
"""On one link of 1 GB/s each layer takes 100 us and its copy 400."""
MACHINE = host(1)
MADE = profile(NET, MACHINE, run=100_000, direct=1e6)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_what_is_kept_is_within_what_was_asked_and_makes_no_start_later(data: st.DataObject) -> None:
    machine = data.draw(some.hosts(max_gpus=3))
    net = data.draw(some.networks(max_layers=4, max_bytes=10**6))
    timings = data.draw(some.profiles(net, machine))
    runs = data.draw(st.sampled_from((1, 3)))
    bare = search(timings, machine, Options(runs=runs))
    keep = data.draw(st.integers(0, net.arena_bytes + 2**12))
    found = search(timings, machine, Options(runs=runs, keep_bytes=keep))
    assert [c.name for c in found.strategies[-2:]] == ["best", "kept"]
    assert found.strategies[:-1] == bare.strategies
    best = found.best
    assert packed_bytes(net.ranges(best.plan.kept(net))) <= keep
    assert best.mean_ns <= bare.best.mean_ns
    assert best.makespan_ns == simulate(lower(best.plan, net, machine), timings).makespan_ns
    assert found.bound_ns <= best.mean_ns * (1 + 1e-9) + 1e-6
    for chunk in best.plan.chunks:
        for start, stop in net.ranges(best.plan.kept(net)):
            assert chunk.stop_bytes <= start or stop <= chunk.start_bytes, "what stays is not brought"


def test_first_needed_is_first_kept_and_what_is_read_in_place_comes_last() -> None:
    net = network(100, (200, 300), 400)
    plan = copied(net)
    assert order(plan, net) == [0, 1, 2, 3]
    rows = ((Access.DIRECT,), (Access.COPIED, Access.PEER), (Access.COPIED,))
    assert order(replace(plan, access=rows), net) == [1, 3, 0, 2]
    assert prefixes([1, 3, 0], net, 200) == [frozenset(), frozenset({1})]
    all_three = packed_bytes(net.ranges([0, 1, 3]))
    assert prefixes([1, 3, 0], net, all_three)[-1] == {0, 1, 3}
    assert prefixes([1, 3, 0], net, all_three - 1)[-1] == {1, 3}


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300), st.integers(0, 10**8))
def test_as_few_as_will_do_are_found_in_few_tries(sizes: list[int], least: int) -> None:
    net = network(*sizes)
    choices = prefixes(range(len(sizes)), net, float("inf"))
    tries: list[int] = []

    def enough(kept: frozenset[int]) -> bool:
        tries.append(sum(sizes[at] for at in kept))
        return tries[-1] >= least

    found = fewest(choices, net, enough)
    able = [s for n in range(len(sizes) + 1) if (s := sum(sizes[:n])) >= least]
    if able:
        assert found is not None
        assert able[0] <= sum(sizes[at] for at in found) <= able[0] + CLOSE * net.arena_bytes
    else:
        assert found is None
    assert len(tries) <= 2 + 10


@settings(deadline=None)
@given(st.data())
def test_a_plan_that_keeps_some_brings_all_else(data: st.DataObject) -> None:
    machine, net = data.draw(some.hosts()), data.draw(some.networks())
    plan = data.draw(some.plans(net, machine))
    storages = data.draw(st.sets(st.integers(0, len(net.storages) - 1))) if net.storages else set()
    found = keeping(plan, storages, net)
    found.check(net, machine)
    assert found.kept(net) >= {s for s in storages if net.readers[s]}
    assert (found.head == len(found.chunks)) or plan.head < len(plan.chunks)
    assert found.copied_bytes <= plan.copied_bytes
    for chunk in found.chunks:
        for start, stop in net.ranges(storages):
            assert chunk.stop_bytes <= start or stop <= chunk.start_bytes


@pytest.mark.parametrize(
    ("keep", "kept", "takes_us"),
    [
        (Options(keep_bytes=0), 0, 1700),
        (Options(keep_bytes=399_999), 0, 1700),
        (Options(keep_bytes=400_000), 1, 1300),
        (Options(keep_bytes=2_000_000), 4, 400),
        (Options(keep_ratio=5), 0, 1700),
        (Options(keep_ratio=3), 2, 900),
        (Options(keep_ratio=1), 4, 400),
        (Options(keep_ratio=1, memory_budget_bytes=900_000), 2, 900),
    ],
)
def test_each_layer_that_stays_makes_a_start_sooner(keep: Options, kept: int, takes_us: int) -> None:
    free = replace(MADE, layers=tuple(replace(t, issue=replace(t.issue, median_ns=0)) for t in MADE.layers))
    assert warm_ns(free, MACHINE) == 400_000
    found = search(free, MACHINE, keep)
    assert sorted(found.best.plan.kept(NET)) == list(range(kept))
    if keep.memory_budget_bytes is None:
        assert found.best.makespan_ns == pytest.approx(takes_us * 1000)
    assert found.bound_ns == bound_ns(free, MACHINE, (0,), frozenset(range(kept)))
    assert found.bound_ns <= found.best.makespan_ns * (1 + 1e-9)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep_bytes": -1}, "--keep -1: cannot be negative; 0 keeps nothing"),
        (
            {"keep_ratio": 0.9},
            "--keep 0.9x: a start that is faster than a warm run is asked; give 1x or more, as 1.05x",
        ),
        (
            {"keep_ratio": 1.5, "runs": 3},
            "--keep 1.5x with --runs 3: the ratio is of one cold start; leave --runs out, or give the bytes to keep",
        ),
        ({"keep_ratio": 2, "keep_bytes": 1}, "--keep 1 and 2x: both cannot be kept to; give one"),
        (
            {"keep_bytes": 9, "memory_budget_bytes": 8},
            "--keep 9 bytes: more than the --memory-budget of 8 bytes, towards which it counts; give at most that",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(InputError) as refused:
        Options(**wrong)  # type: ignore[arg-type]
    assert str(refused.value) == says


def test_what_is_left_to_copy_is_cut_as_finely_as_before() -> None:
    """With few storages left every plan cut between them can be tried, and one that cuts within is better."""
    machine = host(2, pcie=1.0, nvlink=100)
    net = network(100_000, 4_000_000, 4_000_000, 4_000_000)
    timings = profile(net, machine, run=100_000, direct=1e9, peer=1e9)
    takes = [search(timings, machine, Options()).best.makespan_ns]
    for keep in (100_352, 4_100_352, 8_100_352):
        found = search(timings, machine, Options(keep_bytes=keep))
        assert found.best.plan.kept_bytes(net) > keep - 4096
        assert found.gap < 0.05
        assert not found.exact
        takes.append(found.best.makespan_ns)
    assert takes == sorted(takes, reverse=True)


def test_a_ratio_that_no_plan_reaches_gives_the_fastest_that_was_tried() -> None:
    found = search(MADE, MACHINE, Options(keep_ratio=1, memory_budget_bytes=900_000))
    assert found.best.makespan_ns > warm_ns(MADE, MACHINE)
    assert found.best.makespan_ns <= found.strategies[-2].makespan_ns


def test_a_storage_is_not_brought_for_one_layer_where_it_stays_for_another() -> None:
    net = network(512, 512)
    shared = replace(net, layers=(net.layers[0], replace(net.layers[1], reads=net.layers[0].reads)))
    plan = replace(copied(shared, Chunk(0, 512, (0,))), access=((Access.RESIDENT,), (Access.COPIED,)))
    with pytest.raises(
        InputError, match="w0 is resident for one layer and copied for another; its bytes are in one place"
    ):
        plan.check(shared, MACHINE)
    replace(plan, access=((Access.RESIDENT,), (Access.DIRECT,))).check(shared, MACHINE)
