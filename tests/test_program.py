"""What lowering makes of a plan, and what the replay refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sim.errors import InputError
from sim.host import Host
from sim.network import Network
from sim.ops import Copy, Record, Run, Wait, device_of
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.program import Program, calls_of, lower
from tests import strategies as some
from tests.builders import copied, host, network


def test_one_stream_needs_one_wait_for_the_last_chunk_only() -> None:
    net, machine = network((100, 100), 100), host()
    plan = copied(net, Chunk(0, 100, (0,)), Chunk(256, 356, (0,)), Chunk(512, 612, (0,)))
    program = lower(plan, net, machine)
    waits = [op for op in program.ops if isinstance(op, Wait)]
    records = [op for op in program.ops if isinstance(op, Record)]
    assert len(waits) == len(records) == 2, "chunk 0 is behind chunk 1 on the same stream"


def test_a_chunk_that_two_layers_share_is_waited_for_once() -> None:
    net, machine = network(100, 100), host()
    program = lower(copied(net, Chunk(0, 356, (0,))), net, machine)
    assert [type(op).__name__ for op in program.ops] == ["Copy", "Record", "Wait", "Run", "Run"]


def test_host_waits_stand_on_the_host() -> None:
    net, machine = network(100, 100), host()
    plan = replace(copied(net, Chunk(0, 356, (0,)), launch=Launch.EAGER), sync=Sync.HOST_ALL)
    assert [op.stream for op in lower(plan, net, machine).ops if isinstance(op, Wait)] == ["host"]


def test_a_head_stands_first_and_a_layer_waits_for_it_where_it_needs_it() -> None:
    net, machine = network(100, 100), host(2)
    plan = replace(copied(net, Chunk(0, 100, (0,)), Chunk(256, 356, (1, 0))), head=1)
    program = lower(plan, net, machine)
    assert [type(op).__name__ for op in program.ops[: program.head_ops]] == ["Copy", "Record"]
    behind = program.ops[program.head_ops :]
    assert [type(op).__name__ for op in behind if op.stream == "compute:0"] == ["Wait", "Run", "Wait", "Run"]
    with pytest.raises(InputError, match=r"a head of 3 chunks; it has 2, .*: write 0 to 2$"):
        lower(replace(plan, head=3), net, machine)
    with pytest.raises(InputError, match="eager plan has no head"):
        lower(replace(plan, launch=Launch.EAGER), net, machine)


def told(program: Program) -> list[str]:
    return [f"{type(op).__name__} {op.stream}" for op in program.ops]


def landings(program: Program) -> list[tuple[Wait, Record]]:
    """Of the head, each wait of a landing stream with the event that it records then."""
    head = program.ops[: program.head_ops]
    return [
        (wait, record)
        for wait, record in pairwise(head)
        if isinstance(wait, Wait) and wait.stream.startswith("land:") and isinstance(record, Record)
    ]


def test_a_relayed_chunk_of_a_head_lands_through_a_stream_of_the_target() -> None:
    net, machine = network(100, 100), host(2)
    plan = replace(copied(net, Chunk(0, 100, (1, 0)), Chunk(256, 356, (0,))), head=2)
    program = lower(plan, net, machine)
    ((wait, record),) = landings(program)
    pushed = next(op for op in program.ops if isinstance(op, Record) and op.stream == "p2p:1>0")
    assert (wait.event, wait.cross_device, record.stream) == (pushed.event, True, wait.stream)
    assert device_of(wait.stream) == 0
    first, second = (op for op in program.ops if isinstance(op, Wait) and op.stream == "compute:0")
    assert (first.event, first.cross_device, second.cross_device) == (record.event, False, False)
    within = lower(replace(plan, head=0), net, machine)
    assert not any("land:" in line for line in told(within)), (
        "in the graph the layer waits for the push itself"
    )


def test_of_chunks_that_are_waited_for_together_only_the_last_lands() -> None:
    net, machine = network((100, 100), 100), host(2)
    chunks = (Chunk(0, 100, (1, 0)), Chunk(256, 356, (1, 0)), Chunk(512, 612, (1, 0)))
    program = lower(replace(copied(net, *chunks), head=3), net, machine)
    assert len(landings(program)) == 2, "chunk 0 is behind chunk 1 on the same stream"
    # what the graph brings on the stream of a push is behind it: one wait in the graph for both, and no landing
    both = lower(replace(copied(network((100, 100)), *chunks[:2]), head=1), network((100, 100)), machine)
    assert landings(both) == []
    assert told(both)[-2:] == ["Wait compute:0", "Run compute:0"]
    unread = replace(copied(net, *chunks), access=((Access.DIRECT,) * 2, (Access.COPIED,)), head=3)
    assert len(landings(lower(unread, net, machine))) == 1, "nothing reads chunks 0 and 1 from an arena"


def test_a_relay_and_a_part_that_stays_at_the_partner_are_each_waited_for_where_needed() -> None:
    """Both land from GPU 1, and one is no reason to wait for the other."""
    net, machine = network((100, 100), 100), host(2)
    access = ((Access.COPIED, Access.PEER), (Access.COPIED,))
    chunks = (Chunk(0, 100, (1, 0)), Chunk(256, 356, (1,)), Chunk(512, 612, (1, 0)))
    for order in permutations(chunks):
        for head in range(4):
            plan = Plan("both", 0, Launch.GRAPH, access, order, head=head)
            every_wait_is_needed(lower(plan, net, machine))


def test_what_a_push_of_another_chunk_has_waited_for_is_behind_the_layer_too() -> None:
    """The last push from GPU 1 comes from GPU 2, but the one before it on that stream waited for GPU 1's own copies."""
    net, machine = network((100, 100), 100), host(3)
    access = ((Access.COPIED, Access.COPIED), (Access.PEER,))
    stays, relay, far = Chunk(512, 612, (1,)), Chunk(0, 100, (1, 0)), Chunk(256, 356, (2, 1, 0))
    for order, waits in (((stays, relay, far), 1), ((relay, stays, far), 2), ((relay, far, stays), 2)):
        for head in range(4):
            plan = Plan("behind", 0, Launch.GRAPH, access, order, head=head)
            program = lower(plan, net, machine)
            found = [op for op in program.ops if isinstance(op, Wait) and op.stream == "compute:0"]
            assert len(found) == waits
            every_wait_is_needed(program)


