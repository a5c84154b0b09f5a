"""Walking a program's operations while the network runs: what is issued before which layer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hwexec.binding import point
from hwexec.device import Device, Event, Graph, Stream
from hwexec.script import Head, Move, Script, do
from sim.errors import InputError
from sim.network import Network
from sim.ops import HOST, Copy, Op, Record, Run, Wait

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Tensors, and the views they are pointed at."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A stretch of one stream between two timing events, or of the host between two clock readings."""

    op: int
    stream: str
    start: Event | float
    stop: Event | float


class Marks:
    """Timing events round each copy and each layer, for an eager start that is watched."""

    def __init__(self, device: Device, compute: Stream, streams: Iterable[Stream]) -> None:
        self.device, self.compute = device, compute
        self.gpu = {stream.name: stream.gpu for stream in streams}
        self.found: list[Mark] = []
        device.synchronize()
        if device.one_clock:
            self._origins = dict.fromkeys(self.gpu.values(), self.at(compute))
        else:  # one origin per GPU, on idle streams one right after the other
            self._origins = {stream.gpu: self.at(stream) for stream in streams}
        self.began_ns = time.perf_counter_ns()
        self._layer: tuple[int, str, Event] | None = None

    def at(self, stream: Stream) -> Event:
        event = self.device.event(timing=True)
        self.device.record(stream, event)
        return event

    def layer_ends(self) -> None:
        if self._layer is not None:
            op, stream, start = self._layer
            self.found.append(Mark(op, stream, start, self.at(self.compute)))
            self._layer = None

    def layer_begins(self, op: int, stream: str) -> None:
        self.layer_ends()  # of layers that begin at one hook, the last has the time of all
        self._layer = (op, stream, self.at(self.compute))

    def rows(self) -> list[tuple[int, float, float]]:
        """(operation, start, stop) in nanoseconds since the request; all must have happened."""
        return [(m.op, self._ns(m.stream, m.start), self._ns(m.stream, m.stop)) for m in self.found]

    def _ns(self, stream: str, at: Event | float) -> float:
        return at if isinstance(at, float) else self.device.elapsed_ns(self._origins[self.gpu[stream]], at)


