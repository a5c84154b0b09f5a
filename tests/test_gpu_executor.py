"""Plans on real GPUs: captured and eager, over one link and two. Run with `pytest -m gpu`."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import hwexec
from hwexec.arena import HostArena
from hwexec.cuda import CudaDevice
from hwexec.cuda_graph import CudaGraph
from hwexec.device import Activity, Stream
from hwexec.driver import load_driver
from hwexec.timing import time_ns
from sim.errors import InputError
from sim.models import Built, build
from sim.network import Network
from sim.ops import Copy
from sim.plan import Access, Chunk, Launch, Plan
from sim.timeline import SpanKind
from sim.trace import trace
from tests import builders, toys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
edits_graphs = pytest.mark.skipif(
    not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"), reason="needs PyTorch 2.8"
)
MIB = 2**20
LLAMA = "hf:llama-1b:hidden=256,layers=2,heads=4,kv_heads=2,tied=yes"
MODELS = ("resnet18", "vit_b_16", "hf:bert-base", LLAMA)


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


def links_here(links: int) -> int:
    if links > torch.cuda.device_count():
        pytest.skip(f"needs {links} GPUs")
    return links


def dealt(net: Network, launch: Launch, links: int, size: int, direct: tuple[int, ...] = ()) -> Plan:
    starts = range(0, net.arena_bytes, size)
    paths = [(0,), (1, 0)][:links]
    chunks = [Chunk(s, min(s + size, net.arena_bytes), paths[i % links]) for i, s in enumerate(starts)]
    access = tuple(
        tuple(Access.DIRECT if index in direct else Access.COPIED for _ in layer.reads)
        for index, layer in enumerate(net.layers)
    )
    return Plan("dealt", 0, launch, access, tuple(chunks))


def at_partner(net: Network) -> Plan:
    """The second half stays on GPU 1 and is read there."""
    cut = net.offsets[len(net.storages) // 2]
    access = tuple(
        tuple(Access.PEER if net.offsets[r.storage] >= cut else Access.COPIED for r in layer.reads)
        for layer in net.layers
    )
    chunks = (Chunk(0, cut, (0,)), Chunk(cut, net.arena_bytes, (1,)))
    return Plan("peer", 0, Launch.GRAPH, access, chunks)


def tensors(output: object) -> list[torch.Tensor]:
    return [t.clone() for t in pytree.tree_flatten(output)[0] if isinstance(t, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def prepared(built: Built, net: Network, plan: Plan, device: CudaDevice) -> hwexec.ColdStart:
    host = builders.host(max(2, torch.cuda.device_count()))
    return hwexec.prepare(built.module, plan, built.inputs, network=net, host=host, device=device)


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("name", MODELS)
def test_cold_is_bit_equal_to_resident(name: str, launch: Launch, links: int, device: CudaDevice) -> None:
    links_here(links)
    built = build(name, seq=32 if name.startswith("hf") else None)
    net = trace(built).network
    plan = dealt(net, launch, links, 4 * MIB, direct=(0, len(net.layers) // 2))
    with prepared(built, net, plan, device) as cold:
        assert (cold.launch, cold.why_eager) == (launch, "")
        want = tensors(cold.resident(*built.inputs))
        assert not any(t.isnan().any() for t in want if t.is_floating_point())
        for _ in range(5):
            cold.evict()
            assert same(tensors(cold(*built.inputs)), want)
        assert cold.brought()[0] == plan.copied_bytes
        assert same(tensors(cold.warm(*built.inputs)), want)
        cold.settle()
        assert same(tensors(cold.warm(*built.inputs)), want)


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("name", MODELS)
def test_in_the_memory_that_a_plan_takes_answers_are_the_resident_ones(
    name: str, launch: Launch, device: CudaDevice
) -> None:
    """The first half is copied, the second read in place."""
    built = build(name, seq=32 if name.startswith("hf") else None)
    net = trace(built).network
    cut = net.offsets[len(net.storages) // 2]
    access = tuple(
        tuple(Access.DIRECT if net.offsets[r.storage] >= cut else Access.COPIED for r in layer.reads)
        for layer in net.layers
    )
    plan = Plan("half", 0, launch, access, (Chunk(0, cut, (0,)),))
    with prepared(built, net, plan, device) as cold:
        want = tensors(cold.resident(*built.inputs))
    host = builders.host(max(2, torch.cuda.device_count()))
    with hwexec.prepare(
        built.module, plan, built.inputs, network=net, host=host, device=device, settles=False
    ) as cold:
        assert (cold.launch, cold.why_eager) == (launch, "")
        assert cold._stage.arena.numel() == plan.held_bytes(net) == cut
        for _ in range(3):
            cold.evict()
            assert same(tensors(cold(*built.inputs)), want)
            assert same(tensors(cold.warm(*built.inputs)), want)
            assert same(tensors(cold.in_place(*built.inputs)), want)


@pytest.mark.parametrize(
    ("launch", "head", "opening"),
    [(Launch.EAGER, 0, 0), (Launch.GRAPH, 0, 0), (Launch.GRAPH, 4, 0), (Launch.GRAPH, 99, 40)],
)
@pytest.mark.parametrize("links", [1, 2])
def test_the_timeline_has_every_copy_and_layer(
    launch: Launch, head: int, opening: int, links: int, device: CudaDevice
) -> None:
    links_here(links)
    built = build("resnet50")
    net = trace(built).network
    plan = dealt(net, launch, links, 4 * MIB)
    plan = replace(plan, head=min(head, len(plan.chunks)), opening=opening)
    with prepared(built, net, plan, device) as cold:
        cold(*built.inputs)
        cold.evict()
        timeline = cold.timeline()
    copies = [op for op in cold.program.ops if isinstance(op, Copy)]
    spans = timeline.of(SpanKind.COPY)
    assert sorted((s.op, s.stream) for s in spans) == sorted(
        (i, op.stream) for i, op in enumerate(cold.program.ops) if isinstance(op, Copy)
    )
    assert len(spans) == len(copies)
    assert [s.layer for s in timeline.of(SpanKind.RUN)] == list(range(len(net.layers)))
    by_stream: dict[str, float] = {}
    for span in sorted(spans, key=lambda s: s.start_ns):
        assert span.start_ns >= by_stream.get(span.stream, 0.0) - 1000, "a stream is in order"
        by_stream[span.stream] = span.stop_ns
    moved = sum(s.duration_ns for s in spans if s.stream == "h2d:0")
    assert moved > 0
    assert timeline.makespan_ns >= max(s.stop_ns for s in timeline.spans)
    assert min(s.start_ns for s in timeline.spans) >= 0.0
    if head:
        # stream by stream: a copy of the graph need not be behind the head's copies on another stream
        for stream in {s.stream for s in spans}:
            ahead = [s.stop_ns for s in spans if s.stream == stream and s.chunk < head]
            behind = [s.start_ns for s in spans if s.stream == stream and s.chunk >= head]
            if ahead and behind:
                assert min(behind) >= max(ahead) - 1000, f"{stream}: the graph is behind its head"
        assert timeline.of(SpanKind.ISSUE)[0].start_ns > 0.0, "the head's calls come before the launch"


def test_weights_are_read_at_the_partner(device: CudaDevice) -> None:
    links_here(2)
    built = build("resnet18")
    net = trace(built).network
    with prepared(built, net, at_partner(net), device) as cold:
        want = tensors(cold.resident(*built.inputs))
        cold.evict()
        assert same(tensors(cold(*built.inputs)), want)
        assert cold.brought()[1] == 0
        cold.settle()
        assert same(tensors(cold.warm(*built.inputs)), want)


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_weight(launch: Launch, dtype: torch.dtype, device: CudaDevice) -> None:
    made = toys.text(dtype=dtype)
    built = Built(made.module, made.inputs, 2, "fp32", None, "toy")
    plan = dealt(made.network, launch, min(2, torch.cuda.device_count()), 512, direct=(0, 3))
    with prepared(built, made.network, plan, device) as cold:
        want = tensors(cold.resident(*made.inputs))
        for _ in range(20):
            cold.evict()
            assert same(tensors(cold(*made.inputs)), want)
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    assert torch.allclose(want[0].cpu().float(), made.answer.float(), rtol=tolerance, atol=tolerance * 100)


@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_head_ahead_of_the_graph_is_bit_equal(name: str, links: int, device: CudaDevice) -> None:
    links_here(links)
    built = build(name, seq=32 if name.startswith("hf") else None)
    net = trace(built).network
    plan = dealt(net, Launch.GRAPH, links, 2 * MIB)
    every = len(plan.chunks)
    for head, opening in ((1, 0), (2, 0), (5, 0), (every, 0), (every, 1), (every, len(net.layers) // 3)):
        with prepared(built, net, replace(plan, head=min(head, every), opening=opening), device) as cold:
            assert (cold.launch, cold.why_eager) == (Launch.GRAPH, "")
            want = tensors(cold.resident(*built.inputs))
            on_gpu = tuple(t.to("cuda:0") for t in built.inputs)
            for turn in range(12):
                if turn % 2:
                    cold.evict()  # the next start finds the device idle; others find it busy
                else:
                    cold(*on_gpu)
                assert same(tensors(cold(*(on_gpu if turn % 3 else built.inputs))), want)
            if (head, opening) == (every, 0):
                assert same(tensors(cold.landed(*built.inputs)), want), "layers and waits, without copies"


def test_a_copy_that_the_driver_refuses_is_one_clear_error(device: CudaDevice) -> None:
    stream = device.stream("h2d:0", 0)
    origin = device.allocate(4096, 0)
    wrong = device._driver_copy(
        stream, 0, origin.data_ptr(), 4096
    )  # nowhere; other wrong addresses may be read on the host
    with pytest.raises(
        RuntimeError, match=r"a copy of 4096 bytes on h2d:0: .*\(CUDA_ERROR_INVALID_VALUE, 1\)"
    ):
        wrong()
    assert torch.ones(4, device="cuda").sum().item() == 4


def test_alternating_starts_leave_memory_where_it_was(device: CudaDevice) -> None:
    links = min(2, torch.cuda.device_count())
    built = [build("resnet18"), build("squeezenet1_0")]

    def started() -> list[hwexec.ColdStart]:
        colds = []
        for one in built:
            net = trace(one).network
            colds.append(prepared(one, net, dealt(net, Launch.GRAPH, links, 4 * MIB), device))
        for cold, one in zip(colds, built, strict=True):
            cold(*one.inputs)
        device.synchronize()
        return colds

    def close(colds: list[hwexec.ColdStart]) -> None:
        while colds:
            colds.pop(0).close()
        gc.collect()

    # PyTorch keeps a cuBLAS workspace (33 MiB) for every stream that ran a matrix product, as long as the process lives. The
    # device hands its streams out again, last given back first, so every other round has the streams of this one in their
    # roles: after two, none is new to the library.
    for _ in range(2):
        close(started())
    outside = [device.allocated_bytes(gpu) for gpu in range(device.gpu_count)]
    colds = started()
    free = [device.memory(gpu).free_bytes for gpu in range(device.gpu_count)]
    for _ in range(500):  # a thousand starts
        for cold, one in zip(colds, built, strict=True):
            cold(*one.inputs)
    device.synchronize()
    assert [device.memory(gpu).free_bytes for gpu in range(device.gpu_count)] == free
    del cold
    close(colds)
    assert [device.allocated_bytes(gpu) for gpu in range(device.gpu_count)] == outside


def test_the_graphs_of_a_module_have_one_memory_for_what_they_compute(device: CudaDevice) -> None:
    built = build("resnet18")
    net = trace(built).network
    with prepared(built, net, dealt(net, Launch.GRAPH, 1, 4 * MIB, direct=(0,)), device) as cold:
        cold.in_place(*built.inputs)
        assert len({id(captured) for captured in cold._runs.graphs.values()}) == 4, (
            "cold, warm, resident, in place"
        )
        owners = {tuple(s["segment_pool_id"]) for s in torch.cuda.memory_snapshot()} - {(0, 0)}
        assert len(owners) == 1
        want = tensors(cold.resident(*built.inputs))
        for run in (cold, cold.warm, cold.in_place, cold, cold.resident, cold.warm):
            assert same(tensors(run(*built.inputs)), want)


def test_a_capture_that_breaks_falls_back_and_the_next_one_works(device: CudaDevice) -> None:
    class Synchronises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            return self.b(x)

    made = toys.toy(Synchronises(), torch.randn(2, 64))
    built = Built(made.module, made.inputs, 2, "fp32", None, "toy")
    plan = dealt(made.network, Launch.GRAPH, min(2, torch.cuda.device_count()), 512)
    with prepared(built, made.network, plan, device) as cold:
        assert cold.launch is Launch.EAGER
        assert cold.why_eager.startswith("layer 0 (a) cannot be captured: ")
        assert torch.allclose(cold(*made.inputs).cpu(), made.answer, atol=1e-3)
    good = toys.text()
    built = Built(good.module, good.inputs, 2, "fp32", None, "toy")
    with prepared(built, good.network, dealt(good.network, Launch.GRAPH, 1, 512), device) as cold:
        assert cold.launch is Launch.GRAPH
        want = tensors(cold.resident(*good.inputs))
        cold.evict()
        assert same(tensors(cold(*good.inputs)), want)


def test_a_capture_that_breaks_beside_other_graphs_can_be_made_again(device: CudaDevice) -> None:
    built = build("resnet18")
    net = trace(built).network
    with prepared(built, net, dealt(net, Launch.GRAPH, 1, 4 * MIB, direct=(0,)), device) as cold:
        want = tensors(cold.resident(*built.inputs))
        hook = built.module.fc.register_forward_pre_hook(lambda module, given: given[0].sum().item() and None)
        with pytest.raises(
            InputError, match=r"reading every weight in place cannot be captured as a graph: layer \d+ \("
        ):
            cold.in_place(*built.inputs)
        hook.remove()
        for run in (cold.in_place, cold, cold.warm, cold.in_place, cold.resident):
            assert same(tensors(run(*built.inputs)), want)


def test_what_cannot_be_had_is_one_line_and_leaves_the_gpu_usable(device: CudaDevice) -> None:
    made = toys.text(("linear",))
    built = Built(made.module, made.inputs, 2, "fp32", None, "toy")
    hog = device.allocate(max(0, device.memory(0).free_bytes - 200 * MIB), 0)
    with pytest.raises(InputError, match=r"GPU 0 \(.*\) has \d+ of \d+ bytes free, and toy needs \d+ there"):
        prepared(built, made.network, dealt(made.network, Launch.GRAPH, 1, 512), device)
    del hog
    device.trim()
    with pytest.raises(InputError, match=r"refuses to pin"):
        device.pin(4096, MIB)
    assert torch.ones(4, device="cuda").sum().item() == 4
    far = Plan("far", 0, Launch.GRAPH, dealt(made.network, Launch.GRAPH, 1, 512).access, ())
    gone = device.gpu_count
    chunks = (Chunk(0, made.network.arena_bytes, (gone, 0)),)
    host = builders.host(gone + 1)
    with pytest.raises(InputError, match=f"uses GPU {gone}, but this machine has {gone}"):
        hwexec.prepare(
            made.module,
            Plan("far", 0, Launch.GRAPH, far.access, chunks),
            made.inputs,
            network=made.network,
            host=host,
            device=device,
        )


def replayed(device: CudaDevice, stream: Stream, graph: CudaGraph) -> tuple[Activity, ...]:
    """What the GPU was seen doing while the graph ran."""

    def replay() -> None:
        with device.on(stream):
            graph.replay()

    return device.trace(replay)


@edits_graphs
@pytest.mark.parametrize(("element", "value"), [(8, 0xA5), (16, 0xBEEF), (32, 0xDEADBEEF)])
def test_a_captured_memset_is_a_kernel_that_writes_the_same(
    element: int, value: int, device: CudaDevice
) -> None:
    driver = load_driver()
    stream, size = device.stream("compute:0", 0), 3 * MIB + 4
    arena = device.allocate(size + 8, 0)
    with device.capture(stream) as graph:
        arena.add_(1)
        write = getattr(driver, f"cuMemsetD{element}Async")
        count = ctypes.c_size_t(size // (element // 8))
        at = ctypes.c_uint64(arena.data_ptr() + 4)
        assert write(at, ctypes.c_uint(value), count, ctypes.c_void_p(stream.raw.cuda_stream)) == 0
        arena.add_(1)
    device.fill(stream, arena, 0)

    seen = replayed(device, stream, graph)
    assert [a.kind for a in seen if a.kind not in ("launch", "issue")] == ["kernel"] * 3
    assert not any("Memset" in a.name for a in seen)
    word = (value.to_bytes(element // 8, "little") * 4)[:4]
    want = torch.tensor(list(word), dtype=torch.uint8).repeat(size // 4) + 1
    assert torch.equal(arena[4 : 4 + size].cpu(), want)
    assert arena[:4].tolist() == arena[-4:].tolist() == [2] * 4
    graph.close()
    device.close_stream(stream)


@edits_graphs
@pytest.mark.parametrize("words", [72, 5])
def test_a_captured_copy_of_a_layer_is_a_kernel_and_one_into_an_arena_is_not(
    words: int, device: CudaDevice
) -> None:
    host = HostArena(device, MIB, 0)
    weight = host.tensor.view(torch.float32)[:words]
    weight.copy_(torch.rand(words))
    in_place = host.view(0).view(torch.float32)[:words]
    stream, arena = device.stream("compute:0", 0), device.allocate(MIB, 0)
    with device.capture(stream, [arena]) as graph:
        device.copy(stream, arena, host.tensor)
        one = in_place.clone()
        two = one.clone()

    seen = replayed(device, stream, graph)
    assert [a.kind for a in seen if a.kind not in ("launch", "issue")] == ["h2d", "kernel", "kernel"]
    for found in (one, two, arena.view(torch.float32)[:words]):
        assert torch.equal(found.cpu(), weight)
    graph.close()
    device.close_stream(stream)
    host.close()


class Scaled(nn.Module):
    """Copies its weight before it uses it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain.clone()


