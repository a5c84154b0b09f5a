"""A plan run for real, as often as one likes: a module that `prepare` has made ready (hwexec/preparing.py).

`ColdStart` owns what it takes (arenas, streams, graphs, the module's binding) and gives all of it back, also when making
it fails half way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch

from hwexec import spans
from hwexec.binding import Weights
from hwexec.device import CaptureError, Device
from hwexec.graphs import Captured
from hwexec.host_memory import memory_error
from hwexec.inputs import Inputs
from hwexec.place import Place
from hwexec.pool import Pool, Tenant
from hwexec.rouse import Rouse
from hwexec.runs import Runs
from hwexec.script import do
from hwexec.stage import Stage
from hwexec.timing import Samples, time_ns
from sim.errors import InputError, require
from sim.hints import first_line
from sim.ops import Copy
from sim.plan import Launch
from sim.program import Program
from sim.timeline import Timeline


class ColdStart:
    """A module made ready: see `prepare`. A context manager; `close` gives the module and all memory back.

    Outputs of graph starts are overwritten by the module's next start, whatever its kind (cold, warm, resident, in place), and
    an output that is a view of a weight as the weight is: clone what must last.
    One thread at a time. In a `Pool` a start takes its place from modules that overlap it, and `hot` says whether what it brought
    is still there. Between starts the module's tensors are CPU views of the host arena, which a next cold start brings, and `keep`
    what the plan keeps on the GPU: change them in place (load_state_dict, copy_). Tensors that are replaced (assign=True,
    `module.fc = ...`), cast (`half()`) or written through `.data` are not seen, and `close` gives the module its own back.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        program: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: Device,
        weights: Weights | None,
        own_device: bool,
        settles: bool,
        pool: Pool | None = None,
    ) -> None:
        self.module, self.program, self.device = module, program, device
        self.plan, self.network = program.plan, program.network
        self._closed = False
        self._starting = threading.Lock()
        """Held while it is prepared, and in each start."""
        self._place = Place(device, None)
        self._stack = ExitStack()
        try:
            with self._starting:
                if own_device:
                    self._stack.callback(device.close)
                tenant = None if pool is None else self._joined(pool)
                self._place = Place(device, tenant)
                self._make_ready(module, args, kwargs, weights, settles, tenant)
        except device.out_of_memory as error:
            self.close()
            target = device.memory(self.plan.target)
            raise InputError(
                f"out of memory while preparing {self.network.model} ({first_line(error)}); GPU "
                f"{self.plan.target} has {target.free_bytes} bytes free: stop what else runs there, or take a smaller "
                + ("model" if pool is None else "pool")
            ) from None
        except BaseException as error:
            self.close()
            if (line := memory_error(error, device)) is not None:
                raise line from None
            raise

    def _joined(self, pool: Pool) -> Tenant:
        tenant = pool.join(self.network.model, self)
        self._stack.callback(pool.leave, tenant)
        return tenant

    def _make_ready(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: Weights | None,
        settles: bool,
        tenant: Tenant | None,
    ) -> None:
        device, stack = self.device, self._stack
        stage = self._stage = Stage(module, self.program, device, weights, stack, settles, tenant)
        self._inputs = Inputs(device, self.plan.target, self.network.model, args, kwargs)
        stack.callback(self._inputs.clear)
        with self._place:  # others may start until here
            if tenant is not None:
                tenant.pool.check_open()
            if settles:
                self._place.take_now()
                self._place.filling(stage.fill())
            self._runs = Runs(stage, self._inputs, stack)
            graph = self.launch is Launch.GRAPH
            self._rouse = Rouse(
                device, self.program, stage.streams, stage.compute, stage.host.tensor, graph=graph
            )
            stack.callback(self._rouse.close)
            self.evict()
            if self.plan.kept(self.network):
                stage.keep()
                device.synchronize()  # what cannot be brought is told here

    @property
    def launch(self) -> Launch:
        """As the plan has it, or eager where that cannot be captured."""
        return self._runs.launch

    @property
    def why_eager(self) -> str:
        """Why a plan for a graph runs eagerly all the same; empty where it does not."""
        return self._runs.why_eager

    @property
    def hot(self) -> bool:
        """Whether a warm run can be made: a start has brought the weights, and in a pool nobody has taken their place."""
        return self._place.was_filled and self._place.its_own and not self._closed

    # Running

    # A start is late by all that the host does until its first copy is issued, mostly out of cold caches: few calls, and none that
    # only a pool needs

    def _turn(self) -> Place:
        """To enqueue a run in. What the host must wait for comes first, where others of a pool would have to wait as well."""
        if self._place.shared and not self._closed:
            self._inputs.wait()
        return self._place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One cold start: every copy of the plan, every layer behind its waits. Returns the module's output.

        Ordered after the caller's stream and before it, as any PyTorch call; nothing is waited for.
        """
        with self._turn():
            return self._cold(args, kwargs)

    def _cold(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._closed:
            self._open()
        if self._place.shared:
            self._check_first(args, kwargs)
        output = self._start("cold", args, kwargs)
        self._place.brought = True
        return output

    def warm(self, *args: Any, **kwargs: Any) -> Any:
        """One run with weights as the cold start left them, or, once settled, all in GPU memory. InputError where they are not."""
        with self._turn():
            return self._warm(args, kwargs)

    def _warm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._open()
        self._check_hot("make a cold start before a warm run")
        return self._start("resident" if self._place.full else "warm", args, kwargs)

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """A warm run where it can be made (`hot`), else a cold start."""
        with self._turn():
            return (self._warm if self.hot else self._cold)(args, kwargs)

    def resident(self, *args: Any, **kwargs: Any) -> Any:
        """The reference: every weight brought to GPU memory beforehand, launched like a cold start."""
        with self._turn():
            self._open()
            self._check_settles("no resident run; in_place() is the reference then")
            self._check_first(args, kwargs)
            self._place.take()
            if not self._place.full:
                self._place.follow(self._stage.compute)
                self._place.filling(self._stage.fill())
            return self._start("resident", args, kwargs)

    def in_place(self, *args: Any, **kwargs: Any) -> Any:
        """The reference that takes no weights of GPU memory: every one read in place from host memory, launched like a cold
        start. A graph for it is captured when it is first asked for."""
        with self._turn():
            self._open()
            if self.launch is not Launch.EAGER and "in place" not in self._runs.graphs:
                try:
                    self._runs.add_graph("in place")
                except CaptureError as error:
                    raise InputError(
                        f"reading every weight in place cannot be captured as a graph: {error}; prepare a plan with launch eager"
                    ) from None
                except BaseException as error:
                    if (line := memory_error(error, self.device)) is not None:
                        raise line from None
                    raise
            return self._start("in place", args, kwargs)

    def rouse(self) -> None:
        """A start is near, in 0.2 ms or more: make host and wires ready for it, on the thread that will make it. Blocks nothing.

        After a pause a start takes some tenths of a millisecond longer, and most of that can be had while a request is still
        being read or decoded. Copies small things to scratch memory, and changes no answer.
        """
        self._open()
        self._rouse()

    def settle(self) -> None:
        """Copy what the plan reads in place into GPU memory, in the background; warm runs from now on wait for it."""
        with self._place:
            self._open()
            self._check_settles("nothing to settle into")
            self._check_hot("make a cold start first; then there is something to settle")
            if not self._place.full:
                self._place.filling(self._stage.settle(), beside=True)

    def evict(self) -> None:
        """Fill every arena with 0xFF, but for what the plan keeps between starts. Blocks. The next start is cold or wrong.

        In a pool only where its place is still its own: what another has there stays, and nothing is waited for.
        """
        with self._place:
            self._open()
            self._place.forget()
            if self._place.its_own:
                self._stage.poison()

    def keep(self) -> None:
        """Bring what the plan keeps between starts once more, in the background: no start does. Runs from now on wait for it."""
        with self._place:
            self._open()
            self._stage.keep()

    def timeline(self) -> Timeline:
        """One more cold start, with the last inputs, watched: measured spans of each copy and each layer.

        Eager: timing events round them. Graph: what PyTorch's profiler sees of head and replay. Once that has run in
        a process, CUPTI stays in and makes every later launch slower: take all times first, and
        timelines last. TEARDOWN_CUPTI=1 in the environment takes it out again, but PyTorch warns of crashes with CUDA graphs.
        """
        with self._place:
            self._open()
            self._place.take()
            self._place.wait()
            try:
                found = self._watched()
            except BaseException:
                self._give_up()
                raise
            self._place.brought, self._place.full = True, False
        return found

    def _watched(self) -> Timeline:
        if self.launch is Launch.EAGER:
            return spans.of_rows(self.program, self._runs.watched())
        captured = self._runs.graphs["cold"]
        seen = self.device.trace(lambda: self._replay(captured, lambda: None, self._ahead(captured)))
        return spans.of_graph(self.program, seen, captured.layer_nodes)

    def copies_alone(self, repeats: int = 3) -> Samples | None:
        """The plan's copies from host memory and nothing else, all lanes at once: what the wires take right now. Blocks.

        None where nothing is copied. The same bytes land where they lay, so what was warm stays warm.
        """
        with self._place:
            self._open()
            copies = [(op, move) for op, move in self._stage.copies() if op.source is None]
            if not copies:
                return None
            self._place.take_now()
            lanes = [self._stage.streams[name] for name in dict.fromkeys(op.stream for op, _ in copies)]
            calls = [move.issue for _, move in copies]
            return time_ns(lambda: do(calls), self.device, lanes, repeats=repeats, warmup=1)

    def brought(self) -> tuple[int, int]:
        """Bytes that the plan copies and that are on their GPUs now: out of host memory, and on from GPU to GPU. Blocks.

        Of arenas, which `evict` fills with 0xFF, as they are: what a start copied, not what it was to copy. Where another module
        of a pool has the place, 0.
        """
        with self._place:
            self._open()
            return self._stage.brought() if self._place.its_own else (0, 0)

    def landed(self, *args: Any, **kwargs: Any) -> Any:
        """A cold start's layers and waits, behind copies that have all landed: no wait holds a layer up, and what this takes longer
        than a resident run is what they cost.

        InputError where that is not so: of an eager start, of a graph that makes copies itself, with no weights in GPU memory.
        """
        with self._turn():
            self._open()
            alone = not any(isinstance(op, Copy) for op in self.program.ops[self.program.head_ops :])
            require(
                "cold" in self._runs.graphs and alone and not self.program.opening,
                f"plan {self.plan.name!r} has no graph of layers alone: give it launch graph, all chunks in the head, and no "
                "opening",
            )
            self._check_hot("make a cold start first")
            return self._start("cold", args, kwargs, landed=True)

    def _open(self) -> None:
        require(not self._closed, "this cold start is closed; prepare the module again")

    def _check_settles(self, refused: str) -> None:
        require(
            self._stage.settles,
            f"{self.network.model} is prepared with settles=False, and GPU {self.plan.target} holds only what plan "
            f"{self.plan.name!r} brings there: {refused}; prepare it with settles=True, where all of it has room",
        )

    def _check_hot(self, remedy: str) -> None:
        if not self.hot:
            taken = f", since another module of the pool has taken the place of {self.network.model}"
            why = taken if self._place.was_filled else ""
            raise InputError(f"no weights are in GPU memory{why}: {remedy}")

    def _check_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """InputError for inputs that a start would refuse, where it would have taken others' place by then."""
        if not self._place.its_own:
            self._inputs.given(args, kwargs)

    def _start(
        self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, landed: bool = False
    ) -> Any:
        """`landed`: what the head brings is there."""
        mine = False
        try:
            mine = self._starting.acquire(blocking=False)
            if not mine:
                raise InputError(
                    f"{self.network.model}: another thread is in a start of this module, whose arenas and output are one; take "
                    "turns, or prepare a copy of the module for each thread"
                )
            if (self._place.shared or self._place.unsure) and kind != "in place":
                self._place.take()
            return self._started(kind, args, kwargs, landed)
        finally:
            if mine:
                self._starting.release()

    def _started(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any], landed: bool) -> Any:
        captured = self._runs.graphs.get(kind)
        begun = captured is not None and captured.head is not None
        try:
            begun = ahead = landed or (captured is not None and self._ahead(captured))
            given = self._inputs.given(args, kwargs)  # while the first copies are under way
            bring = self._inputs.stage(self._stage.compute, given)
            begun = True
            if kind == "cold" and not landed:
                self._place.full = False  # what had been settled may be older than what is brought
            if captured is not None:
                output = self._replay(captured, bring, ahead)
            else:
                with torch.no_grad(), self.device.on(self._stage.compute):
                    self._place.follow(self._stage.compute)
                    bring()
                    output = self._runs.eager(kind)
            if kind != "in place":
                self._place.enqueued(self._stage.compute)
            return output
        except self.device.out_of_memory as error:
            self._give_up()
            raise InputError(
                f"out of memory while running {self.network.model} ({first_line(error)}); "
                "stop what else runs on the GPU, or take a smaller batch"
            ) from None
        except BaseException as error:
            if begun:
                self._give_up()
            if (line := memory_error(error, self.device)) is not None:
                raise line from None
            raise

    def _give_up(self) -> None:
        """A start broke half way."""
        self._place.forget()
        with suppress(Exception):
            self._place.wait()

    def _ahead(self, captured: Captured) -> bool:
        """Issue the head at once where nothing is under way that still needs the arenas; False where something may be."""
        head = captured.head
        if head is None or (self._place.behind and not self._place.unobstructed()):
            return False
        if not self.device.idle(self._stage.compute):
            return False
        do(head.copies)
        return True

    def _replay(self, captured: Captured, bring: Callable[[], None], ahead: bool) -> Any:
        """A start by its graph, behind its head where that is not `ahead` already; `bring` brings the inputs."""
        with self.device.on(self._stage.compute):
            self._place.follow(self._stage.compute)
            return captured.start(bring, ahead=ahead)

    # Going again

    def close(self) -> None:
        """Give everything back: the module its own memory and hooks, the GPUs and the host theirs. Safe to call twice.

        InputError in the middle of a start, or while another thread prepares it.
        """
        with self._place:
            if not self._closed:
                require(
                    not self._starting.locked(),
                    f"{self.network.model}: it is being prepared, or in a start that is not enqueued yet; close it after that",
                )
                self._closed = True
                try:
                    with suppress(Exception):
                        self.device.synchronize()
                finally:
                    self._stack.close()

    def __enter__(self) -> ColdStart:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
