"""What an executor needs of a device: streams, events, arenas, copies, capture and replay, and nothing more.

Two things implement it: `cuda.CudaDevice`, with `cuda_graph.py` alone in naming torch.cuda, and `cpu.CpuDevice`, whose streams
are threads with delays on purpose. A GPU is an index everywhere; host memory has no index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

POISON = 0xFF
"""What evicted arenas are filled with: NaN in every floating dtype, -1 in every integer one."""


HOST_MUST_SEE = frozenset(
    {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique", "_unique2"}
)
"""Operators whose result the host must know to go on: no captured graph can hold them."""


class CaptureError(Exception):
    """The work given to `Device.capture` cannot be captured; the message is the device's own."""


@dataclass(slots=True, eq=False)
class Stream:
    """Operations in order on one GPU. `raw` is the device's own handle."""

    name: str
    gpu: int
    raw: Any


@dataclass(slots=True, eq=False)
class Event:
    """A point on a stream, once recorded; recording again moves it. Only one made with `timing` has a time."""

    timing: bool
    raw: Any


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU: `free_bytes` counts what the process has cached and could reuse."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Activity:
    """What a device was seen doing. `launch` is a host's call that started a graph, `issue` one that enqueued anything else."""

    kind: Literal["h2d", "d2d", "kernel", "launch", "issue"]
    gpu: int
    start_ns: float
    stop_ns: float
    size_bytes: int
    name: str


class Graph(Protocol):
    """Captured work, in one part or several. Its inputs, outputs and addresses are fixed."""

    def nodes(self) -> int | None:
        """While capturing: kernels and copies captured so far; None where the device cannot tell."""
        ...

    def cut(self) -> None:
        """While capturing: what follows is another part. Every other stream must have been joined."""
        ...

    def replay(self, part: int = 0) -> None:
        """Enqueue all of one part on the current stream (see `Device.on`), as one operation; parts in their order."""
        ...

    def close(self) -> None: ...


Ready = Callable[[], object]
"""One operation made ready: each call enqueues it once more."""


