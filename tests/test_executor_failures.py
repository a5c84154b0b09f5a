"""Starts and preparations that go wrong: one clear line, and a module, memory and device as they were."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import hwexec
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.plan import Chunk, Launch, Sync
from tests import builders, toys
from tests.test_arena import fingerprint
from tests.toys import TWO, cold_start, dealt


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("pin", r"refuses to pin \d+ bytes"),
        ("peer", r"GPU 0 cannot read GPU 1's memory \(no peer access\); plan over one link"),
        ("arena", r"out of memory while preparing toy"),
        ("arena#2", r"out of memory while preparing toy"),
        ("kernel#5", r"out of memory while preparing toy"),
    ],
)
def test_a_prepare_that_fails_leaves_nothing_behind(launch: Launch, fault: str, says: str) -> None:
    made = toys.text(("linear", "norm"))
    before, threads = fingerprint(made.module), threading.active_count()
    device = CpuDevice(2, fail_at=fault)
    if fault.startswith("kernel") and launch is Launch.EAGER:
        pytest.skip("only a capture sees kernels")
    with pytest.raises(InputError, match=says) as caught:
        cold_start(made, dealt(made, launch), device)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert fingerprint(made.module) == before
    assert device.pinned == {}
    assert device.held_bytes(0) + device.held_bytes(1) == 0
    assert threading.active_count() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.module.modules())
    with cold_start(made, dealt(made, launch), CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer), "a second plan on the same module works"


def test_memory_that_a_cycle_still_holds_is_no_reason_to_refuse() -> None:
    made, device = toys.text(("linear", "norm")), CpuDevice(2, memory_bytes=300 * 2**20)
    gc.collect()
    gc.disable()
    try:
        cycle: list[object] = [device.allocate(200 * 2**20, 0)]
        cycle.append(cycle)
        del cycle
        assert device.memory(0).free_bytes < 256 * 2**20, "a GPU needs so much beside its arena"
        with cold_start(made, dealt(made, Launch.GRAPH), device) as cold:
            assert torch.equal(cold(*made.inputs), made.answer)
    finally:
        gc.enable()
    device.close()


def test_an_interrupted_start_and_a_broken_one_leave_a_usable_module() -> None:
    made = toys.text(("linear", "norm"))
    before = fingerprint(made.module)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with cold_start(made, dealt(made, Launch.EAGER), CpuDevice(2)) as cold:
        made.module.head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            cold(*made.inputs)
    assert fingerprint(made.module) == before
    made.module.head._forward_pre_hooks.clear()
    device = CpuDevice(2, fail_at="replay")
    with cold_start(made, replace(dealt(made), head=2), device) as cold:
        with pytest.raises(RuntimeError, match="injected launch error"):
            cold(*made.inputs)
        with pytest.raises(InputError, match="make a cold start before a warm run"):
            cold.warm(*made.inputs)
        assert torch.equal(cold(*made.inputs), made.answer)
    made.module.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cold_start(made, dealt(made), CpuDevice(2))
    assert fingerprint(made.module) == before


@pytest.mark.parametrize("launch", Launch)
def test_a_watched_start_that_breaks_half_way_leaves_no_warm_run(launch: Launch) -> None:
    """A warm run after it answered with a mixture of the weights from before and those that had come."""
    made, device = toys.text(), CpuDevice(2)
    with cold_start(made, dealt(made, launch), device) as cold:
        cold(*made.inputs)
        device._fault, device._countdown = ("replay", 1) if launch is Launch.GRAPH else ("copy", 3)
        with pytest.raises(RuntimeError, match="injected"):
            cold.timeline()
        with pytest.raises(InputError, match="make a cold start before a warm run"):
            cold.warm(*made.inputs)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.timeline().makespan_ns > 0
    device.close()


def test_layers_alone_that_break_leave_no_warm_run() -> None:
    made, device = toys.text(), CpuDevice(2)
    plan = dealt(made, Launch.GRAPH)
    with cold_start(made, replace(plan, head=len(plan.chunks)), device) as cold:
        cold(*made.inputs)
        device._fault, device._countdown = "replay", 1
        with pytest.raises(RuntimeError, match="injected launch error"):
            cold.landed(*made.inputs)
        with pytest.raises(InputError, match="make a cold start before a warm run"):
            cold.warm(*made.inputs)
        assert torch.equal(cold(*made.inputs), made.answer)
    device.close()


def test_a_reference_in_place_that_cannot_be_captured_is_one_clear_line() -> None:
    made, device = toys.text(("linear", "norm")), CpuDevice(2)
    with cold_start(made, dealt(made, Launch.GRAPH), device) as cold:
        cold(*made.inputs)
        device._fault, device._countdown = "capture", 1
        with pytest.raises(
            InputError, match=r"in place cannot be captured as a graph: .*; prepare a plan with launch eager"
        ):
            cold.in_place(*made.inputs)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
    device.close()


def test_plans_and_inputs_that_do_not_fit_are_one_clear_line() -> None:
    made = toys.text(("linear",))
    plan = dealt(made)
    far = replace(plan, chunks=(Chunk(0, made.network.arena_bytes, (3, 0)),))
    with pytest.raises(InputError, match="plan 'dealt' uses GPU 3, but this machine has 2"):
        cold_start(made, far, CpuDevice(2), builders.host(4))
    with pytest.raises(
        InputError, match=r"GPU 0 \(.*\) has 1000 of 1000 bytes free, and toy needs \d+ there"
    ):
        cold_start(made, plan, CpuDevice(2, memory_bytes=1000))
    with pytest.raises(
        InputError, match=r"waits on the host thread, which a graph cannot; launch it eagerly"
    ):
        cold_start(made, replace(plan, sync=Sync.HOST_ALL), CpuDevice(2))
    with pytest.raises(InputError, match="is in training mode"):
        hwexec.prepare(nn.Linear(2, 2), plan, made.inputs, host=TWO, device="cpu")
    with pytest.raises(InputError, match="device 'tpu': there is 'cuda' and 'cpu'"):
        hwexec.open_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            hwexec.prepare(made.module, plan, made.inputs, network=made.network, host=TWO)
    with cold_start(made, plan, CpuDevice(2)) as cold:
        with pytest.raises(
            InputError, match=r"input 0 is torch.int64 \[1, 5\], but torch.int64 \[2, 5\] in the example"
        ):
            cold(made.inputs[0][:1])
        with pytest.raises(InputError, match="not built like the example's"):
            cold(*made.inputs, *made.inputs)
        with pytest.raises(InputError, match="make a cold start before a warm run"):
            cold.warm(*made.inputs)
    with pytest.raises(InputError, match="closed; prepare the module again"):
        cold(*made.inputs)
