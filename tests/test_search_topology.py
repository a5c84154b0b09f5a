"""Which links the search takes: machines of four and eight GPUs, joined in different ways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.bound import intake
from sim.budget import within
from sim.catalog import Request, find_host, obtain_profile
from sim.draft import EVERY, Draft, paths_of, plan_of, shares
from sim.errors import InputError
from sim.host import Gpu, Host, Link, Peer
from sim.memory import HEADROOM_BYTES
from sim.ops import Copy
from sim.options import Options, Outcome
from sim.plan import Launch
from sim.program import lower
from sim.search import search
from tests.builders import FREE, GB, figure, host, network, profile

P3 = find_host("p3.8xlarge")
MESH = {
    **{(0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2},
    **{(2, 6): 1, (3, 7): 1, (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2},
}
"""NVLink lanes of a DGX-1 with V100: two rings of four, and one GPU of the other four beside each."""


def joined(lanes: dict[tuple[int, int], int], gpus: int = 8) -> Host:
    """Two GPUs behind each PCIe switch, NVLink as told, costs of the P3.8xlarge."""
    both = {(a, b): n for (x, y), n in lanes.items() for a, b in ((x, y), (y, x))}
    links = [Link(f"pcie{g}", figure(12 * GB)) for g in range(gpus)]
    links += [Link(f"uplink{switch}", figure(12 * GB)) for switch in range(gpus // 2)]
    links += [Link(f"nvlink{a}>{b}", figure(24 * GB * n)) for (a, b), n in both.items()]
    return Host(
        "mesh",
        "by hand",
        tuple(Gpu(g, "GPU", 2**34, (f"pcie{g}", f"uplink{g // 2}")) for g in range(gpus)),
        tuple(links),
        tuple(Peer(a, b, (f"nvlink{a}>{b}",)) for a, b in both),
        P3.costs,
    )


def switched(gpus: int = 8) -> Host:
    """A PCIe lane each, and NVSwitch: every GPU reaches every other through its own port. Costs of the H200 pair."""
    pairs = [(a, b) for a in range(gpus) for b in range(gpus) if a != b]
    links = [Link(f"pcie{g}", figure(55 * GB)) for g in range(gpus)]
    links += [Link(f"{way}{g}", figure(385 * GB)) for g in range(gpus) for way in ("out", "in")]
    return Host(
        "switched",
        "by hand",
        tuple(Gpu(g, "GPU", 2**34, (f"pcie{g}",)) for g in range(gpus)),
        tuple(links),
        tuple(Peer(a, b, (f"out{a}", f"in{b}")) for a, b in pairs),
        find_host("h200-pair").costs,
    )


def find(machine: Host, options: Options, mib: int = 4) -> Outcome:
    """A network of 40 layers whose copies take far longer than its run."""
    net = network(*[mib * 2**20] * 40)
    return search(profile(net, machine, run=10_000, direct=10**8, peer=10**8, issue=10_000), machine, options)


def used(outcome: Outcome) -> set[tuple[int, ...]]:
    return {chunk.path for chunk in outcome.best.plan.chunks}


def lanes_are_even(outcome: Outcome, within: float = 0.25) -> bool:
    carried: dict[int, int] = {}
    for chunk in outcome.best.plan.chunks:
        carried[chunk.path[0]] = carried.get(chunk.path[0], 0) + chunk.size_bytes
    return max(carried.values()) - min(carried.values()) <= within * max(carried.values())


# Four GPUs, two behind each switch: the second switch is the one other way in


@pytest.mark.parametrize(
    ("target", "mate", "best", "other"), [(0, 1, 3, 2), (1, 0, 2, 3), (2, 3, 1, 0), (3, 2, 0, 1)]
)
def test_on_a_p3_the_partner_is_behind_the_other_switch_with_two_nvlink_lanes(
    target: int, mate: int, best: int, other: int
) -> None:
    alone, beside = (target,), (best, target)
    assert paths_of(P3, target, (mate, other, best)) == (alone, beside)
    assert paths_of(P3, target, (mate, other)) == (alone, (other, target)), (
        "one NVLink lane still carries a PCIe lane"
    )
    assert paths_of(P3, target, (mate,)) == (alone, (mate, target)), "nothing better at hand"
    results = [
        find(P3, Options(target, allowed)) for allowed in ((), (mate,), (mate, other), (mate, other, best))
    ]
    times = [found.best.makespan_ns for found in results]
    assert times[1] == pytest.approx(times[0], rel=0.002), "behind the same uplink, it brings nothing"
    assert times[2] < 0.55 * times[0]
    assert times[3] < 1.01 * times[2], "with twelve of its 24 or 48 GB/s used, NVLink decides little"
    assert used(results[3]) == {alone, beside}
    assert lanes_are_even(results[3])
    assert all(found.gap < 0.05 for found in results)
    every = find(P3, Options(target))
    assert every.best == results[3].best, "all GPUs are allowed unless some are named"


def test_resnet50_on_a_p3() -> None:
    timings = obtain_profile(P3, Request("resnet50", None, None, None))
    results = [search(timings, P3, Options(0, allowed)) for allowed in ((), (1,), (2,), (3,), None)]
    alone, mate, one_lane, two_lanes, every = (found.best.makespan_ns for found in results)
    assert alone >= mate > one_lane > 0.99 * two_lanes
    assert two_lanes < 0.53 * alone
    assert two_lanes == every
    assert results[-1].best.plan.gpus == (0, 3)
    assert all(found.gap < 0.06 for found in results)
    assert results[-1].evaluated < 160, "a second on any laptop"


# Eight GPUs in a mesh: four switches, one of them two hops away


def test_in_a_mesh_each_switch_gives_one_lane_and_the_far_one_is_relayed_twice() -> None:
    machine = joined(MESH)
    assert paths_of(machine, 0, range(8)) == ((0,), (3, 0), (4, 0), (7, 4, 0))
    assert paths_of(machine, 5, range(8)) == ((5,), (1, 5), (6, 5), (2, 1, 5))
    assert paths_of(machine, 0, (1, 2, 3, 4)) == ((0,), (3, 0), (4, 0)), "the two in between are not given"
    allowed = [(), (3,), (3, 4), (3, 4, 7), tuple(range(1, 8))]
    results = [find(machine, Options(0, gpus)) for gpus in allowed]
    times = [found.best.makespan_ns for found in results]
    assert times == sorted(times, reverse=True)
    for lanes, time in enumerate(times[:4], start=1):
        assert time < 1.1 * times[0] / lanes
    assert used(results[3]) == {(0,), (3, 0), (4, 0), (7, 4, 0)}
    assert results[4].best == results[3].best, (
        "GPUs 1, 2, 5 and 6 share the switches of others and add nothing"
    )
    assert all(found.gap < 0.06 for found in results)
    assert lanes_are_even(results[4])


def test_a_gpu_without_a_way_to_the_target_is_left_alone() -> None:
    machine = joined({(0, 2): 2, (4, 6): 2})
    assert paths_of(machine, 0, range(8)) == ((0,), (2, 0))
    found = find(machine, Options(0))
    assert found.best.plan.gpus == (0, 2)
    assert intake(machine, tuple(range(8))) == 24 * GB, "the bound counts no GPU that cannot help"
    assert find(machine, Options(1)).best.plan.gpus == (1,)
    with pytest.raises(InputError, match="GPU 4 has no route to GPU 0"):
        find(machine, Options(0, (2, 4)))


def test_named_gpus_may_relay_for_one_another() -> None:
    machine = joined(MESH)
    found = find(machine, Options(0, (7, 4)))
    assert used(found) == {(0,), (4, 0), (7, 4, 0)}
    assert {c.plan.gpus for c in found.strategies if c.name.startswith("pt")} == {(0, 4)}
    with pytest.raises(InputError, match="GPU 7 has no route to GPU 0"):
        find(machine, Options(0, (7,)))


def test_what_is_read_at_a_partner_may_come_there_over_another() -> None:
    """Nothing may be held on the target; GPU 2 is two hops away, GPU 1 shares the target's switch and is read."""
    machine = joined({(0, 1): 2, (1, 2): 2}, gpus=4)
    assert paths_of(machine, 0, range(4)) == ((0,), (2, 1, 0))
    net = network(*[2**20] * 12)
    timings = profile(net, machine, run=10_000, direct=10**7, peer=20_000)
    for allowed, path in ((None, (2, 1)), ((1,), (1,))):
        found = search(timings, machine, Options(0, allowed, memory_budget_bytes=0))
        assert found.best.plan.held_bytes(net) == 0
        assert used(found) == {path}


