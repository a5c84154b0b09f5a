"""Programs run on threads with delays on purpose: right bits, nothing left behind, one clear line where it cannot be."""

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
from torch import nn

import hwexec
from hwexec.cpu import CpuDevice, CpuGraph, _Recorder
from hwexec.device import POISON, Stream
from hwexec.timing import Samples, time_ns, wall_ns
from sim.errors import InputError
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.program import Copy, lower
from sim.timeline import SpanKind
from sim.tracker import tensors_in
from tests import strategies as some
from tests import toys
from tests.test_arena import fingerprint
from tests.toys import TWO, cold_start, dealt


@pytest.mark.parametrize("launch", Launch)
def test_a_cold_start_answers_as_the_module_does(launch: Launch) -> None:
    made = toys.text()
    before = fingerprint(made.module)
    device = CpuDevice(2, seed=1)
    with cold_start(made, dealt(made, launch), device) as cold:
        assert (cold.launch, cold.why_eager) == (launch, "")
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.moved_bytes == made.network.arena_bytes
        assert cold.relayed_bytes == made.network.arena_bytes // 1024 * 512
        other = tuple((t + 3) % 29 for t in made.inputs)
        with torch.no_grad():
            assert torch.equal(cold.warm(*other), made.module(*other)), (
                "at rest, the module is usable as ever"
            )
    assert fingerprint(made.module) == before
    assert device.pinned == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.module.modules())


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_valid_plan_of_any_network_is_bit_equal(data: st.DataObject) -> None:
    made = data.draw(toys.toys())
    host = data.draw(some.hosts(max_gpus=3))
    plan = data.draw(some.plans(made.network, host))
    assert plan.sync is Sync.STREAM or plan.launch is Launch.EAGER
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=40)
    with cold_start(made, plan, device, host) as cold:
        assert (cold.launch, cold.why_eager) == (plan.launch, "")
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.moved_bytes == plan.copied_bytes
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        cold.settle()
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
        timeline = cold.timeline()
    copies = [op for op in cold.program.ops if isinstance(op, Copy)]
    assert len([s for s in timeline.of(SpanKind.COPY) if s.stream.startswith(("h2d", "p2p"))]) == len(copies)
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("launch", Launch)
def test_a_copy_that_is_late_would_be_seen(launch: Launch) -> None:
    """The poison works: without its waits the same program answers wrongly."""
    made = toys.text(("linear", "norm"))
    device = CpuDevice(2, delay_us=20_000)
    with cold_start(made, dealt(made, launch), device) as cold:
        device.wait = lambda stream, event: None  # type: ignore[method-assign]
        assert not torch.equal(cold(*made.inputs), made.answer)
        device.synchronize()


