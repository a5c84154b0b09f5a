"""Small work like a start's own, that changes nothing: what makes host and wires ready for a start that is near.

After a tenth of a second without work a start on two H100 took 0.2 to 0.5 ms longer (results/h100-pair-2/trials). What its
calls need had left the caches of the calling thread's core, which calls on another core did not bring back, and NVLink slept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hwexec.device import Device, Event, Graph, Ready, Stream
from hwexec.script import do
from sim.ops import Copy
from sim.program import Program

ROUSE_BYTES = 64 * 1024
"""Of each copy. A push of 4 KiB leaves NVLink at less than half its rate, one of 16 KiB wakes it up wholly."""
ROUNDS = 2


class Rouse:
    """Copies to and from scratch memory on each of a start's own streams, and one kernel on the compute stream, as a graph where
    starts are.

    Nothing waits for a push, which takes a third of a millisecond where NVLink sleeps. Raises the device's `out_of_memory`.
    """

    def __init__(
        self,
        device: Device,
        program: Program,
        streams: Mapping[str, Stream],
        compute: Stream,
        source: torch.Tensor,
        *,
        graph: bool,
    ) -> None:
        """`source` is pinned host memory, of which the first bytes are copied on each of the program's lanes."""
        self.device, self.compute = device, compute
        source = source[:ROUSE_BYTES]
        self._scratch = {compute.gpu: device.allocate(ROUSE_BYTES, compute.gpu)}
        self._calls: list[Ready] = []
        landed: dict[int, Event] = {}
        for op in {op.stream: op for op in program.ops if isinstance(op, Copy)}.values():
            stream, to, done = streams[op.stream], self._on(op.destination), device.event()
            if op.source is None:
                landed[op.destination] = done
                copy = device.ready_copy(stream, to[: source.numel()], source)
            else:
                if op.source in landed:
                    self._calls.append(device.ready_wait(stream, landed[op.source]))
                copy = device.ready_copy(stream, device.view(to, op.source, to), self._on(op.source))
            self._calls += [copy, device.ready_record(stream, done)]
        self._graph: Graph | None = None
        if graph:
            with device.capture(compute) as self._graph:
                self._kernel()

    def _on(self, gpu: int) -> torch.Tensor:
        if gpu not in self._scratch:
            self._scratch[gpu] = self.device.allocate(ROUSE_BYTES, gpu)
        return self._scratch[gpu]

    def _kernel(self) -> None:
        self.device.fill(self.compute, self._on(self.compute.gpu), 0)

    def __call__(self) -> None:
        for _ in range(ROUNDS):
            do(self._calls)
            with self.device.on(self.compute):
                if self._graph is not None:
                    self._graph.replay()
                else:
                    self._kernel()

    def close(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._calls.clear()
        self._scratch.clear()
