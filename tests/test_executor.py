"""Programs run on threads with delays on purpose: right bits, nothing left behind, one clear line where it cannot be."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hwexec
from hwexec.cpu import CpuDevice, _Recorder
from hwexec.device import POISON
from hwexec.timing import Samples, time_ns, wall_ns
from sim.catalog import find_host
from sim.errors import InputError
from sim.ops import Copy
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.program import lower
from sim.timeline import SpanKind
from sim.trace import trace_module
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
        assert cold.brought()[0] == made.network.arena_bytes
        assert cold.brought()[1] == made.network.arena_bytes // 1024 * 512
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
        assert cold.brought()[0] == plan.copied_bytes
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
        assert cold.brought()[1] == 0
    access = tuple(
        tuple(Access.RESIDENT if net.offsets[r.storage] < cut else Access.COPIED for r in layer.reads)
        for layer in net.layers
    )
    with cold_start(made, Plan("kept", 0, Launch.GRAPH, access, chunks[1:]), CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.brought()[0] == net.arena_bytes - cut


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
@pytest.mark.parametrize("how", ["a start", "a watched start"])
def test_what_was_settled_is_forgotten_once_other_weights_are_brought(launch: Launch, how: str) -> None:
    """Warm runs read what had been settled before: the old weights, in layers that are read in place."""
    made, other = toys.text(("linear",), tied=False), toys.text(("linear",), tied=False)
    for p in other.module.parameters():
        p.data.mul_(0.5)
    with torch.no_grad():
        want = other.module(*made.inputs)
    net, plan = made.network, dealt(made, launch, direct=(len(made.network.layers) - 1,))
    (read,) = net.layers[-1].reads
    brought = (Chunk(0, net.offsets[read.storage], (0,)),)
    with cold_start(made, replace(plan, chunks=brought), CpuDevice(2)) as cold:
        cold(*made.inputs)
        cold.settle()
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        made.module.load_state_dict(other.module.state_dict())
        if how == "a start":
            assert torch.equal(cold(*made.inputs), want)
        else:
            cold.timeline()
        assert torch.equal(cold.warm(*made.inputs), want)
        cold.settle()
        assert torch.equal(cold.warm(*made.inputs), want)


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


def test_an_answer_lasts_until_the_modules_own_next_start_of_any_kind() -> None:
    one, other, device = toys.text(), toys.text(("linear",)), CpuDevice(2)
    with cold_start(one, dealt(one), device) as cold, cold_start(other, dealt(other), device) as stranger:
        for run, next_run in ((cold, cold.resident), (cold.resident, cold), (cold.resident, cold.in_place)):
            answer = run(*one.inputs)
            stranger(*other.inputs)
            assert torch.equal(answer, one.answer)
            next_run(*one.inputs)
            assert not torch.equal(answer, one.answer), "their graphs have one memory for what they compute"


def test_layers_behind_copies_that_have_landed_run_without_one() -> None:
    """The graph has its waits and makes no copy: weights altered in GPU memory stay so, and answer."""
    made, device = toys.text(), CpuDevice(2)
    plan = dealt(made, Launch.GRAPH)
    with cold_start(made, replace(plan, head=len(plan.chunks)), device) as cold:
        with pytest.raises(InputError, match="make a cold start first"):
            cold.landed(*made.inputs)
        cold(*made.inputs)
        assert torch.equal(cold.landed(*made.inputs), made.answer)
        other = tuple((t + 3) % 29 for t in made.inputs)
        assert torch.equal(cold.landed(*other).clone(), cold.warm(*other))
        assert not torch.equal(cold.landed(*other), made.answer)
        cold._stage.arena.zero_()
        assert not torch.equal(cold.landed(*made.inputs), made.answer)
        assert torch.equal(cold(*made.inputs), made.answer)
    opened = replace(plan, head=len(plan.chunks), opening=1)
    for refused in (replace(plan, head=0), opened, replace(plan, launch=Launch.EAGER, head=0)):
        with cold_start(made, refused, device) as cold:
            cold(*made.inputs)
            with pytest.raises(InputError, match="all chunks in the head, and no opening"):
                cold.landed(*made.inputs)
    assert device.pinned == {}
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


class Refreshed(nn.Module):
    """Writes a buffer anew in each run, before it reads it, as rotary embeddings of long sequences do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.scale.copy_(x.mean(0).abs())
        out: torch.Tensor = self.last(x * self.scale)
        return out


