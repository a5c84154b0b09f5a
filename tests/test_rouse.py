"""A start that is near is announced: small work on a start's own streams, which changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwexec.cpu import CpuDevice
from hwexec.device import Stream
from hwexec.rouse import ROUNDS, ROUSE_BYTES
from sim.errors import InputError
from sim.plan import Launch
from tests import strategies as some
from tests import toys
from tests.toys import cold_start, dealt


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_answers_are_the_same_however_often_and_whenever_a_start_is_announced(data: st.DataObject) -> None:
    made = data.draw(toys.toys())
    machine = data.draw(some.hosts(max_gpus=3))
    plan = data.draw(some.plans(made.network, machine))
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=100)
    with cold_start(made, plan, device, machine) as cold:
        for what in data.draw(st.lists(st.sampled_from(("rouse", "cold", "evict")), min_size=2, max_size=6)):
            if what == "cold":
                assert torch.equal(cold(*made.inputs), made.answer)
                assert torch.equal(cold.warm(*made.inputs), made.answer)
            else:
                getattr(cold, what)()
        moved = cold.brought()[0]
        cold.rouse()
        assert cold.brought()[0] == moved, "what it copies is no part of a plan"
        assert torch.equal(cold(*made.inputs), made.answer)
    device.synchronize()
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("launch", Launch)
def test_every_lane_copies_every_wire_pushes_and_the_compute_stream_waits_for_none(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device = toys.text(), CpuDevice(2)
    with cold_start(made, dealt(made, launch), device) as cold:
        arena = cold._stage.arena.clone()
        story: list[str] = []
        for name in ("copy", "wait"):
            call = getattr(device, name)

            def told(stream: Stream, *given: object, name: str = name, call: object = call) -> None:
                story.append(f"{name} {stream.name}")
                call(stream, *given)  # type: ignore[operator]

            monkeypatch.setattr(device, name, told)
        cold.rouse()
        device.synchronize()
        assert story == ["copy h2d:0", "copy h2d:1", "wait p2p:1>0", "copy p2p:1>0"] * ROUNDS
        assert torch.equal(cold._stage.arena, arena), "it lands in memory of its own"
        assert device.held_bytes(1) == cold._stage.arenas[1].numel() + ROUSE_BYTES
    with pytest.raises(InputError, match="this cold start is closed"):
        cold.rouse()


def test_memory_that_is_full_with_the_plan_has_no_room_for_it() -> None:
    made = toys.text(("linear",))
    device = CpuDevice(1, fail_at="arena#2")
    with pytest.raises(InputError, match="out of memory while preparing toy"):
        cold_start(made, replace(dealt(made, links=1), head=0), device)
    assert (device.pinned, device.held_bytes(0)) == ({}, 0)
