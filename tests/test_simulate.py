"""Stories of one copy, two copies, a relay, a read in place, each with its whole timeline; then laws over random plans."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.account import account
from sim.errors import InputError
from sim.fabric import Fabric
from sim.host import Figure, Host, Peer
from sim.network import Network
from sim.ops import Copy, Run
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.profile import Profile, Timing
from sim.program import lower
from sim.score import Scores
from sim.simulate import simulate
from sim.timeline import SpanKind, Timeline
from tests import strategies as some
from tests.builders import FREE, copied, figure, host, network, profile

KIB = 1024


def story(timeline: Timeline) -> list[tuple[str, str, float, float]]:
    return [(s.stream, str(s.kind), s.start_ns, s.stop_ns) for s in timeline.spans]


def test_each_layer_runs_when_its_chunk_has_landed() -> None:
    net, machine = network(4 * KIB, 2 * KIB), host()
    plan = copied(net, Chunk(0, 4 * KIB, (0,)), Chunk(4 * KIB, 6 * KIB, (0,)))
    timeline = simulate(lower(plan, net, machine), profile(net, machine))
    assert sorted(story(timeline)) == [
        ("compute:0", "run", 4096, 5096),
        ("compute:0", "run", 6144, 7144),
        ("compute:0", "stall", 0, 4096),
        ("compute:0", "stall", 5096, 6144),
        ("h2d:0", "copy", 0, 4096),
        ("h2d:0", "copy", 4096, 6144),
    ]
    assert timeline.makespan_ns == 7144
    assert {s.cause for s in timeline.of(SpanKind.STALL)} == {"chunk 0 over pcie0", "chunk 1 over pcie0"}
    assert timeline.link_bytes("pcie0") == pytest.approx(6 * KIB)


def test_costs_are_charged_where_they_arise() -> None:
    costs = replace(
        FREE,
        copy_latency_ns=figure(10),
        wait_ns=figure(3),
        launch_ns=figure(100),
        launch_node_ns=figure(1),
        launch_first_ns=figure(20),
        launch_copy_ns=figure(7),
        launch_cross_ns=figure(9),
        wait_cross_ns=figure(4),
        wait_head_ns=figure(5),
        wait_land_ns=figure(6),
        start_graph_ns=figure(30),
    )
    net, machine = network(1000), host(2, costs=costs, nvlink=1000)
    own, relayed = copied(net, Chunk(0, 1000, (0,))), copied(net, Chunk(0, 1000, (1, 0)))

    def took(plan: Plan) -> float:
        return simulate(lower(plan, net, machine), profile(net, machine)).makespan_ns

    # start 30 in all, the first copy of the launch 20; latency 10, bytes 1000; wait 3; run 1000
    assert took(own) == 30 + 20 + 10 + 1000 + 3 + 1000
    # the push waits for its partner's copy on the same device, the layer for another device's push
    assert took(relayed) == 30 + 20 + 10 + 1000 + 3 + 1 + 4 + 1000
    # a head: its copy needs no launch, and the layer's wait is no edge of the graph
    assert took(replace(own, head=1)) == 30 + 10 + 1000 + 5 + 1000
    # the push lands at the target, and the layer waits for that as for any other of the head
    assert took(replace(relayed, head=1)) == 30 + 10 + 1000 + 3 + 1 + 6 + 5 + 1000


def launched(plan: Plan, net: Network, machine: Host, launch: float = 100) -> list[tuple[str, float, float]]:
    """Spans of the host, of copies and of layers, all costs but those of the launch left out."""
    costs = replace(
        FREE,
        launch_ns=figure(launch),
        launch_node_ns=figure(1),
        launch_first_ns=figure(20),
        launch_copy_ns=figure(7),
        launch_wait_ns=figure(8),
        launch_cross_ns=figure(9),
    )
    machine = replace(machine, costs=costs)
    timeline = simulate(lower(plan, net, machine), profile(net, machine))
    kinds = (SpanKind.ISSUE, SpanKind.COPY, SpanKind.RUN)
    return [(s.stream, s.start_ns, s.stop_ns) for s in timeline.spans if s.kind in kinds]


def test_a_launch_submits_copies_one_by_one_and_layers_last() -> None:
    net, machine = network(1, 1, 1), host(2, nvlink=1)
    chunks = Chunk(0, 1, (0,)), Chunk(256, 257, (0,)), Chunk(512, 513, (0,))
    plan = copied(net, *chunks)
    # the first copy at 20, each next one 7 later; layers after 100, three of 1, and three copies of 7
    assert launched(plan, net, machine) == [
        ("host", 0, 124),
        ("h2d:0", 20, 21),
        ("h2d:0", 27, 28),
        ("h2d:0", 34, 35),
        *(("compute:0", 124 + 1000 * at, 1124 + 1000 * at) for at in range(3)),
    ]
    # a copy that the host issued is none of the launch's, but the layer's wait for it is
    assert launched(replace(plan, head=1), net, machine)[:5] == [
        ("host", 0, 125),
        ("h2d:0", 0, 1),
        ("h2d:0", 20, 21),
        ("h2d:0", 27, 28),
        ("compute:0", 125, 1125),
    ]
    # a relay is two copies, and what waits for the push is an edge between devices
    relay = copied(net, chunks[0], Chunk(256, 257, (1, 0)), chunks[2])
    assert launched(relay, net, machine)[:6] == [
        ("host", 0, 103 + 4 * 7 + 9),
        ("h2d:0", 20, 21),
        ("h2d:0", 41, 42),
        ("h2d:1", 27, 28),
        ("p2p:1>0", 34, 35),
        ("compute:0", 140, 1140),
    ]
    # in the head it is neither: the layer waits for the landing
    assert launched(replace(relay, head=2), net, machine)[0] == ("host", 0, 103 + 7 + 2 * 8)


def test_no_layer_runs_before_the_copies_that_a_launch_submits_first() -> None:
    net, machine = network(1, 1, 1), host()
    plan = copied(net, *(Chunk(256 * at, 256 * at + 1, (0,)) for at in range(3)))
    copies = [("h2d:0", 20, 21), ("h2d:0", 27, 28), ("h2d:0", 34, 35)]
    for launch, end in ((100, 103 + 21), (50, 53 + 21), (10, 20 + 21)):
        found = launched(plan, net, machine, launch)
        assert found[0] == ("host", 0, end)
        assert found[1:4] == copies
        assert found[4] == ("compute:0", end, end + 1000)


def test_a_start_by_graph_pays_half_ahead_and_half_behind() -> None:
    net, machine = network(1000), host(costs=replace(FREE, start_graph_ns=figure(30), start_ns=figure(7000)))
    plan = copied(net, Chunk(0, 1000, (0,)))
    for head in (0, 1):
        timeline = simulate(lower(replace(plan, head=head), net, machine), profile(net, machine))
        assert [s.start_ns for s in timeline.of(SpanKind.COPY)] == [15]
        assert [s.stop_ns for s in timeline.of(SpanKind.RUN)] == [2015]
        assert timeline.makespan_ns == 2030
    eager = lower(replace(plan, launch=Launch.EAGER), net, machine)
    assert simulate(eager, profile(net, machine, issue=0)).makespan_ns == 9000
    own = replace(profile(net, machine, issue=0), start=Figure(500, "measured", "here"))
    assert simulate(eager, own).makespan_ns == 2500


def test_a_start_is_issued_when_its_call_returns_whatever_still_runs() -> None:
    costs = replace(
        FREE, issue_copy_ns=figure(10), launch_ns=figure(600), start_graph_ns=figure(30), start_ns=figure(50)
    )
    net, machine = network(1000), host(costs=costs)
    plan = copied(net, Chunk(0, 1000, (0,)))
    timings = profile(net, machine, run=10_000, issue=7)
    for head, ended in ((0, 15 + 600), (1, 15 + 10 + 600)):
        for detail in (True, False):
            found = simulate(lower(replace(plan, head=head), net, machine), timings, detail=detail)
            assert found.issued_ns == ended
    eager = simulate(lower(replace(plan, launch=Launch.EAGER), net, machine), timings)
    # behind its last layer an eager start goes on with its modules
    assert eager.issued_ns == 25 + 10 + 7 + 25 < eager.makespan_ns


def test_layers_do_not_pay_for_a_landing_that_is_over() -> None:
    costs = replace(FREE, wait_land_ns=figure(600), wait_head_ns=figure(5), wait_cross_ns=figure(50))
    net, machine = network(0, 1000), host(2, nvlink=1000, costs=costs)
    plan = replace(copied(net, Chunk(0, 1000, (1, 0))), head=1)
    program = lower(plan, net, machine)
    # the push ends at 1001, the landing at 1601: meanwhile layer 0 runs
    runs = simulate(program, profile(net, machine, run=3000)).of(SpanKind.RUN)
    assert [(s.start_ns, s.stop_ns) for s in runs] == [(0, 3000), (3005, 6005)]
    # a layer that is there before waits for the landing's end
    runs = simulate(program, profile(net, machine, run=1000)).of(SpanKind.RUN)
    assert [(s.start_ns, s.stop_ns) for s in runs] == [(0, 1000), (1606, 2606)]


def test_a_wait_that_blocks_costs_more_than_one_that_is_over() -> None:
    costs = replace(
        FREE,
        wait_ns=figure(3),
        wait_cross_ns=figure(4),
        wait_blocked_ns=figure(50),
        wait_cross_blocked_ns=figure(70),
    )
    net, machine = network(0, 1000), host(2, nvlink=1000, costs=costs)
    own, relayed = copied(net, Chunk(0, 1000, (0,))), copied(net, Chunk(0, 1000, (1, 0)))

    def begins(plan: Plan, run: float) -> float:
        program, timings = lower(plan, net, machine), profile(net, machine, run=run)
        assert simulate(program, timings, detail=False).makespan_ns == simulate(program, timings).makespan_ns
        return simulate(program, timings).of(SpanKind.RUN)[-1].start_ns

    # the layer stands still until the copy has ended at 1000, or comes to it later
    assert begins(own, 400) == 1000 + 50
    assert begins(own, 3000) == 3000 + 3
    # the push stands still for its partner's copy, and the layer for the push on another device
    assert begins(relayed, 400) == 1000 + 50 + 1 + 70
    assert begins(relayed, 3000) == 3000 + 4
    # a stream that comes a moment after the event knows of it no sooner than one that was there
    assert begins(own, 1010) == 1000 + 50
    assert begins(own, 1047) == 1000 + 50
    assert begins(own, 1048) == 1048 + 3


def test_beside_copies_a_wait_that_is_over_costs_more() -> None:
    costs = replace(FREE, wait_ns=figure(3), wait_beside_ns=figure(20), wait_blocked_ns=figure(50))
    machine = host(2, costs=costs, nvlink=1000)

    def second(size: int, last: tuple[int, ...]) -> tuple[float, list[float]]:
        """When the second layer starts, and the stalls that end there; the chunk behind its own has `size` bytes."""
        net = network(1024, 1024, size)
        chunks = (Chunk(0, 1024, (0,)), Chunk(1024, 2048, (0,)), Chunk(2048, net.arena_bytes, last))
        timeline = simulate(lower(copied(net, *chunks), net, machine), profile(net, machine, run=3000))
        starts = timeline.of(SpanKind.RUN)[1].start_ns
        return starts, [
            s.duration_ns for s in timeline.of(SpanKind.STALL) if starts - 50 < s.stop_ns <= starts
        ]

    # the second layer comes to its chunk at 4074, which has landed at 2048; what any wait there costs is no stall
    assert second(10_240, (0,)) == (4074 + 20, [])
    # the lane is another's, or has done by then
    assert second(10_240, (1, 0)) == (4074 + 3, [])
    assert second(1024, (0,)) == (4074 + 3, [])


def test_in_a_graph_a_wait_of_a_layer_costs_what_the_profile_says() -> None:
    costs = replace(
        FREE, wait_ns=figure(3), wait_head_ns=figure(5), wait_beside_ns=figure(7), wait_blocked_ns=figure(50)
    )
    net, machine = network(1024, 1024, 10_240), host(2, costs=costs, nvlink=1000)
    ends = ((0, 1024), (1024, 1536), (1536, 2048), (2048, 12_288))

    def second(launch: Launch, last: tuple[int, ...], own: bool = True) -> float:
        """When the second layer starts behind waits for the own lane and a push, both over."""
        chunks = [Chunk(a, b, path) for (a, b), path in zip(ends, ((0,), (0,), (1, 0), last), strict=True)]
        plan = replace(copied(net, *chunks), launch=launch, head=len(chunks) if launch is Launch.GRAPH else 0)
        made = profile(net, machine, run=3000)
        if own:
            made = replace(made, wait=figure(20), wait_beside=figure(40))
        return simulate(lower(plan, net, machine), made).of(SpanKind.RUN)[1].start_ns

    first = 1024 + 50 + 3000
    assert second(Launch.GRAPH, (0,)) == first + 2 * 40, "the lane goes on"
    assert second(Launch.GRAPH, (1, 0)) == first + 2 * 20, "another's does"
    assert second(Launch.GRAPH, (0,), own=False) == first + 7 + 7
    assert second(Launch.EAGER, (1, 0)) == second(Launch.EAGER, (1, 0), own=False)


def test_a_networks_own_wait_costs_no_less_beside_copies_across_devices_or_where_it_blocks() -> None:
    net, machine = (
        network(1024, 1024, 10_240),
        host(2, costs=replace(FREE, wait_cross_ns=figure(100)), nvlink=1000),
    )
    slow = replace(profile(net, machine, run=3000), wait=figure(20), wait_beside=figure(15))
    assert slow.own_waits_ns == (20, 20)

    def second(path: tuple[int, ...], made: Profile, on: Host) -> float:
        chunks = (Chunk(0, 1024, (0,)), Chunk(1024, 2048, path), Chunk(2048, net.arena_bytes, (0,)))
        plan = replace(copied(net, *chunks), launch=Launch.GRAPH)
        return simulate(lower(plan, net, on), made).of(SpanKind.RUN)[1].start_ns

    assert second((0,), slow, machine) == 1024 + 20 + 3000 + 20
    assert second((1, 0), slow, machine) == 1024 + 20 + 3000 + 100, "a wait between devices"
    # layers of no length stand still at their waits
    for costs, path, held in (
        (replace(FREE, wait_blocked_ns=figure(50)), (0,), 50),
        (FREE, (0,), 20),
        (replace(FREE, wait_cross_blocked_ns=figure(70)), (1, 0), 70),
    ):
        on = host(2, costs=costs, nvlink=1000)
        quick = replace(profile(net, on, run=1), wait=figure(20), wait_beside=figure(20))
        landed = 2048 if path == (0,) else 1025
        assert second(path, quick, on) == pytest.approx(landed + held, abs=1)
    beside = replace(profile(net, machine, run=1), wait=figure(20), wait_beside=figure(60))
    assert second((0,), beside, machine) == 2048 + 60, "the lane goes on"


def test_beside_copies_a_push_waits_no_longer() -> None:
    costs = replace(FREE, wait_ns=figure(3), wait_beside_ns=figure(20), wait_blocked_ns=figure(50))
    net, machine = network(1024, 1024, 10_240), host(2, costs=costs, nvlink=0.5)
    chunks = (Chunk(0, 1024, (1, 0)), Chunk(1024, 2048, (1, 0)), Chunk(2048, 12_288, (0,)))
    timeline = simulate(lower(copied(net, *chunks), net, machine), profile(net, machine))
    first, second = (s for s in timeline.of(SpanKind.COPY) if s.stream == "p2p:1>0")
    assert (first.start_ns, second.start_ns) == (1024 + 50, 1024 + 50 + 2048 + 3)


def test_a_layer_that_comes_a_moment_after_its_copy_stalls_for_it_as_well() -> None:
    costs = replace(FREE, wait_ns=figure(3), wait_blocked_ns=figure(50))
    net, machine = network(0, 1000), host(costs=costs)
    program = lower(copied(net, Chunk(0, 1000, (0,))), net, machine)

    def stalls(run: float) -> list[tuple[float, float, str]]:
        timeline = simulate(program, profile(net, machine, run=run))
        return [(s.start_ns, s.stop_ns, s.cause) for s in timeline.of(SpanKind.STALL)]

    # what a wait costs in any case is no stall
    assert stalls(1010) == [(1010, 1000 + 50 - 3, "chunk 0 over pcie0")]
    assert stalls(1047) == []


def test_a_wait_for_a_head_that_blocks_costs_the_larger() -> None:
    costs = replace(FREE, wait_head_ns=figure(5), wait_land_ns=figure(6), wait_ns=figure(3))
    net = network(1000)

    def took(path: tuple[int, ...], same: float, cross: float) -> float:
        blocked = replace(costs, wait_blocked_ns=figure(same), wait_cross_blocked_ns=figure(cross))
        machine = host(2, nvlink=1000, costs=blocked)
        plan = replace(copied(net, Chunk(0, 1000, path)), head=1)
        return simulate(lower(plan, net, machine), profile(net, machine)).makespan_ns

    assert (took((0,), 50, 0), took((0,), 4, 0)) == (1000 + 50 + 1000, 1000 + 5 + 1000)
    # the push waits for its partner's copy, the landing for the push, the layer for the landing
    assert took((1, 0), 50, 70) == 1000 + 50 + 1 + 70 + 50 + 1000
    assert took((1, 0), 4, 5) == 1000 + 4 + 1 + 6 + 5 + 1000


def test_a_host_that_stands_still_is_no_stream_that_does() -> None:
    costs = replace(FREE, wait_blocked_ns=figure(50), host_sync_ns=figure(7))
    net, machine = network(1000), host(costs=costs)
    plan = replace(copied(net, Chunk(0, 1000, (0,)), launch=Launch.EAGER), sync=Sync.HOST_ALL)
    timeline = simulate(lower(plan, net, machine), profile(net, machine, issue=0))
    assert [s.start_ns for s in timeline.of(SpanKind.RUN)] == [1000 + 7]


def test_a_stall_for_a_relayed_chunk_of_the_head_names_the_chunk() -> None:
    net, machine = network(1000), host(2, nvlink=1000)
    plan = copied(net, Chunk(0, 1000, (1, 0)))
    for head in (0, 1):
        timeline = simulate(lower(replace(plan, head=head), net, machine), profile(net, machine))
        stall = next(s for s in timeline.of(SpanKind.STALL) if s.stream == "compute:0")
        assert (stall.chunk, stall.cause) == (0, "chunk 0 over nvlink1>0")
        assert account(plan, machine, timeline).copies_ns == pytest.approx(1001)


def test_eager_host_issues_one_operation_after_another() -> None:
    costs = replace(FREE, issue_copy_ns=figure(50), issue_event_ns=figure(5), start_ns=figure(20))
    net, machine = network(1000, 0), host(costs=costs)
    plan = copied(net, Chunk(0, 1000, (0,)), launch=Launch.EAGER)
    timeline = simulate(lower(plan, net, machine), profile(net, machine, issue=2000))
    # start 10, copy 50, record 5, wait 5, then 2000 for each layer; the answer costs 10 more
    assert [s.stop_ns for s in timeline.of(SpanKind.ISSUE)] == [60, 65, 70, 2070, 4070]
    assert [(s.start_ns, s.stop_ns) for s in timeline.of(SpanKind.RUN)] == [(2070, 3070), (4070, 5070)]
    assert timeline.makespan_ns == 5080
    assert timeline.of(SpanKind.STALL)[-1].cause == "the host to issue it"
    hooked = host(
        costs=replace(costs, issue_hook_ns=figure(300))
    )  # ahead of the first layer alone something is issued
    of_host = profile(net, hooked, issue=2000)
    assert simulate(lower(plan, net, hooked), of_host).makespan_ns == 5380
    assert simulate(lower(plan, net, hooked), replace(of_host, hook=figure(500))).makespan_ns == 5580
    # what stands ahead of a layer that waits for none of it is issued before the module is called
    in_place = replace(plan, access=((Access.DIRECT,), ()))
    assert (
        simulate(lower(in_place, net, hooked), profile(net, hooked, issue=2000, direct=0)).makespan_ns == 5070
    )


def test_a_launch_takes_as_much_longer_as_its_networks_own_starts_and_once() -> None:
    costs = replace(FREE, issue_copy_ns=figure(10), launch_ns=figure(600))
    net, machine = network(1000, 1000), host(costs=costs)
    plan = replace(copied(net, Chunk(0, 1000, (0,)), Chunk(1024, 2024, (0,))), head=2)
    timings = profile(net, machine)
    own = replace(timings, launch=figure(50_000))
    for opening, launches in ((0, 1), (1, 2)):
        program = lower(replace(plan, opening=opening), net, machine)
        plain, late = simulate(program, timings), simulate(program, own)
        assert plain.issued_ns == 20 + launches * 600
        assert late.issued_ns == 20 + launches * 600 + 50_000
        begins = [span.start_ns for span in late.of(SpanKind.COPY)]
        assert begins[0] == 10, "copies of the head are ahead of it"
    eager = lower(replace(plan, launch=Launch.EAGER, head=0), net, machine)
    assert simulate(eager, own) == simulate(eager, timings)


def test_a_relay_costs_the_host_of_an_eager_start_what_its_network_says() -> None:
    net, machine = network(1000), host(2, costs=replace(FREE, issue_copy_ns=figure(50)))
    plan = copied(net, Chunk(0, 1000, (1, 0)), launch=Launch.EAGER)
    own = replace(profile(net, machine, issue=2000), relay=figure(700))
    plain = simulate(lower(plan, net, machine), replace(own, relay=None))
    assert simulate(lower(plan, net, machine), own).issued_ns == plain.issued_ns + 700
    graph = lower(copied(net, Chunk(0, 1000, (1, 0))), net, machine)
    assert simulate(graph, own) == simulate(graph, replace(own, relay=None))


def test_layers_of_a_graph_without_copies_wait_for_no_first_copy_of_its_launch() -> None:
    costs = replace(FREE, launch_ns=figure(100), launch_first_ns=figure(5000))
    net, machine = network(1000, 1000, 1000), host(costs=costs)
    plan = copied(net, Chunk(0, 1000, (0,)), Chunk(1024, 3048, (0,)))

    def first_layer(plan: Plan) -> float:
        return min(
            s.start_ns for s in simulate(lower(plan, net, machine), profile(net, machine)).of(SpanKind.RUN)
        )

    assert first_layer(replace(plan, head=2)) == first_layer(replace(plan, head=2, opening=1)) == 1000
    assert first_layer(replace(plan, head=1)) == 5000, "the second is a copy of the graph"
    warm = Scores(profile(net, machine), machine, 0, None, 2).warm_ns(Launch.GRAPH, ())
    assert warm == 100 + 3 * 1000


def test_the_launch_of_a_graph_hides_behind_its_head() -> None:
    costs = replace(FREE, issue_copy_ns=figure(10), launch_ns=figure(600), launch_first_ns=figure(600))
    net, machine = network(1000, 1000), host(costs=costs)
    plan = copied(net, Chunk(0, 1000, (0,)), Chunk(1024, 2024, (0,)))
    late = simulate(lower(plan, net, machine), profile(net, machine))
    early = simulate(lower(replace(plan, head=1), net, machine), profile(net, machine))
    # without a head the first copy waits for the launch; with one the graph is launched meanwhile
    assert [(s.start_ns, s.stop_ns) for s in late.of(SpanKind.COPY)] == [(600, 1600), (1600, 2600)]
    assert [(s.start_ns, s.stop_ns) for s in early.of(SpanKind.COPY)] == [(10, 1010), (1010, 2010)]
    assert (late.makespan_ns, early.makespan_ns) == (3600, 3010)


def test_a_relayed_chunk_crosses_the_partner_then_nvlink() -> None:
    net, machine = network(4000), host(2)
    timeline = simulate(lower(copied(net, Chunk(0, 4000, (1, 0))), net, machine), profile(net, machine))
    spans = {(s.stream, s.kind): (s.start_ns, s.stop_ns) for s in timeline.spans}
    assert spans["h2d:1", SpanKind.COPY] == (0, 4000)
    assert spans["p2p:1>0", SpanKind.COPY] == (4000, 5000)
    assert spans["compute:0", SpanKind.RUN] == (5000, 6000)


def test_two_gpus_behind_one_switch_share_its_uplink() -> None:
    net, machine = network(1000, 1000), host(2, uplinks=(0, 0), nvlink=1000)
    plan = copied(net, Chunk(0, 1000, (0,)), Chunk(1024, 2024, (1, 0)))
    timeline = simulate(lower(plan, net, machine), profile(net, machine))
    copies = {s.stream: s.stop_ns for s in timeline.of(SpanKind.COPY)}
    assert copies["h2d:0"] == copies["h2d:1"] == 2000


def test_a_read_in_place_takes_what_the_profile_says_and_slows_a_copy_beside_it() -> None:
    costs = replace(FREE, direct_bytes_per_s=figure(1e9), direct_weight=figure(3))
    net, machine = network(1000, 4000), host(costs=costs)
    plan = replace(copied(net, Chunk(1024, 5024, (0,))), access=((Access.DIRECT,), (Access.COPIED,)))
    timeline = simulate(lower(plan, net, machine), profile(net, machine, direct=1500))
    # in place: 1500 bytes at 3/4 of the link take 2000 ns, then 1000 ns of kernel; the copy gets the rest
    spans = {(s.stream, s.start_ns): s.stop_ns for s in timeline.spans}
    assert spans["compute:0", 0] == 3000
    assert spans["h2d:0", 0] == 2000 + 3500
    alone = simulate(
        lower(replace(plan, access=((Access.DIRECT,), (Access.DIRECT,)), chunks=()), net, machine),
        profile(net, machine, direct=1500),
    )
    assert alone.makespan_ns == pytest.approx(2 * 2500)


def test_what_a_layer_reads_while_it_computes_keeps_the_wire_as_busy() -> None:
    costs = replace(FREE, direct_bytes_per_s=figure(1e9))
    net, machine = network(4000, 6000), host(costs=costs)
    # 4000 ns of reading, 2500 of them in the kernel's own time
    timings = profile(net, machine, run=3000, direct=1500)
    plan = replace(copied(net, Chunk(4096, 10_096, (0,))), access=((Access.DIRECT,), (Access.COPIED,)))
    timeline = simulate(lower(plan, net, machine), timings)
    # half the link each: 3000 ns for 1500, then 5000 for the other 2500, which its 3000 of kernel do not hide
    assert timeline.of(SpanKind.RUN)[0].stop_ns == 3000 + 5000
    assert timeline.of(SpanKind.COPY)[0].stop_ns == 4000 + 6000, "all bytes have crossed the link"
    alone = replace(plan, access=((Access.DIRECT,), (Access.DIRECT,)), chunks=())
    assert simulate(lower(alone, net, machine), timings).makespan_ns == 4500 + 4500, "as the profile says"
    short = replace(timings, layers=(replace(timings.layers[0], resident=Timing(500)), timings.layers[1]))
    assert short.hidden_ns(0, [0], costs) == 500, "no longer than the kernel"
    assert simulate(lower(alone, net, machine), short).makespan_ns == 2000 + 4500


def test_what_is_read_at_a_partner_comes_before_what_a_layer_reads_while_it_computes() -> None:
    """A route between GPUs may share the target's lane."""
    costs = replace(FREE, direct_bytes_per_s=figure(1e9))
    net, machine = network((4000, 2000)), host(2, costs=costs)
    machine = replace(machine, peers=(Peer(1, 0, ("pcie0",)),))
    plan = replace(copied(net, Chunk(4096, 6096, (1,))), access=((Access.DIRECT, Access.PEER),))
    timings = profile(net, machine, run=4000, direct=0, peer=2000)
    run = simulate(lower(plan, net, machine), timings).of(SpanKind.RUN)[0]
    assert run.stop_ns - run.start_ns == 2000 + 4000