def test_what_comes_to_a_partner_over_another_takes_room_on_both() -> None:
    """Counted once, twice as much was to stay there as had room, and everything was read in host memory instead."""
    machine = joined({(0, 1): 2, (1, 2): 2}, gpus=4)
    rooms = zip(machine.gpus, (0, 7 * 2**20, 7 * 2**20, 0), strict=True)
    machine = replace(
        machine, gpus=tuple(replace(gpu, memory_bytes=HEADROOM_BYTES + room) for gpu, room in rooms)
    )
    net = network(*[2**20] * 12)
    found = search(profile(net, machine, run=10_000, direct=10**7, peer=20_000), machine, Options(0))
    assert used(found) == {(2, 1)}
    assert found.best.plan.copied_bytes == 6 * 2**20


# Eight GPUs behind NVSwitch, a PCIe lane each


def test_behind_a_switch_all_eight_lanes_count() -> None:
    machine = switched()
    assert paths_of(machine, 0, range(8)) == ((0,), *((gpu, 0) for gpu in range(1, 8)))
    assert paths_of(machine, 5, range(8)) == ((5,), *((gpu, 5) for gpu in (0, 1, 2, 3, 4, 6, 7)))
    counts = (1, 2, 4, 8)
    results = [find(machine, Options(0, tuple(range(1, lanes))), mib=32) for lanes in counts]
    times = [found.best.makespan_ns for found in results]
    for lanes, time in zip(counts, times, strict=True):
        assert time < 1.12 * times[0] / lanes
    assert times == sorted(times, reverse=True)
    assert used(results[-1]) == {(0,), *((gpu, 0) for gpu in range(1, 8))}
    assert all(lanes_are_even(found) for found in results)
    assert all(found.gap < 0.1 for found in results)


