"""Heads: what a start issues ahead of its graph, in which order, and what is left of it where the start is refused or breaks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwexec.cpu import CpuDevice, CpuGraph
from hwexec.device import Stream
from sim.errors import InputError
from sim.plan import Chunk, Launch
from sim.timeline import SpanKind
from tests import strategies as some
from tests import toys
from tests.test_arena import fingerprint
from tests.toys import cold_start, dealt


@pytest.mark.parametrize("links", [1, 2])
def test_whatever_the_head_a_start_is_bit_equal_also_right_behind_another(links: int) -> None:
    made = toys.text(("linear", "norm", "bare"))
    plan = dealt(made, links=links)
    for head in range(len(plan.chunks) + 1):
        device = CpuDevice(2, seed=head, delay_us=300)
        with cold_start(made, replace(plan, head=head), device) as cold:
            toys.check_cold_then_again(made, cold)
            assert cold.brought() == (
                plan.copied_bytes,
                sum(c.size_bytes for c in plan.chunks if len(c.path) == 2),
            )
            assert torch.equal(cold.warm(*made.inputs), made.answer)


@pytest.mark.parametrize("idle", [True, False])
def test_the_head_is_issued_ahead_of_inputs_and_launch(idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = toys.text(("linear", "norm"))
    plan = replace(dealt(made), head=4)
    device = CpuDevice(2)
    with cold_start(made, plan, device) as cold:
        story: list[str] = []

        def told(name: str) -> None:
            call = getattr(device, name)

            def tell(stream: Stream, *given: object) -> None:
                story.append(f"{name} {stream.name}")
                call(stream, *given)

            monkeypatch.setattr(device, name, tell)

        for name in ("copy", "record", "wait", "read"):
            told(name)
        monkeypatch.setattr(device, "idle", lambda stream: idle)
        replay = CpuGraph.replay

        def launched(graph: CpuGraph, part: int = 0) -> None:
            story.append("launch")
            replay(graph, part)

        monkeypatch.setattr(CpuGraph, "replay", launched)
        assert torch.equal(cold(*made.inputs), made.answer)
        (land,) = (name for name in cold.program.streams if name.startswith("land:"))
    fork = ["record compute:0", "wait h2d:0", "wait h2d:1", "wait p2p:1>0", f"wait {land}"]
    pushed = ["copy h2d:1", "record h2d:1", "wait p2p:1>0", "copy p2p:1>0"]
    landed = ["record p2p:1>0", f"wait {land}", f"record {land}"]
    copies = ["copy h2d:0", *pushed, "copy h2d:0", "record h2d:0", *pushed, *landed]
    goes_on = ["record h2d:0", "record h2d:1", "record p2p:1>0"]
    own = [*copies, *goes_on, "read compute:0", "record compute:0", "launch"]
    want = own if idle else [*fork, *own]
    assert story[: len(want)] == want
    graph = story[len(want) :]
    for name in ("h2d:0", "h2d:1", "p2p:1>0"):  # behind its start and behind the head's copies
        assert [call for call in graph if call.endswith(name)][:2] == [f"wait {name}", f"wait {name}"]
    assert not any(call.endswith(land) for call in graph)
    assert sum(call.startswith("copy") for call in story) == sum(len(c.path) for c in plan.chunks)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_heads_with_relays_are_bit_equal_whatever_is_late(data: st.DataObject) -> None:
    """All GPUs push to each other, and a start comes right behind another or finds nothing but poison."""
    made = data.draw(toys.toys())
    host = data.draw(some.hosts(min_gpus=2, max_gpus=3, joined=True))
    plan = data.draw(some.plans(made.network, host, launch=Launch.GRAPH).filter(lambda p: p.chunks))
    plan = some.headed(plan, data.draw(st.integers(1, len(plan.chunks))))
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=400)
    with cold_start(made, plan, device, host) as cold:
        assert (cold.launch, cold.why_eager) == (Launch.GRAPH, "")
        for poisoned in data.draw(st.lists(st.booleans(), min_size=2, max_size=4)):
            if poisoned:
                cold.evict()
            assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
    device.synchronize()
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


def test_a_landing_that_is_late_would_be_seen() -> None:
    """A layer waits for a landing alone: were that not behind its push, the layer would come too early."""
    made = toys.text(("linear", "norm"))
    plan = replace(dealt(made), chunks=(Chunk(0, made.network.arena_bytes, (1, 0)),), head=1)
    device = CpuDevice(2, delay_us=20_000)
    wait = device.wait
    with cold_start(made, plan, device) as cold:
        device.idle = lambda stream: True  # type: ignore[method-assign]
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
        device.wait = lambda s, e: None if s.name.startswith("land:") else wait(s, e)  # type: ignore[method-assign]
        wrong = 0
        for _ in range(8):
            cold.evict()
            wrong += not torch.equal(cold(*made.inputs), made.answer)
            device.synchronize()
        assert wrong


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("links", [1, 2])
def test_a_start_with_wrong_inputs_is_refused_and_the_next_is_right(idle: bool, links: int) -> None:
    """The head may be under way before the inputs are looked at."""
    made = toys.text(("linear", "norm"))
    before, threads = fingerprint(made.module), threading.active_count()
    device = CpuDevice(2, delay_us=1_000)
    device.idle = lambda stream: idle  # type: ignore[method-assign]
    plan = dealt(made, links=links)
    wrong = ((made.inputs[0][:1],), (made.inputs[0].float(),), (*made.inputs, *made.inputs), ())
    copied: list[str] = []
    copy = device.copy

    def told(stream: Stream, *given: Any) -> None:
        copied.append(stream.name)
        copy(stream, *given)

    for head in (0, 1, 4, len(plan.chunks)):
        with cold_start(made, replace(plan, head=head), device) as cold:
            device.copy = told  # type: ignore[method-assign]
            cold.evict()
            for given in wrong:
                copied.clear()
                with pytest.raises(InputError, match="the example"):
                    cold(*given)
                issued = sum(len(chunk.path) for chunk in plan.chunks[:head]) if idle else 0
                assert len(copied) == issued, "the head alone, and only where nothing was under way"
                with pytest.raises(InputError, match="make a cold start before a warm run"):
                    cold.warm(*made.inputs)
                if given:  # right behind what is still under way, else after all bytes are gone again
                    assert torch.equal(cold(*made.inputs), made.answer)
                    assert torch.equal(cold._stage.arena, cold._stage.host.tensor)
                cold.evict()
                assert torch.equal(cold(*made.inputs), made.answer)
                assert torch.equal(cold.warm(*made.inputs), made.answer)
                cold.evict()
            with pytest.raises(InputError):
                cold(*wrong[0])
        device.copy = copy  # type: ignore[method-assign]
    assert fingerprint(made.module) == before
    gc.collect()
    assert device.pinned == {}
    assert device.held_bytes(0) + device.held_bytes(1) == 0
    assert threading.active_count() == threads


def test_a_refused_start_leaves_no_mix_of_old_and_new_weights() -> None:
    """Other weights were loaded since the last start, and the head of a refused one brought some of them."""
    made, other = toys.text(("linear", "norm")), toys.text(("linear", "norm"))
    for p in other.module.parameters():
        p.data.mul_(0.5)
    with torch.no_grad():
        new = other.module(*made.inputs)
    device = CpuDevice(2)
    device.idle = lambda stream: True  # type: ignore[method-assign]
    with cold_start(made, replace(dealt(made), head=4), device) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
        made.module.load_state_dict(other.module.state_dict())
        with pytest.raises(InputError, match="in the example"):
            cold(made.inputs[0][:1])
        device.synchronize()
        with pytest.raises(InputError, match="make a cold start before a warm run"):
            cold.warm(*made.inputs)
        assert torch.equal(cold.resident(*made.inputs), new)


def test_what_is_not_captured_runs_its_head_eagerly_too() -> None:
    made = toys.text()
    plan = replace(dealt(made), head=5)
    device = CpuDevice(2, fail_at="capture", delay_us=1000)
    with cold_start(made, plan, device) as cold:
        assert cold.launch is Launch.EAGER
        for _ in range(3):
            cold.evict()
            assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.brought()[0] == plan.copied_bytes
        copies = cold.timeline().of(SpanKind.COPY)
        assert len(copies) == sum(len(c.path) for c in plan.chunks)


def test_a_head_that_breaks_leaves_a_start_that_can_be_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = toys.text()
    before, threads = fingerprint(made.module), threading.active_count()
    device = CpuDevice(2)
    copy = device.copy
    with cold_start(made, replace(dealt(made), head=4), device) as cold:
        for number in range(1, 7):  # the head's copies: four chunks, two of them pushed on
            calls = iter(range(1, number + 1))

            def refused(*given: object, calls: Iterator[int] = calls, number: int = number) -> None:
                if next(calls) == number:
                    raise RuntimeError("the driver refuses a copy")
                copy(*given)  # type: ignore[arg-type]

            monkeypatch.setattr(device, "copy", refused)
            with pytest.raises(RuntimeError, match="the driver refuses a copy"):
                cold(*made.inputs)
            monkeypatch.undo()
            with pytest.raises(InputError, match="make a cold start before a warm run"):
                cold.warm(*made.inputs)
            cold.evict()
            assert torch.equal(cold(*made.inputs), made.answer)
        device._fault, device._countdown = "copy", 2  # one that is issued, and breaks later
        cold(*made.inputs)
        with pytest.raises(RuntimeError, match="an injected copy error"):
            device.synchronize()
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
    assert fingerprint(made.module) == before
    gc.collect()
    assert device.pinned == {}
    assert device.held_bytes(0) + device.held_bytes(1) == 0
    assert threading.active_count() == threads