class Device(Protocol):
    """One host's GPUs. Methods that enqueue return at once; `synchronize`, `wait_for_caller` and `wait_on_host` block."""

    kind: str
    """`cuda` or `cpu`."""
    figures: bool
    """Whether its times mean anything. On the CPU they do not, and whoever prints one says so."""
    one_clock: bool
    """Whether `elapsed_ns` can tell events of different GPUs apart."""
    out_of_memory: type[Exception]

    @property
    def gpu_count(self) -> int: ...

    def describe(self, gpu: int) -> str:
        """The GPU's name."""
        ...

    def torch_device(self, gpu: int) -> torch.device: ...

    def memory(self, gpu: int) -> Memory: ...

    def numa_node(self, gpu: int) -> int | None:
        """The NUMA node nearest to a GPU, None where there is one node or nobody knows."""
        ...

    # Memory

    def pin(self, address: int, size_bytes: int) -> None:
        """Let copy engines and kernels reach host memory. InputError where the system refuses."""
        ...

    def unpin(self, address: int) -> None: ...

    def allocate(self, size_bytes: int, gpu: int) -> torch.Tensor:
        """uint8, on that GPU, not initialised. Raises `out_of_memory`."""
        ...

    def trim(self) -> None:
        """Give memory that is cached but unused back to the system."""
        ...

    def view(self, source: torch.Tensor, gpu: int, owner: object) -> torch.Tensor:
        """`source`, pinned host memory or another GPU's arena (uint8), as a tensor that kernels and copies of `gpu` read in place.

        `owner` stays alive as long as any view does.
        """
        ...

    def connect(self, source: int, destination: int) -> None:
        """Let `destination` read `source`'s memory. InputError where the two have no peer access."""
        ...

    # Streams and events

    def stream(self, name: str, gpu: int) -> Stream:
        """A new stream; a name that starts with `compute` is the one that layers run on."""
        ...

    def close_stream(self, stream: Stream) -> None: ...

    def on(self, stream: Stream) -> AbstractContextManager[None]:
        """Make `stream` current: after all that the caller's stream holds; the caller's stream goes on after it."""
        ...

    def idle(self, stream: Stream) -> bool:
        """Whether all that `stream` and the caller's stream hold has happened; it may say no when nobody knows."""
        ...

    def event(self, timing: bool = False) -> Event: ...

    def record(self, stream: Stream, event: Event) -> None: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """`stream` goes on once `event`, as last recorded, has happened."""
        ...

    def wait_outside(self, stream: Stream, event: Event) -> None:
        """`wait` inside a capture for an event that is recorded outside of it: as last recorded before each replay.

        It must have been recorded once.
        """
        ...

    def wait_on_host(self, event: Event) -> None:
        """The calling thread goes on once `event` has happened."""
        ...

    def happened(self, event: Event) -> bool: ...

    def elapsed_ns(self, start: Event, stop: Event) -> float:
        """Between two timing events of one GPU that have both happened."""
        ...

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Bytes, both tensors uint8 and contiguous.

        One of them is on the stream's GPU, the other there too, or pinned host memory, or a `view` for that GPU: then it is a
        push or a pull over the peer link, and holds up no other stream.
        """
        ...

    def ready_copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> Ready:
        """`copy` made ready: what can be looked up beforehand is. The tensors must outlive it, and so for the next two."""
        ...

    def ready_record(self, stream: Stream, event: Event) -> Ready: ...

    def ready_wait(self, stream: Stream, event: Event) -> Ready: ...

    def assign(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Values of a tensor of this shape and dtype that lies anywhere, into one on the stream's GPU; `stream` is current."""
        ...

    def read(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Bytes, both tensors uint8 and contiguous, by a kernel on the stream, which is current: `source` is pinned host memory as
        a `view` for its GPU, and no copy engine is asked for it."""
        ...

    def fill(self, stream: Stream, destination: torch.Tensor, byte: int) -> None: ...

    def gate(self, stream: Stream, hold_ns: float) -> None:
        """Keep `stream` busy with nothing for about `hold_ns`, so that what follows is enqueued before it starts."""
        ...

    def wait_for_caller(self, gpu: int) -> None:
        """The calling thread goes on once all that its own current stream of a GPU holds has happened: once an answer is there."""
        ...

    def synchronize(self) -> None:
        """Wait until all streams are idle. Raises what went wrong on them."""
        ...

    # Graphs

    def capture(
        self, stream: Stream, arenas: Sequence[torch.Tensor] | None = None, beside: Graph | None = None
    ) -> AbstractContextManager[Graph]:
        """Capture what is enqueued inside on `stream` and on streams that wait for it. All must be joined before the end.

        What the work allocates is the graph's own, or shared with `beside`, an earlier one of this device: a replay of either
        may overwrite the other's outputs, and they must not run at once.
        Copies into `arenas` are a plan's; with these given, other copies are a layer's own, and kernels where the device can
        do that, so that they stand behind none of the plan's.
        Raises CaptureError where the work cannot be captured; the device is usable afterwards.
        """
        ...

    def trace(self, call: Callable[[], None]) -> tuple[Activity, ...]:
        """What the GPUs do during `call`, which may replay a graph, in order of start."""
        ...

    def close(self) -> None:
        """Give back what the device itself holds; streams and arenas are their makers'."""
        ...


@contextmanager
def forked(device: Device, origin: Stream, others: Sequence[Stream]) -> Iterator[None]:
    """`others` start after what `origin` holds now, and `origin` goes on after all that they were given inside."""
    start = device.event()
    device.record(origin, start)
    for stream in others:
        device.wait(stream, start)
    yield
    for stream in others:
        done = device.event()
        device.record(stream, done)
        device.wait(origin, done)