@edits_graphs
def test_a_layer_that_copies_a_weight_read_in_place_stands_behind_no_weights(device: CudaDevice) -> None:
    module = nn.Sequential(nn.Linear(1024, 1024), Scaled(1024), nn.Linear(1024, 2**16)).eval()
    built = Built(module, (torch.randn(4, 1024),), 4, "fp32", None, "toy")
    net = trace(built).network
    plan = dealt(net, Launch.GRAPH, 1, 8 * MIB, direct=(1,))
    with prepared(built, net, replace(plan, head=len(plan.chunks)), device) as cold:
        want = tensors(cold.resident(*built.inputs))
        cold.evict()
        assert same(tensors(cold(*built.inputs)), want)
        cold.evict()
        spans = cold.timeline()
        scaled = next(s for s in spans.of(SpanKind.RUN) if s.layer == 1)
        assert scaled.stop_ns < max(s.stop_ns for s in spans.of(SpanKind.COPY)) / 2


def test_the_gate_hides_the_cost_of_issuing(device: CudaDevice) -> None:
    host = HostArena(device, 64 * MIB, 0)
    assert host.tensor.is_pinned()
    host.tensor.random_()
    arena = device.allocate(64 * MIB, 0)
    stream = device.stream("h2d:0", 0)
    timed = time_ns(lambda: device.copy(stream, arena, host.tensor), device, [stream])
    assert timed.gated
    assert 64 * MIB / timed.median_ns > 1.0, "GB/s"
    assert torch.equal(arena.cpu(), host.tensor)
    assert torch.equal(host.view(0).cpu(), host.tensor)
    host.close()