def test_a_read_in_place_behind_copies_waits_shares_evenly_and_then_takes_over() -> None:
    costs = replace(FREE, direct_busy_ns=figure(100), direct_ramp_ns=figure(500), direct_weight=figure(4))
    net, machine = network(1000, 1000, 9000), host(costs=costs)
    chunks = (Chunk(0, 1000, (0,)), Chunk(2048, 11048, (0,)))
    plan = replace(copied(net, *chunks), access=((Access.COPIED,), (Access.DIRECT,), (Access.COPIED,)))
    timeline = simulate(lower(plan, net, machine), profile(net, machine, direct=1300))
    runs = [(s.start_ns, s.stop_ns) for s in timeline.of(SpanKind.RUN)]
    # from 2000: 100 behind the copies, 500 at half the link, the other 800 at four fifths; then the kernel's own 1000
    assert runs[1] == (2000, 2000 + 100 + 1000 + 1000 + 1000)
    # the copy lost what the read had of the link
    assert timeline.of(SpanKind.COPY)[-1].stop_ns == 10_000 + 1300


def test_a_read_in_place_waits_no_less_behind_copies_than_the_host_says() -> None:
    costs = replace(FREE, direct_busy_ns=figure(100), direct_weight=figure(4))
    net, machine = network(1000, 1000, 9000), host(costs=costs)
    plan = replace(
        copied(net, Chunk(0, 1000, (0,)), Chunk(2048, 11048, (0,))),
        access=((Access.COPIED,), (Access.DIRECT,), (Access.COPIED,)),
    )
    program, base = lower(plan, net, machine), profile(net, machine, direct=0)
    for own, waited in ((0, 100), (40, 100), (250, 250)):
        timings = replace(base, direct_busy=figure(own), direct_weight=figure(1))
        runs = [(s.start_ns, s.stop_ns) for s in simulate(program, timings).of(SpanKind.RUN)]
        assert runs[1] == (2000, 2000 + waited + 1000)


