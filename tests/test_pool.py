"""Modules that take turns in one pool of GPU memory: who has it, who has lost it, and answers that are right whoever comes next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hwexec
from hwexec.cpu import CpuDevice
from hwexec.pool import Pool, shared
from hwexec.rouse import ROUSE_BYTES
from sim.errors import InputError
from sim.keep import keeping
from sim.plan import Access, Chunk, Launch, Plan
from tests import toys
from tests.pooling import Owner, ahead, planned, pool_of, prepared, text
from tests.toys import TWO, Toy, dealt


@pytest.mark.parametrize("launch", Launch)
def test_two_modules_take_turns_in_memory_for_one(launch: Launch) -> None:
    one, other = text(1), text(2, "inner")
    device = CpuDevice(2)
    with pool_of(other, device, launch=launch) as pool:
        held = [device.held_bytes(gpu) for gpu in (0, 1)]
        a, b = prepared(one, pool, launch), prepared(other, pool, launch)
        scratch = 2 * ROUSE_BYTES
        assert [device.held_bytes(gpu) - scratch for gpu in (0, 1)] == held, (
            "neither has weights in memory of its own"
        )
        assert (a.hot, b.hot, a.launch) == (False, False, launch)
        assert torch.equal(a(*one.inputs), one.answer)
        assert (a.hot, b.hot) == (True, False)
        assert torch.equal(b(*other.inputs), other.answer)
        assert (a.hot, b.hot) == (False, True)
        with pytest.raises(InputError) as refused:
            a.warm(*one.inputs)
        assert str(refused.value) == (
            "no weights are in GPU memory, since another module of the pool has taken the place of toy: make a cold start before "
            "a warm run"
        )
        for refuses in (a, a.serve, a.resident):
            with pytest.raises(InputError, match=r"a prepared module takes that only"):
                refuses(one.inputs[0][:1])
        assert torch.equal(b.warm(*other.inputs), other.answer), "a refusal takes nothing from anybody"
        assert torch.equal(a.serve(*one.inputs), one.answer)
        assert torch.equal(a.serve(*one.inputs), one.answer)
        assert (a.hot, b.hot) == (True, False)
        assert torch.equal(b.resident(*other.inputs), other.answer)
        assert (a.hot, b.hot) == (False, True)
        a.evict()
        assert torch.equal(b.warm(*other.inputs), other.answer), (
            "what a no longer has, it does not fill with 0xFF"
        )
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in (0, 1)] == [0, 0]


def test_where_there_is_room_for_both_they_stay_warm_and_a_third_takes_the_place_of_one() -> None:
    made = [text(seed) for seed in (1, 2, 3)]
    device = CpuDevice(2)
    with pool_of(made[0], device, times=2) as pool:
        cold = [prepared(m, pool) for m in made]
        for at, (start, m) in enumerate(zip(cold, made, strict=True)):
            assert torch.equal(start(*m.inputs), m.answer)
            assert sum(c.hot for c in cold) == min(2, at + 1)
        assert [c.hot for c in cold] == [False, True, True]
        assert torch.equal(cold[1].warm(*made[1].inputs), made[1].answer)
        device.gate(cold[2]._stage.background, 0.02e9)
        cold[2].settle()
        neighbour = cold[1]._place._tenant
        assert neighbour is not None
        assert pool.take(neighbour) == [], "who is elsewhere is not waited for"
        cold[2].close()
        assert not cold[2].hot
        assert pool._tenants[0].neighbours == [], "nobody keeps who has gone"
        assert torch.equal(cold[0](*made[0].inputs), made[0].answer)
        assert [c.hot for c in cold[:2]] == [True, True], "nobody is in the place that was given back"


def test_a_place_is_where_others_are_least() -> None:
    with Pool({0: 1000}, CpuDevice(1)) as pool:
        spans, owners = [], []
        for size in (300, 300, 300, 200, 1000):
            owners.append(Owner())
            tenant = pool.join("one", owners[-1])
            tenant.allot({0: size})
            spans.append(tenant.spans[0])
        assert spans == [(0, 300), (512, 812), (0, 300), (768, 968), (0, 1000)]
        owners.clear()
        assert pool.least_used(0, 1000) == (0, 1000)
        assert pool._tenants == [], "who is let go of has no place"
    with Pool({0: 9 * 256}, CpuDevice(1)) as pool:
        for start, stop in ((0, 1), (1, 2), (2, 9)):
            owners.append(Owner())
            pool.join("one", owners[-1]).spans = {0: (256 * start, 256 * stop)}
        assert pool.least_used(0, 2 * 256) == (2 * 256, 4 * 256), "of one rather than two, by as many bytes"
    assert (shared((0, 5), (3, 9)), shared((0, 3), (3, 9)), shared((4, 6), (0, 9))) == (2, 0, 2)


ACTS = ("cold", "warm", "serve", "resident", "in place", "settle", "evict", "timeline", "again", "wrong")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_they_do_in_turn_answers_are_right_and_warm_runs_are_of_their_own_weights(
    data: st.DataObject,
) -> None:
    made = [data.draw(toys.toys()) for _ in range(3)]
    device = CpuDevice(2, seed=data.draw(st.integers(0, 99)), delay_us=40)
    largest = max(m.network.arena_bytes for m in made)
    total = sum(m.network.arena_bytes for m in made)
    size = data.draw(st.integers(largest, total + 1024))
    with Pool({0: size, 1: size}, device) as pool:
        plans = [dealt(m, data.draw(st.sampled_from(Launch))) for m in made]
        keeps = [data.draw(st.sets(st.integers(0, len(m.network.storages) - 1), max_size=3)) for m in made]
        plans = [keeping(plan, kept, m.network) for m, plan, kept in zip(made, plans, keeps, strict=True)]
        plans = [ahead(plan) if data.draw(st.booleans()) else plan for plan in plans]
        cold = [planned(m, plan, pool) for m, plan in zip(made, plans, strict=True)]
        for _ in range(12):
            at = data.draw(st.integers(0, 2))
            c, m = cold[at], made[at]
            act = data.draw(st.sampled_from(ACTS))
            hot = c.hot
            runs: dict[str, Callable[..., torch.Tensor]] = {
                "cold": c, "serve": c.serve, "resident": c.resident, "in place": c.in_place,
            }  # fmt: skip
            if act == "warm" and not hot:
                with pytest.raises(InputError, match="no weights are in GPU memory"):
                    c.warm(*m.inputs)
            elif act == "warm":
                assert torch.equal(c.warm(*m.inputs), m.answer)
            elif act == "settle" and hot:
                c.settle()
            elif act == "evict":
                c.evict()
                assert not c.hot
            elif act == "timeline":
                assert c.timeline().spans
            elif act == "wrong":
                hots = [x.hot for x in cold]
                with pytest.raises(InputError):
                    c(m.inputs[0][:1])
                assert [x.hot for x in cold if x is not c] == [
                    h for x, h in zip(cold, hots, strict=True) if x is not c
                ]
            elif act == "again":  # given back and prepared anew, where others are
                c.close()
                cold[at] = planned(m, plans[at], pool)
            elif act in runs:
                assert torch.equal(runs[act](*m.inputs), m.answer)
                assert c.hot == (act != "in place" or hot)
            tenants = [tenant for c in cold if c.hot and (tenant := c._place._tenant) is not None]
            assert not any(x.overlaps(y) for x in tenants for y in tenants if x is not y)
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in (0, 1)] == [0, 0]


def test_threads_share_a_pool() -> None:
    made = [text(width, width=width) for width in (8, 12, 16)]
    device = CpuDevice(2, delay_us=200)
    with pool_of(made[2], device, times=1.3) as pool, ThreadPoolExecutor(len(made)) as threads:
        cold = [prepared(m, pool) for m in made]

        def serve(start: hwexec.ColdStart, m: Toy) -> bool:
            return all(torch.equal(start.serve(*m.inputs), m.answer) for _ in range(20))

        assert list(threads.map(serve, cold, made)) == [True, True, True]


def test_a_thousand_starts_in_turn_leave_memory_where_it_was() -> None:
    made = [text(width, width=width) for width in (8, 12)]
    device = CpuDevice(2, delay_us=0)
    with pool_of(made[1], device) as pool:
        cold = [prepared(m, pool) for m in made]
        cold[0](*made[0].inputs)
        before = [device.held_bytes(gpu) for gpu in (0, 1)], dict(device.pinned)
        for turn in range(1000):
            assert torch.equal(cold[turn % 2].serve(*made[turn % 2].inputs), made[turn % 2].answer)
        assert ([device.held_bytes(gpu) for gpu in (0, 1)], device.pinned) == before
        assert [c._place.behind for c in cold] == [[], []]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({}, "pool: {} says no GPU; pass bytes by GPU, as in {0: 8 * 2**30}"),
        (2**30, "pool: 1073741824 says no GPU; pass bytes by GPU, as in {0: 8 * 2**30}"),
        ({0: -1}, "pool: bytes of GPU 0 -1: must be a whole number from 0"),
        ({0: 1.5}, "pool: bytes of GPU 0 1.5: must be a whole number from 0"),
        ({-1: 5}, "pool: GPU -1: must be a whole number from 0"),
        ({4: 5}, "pool: GPU 4 is not there; this machine has 2"),
        ({0: 2**20}, "pool: GPU 0 has 1000 bytes free, not 1048576 "),
    ],
)
def test_a_pool_that_cannot_be_is_refused(sizes: dict[int, int], said: str) -> None:
    with pytest.raises(InputError) as refused:
        Pool(sizes, CpuDevice(2, memory_bytes=1000))
    assert str(refused.value).startswith(said)


def test_what_a_pool_cannot_hold_is_refused_and_leaves_nothing() -> None:
    made = toys.text(("linear",))
    need = made.network.arena_bytes
    with pytest.raises(
        InputError, match="plan 'dealt': made for another network than toy; search one for it"
    ):
        hwexec.arena_bytes(toys.image().network, dealt(made))
    with pytest.raises(InputError, match=r"network .* is a Text; pass a sim.network.Network"):
        hwexec.arena_bytes(made.module, dealt(made))  # type: ignore[arg-type]
    device = CpuDevice(2)
    with Pool({0: need - 1, 1: need}, device) as pool:
        with pytest.raises(InputError) as refused:
            prepared(made, pool)
        assert str(refused.value) == (
            f"pool: has {need - 1} bytes of GPU 0, and this plan needs {need} there; make a pool of as much (hwexec.arena_bytes "
            "says what a plan needs of each GPU)"
        )
        with pytest.raises(InputError, match="pool: has 0 bytes of GPU 1"):
            prepared(made, Pool({0: need}, device))
        assert (device.pinned, pool._tenants) == ({}, [])
        with pytest.raises(InputError, match="device 'cuda': the pool has memory of another"):
            hwexec.prepare(made.module, dealt(made), made.inputs, host=TWO, pool=pool, device="cuda")
        with pytest.raises(InputError, match=r"pool 3 is a int; pass a hwexec\.Pool"):
            hwexec.prepare(made.module, dealt(made), made.inputs, host=TWO, pool=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="this pool is closed; make a new one"):
        prepared(made, pool)
    with pytest.raises(InputError, match="this pool is closed; make a new one"), pool:
        pass
    pool.close()


def test_a_plan_that_brings_nothing_needs_nothing_of_a_pool() -> None:
    made = toys.text(("linear",))
    everything = tuple(tuple(Access.DIRECT for _ in layer.reads) for layer in made.network.layers)
    plan = Plan("in place", 0, Launch.GRAPH, everything, ())
    assert hwexec.arena_bytes(made.network, plan, settles=False) == {0: 0}
    with Pool({0: 1}, CpuDevice(1)) as pool:
        cold = planned(made, plan, pool, settles=False)
        assert torch.equal(cold(*made.inputs), made.answer)


def test_a_plan_that_brings_half_takes_half_of_a_pool() -> None:
    made = toys.text(("linear", "norm"))
    cut = made.network.offsets[len(made.network.storages) // 2]
    access = tuple(
        tuple(
            Access.COPIED if made.network.offsets[read.storage] < cut else Access.DIRECT
            for read in layer.reads
        )
        for layer in made.network.layers
    )
    plan = Plan("half", 0, Launch.GRAPH, access, (Chunk(0, cut, (0,)),))
    need = hwexec.arena_bytes(made.network, plan, settles=False)
    assert need == {0: -(-cut // 256) * 256}, "such that those of several add up"
    with Pool({0: cut}, CpuDevice(1)) as pool:
        cold = planned(made, plan, pool, settles=False)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
