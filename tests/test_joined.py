"""A joined head: what several lanes bring side by side is waited for at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.errors import InputError
from sim.network import Network
from sim.ops import Record, Wait
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import Profile, Timing
from sim.program import Program, lower
from sim.search import Options, search
from sim.simulate import simulate
from tests.builders import copied, figure, host, network, profile
from tests.test_program import every_wait_is_needed, landings, relayed

OWN, RELAYED = (0,), (1, 0)


def side_by_side(*paths: tuple[int, ...], joined: bool = True) -> tuple[Plan, Network]:
    """A layer and a chunk for each path, all in the head."""
    net = network(*(100 for _ in paths))
    chunks = tuple(Chunk(at, at + 100, path) for at, path in zip(net.offsets[:-1], paths, strict=True))
    return replace(copied(net, *chunks), head=len(chunks), joined=joined), net


def waits(program: Program) -> list[Wait]:
    """Those of the layers."""
    return [op for op in program.ops if isinstance(op, Wait) and op.stream == "compute:0"]


def test_layers_wait_once_for_what_comes_side_by_side() -> None:
    plan, net = side_by_side(OWN, RELAYED, OWN, RELAYED)
    program = lower(plan, net, host(2))
    found = landings(program)
    assert [[type(op).__name__ for op in landing] for landing in found] == 2 * [["Wait", "Wait", "Record"]]
    assert {op.stream for landing in found for op in landing} == {"land:0:lanes"}
    assert [[op.cross_device for op in landing if isinstance(op, Wait)] for landing in found] == 2 * [
        [False, True]
    ]
    records = [landing[-1] for landing in found]
    assert [wait.event for wait in waits(program)] == [r.event for r in records if isinstance(r, Record)]
    assert len(waits(lower(replace(plan, joined=False), net, host(2)))) == 4
    every_wait_is_needed(program)


def test_chunks_of_one_lane_are_never_joined() -> None:
    plan, net = side_by_side(OWN, OWN, RELAYED)
    program = lower(plan, net, host(2))
    assert [len(landing) for landing in landings(program)] == [3], "the second and the third"
    assert len(waits(program)) == 2
    alone, net = side_by_side(OWN, OWN)
    assert lower(alone, net, host(2)).ops == lower(replace(alone, joined=False), net, host(2)).ops


def test_what_stays_at_a_partner_or_is_copied_for_nobody_is_not_waited_for_with_others() -> None:
    plan, net = side_by_side(OWN, (1,), RELAYED)
    stays = replace(plan, access=((Access.COPIED,), (Access.PEER,), (Access.COPIED,)))
    assert len(waits(lower(stays, net, host(2)))) == 3
    plan, net = side_by_side(OWN, RELAYED)
    unread = replace(plan, access=((Access.COPIED,), (Access.DIRECT,)))
    program = lower(unread, net, host(2))
    assert landings(program) == []
    assert len(waits(program)) == 1


def test_an_opening_stands_behind_all_that_is_joined_with_what_it_needs() -> None:
    plan, net = side_by_side(OWN, RELAYED, OWN, RELAYED)
    program = lower(replace(plan, opening=1), net, host(2))
    ahead = program.ops[: program.opening.start]
    assert sum(isinstance(op, Record) and op.stream == "land:0:lanes" for op in ahead) == 1
    assert lower(replace(plan, head=3), net, host(2)).head_ops < program.head_ops


def test_only_a_head_is_joined() -> None:
    plan, net = side_by_side(OWN, RELAYED)
    for change in ({"head": 0}, {"head": 0, "launch": Launch.EAGER}):
        with pytest.raises(InputError, match="joined, but it has no head"):
            lower(replace(plan, **change), net, host(2))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=300)
@given(relayed(), st.booleans())
def test_a_joined_program_waits_for_no_more_and_has_the_same_behind_it(
    case: tuple[Plan, Network, object], opened: bool
) -> None:
    """`lower` proves that each layer stands behind its bytes; joined or not, and with no more waits of layers."""
    plan, net, machine = case
    plan = replace(plan, joined=True, opening=plan.opening if opened else 0)
    program = lower(plan, net, machine)  # type: ignore[arg-type]
    apart = lower(replace(plan, joined=False), net, machine)  # type: ignore[arg-type]
    name = f"compute:{plan.target}"
    ours, theirs = (sum(isinstance(op, Wait) and op.stream == name for op in p.ops) for p in (program, apart))
    assert ours <= theirs


def costly(wait_ns: float) -> Profile:
    """Layers that take as long as both lanes bring their bytes, and lose so much to each wait."""
    net, machine = network(*(200_000 for _ in range(24))), host(2)
    base = profile(net, machine, run=1e5, direct=1e9)
    layers = tuple(replace(t, issue=Timing(1e6)) for t in base.layers)  # a graph's business
    return replace(base, layers=layers, wait=figure(wait_ns), wait_beside=figure(wait_ns))


def test_each_wait_that_is_saved_is_time() -> None:
    timings, machine = costly(10_000), host(2)
    net = timings.network
    chunks = [Chunk(at, at + 200_000, (OWN, RELAYED)[i % 2]) for i, at in enumerate(net.offsets[:-1])]
    plan = replace(copied(net, *chunks), head=len(chunks))
    apart, joined = (
        simulate(lower(p, net, machine), timings).makespan_ns for p in (plan, replace(plan, joined=True))
    )
    assert joined < apart


def test_search_joins_where_waits_are_dear_and_not_where_they_cost_nothing() -> None:
    machine = host(2)
    dear, free = (search(costly(ns), machine, Options()).best for ns in (20_000, 0))
    assert dear.plan.joined
    assert not free.plan.joined
    apart = lower(replace(dear.plan, joined=False), costly(0).network, machine)
    assert dear.makespan_ns < simulate(apart, costly(20_000)).makespan_ns