def test_layers_are_slower_while_host_memory_is_copied_to_their_gpu() -> None:
    net, machine = network(1000, 0, 0, 3000), host(2, nvlink=1000)
    plan = copied(net, Chunk(0, 1000, (0,)), Chunk(1024, 4024, (0,)))
    timings = replace(profile(net, machine), slowed=Figure(0.5, "measured", "here"))
    runs = simulate(lower(plan, net, machine), timings).of(SpanKind.RUN)
    # until 4000 the second chunk is under way; the last layer begins after it
    assert [s.duration_ns for s in runs] == [1500, 1500, 1500, 1000]
    own = replace(timings, layers=(replace(timings.layers[0], beside=Timing(70)), *timings.layers[1:]))
    runs = simulate(lower(plan, net, machine), own).of(SpanKind.RUN)
    assert [s.duration_ns for s in runs] == [1070, 1500, 1500, 1000], (
        "what a layer was measured to take goes first"
    )
    far = replace(plan, chunks=(Chunk(0, 1000, (1, 0)), Chunk(1024, 4024, (1, 0))))
    runs = simulate(lower(far, net, machine), timings).of(SpanKind.RUN)
    assert [s.duration_ns for s in runs] == [1000] * 4, "a partner's lane is none of their business"


def test_fair_shares_match_the_closed_form() -> None:
    """Two links: "wide" of 4 carries weights 1 and 3, and a third flow that "narrow" of 0.5 holds to 0.5 in all."""
    env = simpy.Environment()
    fabric = Fabric(env, {"wide": 4.0, "narrow": 0.5})
    ends: dict[str, float] = {}
    flows = {
        "light": fabric.transfer(("wide",), 8.75, 1.0),
        "heavy": fabric.transfer(("wide",), 26.25, 3.0),
        "held": fabric.transfer(("wide", "narrow"), 5.0, 2.0),
    }
    for name, event in flows.items():
        event.callbacks.append(lambda _, name=name: ends.__setitem__(name, env.now))  # type: ignore[union-attr]
    env.run()
    assert ends == {"held": 10.0, "light": 10.0, "heavy": 10.0}