@st.composite
def relayed(draw: st.DrawFn) -> tuple[Plan, Network, Host]:
    """Graph plans with a head on hosts whose GPUs can all push to each other."""
    machine = draw(some.hosts(min_gpus=2, joined=True))
    net = draw(some.networks())
    # chunks that come by the target and go on to a partner are valid, and nobody's idea; for them a wait may be too many
    straight = some.plans(net, machine, launch=Launch.GRAPH).filter(
        lambda p: bool(p.chunks) and not any(p.target in c.path[:-1] for c in p.chunks)
    )
    plan = draw(straight)
    return some.headed(plan, draw(st.integers(1, len(plan.chunks)))), net, machine


@settings(deadline=None, max_examples=300)
@given(relayed())
def test_layers_wait_for_a_head_by_events_of_their_own_device_alone(case: tuple[Plan, Network, Host]) -> None:
    plan, net, machine = case
    program = lower(plan, net, machine)
    head, graph = program.ops[: program.head_ops], program.ops[program.head_ops :]
    assert [at for at, op in enumerate(head) if op.stream.startswith("compute")] == list(program.opening)
    recorded = {op.event: op.stream for op in head if isinstance(op, Record)}
    waits = [
        op for op in (*head[program.opening.start : program.opening.stop], *graph) if isinstance(op, Wait)
    ]
    for op in waits:
        if op.event in recorded:
            assert device_of(recorded[op.event]) == device_of(op.stream) == plan.target
            assert not op.cross_device
    wanted = {op.event for op in waits}
    landed = [op for op in program.ops if op.stream.startswith("land:")]
    assert [op for pair in landings(program) for op in pair] == landed, (
        "a wait and its record, in the head alone"
    )
    for wait, record in landings(program):
        assert wait.cross_device
        assert device_of(recorded[wait.event]) != plan.target == device_of(wait.stream)
        assert record.event in wanted
    every_wait_is_needed(program)