def test_behind_a_switch_a_network_that_computes_longer_takes_only_the_lanes_it_needs() -> None:
    machine = switched()
    net = network(*[2**20] * 40)
    found = search(profile(net, machine, run=100_000, direct=10**8), machine, Options(0))
    assert len(found.best.plan.gpus) < 4
    assert found.gap < 0.02
    assert found.evaluated < 250


def test_a_port_that_is_full_takes_no_more_lanes() -> None:
    machine = switched()
    narrow = tuple(
        replace(link, bytes_per_s=figure(100 * GB)) if link.name == "in0" else link for link in machine.links
    )
    machine = replace(machine, links=narrow)
    assert paths_of(machine, 0, range(8)) == ((0,), (1, 0), (2, 0))
    assert [
        round(rate / GB) for rate in shares([("pcie0",), ("pcie1", "in0"), ("pcie2", "in0")], machine)
    ] == [55, 50, 50]


# Heads: what the graph need not hold


def slow_to_launch(**costs: float) -> Host:
    base = host(4, pcie=10, nvlink=40)
    known = {
        "issue_copy_ns": 4000,
        "issue_event_ns": 1000,
        "launch_node_ns": 200,
        "copy_latency_ns": 2000,
        "start_ns": 10_000_000,  # or an eager plan would do as well
        **costs,
    }
    return replace(base, costs=replace(FREE, **{name: figure(value) for name, value in known.items()}))


@pytest.mark.parametrize(
    "cost", [{}, {"launch_cross_ns": 1_000_000}, {"launch_copy_ns": 100_000}, {"launch_first_ns": 1_000_000}]
)
def test_copies_over_partners_stay_out_of_a_graph_that_is_slow_to_launch_with_them(
    cost: dict[str, float],
) -> None:
    machine = slow_to_launch(launch_ns=20_000, **cost)
    found = find(machine, Options(0))
    program = lower(found.best.plan, network(*[4 * 2**20] * 40), machine)
    assert len(found.best.plan.gpus) == 4
    assert found.gap < 0.05
    if cost:
        assert not any(
            isinstance(op, Copy) and op.source is not None for op in program.ops[program.head_ops :]
        )


