"""A plan made under a memory budget runs where the plan has room and the model has not, and answers with the very same bits."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hwexec
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.host import Host
from sim.memory import HEADROOM_BYTES, activation_bytes
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan
from sim.search import Options, search
from sim.timeline import SpanKind
from tests import builders, toys
from tests import strategies as some
from tests.test_arena import fingerprint
from tests.toys import TWO, Toy


def sized(network: Network, weight_bytes: int, gpus: int = 2) -> CpuDevice:
    """GPUs with room for so many bytes of weights and what running takes, and not a byte more."""
    return CpuDevice(gpus, memory_bytes=weight_bytes + HEADROOM_BYTES + activation_bytes(network))


def budgeted(made: Toy, budget: int, host: Host = TWO) -> Plan:
    """The best plan that holds no more on the target."""
    timings = builders.profile(made.network, host, direct=10**6)
    plan = search(timings, host, Options(memory_budget_bytes=budget, partners=())).best.plan
    assert 0 < plan.held_bytes(made.network) <= budget < made.network.arena_bytes
    return plan


def within(made: Toy, plan: Plan, device: CpuDevice, host: Host = TWO) -> hwexec.ColdStart:
    return hwexec.prepare(
        made.module, plan, made.inputs, network=made.network, host=host, device=device, settles=False
    )


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_plan_under_a_budget_runs_where_the_model_does_not_fit(launch: Launch, share: float) -> None:
    made = toys.text()
    before, threads = fingerprint(made.module), threading.active_count()
    budget = int(made.network.arena_bytes * share)
    plan = replace(budgeted(made, budget), launch=launch, head=0)
    device = sized(made.network, budget, 1)
    with within(made, plan, device) as cold:
        assert (cold.launch, cold.why_eager) == (launch, "")
        assert device.held_bytes(0) == plan.held_bytes(made.network) <= budget
        for _ in range(2):
            assert torch.equal(cold(*made.inputs), made.answer)
            assert cold.moved_bytes == plan.copied_bytes
            assert torch.equal(cold.warm(*made.inputs), made.answer)
            assert torch.equal(cold.in_place(*made.inputs), made.answer)
            cold.evict()
            with pytest.raises(InputError, match="make a cold start before a warm run"):
                cold.warm(*made.inputs)
            assert torch.equal(cold.in_place(*made.inputs), made.answer), (
                "it needs nothing of the GPU's arena"
            )
        copies = cold.timeline().of(SpanKind.COPY)
        assert len(copies) == len(plan.chunks)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        other = tuple((t + 3) % 29 for t in made.inputs)
        with torch.no_grad():
            assert torch.equal(cold(*other), made.module(*other))
        assert device.held_bytes(0) <= budget
    assert fingerprint(made.module) == before
    gc.collect()
    assert (device.pinned, device.held_bytes(0)) == ({}, 0)
    assert threading.active_count() == threads


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_valid_plan_is_bit_equal_in_the_memory_that_it_takes(data: st.DataObject) -> None:
    made = data.draw(toys.toys())
    host = data.draw(some.hosts(max_gpus=3))
    plan = data.draw(some.plans(made.network, host))
    kept = data.draw(st.sets(st.integers(0, len(made.network.storages) - 1)))
    access = tuple(
        tuple(
            Access.RESIDENT if how is Access.DIRECT and read.storage in kept else how
            for read, how in zip(layer.reads, accesses, strict=True)
        )
        for layer, accesses in zip(made.network.layers, plan.access, strict=True)
    )
    plan = replace(plan, access=access)
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=40)
    with within(made, plan, device, host) as cold:
        assert (cold.launch, cold.why_eager) == (plan.launch, "")
        assert device.held_bytes(plan.target) == plan.held_bytes(made.network)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.moved_bytes == plan.copied_bytes
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        if data.draw(st.booleans()):
            assert torch.equal(cold.in_place(*made.inputs), made.answer)
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


def test_what_takes_all_weights_is_refused_with_its_remedy() -> None:
    made = toys.text(("linear", "norm"))
    plan = budgeted(made, made.network.arena_bytes // 2)
    with within(made, plan, CpuDevice(1)) as cold:
        for call in (cold.settle, lambda: cold.resident(*made.inputs)):
            with pytest.raises(
                InputError, match="is prepared with settles=False, and GPU 0 holds only"
            ) as told:
                call()
            assert "prepare it with settles=True" in str(told.value)
            assert "\n" not in str(told.value)
        assert torch.equal(cold(*made.inputs), made.answer), "what was refused did no harm"
        with pytest.raises(InputError, match="settles=False"):
            cold.settle()
        assert torch.equal(cold.warm(*made.inputs), made.answer)


def test_a_gpu_without_room_for_the_model_is_told_what_has_room() -> None:
    made = toys.text(("linear", "norm"))
    plan = budgeted(made, made.network.arena_bytes // 2)
    held = plan.held_bytes(made.network)
    device = sized(made.network, held, 1)
    need = device.memory_bytes
    with pytest.raises(InputError, match=rf"settles=False, which needs {need} for plan 'best'"):
        toys.cold_start(made, plan, device)
    within(made, plan, device).close()
    device.memory_bytes -= 1
    with pytest.raises(
        InputError, match=rf"needs {need} there; .* search a plan with a smaller --memory-budget"
    ):
        within(made, plan, device)
    assert device.pinned == {}


def test_with_room_for_all_a_run_in_place_is_one_more_reference() -> None:
    made = toys.text()
    with toys.cold_start(made, toys.dealt(made), CpuDevice(2)) as cold:
        assert torch.equal(cold.in_place(*made.inputs), made.answer)
        assert torch.equal(cold.resident(*made.inputs), made.answer)


def test_a_budget_of_nothing_holds_nothing() -> None:
    made = toys.text(("linear", "bare"))
    access = tuple(tuple(Access.DIRECT for _ in layer.reads) for layer in made.network.layers)
    device = sized(made.network, 0, 1)
    with within(made, Plan("none", 0, Launch.GRAPH, access, ()), device) as cold:
        assert device.held_bytes(0) == 0
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold.warm(*made.inputs), made.answer)


def test_the_target_may_only_pass_bytes_on() -> None:
    """They cross the target's memory on their way to a partner, where they are read."""
    made = toys.text(("linear", "norm"), tied=False)
    access = tuple(tuple(Access.PEER for _ in layer.reads) for layer in made.network.layers)
    size = made.network.arena_bytes
    plan = Plan("over", 0, Launch.GRAPH, access, (Chunk(0, size, (0, 1)),))
    assert plan.held_bytes(made.network) == size
    with within(made, plan, CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
