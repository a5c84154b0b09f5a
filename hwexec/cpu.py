"""A device without a GPU: threads play copy streams, the calling thread plays compute, and delays come at random.

Copies are real, arenas are poisoned, so a wait that is missing shows as wrong bits. Times mean nothing. A "captured
graph" is the list of what was enqueued, kernels (PyTorch operators) included, done again on the same addresses.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from hwexec.device import HOST_MUST_SEE, POISON, Activity, CaptureError, Event, Graph, Memory, Ready, Stream
from sim.errors import InputError, require

_StorageWeakRef: Any = reductions.StorageWeakRef


class OutOfMemory(Exception):
    """A fake GPU has not that much memory."""


@dataclass(slots=True, eq=False)
class _Token:
    """One recording of an event."""

    done: threading.Event = field(default_factory=threading.Event)
    at_ns: int = 0

    def ring(self) -> None:
        self.at_ns = time.perf_counter_ns()
        self.done.set()


class _Capturing(threading.local):
    """What the calling thread's capture has enqueued; None where it makes none."""

    tape: list[Callable[[], None]] | None = None


class _Worker:
    """A copy stream: a thread and its queue."""

    def __init__(self, name: str, device: CpuDevice, seed: int) -> None:
        self.device = device
        self.random = random.Random(seed)
        self.queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (act := self.queue.get()) is not None:
            try:
                act()
            except Exception as error:
                self.device.failure = self.device.failure or error
            act = None
            self.queue.task_done()

    def dawdle(self) -> None:
        if self.device.delay_s > 0 and self.random.random() < 0.5:
            time.sleep(self.random.random() * self.device.delay_s)


