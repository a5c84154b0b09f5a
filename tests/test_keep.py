"""What stays on a GPU between starts: which weights, how few will do, and what plans then cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.bound import bound_ns, warm_ns
from sim.errors import InputError
from sim.keep import CLOSE, least, order, prefixes
from sim.memory import PADDING_BYTES, packed_bytes
from sim.plan import Access
from sim.program import lower
from sim.search import Options, search
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
    most = 200 + 400 + 100 + 2 * PADDING_BYTES
    assert prefixes([1, 3, 0], net, most)[-1] == {0, 1, 3}
    assert prefixes([1, 3, 0], net, most - 1)[-1] == {1, 3}


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=300), st.integers(0, 10**8))
def test_as_few_as_will_do_are_found_in_few_tries(sizes: list[int], enough: int) -> None:
    net = network(*sizes)
    choices = prefixes(range(len(sizes)), net, float("inf"))
    tries: list[int] = []

    def size(kept: frozenset[int]) -> int:
        tries.append(sum(sizes[at] for at in kept))
        return tries[-1]

    found = least(choices, net, size, lambda kept: kept >= enough)
    sums = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    able = [s for s in sums if s >= enough]
    if able:
        assert able[0] <= found <= able[0] + CLOSE * net.arena_bytes
    else:
        assert found == sums[-1]
    assert len(tries) <= 2 + 10


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
        ({"keep_ratio": 0.9}, "--keep 0.9x: no start is faster than a warm run; give 1x or more, as 1.05x"),
        ({"keep_ratio": 2, "keep_bytes": 1}, "--keep 1 and 2x: both cannot be kept to; give one"),
        (
            {"keep_bytes": 9, "memory_budget_bytes": 8},
            "--keep 9: more than the --memory-budget of 8 bytes, towards which it counts; give at most that",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(InputError) as refused:
        Options(**wrong)  # type: ignore[arg-type]
    assert str(refused.value) == says
