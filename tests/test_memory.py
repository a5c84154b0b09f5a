"""No plan needs more memory on any GPU than it has: what comes to a partner lies there, whether it stays or goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwexec.arena import Extents
from hwexec.cpu import CpuDevice
from hwexec.layout import room_for
from sim.budget import within
from sim.cli import cli
from sim.console import run_command
from sim.draft import Draft, deal
from sim.errors import InputError
from sim.files import read_plan, write_host, write_plan, write_profile
from sim.host import Host
from sim.memory import HEADROOM_BYTES, activation_bytes
from sim.network import Network, Read
from sim.options import Options
from sim.plan import Access, Chunk, Launch, Plan
from sim.search import search
from tests import strategies as some
from tests.builders import copied, host, network, profile

MB = 1_000_000


def roomy(machine: Host, *rooms: int, runs: Network | None = None, target: int = 0) -> Host:
    """The machine with so much room for weights on each GPU, and on the target for what the network takes to run."""
    more = 0 if runs is None else activation_bytes(runs)
    gpus = (
        replace(gpu, memory_bytes=room + HEADROOM_BYTES + (more if gpu.index == target else 0))
        for gpu, room in zip(machine.gpus, rooms, strict=True)
    )
    return replace(machine, gpus=tuple(gpus))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_plan_counts_what_the_executor_allocates(data: st.DataObject) -> None:
    machine, net = data.draw(some.hosts()), data.draw(some.networks())
    plan = data.draw(some.plans(net, machine))
    found = room_for(plan, net, CpuDevice(len(machine.gpus)), settles=False).arenas
    assert set(found) == set(plan.gpus)
    assert found[plan.target].size_bytes == plan.held_bytes(net)
    taken = [found[g.index].size_bytes if g.index in found else 0 for g in machine.gpus]
    full = roomy(machine, *taken, runs=net, target=plan.target)
    assert plan.overfull(net, full) is None
    for gpu in plan.gpus:
        if found[gpu].size_bytes:
            rooms = [size - (at == gpu) for at, size in enumerate(taken)]
            short = roomy(full, *rooms, runs=net, target=plan.target)
            assert f"on GPU {gpu}, which has room for" in (plan.overfull(net, short) or "")
    need = taken[plan.target] + HEADROOM_BYTES + activation_bytes(net)
    alone = replace(plan, chunks=tuple(c for c in plan.chunks if c.path == (plan.target,)))
    assert room_for(alone, net, CpuDevice(len(machine.gpus), memory_bytes=need), settles=False)
    whole = room_for(plan, net, CpuDevice(len(machine.gpus))).arenas
    assert whole[plan.target].size_bytes == net.arena_bytes
    assert all(whole[gpu] == found[gpu] for gpu in plan.gpus[1:])


def test_a_plan_that_a_partner_has_no_room_for_is_refused() -> None:
    net = network(4 * MB, 4 * MB)
    machine = roomy(host(2), 16 * MB, 3 * MB)
    at = net.offsets
    relay = copied(net, Chunk(0, at[1], (0,)), Chunk(at[1], at[2], (1, 0)))
    with pytest.raises(InputError, match=r"plan 'test': needs 3.8 MiB on GPU 1, which has room for 2.9; "):
        relay.check(net, machine)
    stay = replace(relay, chunks=(relay.chunks[0], Chunk(at[1], at[2], (1,))))
    stay = replace(stay, access=(stay.access[0], (Access.PEER,)))
    with pytest.raises(InputError, match="on GPU 1, which has room"):
        stay.check(net, machine)
    with pytest.raises(InputError, match=r"needs 7.6 MiB on GPU 0"):
        copied(net, Chunk(0, at[2], (0,))).check(net, roomy(host(2), 7 * MB, 0))
    relay.check(net, roomy(host(2), 8 * MB, 4 * MB + 512))


def test_pieces_go_to_partners_while_there_is_room_then_straight() -> None:
    pieces = [((at * MB, (at + 1) * MB), False) for at in range(8)]
    paths = ((0,), (1, 0), (2, 0))
    machine = roomy(host(3, pcie=1), 16 * MB, 2 * MB + 5000, 0)
    chunks = list(deal(pieces, paths, machine, 0))
    assert [c.path for c in chunks].count((1, 0)) == 2
    assert [c.path for c in chunks].count((2, 0)) == 0
    staying = [(piece, at > 4) for at, (piece, _) in enumerate(pieces)]
    tight = roomy(host(3, pcie=1), 16 * MB, 2 * MB + 5000, 2 * MB + 5000)
    chunks = list(deal(staying, paths, tight, 0))
    assert sum(len(c.path) == 2 for c in chunks[:5]) == 0, "kept back for those that stay"
    assert [c.path for c in chunks[5:]].count((1,)) < 3
    assert {c.path for c in chunks[5:]} == {(1,), (2,)}


def test_a_budget_is_kept_with_what_partners_have_room_for_and_the_rest_in_host_memory() -> None:
    net = network(*[MB] * 10)
    machine = roomy(host(3), 16 * MB, 3 * MB, 3 * MB)
    timings = profile(net, machine, direct=10**6, peer=10**5)
    draft = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,), (1, 0), (2, 0)))
    tight = within(2 * MB + 5000, draft, timings, machine)
    assert (len(tight.peer), len(tight.direct)) == (4, 4)
    already = within(2 * MB + 5000, replace(draft, peer=tight.peer), timings, machine)
    assert (already.peer, already.direct) == (tight.peer, tight.direct), "what lies there has its place"
    large = roomy(machine, 16 * MB, 16 * MB, 16 * MB)
    timings = profile(net, large, direct=10**6, peer=10**5)
    assert len(within(2 * MB + 5000, draft, timings, large).peer) == 8


def test_a_storage_without_bytes_stays_at_no_partner() -> None:
    """No chunk would bring it there, so no partner would hold it."""
    net = network(1, MB)
    (empty, whole), (first, second) = net.storages, net.layers
    empty, first = replace(empty, size_bytes=0), replace(first, reads=(Read(0, 0),))
    net = replace(net, storages=(empty, whole), layers=(first, second))
    machine = roomy(host(2), 16 * MB, 16 * MB)
    timings = profile(net, machine, direct=10**6, peer=0)
    draft = Draft(Launch.GRAPH, frozenset(), frozenset(), ((0,), (1, 0)))
    assert within(0, draft, timings, machine).peer == {1}


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_best_plan_fits_every_gpu_and_something_always_does(data: st.DataObject) -> None:
    machine = data.draw(some.hosts(min_gpus=2))
    net = data.draw(some.networks(max_layers=5, max_bytes=10**6))
    rooms = [data.draw(st.integers(0, 2 * net.arena_bytes)) for _ in machine.gpus]
    machine = roomy(machine, *rooms, runs=net)
    timings = data.draw(some.profiles(net, machine))
    budget = data.draw(st.none() | st.integers(0, net.arena_bytes))
    found = search(timings, machine, Options(memory_budget_bytes=budget))
    for candidate in found.strategies:
        assert candidate.plan.overfull(net, machine) is None
        assert candidate.plan.held_bytes(net) <= min(rooms[0], rooms[0] if budget is None else budget)
        for gpu in candidate.plan.gpus[1:]:
            assert Extents.of(candidate.plan.crossing(gpu)).size_bytes <= rooms[gpu]


def test_a_long_network_takes_of_each_partner_what_it_has() -> None:
    net = network(*[MB] * 60)
    machine = roomy(host(3, pcie=1, nvlink=20), 20 * MB, 8 * MB, 6 * MB)
    timings = profile(net, machine, direct=2 * MB, peer=10**5)
    found = search(timings, machine, Options(memory_budget_bytes=20 * MB))
    assert found.best.plan.gpus == (0, 1, 2)
    assert found.best.plan.overfull(net, machine) is None
    alone = search(timings, machine, Options(memory_budget_bytes=20 * MB, partners=()))
    assert found.best.makespan_ns < alone.best.makespan_ns
    assert {name for name, _ in found.left_out} >= {"pt", "pt+dha"}


def test_published_plans_that_a_partner_has_no_room_for_are_left_out_with_the_reason() -> None:
    net = network(*[MB] * 8)
    machine = roomy(host(3), 16 * MB, 0, 2 * MB)
    found = search(profile(net, machine), machine, Options())
    reasons = dict(found.left_out)
    assert reasons["pt"] == "needs 2.9 MiB on GPU 2, which has room for 1.9"


def test_commands_refuse_what_does_not_fit_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = network(4 * MB, 4 * MB)
    machine = roomy(host(2), 5 * MB, 3 * MB)
    write_host("host.yaml", machine)
    write_profile("profile.yaml", profile(net, machine))
    here = ("--model", "test", "--host", "./host.yaml", "--profile", "profile.yaml")

    def sim(*args: str) -> tuple[int, str]:
        code = run_command(cli, "sim", args)
        return code, capsys.readouterr().err

    code, err = sim("search", *here)
    assert (code, err) == (
        2,
        "sim: test: its 7.6 MiB of weights do not fit in the 4.8 MiB that GPU 0 of test has room for; pass --memory-budget with "
        "what it may hold of them, and the rest is read in place\n",
    )
    code, err = sim("search", *here, "--memory-budget", "6MB")
    assert (code, err) == (
        2,
        "sim: --memory-budget of 5.7 MiB: more than the 4.8 MiB that GPU 0 of test has room for; give at most that\n",
    )
    assert sim("search", *here, "--memory-budget", "5MB", "--out", "plan.yaml")[0] == 0
    file = read_plan("plan.yaml")
    at = net.offsets
    access = ((Access.COPIED,), (Access.PEER,))
    plan = Plan("mine", 0, Launch.GRAPH, access, (Chunk(0, at[1], (0,)), Chunk(at[1], at[2], (1,))))
    write_plan("mine.yaml", replace(file, plan=plan))
    code, err = sim("simulate", "mine.yaml", *here[2:])
    assert (code, err) == (
        2,
        "sim: mine.yaml: plan 'mine': needs 3.8 MiB on GPU 1, which has room for 2.9; bring less to it, or search a plan "
        "for test\n",
    )
