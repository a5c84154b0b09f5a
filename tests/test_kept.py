"""Weights that stay on the GPU between starts: no start brings them, nothing that others do takes them."""

from __future__ import annotations

import gc

import pytest
import torch

import hwexec
from hwexec import stage
from hwexec.cpu import CpuDevice
from hwexec.pool import Pool
from hwexec.rouse import ROUSE_BYTES
from sim.errors import InputError
from sim.keep import keeping
from sim.memory import beside_bytes
from sim.plan import Launch, Plan
from tests.pooling import ahead, planned, text
from tests.toys import Toy, cold_start, dealt

KEPT = (0, 1, 3)


def plan_of(made: Toy, launch: Launch) -> Plan:
    plan = ahead(keeping(dealt(made, launch), KEPT, made.network))
    assert plan.kept_bytes(made.network) > 0
    assert plan.copied_bytes < dealt(made).copied_bytes
    return plan


def changed(made: Toy) -> torch.Tensor:
    """The answer once a weight that is kept, and one that is not, are twice what they were."""
    names = [made.network.storages[at].name for at in (KEPT[1], 2)]
    with torch.no_grad():
        for name in names:
            made.module.get_parameter(name).mul_(2)
    return made.module(*made.inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("launch", Launch)
def test_no_start_brings_them_and_each_answer_is_right(launch: Launch) -> None:
    made, device = text(1, "norm", "inner"), CpuDevice(2, delay_us=50)
    plan = plan_of(made, launch)
    with cold_start(made, plan, device) as cold:
        assert cold.launch is launch
        for _ in range(2):
            assert torch.equal(cold(*made.inputs), made.answer)
            assert cold.brought()[0] == plan.copied_bytes
            assert torch.equal(cold.warm(*made.inputs), made.answer)
            assert torch.equal(cold.resident(*made.inputs), made.answer)
            cold.evict()
            for storage in range(len(made.network.storages)):
                filled = bool((cold._stage._home(storage) == 0xFF).all())
                assert filled == (storage not in KEPT)
    assert (device.pinned, device.held_bytes(0)) == ({}, 0)


@pytest.mark.parametrize("pooled", [False, True])
def test_weights_that_were_changed_are_brought_by_a_resident_run(pooled: bool) -> None:
    made, device = text(1, "norm"), CpuDevice(2, delay_us=50)
    plan = plan_of(made, Launch.GRAPH)
    pool = Pool(hwexec.arena_bytes(made.network, plan), device) if pooled else None
    cold = cold_start(made, plan, device) if pool is None else planned(made, plan, pool)
    assert torch.equal(cold(*made.inputs), made.answer)
    answer = changed(made)
    assert torch.equal(cold.resident(*made.inputs), answer)
    assert torch.equal(cold(*made.inputs), answer)
    cold.close()


@pytest.mark.parametrize("pooled", [False, True])
def test_weights_that_were_changed_are_brought_where_it_is_asked(pooled: bool) -> None:
    made, other, device = text(1, "norm"), text(2, "norm"), CpuDevice(2, delay_us=50)
    plan = plan_of(made, Launch.GRAPH)
    sizes = hwexec.arena_bytes(made.network, dealt(made))
    pool = Pool(sizes, device) if pooled else None
    cold = cold_start(made, plan, device) if pool is None else planned(made, plan, pool)
    assert torch.equal(cold(*made.inputs), made.answer)
    answer = changed(made)
    cold.evict()
    stale = cold(*made.inputs).clone()
    assert not torch.equal(stale, made.answer)
    assert not torch.equal(stale, answer), "half of it is as it was"
    if pool is not None:
        with planned(other, dealt(other), pool) as next_one:
            assert torch.equal(next_one(*other.inputs), other.answer)
            device.gate(cold._stage.background, 0.02e9)
            cold.keep()
            assert torch.equal(cold(*made.inputs), answer), "a start waits for them"
            assert torch.equal(next_one(*other.inputs), other.answer)
            cold.keep()
            assert torch.equal(next_one.warm(*other.inputs), other.answer), "what is another's stays"
    else:
        device.gate(cold._stage.background, 0.02e9)
        cold.keep()
    assert torch.equal(cold(*made.inputs), answer)
    cold.close()


@pytest.mark.parametrize("settles", [True, False])
def test_in_a_pool_they_lie_beside_it_and_outlast_what_others_do(settles: bool) -> None:
    made, device = [text(seed, "norm", "inner") for seed in (1, 2, 3)], CpuDevice(2, delay_us=50)
    plans = [plan_of(m, Launch.GRAPH) for m in made]
    needs = [hwexec.arena_bytes(m.network, p, settles=settles) for m, p in zip(made, plans, strict=True)]
    kept = plans[0].kept_bytes(made[0].network)
    whole = hwexec.arena_bytes(made[0].network, dealt(made[0]), settles=settles)
    assert whole[0] - kept - 4096 < needs[0][0] < whole[0]
    with Pool(needs[0], device) as pool:
        free = device.held_bytes(0)
        cold = [planned(m, p, pool, settles=settles) for m, p in zip(made, plans, strict=True)]
        beside = device.held_bytes(0) - free - len(made) * ROUSE_BYTES
        assert len(made) * kept <= beside < len(made) * (kept + 4096)
        for _ in range(3):
            for m, c, p in zip(made, cold, plans, strict=True):
                assert not c.hot
                assert torch.equal(c(*m.inputs), m.answer)
                assert c.brought()[0] == p.copied_bytes
                assert torch.equal(c.serve(*m.inputs), m.answer)
                c.evict()
    assert (device.pinned, device.held_bytes(0)) == ({}, 0)


def test_where_there_is_no_room_beside_the_pool_it_is_refused_and_leaves_nothing() -> None:
    made = text(1, "norm")
    plan = plan_of(made, Launch.GRAPH)
    sizes = hwexec.arena_bytes(made.network, plan)
    beside = beside_bytes(made.network)
    device = CpuDevice(2, memory_bytes=sizes[0] + beside + plan.kept_bytes(made.network) - 1)
    with Pool(sizes, device) as pool:
        with pytest.raises(InputError, match="stop what else runs on it, or make a smaller pool"):
            planned(made, plan, pool)
        assert (device.pinned, device.held_bytes(0), pool._tenants) == ({}, sizes[0], [])


@pytest.mark.parametrize("pooled", [False, True])
def test_a_start_that_takes_what_stays_is_seen(pooled: bool) -> None:
    """An eviction fills all else and brings nothing: were it to, no start after one would tell whether they stayed."""
    made, device = text(1, "norm"), CpuDevice(2, delay_us=50)
    plan = plan_of(made, Launch.GRAPH)
    pool = Pool(hwexec.arena_bytes(made.network, plan), device) if pooled else None
    with cold_start(made, plan, device) if pool is None else planned(made, plan, pool) as cold:
        cold._stage._home(KEPT[1]).fill_(0xFF)
        cold.evict()
        assert not torch.equal(cold(*made.inputs), made.answer)
        cold.keep()
        assert torch.equal(cold(*made.inputs), made.answer)


def test_an_eviction_that_breaks_half_way_takes_nothing_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = text(1, "norm"), CpuDevice(2)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    with cold_start(made, plan_of(made, Launch.GRAPH), device) as cold:
        with monkeypatch.context() as patch:
            patch.setattr(device, "fill", broken)
            with pytest.raises(RuntimeError, match="broken"):
                cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)