@pytest.mark.parametrize("access", [Access.COPIED, Access.DIRECT])
@pytest.mark.parametrize("launch", Launch)
def test_a_buffer_that_each_run_writes_before_it_reads_it_may_lie_anywhere(
    launch: Launch, access: Access
) -> None:
    inputs = [torch.full((3, 4), value) for value in (1.0, 2.0, 3.0)]
    made = toys.toy(Refreshed(), inputs[0])
    with torch.no_grad():
        wants = [made.module(x) for x in inputs]
    plan = dealt(made, launch)
    names = [storage.name for storage in made.network.storages]
    rows = tuple(
        tuple(access if names[r.storage] == "scale" else Access.COPIED for r in layer.reads)
        for layer in made.network.layers
    )
    with cold_start(made, replace(plan, access=rows), CpuDevice(2)) as cold:
        for x, want in zip(inputs, wants, strict=True):
            cold.evict()
            assert torch.equal(cold(x), want)
            assert torch.equal(cold.warm(x), want)


class Labelled(nn.Module):
    """Answers with a buffer that no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("labels", torch.arange(128.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(self.first(x)), self.labels[:8]


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("access", [Access.COPIED, Access.DIRECT])
def test_what_no_layer_reads_is_right_in_every_run(access: Access, launch: Launch) -> None:
    module, x = Labelled().eval().requires_grad_(False), torch.randn(2, 64)
    net, machine = trace_module(module, (x,)).network, find_host("h100-pair")
    read = sorted({read.storage for layer in net.layers for read in layer.reads})
    assert len(read) < len(net.storages)
    starts = ((net.offsets[s], net.storages[s].size_bytes) for s in read)
    chunks = tuple(Chunk(at, at + size, (0,)) for at, size in starts) if access is Access.COPIED else ()
    plan = Plan("labelled", 0, launch, tuple(tuple(access for _ in la.reads) for la in net.layers), chunks)
    device = CpuDevice(1, seed=1, delay_us=100)
    want = torch.arange(8.0)
    with hwexec.prepare(module, plan, (x,), network=net, host=machine, device=device) as cold:
        cold.evict()
        for run in (cold, cold.warm, cold.in_place):
            assert torch.equal(run(x)[1], want)
        cold.settle()
        for run in (cold.warm, cold.resident, cold):
            assert torch.equal(run(x)[1], want)
    device.close()


def test_two_threads_make_no_start_at_once() -> None:
    made = toys.text()
    with cold_start(made, dealt(made), CpuDevice(2, seed=3, delay_us=100)) as cold:
        inside, told = threading.Event(), list[str]()
        bring = cold._inputs.given

        def slow(*args: Any) -> Any:
            inside.set()
            second.join(10)
            return bring(*args)

        def again() -> None:
            inside.wait(10)
            try:
                cold(*made.inputs)
            except InputError as error:
                told.append(str(error))

        cold._inputs.given = slow  # type: ignore[method-assign]
        second = threading.Thread(target=again)
        second.start()
        first = cold(*made.inputs)
        cold._inputs.given = bring  # type: ignore[method-assign]
        assert told == [
            f"{made.network.model}: another thread is in a start of this module, whose arenas and output are one; take turns, or "
            "prepare a copy of the module for each thread"
        ]
        assert torch.equal(first, made.answer)
        assert cold.hot
        cold.close()
        assert not cold.hot
        with pytest.raises(InputError, match="is closed"):
            cold.__enter__()