class Walk:
    """One pass over `ops`, in issue order, in step with the network. The same for eager runs and for capture.

    `graph` counts what is captured. Of a program with a head, `order` leaves out the operations that are issued outside of the
    graph, and that is cut behind the first `opening` of the others. With a `script`, calls made ready are made; without, each
    operation is issued anew.
    """

    def __init__(
        self,
        device: Device,
        network: Network,
        ops: Sequence[Op],
        streams: Mapping[str, Stream],
        moves: Mapping[int, Move],
        repoint: Mapping[int, Pairs],
        *,
        compute: Stream,
        graph: Graph | None = None,
        marks: Marks | None = None,
        head: Head | None = None,
        order: Sequence[int] | None = None,
        opening: int = 0,
        script: Script | None = None,
    ) -> None:
        self.device, self.network, self.ops = device, network, ops
        self.streams, self.moves, self.repoint = streams, moves, repoint
        self.compute, self.graph, self.marks = compute, graph, marks
        self.events: dict[int, Event] = {} if script is None else script.events
        self.script = script
        self.head = head
        self.order = range(len(ops)) if order is None else order
        self.opening = opening
        self.cursor = 0
        self.reached = -1
        """The layer that is running, or the last whose operations have been issued."""
        self._before: list[int | None] = []
        """Nodes in the graph when a layer is about to begin, and at the end."""
        self._after: list[int | None] = []
        """Nodes when the layer's own operators come next."""
        self._early: int | None = None
        self._others = [
            s
            for name in dict.fromkeys(ops[index].stream for index in self.order)
            if (s := streams.get(name)) and s is not compute
        ]

    def begin(self) -> None:
        """Fork the copy streams from the compute stream and issue what stands before the first layer's waits."""
        if self.script is not None:
            do(self.script.fork)
        elif self._others:
            start = self.device.event()
            self.device.record(self.compute, start)
            for stream in self._others:
                self.device.wait(stream, start)
                if self.head is not None and (end := self.head.ends.get(stream.name)) is not None:
                    self.device.wait_outside(stream, end)
        own = (HOST, self.compute.name)
        while self.cursor < len(self.order) and self.ops[self.order[self.cursor]].stream not in own:
            self._issue()
        if self.graph is not None:
            self._early = self.graph.nodes()

    def reach(self, layer: int) -> None:
        """`layer` is about to run its first operator: issue all that stands before, and count what layers captured."""
        if layer <= self.reached:
            return
        if self.graph is not None:
            self._before.append(self.graph.nodes())
        if self.marks is not None:
            self.marks.layer_ends()
        while self.reached < layer:
            if self.cursor >= len(self.order):
                raise self.differs(f"a layer {layer} after the last")
            self._issue()
        if self.graph is not None:
            self._after.append(self.graph.nodes())

    def near(self, layer: int) -> None:
        """The module of `layer` has been called: what it takes views of must lie where the layer reads it."""
        point(self.repoint.get(layer, ()))

    def finish(self) -> None:
        """All layers have run: issue the rest, and let the compute stream go on only after every copy."""
        count = len(self.network.layers)
        if self.reached != count - 1:
            raise self.differs("the end")
        if self.graph is not None:
            self._before.append(self.graph.nodes())
        if self.marks is not None:
            self.marks.layer_ends()
        while self.cursor < len(self.order):
            self._issue()
        if self.script is not None:
            do(self.script.join)
            return
        for stream in self._others:
            done = self.device.event()
            self.device.record(stream, done)
            self.device.wait(self.compute, done)
        if self.head is not None:
            for event in self.head.loose:
                self.device.wait_outside(self.compute, event)

    def layer_nodes(self) -> tuple[int, ...] | None:
        """Kernels and copies that each layer's own operators put into the graph, None where nobody counted."""
        pairs = list(zip(self._after, self._before[1:], strict=False))
        counts = [b - a for a, b in pairs if a is not None and b is not None]
        if counts and self._early is not None and self._before[0] is not None:
            counts[0] += self._before[0] - self._early  # operators before the first layer count as its own
        return tuple(counts) if len(counts) == len(self.network.layers) else None

    def differs(self, met: str) -> InputError:
        at, layers = self.reached + 1, self.network.layers
        wanted = f"layer {at} ({layers[at].name})" if at < len(layers) else "the end"
        return InputError(differs(self.network, met, wanted))

    def _issue(self) -> None:
        if self.graph is not None and self.opening and self.cursor == self.opening:
            self.graph.cut()
        index = self.order[self.cursor]
        op = self.ops[index]
        self.cursor += 1
        if self.script is not None and (call := self.script.calls.get(index)) is not None:
            call()
            return
        device = self.device
        if isinstance(op, Copy):
            stream, move = self.streams[op.stream], self.moves[index]
            start = self.marks.at(stream) if self.marks is not None else None
            move.issue()
            if self.marks is not None and start is not None:
                self.marks.found.append(Mark(index, op.stream, start, self.marks.at(stream)))
        elif isinstance(op, Record):
            event = self.events[op.event] = device.event()
            device.record(self.streams[op.stream], event)
        elif isinstance(op, Wait):
            if op.stream == HOST:
                began = time.perf_counter_ns()
                device.wait_on_host(self.events[op.event])
                if self.marks is not None:
                    origin = self.marks.began_ns
                    self.marks.found.append(
                        Mark(index, HOST, float(began - origin), float(time.perf_counter_ns() - origin))
                    )
            elif self.head is not None and op.event in self.head.events:
                device.wait_outside(self.streams[op.stream], self.head.events[op.event])
            else:
                device.wait(self.streams[op.stream], self.events[op.event])
        else:
            assert isinstance(op, Run)
            point(self.repoint.get(op.layer, ()))
            self.reached = op.layer
            if self.marks is not None:
                self.marks.layer_begins(index, op.stream)


def differs(network: Network, met: str, wanted: str) -> str:
    return (
        f"{network.model}: the run met {met} where the traced network has {wanted}; "
        "trace the network with this module and this input, and plan again"
    )
