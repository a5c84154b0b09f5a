"""CUDA through stock PyTorch: with `cuda_graph.py` the only file that names torch.cuda.

What it had to learn (all tried on two H200, torch 2.11): a pinned host pointer, or another GPU's pointer, wrapped as a
DLPack capsule that names this GPU becomes a tensor of this GPU. Kernels read it in place, and a copy to or from it is a
plain asynchronous copy on the current stream, without the barrier that PyTorch puts round a copy between two devices. `copy_`
takes 14 us of the host's time, the driver's own copy about 1: arenas are copied by the driver, where it can be loaded.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hwexec.core import collector_off
from hwexec.cuda_graph import CudaGraph
from hwexec.cupti import watched
from hwexec.device import Activity, CaptureError, Event, Graph, Memory, Ready, Stream
from hwexec.driver import EXTERNAL, NO_CONTEXT, driver_error, labelled, load_driver, new_stream
from sim.errors import InputError, require
from sim.hints import first_line

_cuda: Any = torch.cuda  # much of it has no types
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not only the current one
_GATE_HZ = 2e9  # no GPU of today clocks higher by much; a slower one holds longer


class CudaDevice:
    """All GPUs that this process sees. InputError where there is none."""

    kind = "cuda"
    figures = True
    one_clock = False
    out_of_memory: type[Exception] = torch.cuda.OutOfMemoryError

    def __init__(self) -> None:
        # streams that share a hardware queue wait for each other's copies, and the default of 8 queues is soon shared; the
        # driver reads this when it first starts, and asking whether CUDA is there starts it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        if not _cuda.is_initialized():
            # as `calibrate` and nvidia-smi number them: a host's file says what each number can do
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        require(
            torch.cuda.is_available(),
            "no CUDA device: this machine or this build of PyTorch has none; device 'cpu' plays one, without figures",
        )
        _cuda.init()
        self._driver = load_driver()
        self._callers: dict[tuple[int, ...], Any] = {}
        self._edges: dict[tuple[int, int], tuple[Ready, Ready, Ready, Ready]] = {}
        self._switch = True
        """Whether a copy must be issued with its stream's GPU current; that takes microseconds, and drivers differ."""

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
        self._switch = self._switch and not self._takes_any(source, destination)

    def _takes_any(self, gpu: int, other: int) -> bool:
        """Whether the driver takes a copy on a stream of `gpu` while `other` is the current one."""
        if self._driver is None:
            return False
        stream, probe = (
            _cuda.Stream(device=gpu),
            torch.zeros(2, dtype=torch.uint8, device=self.torch_device(gpu)),
        )
        with torch.cuda.device(other):
            to = probe.data_ptr()
            code: int = self._driver.cuMemcpyAsync(to, to + 1, 1, stream.cuda_stream)
        self.synchronize()
        return code == 0

    # Streams and events

    def stream(self, name: str, gpu: int) -> Stream:
        """One that nothing else has, and that has never been for anything but what the name says ahead of its first colon.

        A stream that has brought host memory makes its later waits and records on that copy engine's queue, behind all copies
        that others have on it: landings took place 2 to 3.5 ms late, once the lane had come to its end
        (results/h100-pair-5/trials/probe.txt). PyTorch's own streams are 32 a GPU, and the 33rd is the first again.
        """
        with _spare_lock:
            spare = _spare.get((gpu, _purpose(name)))
            raw = spare.pop() if spare else None
        return Stream(name, gpu, self._new_stream(gpu) if raw is None else raw)

    def _new_stream(self, gpu: int) -> Any:
        if self._driver is None:
            return _cuda.Stream(device=gpu)
        with torch.cuda.device(gpu):
            torch.cuda.synchronize(gpu)  # makes the GPU's context, and binds it to this thread
            raw = new_stream(self._driver)
        return _cuda.ExternalStream(raw, device=gpu)

    def close_stream(self, stream: Stream) -> None:
        """It is the next one's of its kind, whoever asks: libraries keep memory for each stream that they have run on."""
        with _spare_lock:
            _spare.setdefault((stream.gpu, _purpose(stream.name)), []).append(stream.raw)

    def on(self, stream: Stream) -> _On:
        return _On(self, stream)

    def _edges_of(self, caller: Any, stream: Stream) -> tuple[Ready, Ready, Ready, Ready]:
        """Calls that put `stream` behind the caller's, and the caller's behind `stream`."""
        key = (caller.cuda_stream, stream.raw.cuda_stream)
        found = self._edges.get(key)
        if found is None:
            other = Stream("the caller's stream", stream.gpu, caller)
            before, after = self.event(), self.event()
            found = self._edges[key] = (
                self.ready_record(other, before),
                self.ready_wait(stream, before),
                self.ready_record(stream, after),
                self.ready_wait(other, after),
            )
        return found

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

    def wait_outside(self, stream: Stream, event: Event) -> None:
        """PyTorch tells such events from others when they are made, and only since 2.7; the driver when they are waited for."""
        if self._driver is None:
            raise CaptureError("libcuda cannot be loaded, and a graph waits for its head's copies through it")
        code = self._driver.cuStreamWaitEvent(stream.raw.cuda_stream, event.raw.cuda_event, EXTERNAL)
        if code:
            raise CaptureError(f"a wait of {stream.name}: {driver_error(self._driver, code)}")

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
        return self._driver_call(
            stream.gpu,
            "cuMemcpyAsync",
            (
                ctypes.c_uint64(to),
                ctypes.c_uint64(origin),
                ctypes.c_size_t(size_bytes),
                ctypes.c_void_p(stream.raw.cuda_stream),
            ),
            f"a copy of {size_bytes} bytes on {stream.name}",
        )

    def _driver_call(
        self, gpu: int, name: str, given: tuple[Any, ...], what: str, alive: object = None
    ) -> Ready:
        """A call of the driver on a stream of `gpu`, made ready. RuntimeError, naming `what`, where it fails.

        `alive` is what must not be freed as long as the call may be made: the driver knows handles only.
        """
        call, switch = getattr(self._driver, name), self._switch
        exchange, current = _cuda._exchange_device, torch._C._cuda_getDevice

        def switched() -> int:
            before = exchange(gpu)
            code: int = call(*given)
            if code == NO_CONTEXT:
                torch.cuda.set_device(gpu)  # binds the GPU's context to this thread
                code = call(*given)
            if before != gpu:
                exchange(before)
            return code

        def issue() -> None:
            code = switched() if switch and current() != gpu else call(*given)
            if code == NO_CONTEXT:
                code = switched()
            if code:
                raise RuntimeError(f"{what}: {driver_error(self._driver, code)}")

        vars(issue)["alive"] = alive
        return issue

    def ready_record(self, stream: Stream, event: Event) -> Ready:
        by_torch = partial(event.raw.record, stream.raw)
        by_torch()  # PyTorch makes the driver's event at its first recording
        # the driver's own default stream is of no one GPU
        if self._driver is None or not stream.raw.cuda_stream:
            return by_torch
        given = (ctypes.c_void_p(event.raw.cuda_event), ctypes.c_void_p(stream.raw.cuda_stream))
        return self._driver_call(stream.gpu, "cuEventRecord", given, f"an event on {stream.name}", event)

    def ready_wait(self, stream: Stream, event: Event) -> Ready:
        if self._driver is None or not event.raw.cuda_event or not stream.raw.cuda_stream:
            return partial(event.raw.wait, stream.raw)
        given = (
            ctypes.c_void_p(stream.raw.cuda_stream),
            ctypes.c_void_p(event.raw.cuda_event),
            ctypes.c_uint(0),
        )
        return self._driver_call(stream.gpu, "cuStreamWaitEvent", given, f"a wait of {stream.name}", event)

    def assign(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        if (
            self._driver is not None
            and type(source) is torch.Tensor
            and source.get_device() == stream.gpu
            and source.is_contiguous()
            and destination.is_contiguous()
            and not (source.is_neg() or source.is_conj())
        ):
            to, origin, size_bytes = destination.data_ptr(), source.data_ptr(), destination.nbytes
            # its own call: one made ready is worth its making only where it is called again
            code = size_bytes and self._driver.cuMemcpyAsync(to, origin, size_bytes, stream.raw.cuda_stream)
            if code:
                raise RuntimeError(
                    f"the copy of an input of {size_bytes} bytes: {driver_error(self._driver, code)}"
                )
            return
        with torch.no_grad():
            destination.copy_(source, non_blocking=True)

    def read(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """A copy of PyTorch's would be the copy engine's: its elementwise operators are kernels."""
        if destination.numel() % 8 == 0:
            destination, source = destination.view(torch.int64), source.view(torch.int64)
        with torch.no_grad():
            torch.bitwise_or(source, 0, out=destination)

    def fill(self, stream: Stream, destination: torch.Tensor, byte: int) -> None:
        with torch.cuda.stream(stream.raw):
            destination.fill_(byte)

    def gate(self, stream: Stream, hold_ns: float) -> None:
        with torch.cuda.stream(stream.raw):
            _cuda._sleep(int(hold_ns * 1e-9 * _GATE_HZ))

    def wait_for_caller(self, gpu: int) -> None:
        self._caller(gpu).synchronize()

    def synchronize(self) -> None:
        for gpu in range(self.gpu_count):
            torch.cuda.synchronize(gpu)

    # Graphs

    @contextmanager
    def capture(
        self, stream: Stream, arenas: Sequence[torch.Tensor] | None = None, beside: Graph | None = None
    ) -> Iterator[CudaGraph]:
        assert beside is None or isinstance(beside, CudaGraph)
        graph = CudaGraph(stream, arenas, beside)
        self.synchronize()
        torch.cuda.empty_cache()
        # nothing that a capture forbids may be freed inside it, as a cycle's tensors would be
        with collector_off(), torch.cuda.device(stream.gpu), torch.cuda.stream(stream.raw):
            try:
                graph.begin()
                yield graph
                graph.end()
            except BaseException as error:
                graph.abandon()
                if isinstance(error, RuntimeError) and not isinstance(error, self.out_of_memory):
                    raise CaptureError(first_line(error)) from error
                raise

    def trace(self, call: Callable[[], None]) -> tuple[Activity, ...]:
        return watched(call, self.synchronize)

    def close(self) -> None:
        pass


_spare: dict[tuple[int, str], list[Any]] = {}
"""Streams of this process that were given back, by GPU and by what they are for. None is ever destroyed."""
_spare_lock = threading.Lock()


def _purpose(name: str) -> str:
    return name.partition(":")[0]


class _On:
    """See `Device.on`. A class: a generator costs more than all that it does here."""

    __slots__ = ("caller", "device", "edges", "gpu", "stream")

    def __init__(self, device: CudaDevice, stream: Stream) -> None:
        self.device, self.stream = device, stream

    def __enter__(self) -> None:
        raw, gpu = self.stream.raw, self.stream.gpu
        self.gpu = _cuda._exchange_device(gpu)
        caller = self.caller = self.device._caller(gpu)
        if caller != raw:
            self.edges = self.device._edges_of(caller, self.stream)
            self.edges[0]()
            self.edges[1]()
            torch.cuda.set_stream(raw)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.caller != self.stream.raw:
            torch.cuda.set_stream(self.caller)
            if error is None:
                self.edges[2]()
                self.edges[3]()
        if self.gpu != self.stream.gpu:
            _cuda._exchange_device(self.gpu)


def _copy_by_torch(stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
    with torch.cuda.stream(stream.raw):
        destination.copy_(source, non_blocking=True)


def _nothing() -> None:
    """A copy of no bytes."""