class CpuDevice:
    """`gpus` fake GPUs. `delay_us` bounds each delay, `seed` decides them.

    `fail_at` injects one fault: a name among pin, peer, arena, copy, capture, replay, kernel, and which call of it fails:
    "copy#3" is the third. `memory_bytes` is what each fake GPU has; `strangers` are pairs without peer access.
    """

    kind = "cpu"
    figures = False
    one_clock = True
    out_of_memory: type[Exception] = OutOfMemory

    def __init__(
        self,
        gpus: int = 4,
        *,
        seed: int = 0,
        delay_us: float = 50.0,
        fail_at: str | None = None,
        memory_bytes: int = 2**63,
        strangers: frozenset[tuple[int, int]] = frozenset(),
    ) -> None:
        self.gpu_count = gpus
        self.delay_s = delay_us * 1e-6
        self.memory_bytes = memory_bytes
        self.strangers = strangers
        self.failure: Exception | None = None
        self.pinned: dict[int, int] = {}
        """Bytes by address: what a test looks at to see that nothing is left behind."""
        name, _, count = (fail_at or "").partition("#")
        self._fault, self._countdown = name, int(count or 1)
        self._random = random.Random(seed)
        self._workers: list[Stream] = []
        self._held: dict[int, list[tuple[Any, int]]] = {}
        self.capturing = _Capturing()
        self._log: list[Activity] | None = None

    def describe(self, gpu: int) -> str:
        return f"GPU {gpu} played by threads"

    def torch_device(self, gpu: int) -> torch.device:
        return torch.device("cpu")

    def held_bytes(self, gpu: int) -> int:
        """Bytes of the arenas of one fake GPU that are still alive."""
        alive = [(ref, size) for ref, size in self._held.get(gpu, []) if not ref.expired()]
        self._held[gpu] = alive
        return sum(size for _, size in alive)

    def memory(self, gpu: int) -> Memory:
        return Memory(max(0, self.memory_bytes - self.held_bytes(gpu)), self.memory_bytes)

    def numa_node(self, gpu: int) -> int | None:
        return None

    def fault(self, name: str) -> bool:
        """Whether the injected fault is due: the n-th call with its name."""
        if name != self._fault:
            return False
        self._countdown -= 1
        return self._countdown == 0

    # Memory

    def pin(self, address: int, size_bytes: int) -> None:
        require(
            not self.fault("pin"),
            f"host memory: the system refuses to pin {size_bytes} bytes (injected); raise the limit (ulimit -l)",
        )
        self.pinned[address] = size_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]

    def allocate(self, size_bytes: int, gpu: int) -> torch.Tensor:
        if self.fault("arena") or size_bytes > self.memory(gpu).free_bytes:
            raise OutOfMemory(f"GPU {gpu} has no {size_bytes} bytes left")
        made = torch.empty(size_bytes, dtype=torch.uint8)
        self._held.setdefault(gpu, []).append((_StorageWeakRef(made.untyped_storage()), size_bytes))
        return made

    def view(self, source: torch.Tensor, gpu: int, owner: object) -> torch.Tensor:
        return source

    def connect(self, source: int, destination: int) -> None:
        if self.fault("peer") or (source, destination) in self.strangers:
            raise InputError(
                f"GPU {destination} cannot read GPU {source}'s memory (no peer access); plan over one link"
            )

    # Streams and events

    def stream(self, name: str, gpu: int) -> Stream:
        if name.startswith("compute"):
            return Stream(name, gpu, None)
        stream = Stream(name, gpu, _Worker(name, self, self._random.getrandbits(32)))
        self._workers.append(stream)
        return stream

    def close_stream(self, stream: Stream) -> None:
        if stream.raw is not None and stream in self._workers:
            self._workers.remove(stream)
            stream.raw.queue.put(None)
            stream.raw.thread.join()

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        yield

    def idle(self, stream: Stream) -> bool:
        over = stream.raw is None or not stream.raw.queue.unfinished_tasks
        return over and self._random.random() < 0.5  # a GPU may be late where the calling thread is not

    def event(self, timing: bool = False) -> Event:
        return Event(timing, None)

    def _do(self, stream: Stream, act: Callable[[], None]) -> None:
        if stream.raw is None:
            act()
        else:
            stream.raw.queue.put(act)

    def _keep(self, again: Callable[[], None]) -> None:
        if (tape := self.capturing.tape) is not None:
            tape.append(again)

    def record(self, stream: Stream, event: Event) -> None:
        self._keep(lambda: self.record(stream, event))
        token = _Token()
        self._do(stream, token.ring)
        event.raw = token

    def wait(self, stream: Stream, event: Event) -> None:
        self._keep(lambda: self.wait(stream, event))
        token: _Token | None = event.raw
        if token is not None:  # as in CUDA, an event never recorded holds nobody up
            self._do(stream, lambda: _sit(token))

    def wait_outside(self, stream: Stream, event: Event) -> None:
        self.wait(stream, event)

    def wait_on_host(self, event: Event) -> None:
        if event.raw is not None:
            _sit(event.raw)

    def happened(self, event: Event) -> bool:
        return event.raw is None or event.raw.done.is_set()

    def elapsed_ns(self, start: Event, stop: Event) -> float:
        return float(stop.raw.at_ns - start.raw.at_ns)

    def copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._keep(lambda: self.copy(stream, destination, source))
        if self.capturing.tape is not None:
            return  # as in CUDA, a capture moves nothing
        fails = self.fault("copy")

        def act() -> None:
            if fails:
                raise RuntimeError("an injected copy error")
            if stream.raw is not None:
                stream.raw.dawdle()
            start = time.perf_counter_ns()
            destination.copy_(source)
            if (log := self._log) is not None:
                kind = "d2d" if stream.name.startswith("p2p") else "h2d"
                stop = time.perf_counter_ns()
                log.append(Activity(kind, stream.gpu, start, stop, destination.numel(), stream.name))  # type: ignore[arg-type]

        self._do(stream, act)

    # Names are looked up when called: a test may put others in their place

    def ready_copy(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> Ready:
        return lambda: self.copy(stream, destination, source)

    def ready_record(self, stream: Stream, event: Event) -> Ready:
        return lambda: self.record(stream, event)

    def ready_wait(self, stream: Stream, event: Event) -> Ready:
        return lambda: self.wait(stream, event)

    def assign(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        with torch.no_grad():
            destination.copy_(source)

    def read(self, stream: Stream, destination: torch.Tensor, source: torch.Tensor) -> None:
        destination.copy_(source)

    def fill(self, stream: Stream, destination: torch.Tensor, byte: int) -> None:
        self._keep(lambda: self.fill(stream, destination, byte))
        self._do(stream, lambda: _fill(destination, byte))

    def gate(self, stream: Stream, hold_ns: float) -> None:
        if stream.raw is not None:
            stream.raw.queue.put(lambda: time.sleep(hold_ns * 1e-9))

    def wait_for_caller(self, gpu: int) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        tokens = []
        for stream in self._workers:
            token = _Token()
            stream.raw.queue.put(token.ring)
            tokens.append(token)
        for token in tokens:
            token.done.wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    # Graphs

    @contextmanager
    def capture(
        self, stream: Stream, arenas: Sequence[torch.Tensor] | None = None, beside: Graph | None = None
    ) -> Iterator[CpuGraph]:
        assert beside is None or isinstance(beside, CpuGraph)
        if self.fault("capture"):
            raise CaptureError("an injected capture error")
        graph = CpuGraph(self, stream.gpu, [] if beside is None else beside.sharing)
        self.capturing.tape = graph.tapes[-1]
        try:
            with _Recorder(graph):
                yield graph
        except BaseException:
            graph.close()
            raise
        finally:
            self.capturing.tape = None
            self.synchronize()

    def trace(self, call: Callable[[], None]) -> tuple[Activity, ...]:
        self.synchronize()
        self._log = []
        try:
            call()
            self.synchronize()
            return tuple(sorted(self._log, key=lambda a: a.start_ns))
        finally:
            self._log = None

    def trim(self) -> None:
        pass

    def close(self) -> None:
        for stream in list(self._workers):
            self.close_stream(stream)


class CpuGraph:
    """What was enqueued, to be done again on the same tensors."""

    def __init__(self, device: CpuDevice, gpu: int, sharing: list[CpuGraph]) -> None:
        self.device, self.gpu = device, gpu
        self.sharing = sharing
        """Graphs that have the same memory, this one among them."""
        sharing.append(self)
        self.made: list[torch.Tensor] = []
        """What its operators allocated."""
        self.tapes: list[list[Callable[[], None]]] = [[]]
        """By part."""
        self.kernels = 0

    def nodes(self) -> int:
        return self.kernels

    def cut(self) -> None:
        if self.device.fault("cut"):
            raise CaptureError("an injected error between two parts")
        self.tapes.append([])
        self.device.capturing.tape = self.tapes[-1]

    def replay(self, part: int = 0) -> None:
        if self.device.fault("replay"):
            raise RuntimeError("an injected launch error")
        if (log := self.device._log) is not None:
            now = time.perf_counter_ns()
            log.append(Activity("launch", self.gpu, now, now, 0, "replay"))
        with torch.no_grad():
            if part == 0:
                self._overwrite_others()
            for act in self.tapes[part]:
                act()

    def _overwrite_others(self) -> None:
        """A GPU's graph may; this one does, so that who counts on them sees it."""
        for other in self.sharing:
            for tensor in other.made if other is not self else ():
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                whole.fill_(POISON)

    def close(self) -> None:
        for tape in self.tapes:
            tape.clear()
        self.made.clear()
        if self in self.sharing:
            self.sharing.remove(self)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Keeps each operator with the memory it used, as a captured kernel keeps its addresses."""

    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in HOST_MUST_SEE:
            raise CaptureError(f"operation not permitted when stream is capturing: {func}")
        if func.overloadpacket.__name__ == "_has_compatible_shallow_copy_type":
            return func(*args, **(kwargs or {}))  # re-pointing a tensor asks this: no kernel
        graph = self.graph
        if graph.device.fault("kernel"):
            raise OutOfMemory("out of memory (injected)")
        here = tree_map_only(torch.Tensor, lambda t: t.detach(), (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        kept = [t.detach() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_flatten(here)[0] if isinstance(t, torch.Tensor)}
        graph.made += [t for t in kept if t.untyped_storage()._cdata not in given]

        def again() -> None:
            start = time.perf_counter_ns()
            made = [t for t in tree_flatten(func(*here[0], **here[1]))[0] if isinstance(t, torch.Tensor)]
            for old, new in zip(kept, made, strict=True):
                if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)
            if (log := graph.device._log) is not None:
                log.append(Activity("kernel", graph.gpu, start, time.perf_counter_ns(), 0, str(func)))

        graph.tapes[-1].append(again)
        graph.kernels += 1
        return result


def _sit(token: _Token) -> None:
    token.done.wait()


def _fill(destination: torch.Tensor, byte: int) -> None:
    destination.fill_(byte)