@st.composite
def cases(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    machine = draw(some.hosts())
    net = draw(some.networks())
    return draw(some.plans(net, machine)), net, machine, draw(some.profiles(net, machine))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_laws_of_every_timeline(case) -> None:  # type: ignore[no-untyped-def]
    plan, net, machine, timings = case
    program = lower(plan, net, machine)
    timeline = simulate(program, timings)
    assert simulate(program, timings) == timeline, "twice the same, to the last digit"
    assert simulate(program, timings, detail=False).makespan_ns == timeline.makespan_ns
    for stream in timeline.streams:
        spans = [s for s in timeline.spans if s.stream == stream]
        for before, after in itertools.pairwise(spans):
            assert after.start_ns >= before.stop_ns - 1e-6 * max(1, before.stop_ns), "streams run in order"
    for use in timeline.links:
        assert use.bytes_per_s <= machine.bandwidth[use.link] * (1 + 1e-9), "no link above its capacity"
    assert max((s.stop_ns for s in timeline.spans), default=0) <= timeline.makespan_ns * (1 + 1e-12)
    copies = [op for op in program.ops if isinstance(op, Copy)]
    assert sum(op.size_bytes for op in copies if op.source is None) == plan.copied_bytes
    assert [op.layer for op in program.ops if isinstance(op, Run)] == list(range(len(net.layers)))


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({"wait": 20}, "wait and wait_beside go together"),
        ({"wait_beside": 20}, "wait and wait_beside go together"),
        ({"direct_busy": 20}, "direct_busy and direct_weight go together"),
        ({"direct_busy": 20, "direct_weight": 0}, "a read in place beside copies would never end"),
    ],
)
def test_a_profile_with_half_of_what_belongs_together_is_refused(
    figures: dict[str, float], says: str
) -> None:
    made = profile(network(1024), host())
    with pytest.raises(InputError, match=f"profile of 'test': .*{says}.*; make the profile again"):
        replace(made, **{name: figure(value) for name, value in figures.items()})