@pytest.mark.parametrize("settles", [True, False])
def test_all_may_stay_and_a_pool_then_needs_nothing(settles: bool) -> None:
    made, device = text(1, "norm"), CpuDevice(2, delay_us=50)
    plan = keeping(dealt(made), range(len(made.network.storages)), made.network)
    assert plan.chunks == ()
    need = hwexec.arena_bytes(made.network, plan, settles=settles)
    assert need == {0: 0}
    with Pool(need, device) as pool:
        one, other = (planned(m, plan, pool, settles=settles) for m in (made, text(2, "norm")))
        for _ in range(2):
            assert torch.equal(one(*made.inputs), made.answer)
            other(*made.inputs)
            assert torch.equal(one.warm(*made.inputs), made.answer)


@pytest.mark.parametrize("settles", [True, False])
def test_where_what_stays_cannot_be_brought_preparing_says_so(settles: bool) -> None:
    made, device = text(1, "norm"), CpuDevice(2, fail_at="copy")
    plan = plan_of(made, Launch.GRAPH)
    need = hwexec.arena_bytes(made.network, plan)
    with Pool(need, device) as pool:
        with pytest.raises(RuntimeError, match="an injected copy error"):
            planned(made, plan, pool, settles=settles)
        gc.collect()  # frames of the copy that failed
        assert (device.pinned, device.held_bytes(0), pool._tenants) == ({}, need[0], [])
        with planned(made, plan, pool, settles=settles) as cold:
            assert torch.equal(cold(*made.inputs), made.answer)


def test_memory_for_what_stays_goes_where_preparing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = text(1, "norm"), CpuDevice(2)
    plan = plan_of(made, Launch.GRAPH)
    need = hwexec.arena_bytes(made.network, plan)

    def broken(*_: object) -> None:
        raise InputError("broken")

    monkeypatch.setattr(stage, "Binding", broken)
    with Pool(need, device) as pool:
        with pytest.raises(InputError, match="broken") as refused:
            planned(made, plan, pool)
        assert (device.pinned, device.held_bytes(0), pool._tenants) == ({}, need[0], [])
        assert refused.tb is not None, "all locals of its frames are still there"