@pytest.mark.parametrize("links", [1, 2])
def test_whatever_the_head_a_start_is_bit_equal_also_right_behind_another(links: int) -> None:
    made = toys.text(("linear", "norm", "bare"))
    plan = dealt(made, links=links)
    for head in range(len(plan.chunks) + 1):
        device = CpuDevice(2, seed=head, delay_us=300)
        with cold_start(made, replace(plan, head=head), device) as cold:
            assert (cold.launch, cold.why_eager) == (Launch.GRAPH, "")
            for turn in range(4):
                if turn % 2 == 0:
                    cold.evict()
                assert torch.equal(cold(*made.inputs), made.answer)
            assert torch.equal(cold._stage.arena, cold._stage.host.tensor), "no copy is left out"
            assert (cold.moved_bytes, cold.relayed_bytes) == (
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

        for name in ("copy", "record", "wait", "assign"):
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
    own = [*copies, *goes_on, "assign compute:0", "launch"]
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
        assert cold.moved_bytes == plan.copied_bytes
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


@pytest.mark.parametrize("launch", Launch)
def test_a_tied_table_is_read_in_place_by_one_layer_and_copied_for_another(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kernel reads the table where the plan says: a view of it that is taken too early would read the other place."""
    made = toys.text(("linear", "bare"), tied=True)
    last = len(made.network.layers) - 1
    assert made.network.readers[0] == (0, last)
    read: list[int] = []
    dispatch = _Recorder.__torch_dispatch__

    def spy(mode: _Recorder, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        table = next((a for a in tensors_in(args) if set(a.shape) == {29, 16}), None)
        if func.overloadpacket.__name__ in ("embedding", "mm", "addmm", "linear") and table is not None:
            read.append(table.data_ptr())
        return dispatch(mode, func, types, args, kwargs)

    monkeypatch.setattr(_Recorder, "__torch_dispatch__", spy)
    with cold_start(made, dealt(made, launch, direct=(0,)), CpuDevice(2)) as cold:
        if launch is Launch.GRAPH:
            arena, host = cold._stage.arena.data_ptr(), cold._stage.host.tensor.data_ptr()
            assert read[:2] == [host, arena]
        pointers: list[int] = []
        made.module.table.register_forward_hook(lambda m, *_: pointers.append(m.weight.data_ptr()))
        made.module.head.register_forward_hook(lambda m, *_: pointers.append(m.weight.data_ptr()))
        assert torch.equal(cold(*made.inputs), made.answer)
        if launch is Launch.EAGER:
            assert pointers[0] != pointers[1]
            cold.settle()
            pointers.clear()
            assert torch.equal(cold.warm(*made.inputs), made.answer)
            assert pointers[0] == pointers[1]


def test_reading_at_the_partner_and_what_is_resident_beforehand() -> None:
    made = toys.text(("linear", "norm", "buffers"), tied=False)
    net = made.network
    cut = net.offsets[4]
    chunks = (Chunk(0, cut, (1,)), Chunk(cut, net.arena_bytes, (0,)))
    access = tuple(
        tuple(Access.PEER if net.offsets[r.storage] < cut else Access.COPIED for r in layer.reads)
        for layer in net.layers
    )
    with cold_start(made, Plan("peer", 0, Launch.GRAPH, access, chunks), CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.relayed_bytes == 0
    access = tuple(
        tuple(Access.RESIDENT if net.offsets[r.storage] < cut else Access.COPIED for r in layer.reads)
        for layer in net.layers
    )
    with cold_start(made, Plan("kept", 0, Launch.GRAPH, access, chunks[1:]), CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.moved_bytes == net.arena_bytes - cut


def test_a_network_that_no_graph_can_hold_runs_eagerly_and_says_why() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x) if x.sum().item() > -1e9 else x

    made = toys.toy(Branch(), torch.randn(2, 8))
    with cold_start(made, dealt(made), CpuDevice(2)) as cold:
        assert cold.launch is Launch.EAGER
        assert cold.why_eager == "layer 0 (a) needs a tensor's values on the host (_local_scalar_dense)"
        assert torch.equal(cold(*made.inputs), made.answer)
    with cold_start(toys.text(), dealt(toys.text()), CpuDevice(2, fail_at="capture#2")) as cold:
        assert cold.launch is Launch.EAGER
        assert cold.why_eager == "layer 0 (table) cannot be captured: an injected capture error"
        assert torch.equal(cold(*toys.text().inputs), toys.text().answer)


@pytest.mark.parametrize("launch", Launch)
def test_layers_in_another_order_are_refused(launch: Launch) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.turned = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.b(x)) if self.turned else self.b(self.a(x))

    made = toys.toy(Either(), torch.randn(2, 8))
    made.module.turned = True
    with pytest.raises(
        InputError, match=r"the run met layer 0 \(b\) where the traced network has layer 0 \(a\)"
    ):
        cold_start(made, dealt(made, launch), CpuDevice(2))
    made.module.turned = False
    with cold_start(made, dealt(made, Launch.EAGER), CpuDevice(2)) as cold:
        made.module.turned = True
        with pytest.raises(
            InputError, match=r"the run met a call of Linear where the traced network has layer 0"
        ):
            cold(*made.inputs)
        made.module.turned = False
        assert torch.equal(cold(*made.inputs), made.answer), "the next start is sound again"


def test_two_hundred_alternating_starts_leave_memory_where_it_was() -> None:
    device = CpuDevice(2, delay_us=0)
    one, two = toys.text(("linear",)), toys.image()
    with (
        cold_start(one, dealt(one), device) as first,
        cold_start(two, dealt(two, Launch.EAGER), device) as second,
    ):
        first(*one.inputs), second(*two.inputs)
        gc.collect()
        held, tensors = device.held_bytes(0) + device.held_bytes(1), _tensors()
        for _ in range(100):
            assert torch.equal(first(*one.inputs), one.answer)
            assert torch.equal(second(*two.inputs), two.answer)
        gc.collect()
        assert device.held_bytes(0) + device.held_bytes(1) == held
        assert _tensors() == tensors
    threads = threading.active_count()
    for _ in range(5):
        cold_start(one, dealt(one), device).close()
    gc.collect()
    assert threading.active_count() == threads
    assert device.held_bytes(0) + device.held_bytes(1) == 0


def _tensors() -> int:
    return sum(1 for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))


def test_a_plan_that_is_traced_here_and_inputs_by_keyword() -> None:
    made = toys.text(("linear",))
    plan = dealt(made)
    with hwexec.prepare(made.module, plan, made.inputs[0], host=TWO, device="cpu") as cold:
        assert torch.equal(cold(made.inputs[0]), made.answer)
    named = {"tokens": made.inputs[0]}
    with hwexec.prepare(made.module, plan, named, network=made.network, host=TWO, device="cpu") as cold:
        assert torch.equal(cold(**named), made.answer)


def test_what_is_loaded_between_starts_is_what_the_next_one_brings() -> None:
    made = toys.text(("linear",))
    other = toys.text(("linear",))
    for p in other.module.parameters():
        p.data.mul_(0.5)
    with torch.no_grad():
        want = other.module(*made.inputs)
    with cold_start(made, dealt(made), CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
        made.module.load_state_dict(other.module.state_dict())
        assert torch.equal(cold(*made.inputs), want)
    with torch.no_grad():
        assert torch.equal(made.module(*made.inputs), want)


@pytest.mark.parametrize("launch", [Launch.GRAPH, Launch.EAGER])
def test_a_plans_copies_are_timed_by_themselves_and_leave_the_weights_as_they_were(launch: Launch) -> None:
    made, device = toys.text(), CpuDevice(2, delay_us=2_000.0)
    plan = dealt(made, launch)
    with cold_start(made, plan, device) as cold:
        cold(*made.inputs)
        taken = cold.copies_alone(repeats=2)
        assert taken is not None
        assert len(taken.raw) == 2
        assert min(taken.raw) > 0
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        cold.evict()
        cold.copies_alone(repeats=1)
        straight = torch.zeros(made.network.arena_bytes, dtype=torch.bool)
        for chunk in plan.chunks:
            straight[chunk.start_bytes : chunk.stop_bytes] = chunk.path == (0,)
        host, arena = cold._stage.host.tensor, cold._stage.arena
        assert torch.equal(arena[straight], host[straight])
        assert bool((arena[~straight] == POISON).all()), "nothing is pushed on"
        assert torch.equal(cold(*made.inputs), made.answer)
    access = tuple(tuple(Access.RESIDENT for _ in row) for row in plan.access)
    with cold_start(made, replace(plan, access=access, chunks=(), head=0), device) as cold:
        assert cold.copies_alone() is None
    device.close()


def test_every_wait_that_lowering_makes_is_needed() -> None:
    made = toys.text()
    program = lower(dealt(made), made.network, TWO)
    waits = [i for i, op in enumerate(program.ops) if type(op).__name__ == "Wait"]
    assert len(waits) > 10
    for index in waits:
        with pytest.raises(InputError, match="a Wait is missing"):
            replace(program, ops=program.ops[:index] + program.ops[index + 1 :])


def test_samples_are_kept_raw_and_their_spread_is_flagged() -> None:
    samples = Samples((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (samples.median_ns, samples.iqr_ns, samples.minimum_ns) == (3.0, 2.0, 1.0)
    assert samples.noisy
    assert not Samples((5.0,)).noisy
    device = CpuDevice(1, delay_us=0)
    stream = device.stream("h2d:0", 0)
    a, b = torch.zeros(1 << 20, dtype=torch.uint8), torch.ones(1 << 20, dtype=torch.uint8)
    timed = time_ns(lambda: device.copy(stream, a, b), device, [stream], repeats=5)
    assert len(timed.raw) == 5
    assert timed.gated
    assert torch.equal(a, b)
    assert len(wall_ns(lambda: device.copy(stream, a, b), device, repeats=3).raw) == 3
    device.close()