def test_streams_are_their_own_and_keep_to_what_they_were_made_for(device: CudaDevice) -> None:
    streams = [device.stream(f"land:{k}", 0) for k in range(40)]
    lane = device.stream("h2d:0", 0)
    handles = [stream.raw.cuda_stream for stream in (*streams, lane)]
    assert len(set(handles)) == 41, "PyTorch's own are 32 a GPU, and the 33rd is the first again"
    for stream in (lane, *streams):
        device.close_stream(stream)
    again = [device.stream(f"land:{k}", 0) for k in range(41)]
    assert set(handles[:40]) < {stream.raw.cuda_stream for stream in again}
    assert handles[40] not in {stream.raw.cuda_stream for stream in again}, "it has copied"
    for stream in again:
        device.close_stream(stream)
    other = CudaDevice()  # as each `prepare` opens one
    assert other.stream("land:0", 0).raw.cuda_stream in {stream.raw.cuda_stream for stream in again}


def test_a_plan_with_resident_weights_starts_behind_no_copies(device: CudaDevice) -> None:
    """Evicting brings them; were it done on the compute stream, its first wait would stand behind the head's copies."""
    built = build("vit_b_16")
    net = trace(built).network
    plan = dealt(net, Launch.GRAPH, 1, 16 * MIB)
    kept = tuple(
        tuple(Access.RESIDENT for _ in row) if at == 0 else row for at, row in enumerate(plan.access)
    )
    start = net.offsets[1 + max(r.storage for r in net.layers[0].reads)]
    starts = range(start, net.arena_bytes, 16 * MIB)
    chunks = tuple(Chunk(at, min(at + 16 * MIB, net.arena_bytes), (0,)) for at in starts)
    given = [t.to("cuda:0") for t in built.inputs]
    with prepared(built, net, replace(plan, access=kept, chunks=chunks, head=len(chunks)), device) as cold:
        want = tensors(cold.resident(*given))
        for _ in range(3):
            cold.evict()
            assert same(tensors(cold(*given)), want)
        cold.evict()
        spans = cold.timeline()
        first = min(s.stop_ns for s in spans.of(SpanKind.RUN))
        assert first < max(s.stop_ns for s in spans.of(SpanKind.COPY)) / 2


@pytest.mark.parametrize("launch", Launch)
def test_inputs_in_host_memory_ask_no_copy_engine(launch: Launch, device: CudaDevice) -> None:
    """A copy of theirs would stand behind all weights that are under way."""
    built = build("resnet18")
    net = trace(built).network
    inputs = [
        torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(k)).contiguous(memory_format=order)
        for k, order in enumerate((torch.contiguous_format, torch.channels_last))
    ]
    with prepared(built, net, dealt(net, launch, 1, 4 * MIB), device) as cold:
        for given in (*inputs, *inputs):
            want = tensors(cold.resident(given.to("cuda:0")))
            cold.evict()
            assert same(tensors(cold(given)), want)
            assert same(tensors(cold.warm(given.pin_memory())), want)
        cold.evict()
        seen = device.trace(lambda: cold(inputs[0]))
        assert sum(a.kind == "h2d" for a in seen) == len(cold.plan.chunks)