def test_every_chunk_may_be_in_the_head() -> None:
    machine = slow_to_launch()
    net = network(*[2**20] * 8)
    cuts = tuple((at * 2**20, (at + 1) * 2**20) for at in range(8))
    draft = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,), (1, 0)), head=EVERY, cuts=cuts)
    plan = plan_of(draft, net, machine)
    assert plan.head == len(plan.chunks)
    assert plan_of(replace(draft, launch=Launch.EAGER), net, machine).head == 0
    assert plan_of(replace(draft, head=3), net, machine).head == 3


def test_a_chunk_goes_where_it_lands_first_once_the_host_thread_has_come_to_it() -> None:
    """A relay costs the thread as much as three own copies: with tiny chunks the thread is what is short."""
    machine = slow_to_launch(issue_copy_ns=1_000_000)
    net = network(*[2**20] * 8)
    cuts = tuple((at * 2**20, (at + 1) * 2**20) for at in range(8))
    own = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,), (1, 0)), head=EVERY, cuts=cuts)
    assert {chunk.path for chunk in plan_of(own, net, machine).chunks} == {(0,)}
    assert {chunk.path for chunk in plan_of(replace(own, head=0), net, machine).chunks} == {(0,), (1, 0)}


def test_where_memory_is_short_partners_that_add_no_bandwidth_hold_what_the_target_reads_there() -> None:
    """GPU 1 shares the target's uplink and GPU 2 that of GPU 3, so neither brings anything faster; both have memory."""
    net = network(*([2**20] * 12))
    small = tuple(replace(gpu, memory_bytes=HEADROOM_BYTES + 2**20 * 5) for gpu in P3.gpus)
    machine = replace(P3, gpus=small)
    timings = profile(net, machine, run=1000, direct=10**6, peer=10**4)
    best = search(timings, machine, Options(memory_budget_bytes=2**20)).best.plan
    staying = {chunk.path[-1] for chunk in best.chunks} - {0}
    assert staying == {1, 2, 3}
    assert best.direct_bytes(net) == 0, "all that the target does not hold has room on a partner"
    lower(best, net, machine)
    # with room on the target nothing is gained
    roomy = search(profile(net, P3, run=1000, direct=10**6, peer=10**4), P3, Options()).best.plan
    assert {gpu for chunk in roomy.chunks for gpu in chunk.path} <= {0, 2, 3}


def test_a_gpu_of_another_kind_is_no_target_but_may_be_a_partner() -> None:
    net = network(2**20, 2**20)
    mixed = replace(P3, gpus=(*P3.gpus[:2], replace(P3.gpus[2], name="Tesla T4"), P3.gpus[3]))
    timings = profile(net, mixed, run=1000)
    with pytest.raises(
        InputError, match=r"^GPU 2 of p3.8xlarge is a Tesla T4, and layers are timed for GPU 0, a Tesla V100"
    ):
        search(timings, mixed, Options(target=2))
    assert search(timings, mixed, Options(partners=(2,))).best.makespan_ns > 0


def test_one_storage_far_larger_than_most_takes_no_room_from_all_others() -> None:
    """Wherever it were put, as much would be kept back on every partner but one."""
    mib = 2**20
    net = network(*([mib] * 40), 3 * mib)
    small = tuple(replace(gpu, memory_bytes=HEADROOM_BYTES + 8 * mib) for gpu in P3.gpus)
    machine = replace(P3, gpus=small)
    timings = profile(net, machine, run=1000, direct=10**6, peer=10**4)
    paths = ((0,), (3, 0), (1, 0), (2, 0))
    tight = within(mib, Draft(Launch.GRAPH, frozenset(), frozenset(), paths), timings, machine)
    assert 40 not in tight.peer
    assert sum(net.storages[at].size_bytes for at in tight.peer) == 21 * mib, (
        "24, less padding and one for each but one"
    )