def every_wait_is_needed(program: Program) -> None:
    """Without any one of them the replay refuses the program."""
    for at, op in enumerate(program.ops):
        if isinstance(op, Wait):
            with pytest.raises(InputError):
                Program(
                    program.network, program.host, program.plan, (*program.ops[:at], *program.ops[at + 1 :])
                )


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_without_any_one_wait_the_program_is_refused(data: st.DataObject) -> None:
    """Lowering emits no wait that is not needed (but for HOST_ALL, which waits for unread bytes too)."""
    machine = data.draw(some.hosts())
    net = data.draw(some.networks())
    plan = data.draw(some.plans(net, machine))
    assume(plan.sync is not Sync.HOST_ALL)
    program = lower(plan, net, machine)
    waits = [at for at, op in enumerate(program.ops) if isinstance(op, Wait)]
    assume(waits)
    at = data.draw(st.sampled_from(waits))
    with pytest.raises(InputError):
        Program(net, machine, plan, (*program.ops[:at], *program.ops[at + 1 :]))


def test_the_replay_refuses_what_is_out_of_order() -> None:
    net, machine = network(100, 100), host()
    plan = copied(net, Chunk(0, 356, (0,)))
    copy, record, wait, first, second = lower(plan, net, machine).ops
    for ops, why in [
        ((copy, wait, record, first, second), "before it is recorded"),
        ((copy, record, wait, second, first), "layer 1 runs where layer 0 should"),
        ((copy, record, wait, first), "1 of 2 layers run"),
        ((copy, copy, record, wait, first, second), "arrive twice"),
        ((copy, record, record, wait, first, second), "recorded twice"),
    ]:
        with pytest.raises(InputError, match=why):
            Program(net, machine, plan, ops)


@pytest.mark.parametrize(
    ("plan_change", "why"),
    [
        ({"chunks": ()}, "no chunks bring all of it"),
        ({"chunks": (Chunk(0, 300, (0,)), Chunk(256, 356, (0,)))}, "arrives twice"),
        ({"chunks": (Chunk(0, 9999, (0,)),)}, "no range of the arena"),
        ({"chunks": (Chunk(0, 356, (3, 0)),)}, "GPU 3: test has GPUs 0 to 1"),
        ({"chunks": (Chunk(0, 356, (1, 0)),)}, "GPU 1 has no route to GPU 0"),
        ({"target": 7}, "GPU 7"),
        ({"access": ((Access.COPIED,),)}, "access for 1 layers"),
        ({"access": ((Access.PEER,), (Access.PEER,))}, "lands whole on no one partner"),
    ],
)
def test_a_plan_that_fits_nothing_is_one_clear_line(plan_change: dict[str, object], why: str) -> None:
    net, machine = network(100, 100), host(2, peers=False)
    plan = replace(copied(net, Chunk(0, 356, (0,))), **plan_change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=why) as caught:
        lower(plan, net, machine)
    assert "\n" not in str(caught.value)


def test_copies_and_runs_carry_the_plan() -> None:
    net, machine = network(100), host(2)
    program = lower(copied(net, Chunk(0, 100, (1, 0))), net, machine)
    h2d, p2p = [op for op in program.ops if isinstance(op, Copy)]
    assert (h2d.stream, h2d.route, p2p.stream, p2p.route) == ("h2d:1", ("pcie1",), "p2p:1>0", ("nvlink1>0",))
    assert [op for op in program.ops if isinstance(op, Run)] == [Run("compute:0", 0, (Access.COPIED,))]


@pytest.mark.parametrize("path", [(0,), (1, 0), (2, 1, 0)])
def test_the_calls_for_a_chunk_of_a_head_are_those_that_lowering_makes(path: tuple[int, ...]) -> None:
    net, machine = network(1000, 1000), host(3)
    plan = replace(copied(net, Chunk(0, 1000, path), Chunk(1024, 2024, (0,))), head=1)
    program = lower(plan, net, machine)
    head = program.ops[: program.head_ops]
    copies = sum(isinstance(op, Copy) for op in head)
    assert calls_of(path) == (copies, len(head) - copies)
