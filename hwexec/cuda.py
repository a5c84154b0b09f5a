"""CUDA through stock PyTorch: the only file that names torch.cuda.

What it had to learn (all tried on two H200, torch 2.11): a pinned host pointer, or another GPU's pointer, wrapped as a
DLPack capsule that names this GPU becomes a tensor of this GPU. Kernels read it in place, and `copy_` from it is a plain
asynchronous copy on the current stream, without the barrier that PyTorch puts round a copy between two devices. `copy_`
takes 14 us of the host's time, the driver's own copy about 1: arenas are copied by the driver, where it can be loaded.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hwexec.device import Activity, CaptureError, Event, Memory, Ready, Stream
from hwexec.driver import NO_CONTEXT, captured_nodes, driver_error, labelled, load_driver
from sim.errors import InputError, require

_cuda: Any = torch.cuda  # much of it has no types
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not only the current one
_GATE_HZ = 2e9  # no GPU of today clocks higher by much; a slower one holds longer


class CudaDevice:
    """All GPUs that this process sees. InputError where there is none."""

    kind = "cuda"
    figures = True
    out_of_memory: type[Exception] = torch.cuda.OutOfMemoryError

    def __init__(self) -> None:
        require(
            torch.cuda.is_available(),
            "no CUDA device: this machine or this build of PyTorch has none; device 'cpu' plays one, without figures",
        )
        _cuda.init()
        self._profiled = False
        self._driver = load_driver()
        self._callers: dict[tuple[int, ...], Any] = {}
        self._edges: dict[int, tuple[Any, Any]] = {}

    @property
    def gpu_count(self) -> int:
        return torch.cuda.device_count()

    def describe(self, gpu: int) -> str:
        return torch.cuda.get_device_name(gpu)

    def torch_device(self, gpu: int) -> torch.device:
        return torch.device("cuda", gpu)

    def memory(self, gpu: int) -> Memory:
        free, total = torch.cuda.mem_get_info(gpu)
        cached = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        return Memory(free + cached, total)

    def allocated_bytes(self, gpu: int) -> int:
        """Bytes of living tensors, PyTorch's own count."""
        return torch.cuda.memory_allocated(gpu)

    def numa_node(self, gpu: int) -> int | None:
        if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) < 2:
            return None
        about: Any = torch.cuda.get_device_properties(gpu)
        with suppress(AttributeError, OSError, ValueError):
            slot = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
            node = int(Path(f"/sys/bus/pci/devices/{slot}/numa_node").read_text())
            return node if node >= 0 else None  # virtual machines say -1
        return None

    # Memory

    def pin(self, address: int, size_bytes: int) -> None:
        cudart = _cuda.cudart()
        code = int(cudart.cudaHostRegister(address, size_bytes, _PORTABLE))
        if code == 0:
            return
        with suppress(
            RuntimeError
        ):  # the runtime keeps the error for the next launch to report: let this one have it
            torch.ones(2, device="cuda").add_(1)
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        said = "none" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        raise InputError(
            f"host memory: the system refuses to pin {size_bytes} bytes (cudaHostRegister error {code}, limit on locked "
            f"memory: {said}); free memory, raise the limit (ulimit -l), or take a smaller model"
        )

    def unpin(self, address: int) -> None:
        cudart = _cuda.cudart()
        cudart.cudaHostUnregister(address)

    def allocate(self, size_bytes: int, gpu: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device(gpu))

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def view(self, source: torch.Tensor, gpu: int, owner: object) -> torch.Tensor:
        return labelled(source.data_ptr(), source.numel(), gpu, (owner, source))

    def connect(self, source: int, destination: int) -> None:
        require(
            torch.cuda.can_device_access_peer(destination, source),
            f"GPU {destination} cannot read GPU {source}'s memory (no peer access between them); "
            "plan over one link, or over a partner that has it",
        )
        # PyTorch enables peer access, in one direction, at the first copy between two devices
        for one, other in ((source, destination), (destination, source)):
            torch.zeros(1, device=self.torch_device(one)).to(self.torch_device(other))
        self.synchronize()

    # Streams and events

    def stream(self, name: str, gpu: int) -> Stream:
        return Stream(name, gpu, _cuda.Stream(device=gpu))

    def close_stream(self, stream: Stream) -> None:
        """PyTorch's streams come from a pool and are never destroyed."""

    def on(self, stream: Stream) -> _On:
        edges = self._edges.get(stream.raw.cuda_stream)
        if edges is None:
            edges = self._edges[stream.raw.cuda_stream] = (_cuda.Event(), _cuda.Event())
        return _On(self, stream, *edges)

    def idle(self, stream: Stream) -> bool:
        return bool(stream.raw.query()) and bool(self._caller(stream.gpu).query())

    def _caller(self, gpu: int) -> Any:
        """The current stream of a GPU; PyTorch's own way makes an object each time."""
        key: tuple[int, ...] = torch._C._cuda_getCurrentStream(gpu)
        found = self._callers.get(key)
        if found is None:
            found = self._callers[key] = torch.cuda.current_stream(gpu)
        return found

    def event(self, timing: bool = False) -> Event:
        return Event(timing, _cuda.Event(enable_timing=timing))

    def record(self, stream: Stream, event: Event) -> None:
        event.raw.record(stream.raw)

    def wait(self, stream: Stream, event: Event) -> None:
        stream.raw.wait_event(event.raw)

    def wait_on_host(self, event: Event) -> None:
        event.raw.synchronize()

    def happened(self, event: Event) -> bool:
        return bool(event.raw.query())

    def elapsed_ns(self, start: Event, stop: Event) -> float:
        return float(start.raw.elapsed_time(stop.raw)) * 1e6

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.ready_copy(stream, destination, source)()

    def ready_copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> Ready:
        size_bytes = destination.numel()
        if self._driver is None or destination.dtype is not torch.uint8 or source.numel() != size_bytes:
            return partial(_copy_by_torch, stream, destination, source)
        return self._driver_copy(stream, destination.data_ptr(), source.data_ptr(), size_bytes)

    def _driver_copy(self, stream: Stream, to: int, origin: int, size_bytes: int) -> Ready:
        """One call of the driver: it knows from the addresses which way to go, and a capture takes it as a copy."""
        if size_bytes == 0:
            return _nothing
        call, exchange, gpu = self._driver.cuMemcpyAsync, _cuda._exchange_device, stream.gpu
        given = (
            ctypes.c_uint64(to),
            ctypes.c_uint64(origin),
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream.raw.cuda_stream),
        )

        def issue() -> None:
            before = exchange(gpu)
            code = call(*given)
            if code == NO_CONTEXT:
                torch.cuda.set_device(gpu)  # binds the GPU's context to this thread
                code = call(*given)
            if before != gpu:
                exchange(before)
            if code:
                raise RuntimeError(
                    f"a copy of {size_bytes} bytes on {stream.name}: {driver_error(self._driver, code)}"
                )

        return issue

    def ready_record(self, stream: Stream, event: Event) -> Ready:
        return partial(event.raw.record, stream.raw)

    def ready_wait(self, stream: Stream, event: Event) -> Ready:
        return partial(event.raw.wait, stream.raw)

    def assign(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        if (
            self._driver is not None
            and type(source) is torch.Tensor
            and source.get_device() == stream.gpu
            and source.is_contiguous()
            and destination.is_contiguous()
            and not (source.is_neg() or source.is_conj())
        ):
            self._driver_copy(stream, destination.data_ptr(), source.data_ptr(), destination.nbytes)()
            return
        with torch.no_grad():
            destination.copy_(source, non_blocking=True)

    def fill(self, stream: Stream, destination: torch.Tensor, byte: int) -> None:
        with torch.cuda.stream(stream.raw):
            destination.fill_(byte)

    def gate(self, stream: Stream, hold_ns: float) -> None:
        with torch.cuda.stream(stream.raw):
            _cuda._sleep(int(hold_ns * 1e-9 * _GATE_HZ))

    def synchronize(self) -> None:
        for gpu in range(self.gpu_count):
            torch.cuda.synchronize(gpu)

    # Graphs

    @contextmanager
    def capture(self, stream: Stream) -> Iterator[CudaGraph]:
        graph = CudaGraph(stream)
        self.synchronize()
        gc.collect()  # nothing that a capture forbids may be freed inside it
        torch.cuda.empty_cache()
        with torch.cuda.device(stream.gpu), torch.cuda.stream(stream.raw):
            try:
                graph.begin()
                yield graph
                graph.end()
            except BaseException as error:
                graph.abandon()
                if isinstance(error, RuntimeError) and not isinstance(error, self.out_of_memory):
                    raise CaptureError(_first_line(error)) from error
                raise

    def trace(self, call: Callable[[], None]) -> tuple[Activity, ...]:
        self.synchronize()
        if not self._profiled:  # the first use of the profiler starts CUPTI, which takes long
            with profile(activities=[ProfilerActivity.CUDA]):
                self.synchronize()
            self._profiled = True
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            call()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            watched.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        found = [activity for event in events if (activity := _activity(event)) is not None]
        return tuple(sorted(found, key=lambda a: (a.start_ns, a.stop_ns)))

    def close(self) -> None:
        pass


class _On:
    """See `Device.on`. A class: a generator costs more than all that it does here."""

    __slots__ = ("after", "before", "caller", "device", "gpu", "stream")

    def __init__(self, device: CudaDevice, stream: Stream, before: Any, after: Any) -> None:
        self.device, self.stream, self.before, self.after = device, stream, before, after

    def __enter__(self) -> None:
        raw, gpu = self.stream.raw, self.stream.gpu
        self.gpu = _cuda._exchange_device(gpu)
        caller = self.caller = self.device._caller(gpu)
        if caller != raw:
            self.before.record(caller)
            self.before.wait(raw)
            torch.cuda.set_stream(raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        raw, caller = self.stream.raw, self.caller
        if caller != raw:
            torch.cuda.set_stream(caller)
        if self.gpu != self.stream.gpu:
            _cuda._exchange_device(self.gpu)
        if caller != raw and error is None:
            self.after.record(raw)
            self.after.wait(caller)


class CudaGraph:
    """A torch.cuda.CUDAGraph of one stream's work."""

    def __init__(self, stream: Stream) -> None:
        self.raw: Any = torch.cuda.CUDAGraph()
        self.stream = stream
        # a pool of its own: captures that shared one would overwrite each other's outputs
        self.pool: Any = _cuda.graph_pool_handle()
        self.capturing = True

    def nodes(self) -> int | None:
        return captured_nodes(self.stream.raw.cuda_stream) if self.capturing else None

    def replay(self) -> None:
        self.raw.replay()

    def close(self) -> None:
        self.raw.reset()

    def begin(self) -> None:
        # thread_local: another thread that allocates must not break this capture
        self.raw.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
            self.raw.capture_end()
        self.capturing = False

    def abandon(self) -> None:
        """Of a capture that broke: end it, and let the allocator and the random generator know that it is over."""
        if not self.capturing:
            self.close()
            return
        try:
            self.end()
        except RuntimeError:
            self._clean_up()
        else:
            self.close()

    def _clean_up(self) -> None:
        gpu = self.stream.gpu
        self.capturing = False
        with suppress(RuntimeError):
            torch.cuda.synchronize(gpu)
        with suppress(RuntimeError, AttributeError):
            # raises where the capture had ended after all, and then reset gives back this graph's share of the pool
            torch._C._cuda_endAllocateToPool(gpu, self.pool)
            torch._C._cuda_releasePool(gpu, self.pool)
        with suppress(RuntimeError), torch.cuda.device(gpu):
            number, spare = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
            with torch.cuda.graph(spare, stream=self.stream.raw, capture_error_mode="thread_local"):
                number.add_(1)
        with suppress(RuntimeError):
            self.raw.reset()


def _copy_by_torch(stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
    with torch.cuda.stream(stream.raw):
        destination.copy_(source, non_blocking=True)


def _nothing() -> None:
    """A copy of no bytes."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _activity(event: dict[str, Any]) -> Activity | None:
    """One event of a profiler's trace; None for those that are no GPU work."""
    category, name = event.get("cat", ""), event.get("name", "")
    start = float(event.get("ts", 0)) * 1e3
    stop = start + float(event.get("dur", 0)) * 1e3
    about = event.get("args", {})
    if category in ("cuda_runtime", "cuda_driver"):
        if "GraphLaunch" in name:
            return Activity("launch", -1, start, stop, 0, name)
        issues = any(part in name for part in ("EventRecord", "StreamWaitEvent", "Memcpy"))
        return Activity("issue", -1, start, stop, 0, name) if issues else None
    if category not in ("gpu_memcpy", "gpu_memset", "kernel"):
        return None
    # copies between two GPUs name both, and the one whose stream they ran on
    gpu = int(about.get("toDevice", about.get("device", -1)))
    size = int(about.get("bytes", 0))
    if category == "gpu_memcpy" and "HtoD" in name:
        return Activity("h2d", gpu, start, stop, size, name)
    if category == "gpu_memcpy" and ("DtoD" in name or "PtoP" in name):
        return Activity("d2d", gpu, start, stop, size, name)
    return Activity("kernel", gpu, start, stop, size, name)
