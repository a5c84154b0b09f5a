"""The runs of a module that has its stage: each kind of them as a graph, or eagerly, behind hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from hwexec import spans
from hwexec.device import CaptureError
from hwexec.graphs import Captured, capture
from hwexec.hooks import LayerHooks, Learned, learn
from hwexec.inputs import Inputs
from hwexec.stage import Stage
from hwexec.walk import Marks
from sim.plan import Launch

_WARM_UP = 2
"""Runs before capture, after the one that learns: libraries choose their kernels in the first ones."""


class Runs:
    """All kinds of runs that `Stage.ways` has, made ready; "in place" where it is asked for. What it takes it notes on `stack`.

    Where the stage settles, the target's arena has all weights by now.
    """

    def __init__(self, stage: Stage, inputs: Inputs, stack: ExitStack) -> None:
        self._stage, self._inputs, self._device = stage, inputs, stage.device
        self.launch: Launch = stage.program.launch
        self.why_eager = ""
        """Why a plan for a graph runs eagerly all the same; empty where it does not."""
        self.graphs: dict[str, Captured] = {}
        """By kind; none where runs are eager."""
        self._broke = False
        """Whether a capture did."""
        stack.callback(self._drop_graphs)
        way = "resident" if stage.settles else "in place"  # all bytes are there, and no copy is needed
        where = self._device.torch_device(stage.plan.target)
        learned = self._with_tensors(
            way, lambda: learn(stage.module, stage.network, stage.find, where, self._forward)
        )
        for _ in range(_WARM_UP):
            self._with_tensors(way, self._forward)
        with self._device.on(stage.compute):
            inputs.rehearse(stage.compute)
        self._device.synchronize()
        if self.launch is not Launch.EAGER:
            self._capture(learned)
        if self.launch is Launch.EAGER:  # planned so, or because it could not be captured
            self._learned, self._script = learned, stage.script()
            stack.callback(self._drop_script)
            self._hooks: LayerHooks | None = None
            stack.callback(self._drop_hooks)
            self._hook(stage.needed())

    def _with_tensors(self, kind: str, call: Callable[[], Any]) -> Any:
        """`call` on the compute stream, with the module's tensors where `kind` wants them, and then at rest again."""
        with self._stage.pointed(kind), torch.no_grad(), self._device.on(self._stage.compute):
            return call()

    def _forward(self) -> Any:
        args, kwargs = self._inputs.fixed()
        return self._stage.module(*args, **kwargs)

    def _capture(self, learned: Learned) -> None:
        stage = self._stage
        kinds = ("cold", "warm", "resident") if stage.settles else ("cold", "warm")
        same = stage.settles and not stage.in_place
        try:
            if learned.blocker:
                raise CaptureError(learned.blocker)
            for kind in ("cold", "resident") if same else kinds:
                self.add_graph(kind)
        except CaptureError as error:
            self._drop_graphs()
            self.launch, self.why_eager = Launch.EAGER, str(error)
            return
        if same:
            self.graphs["warm"] = self.graphs["resident"]

    def add_graph(self, kind: str) -> None:
        """Raises CaptureError, which names the layer that it had reached."""
        # one runs after the other, so they share their memory
        earlier = None if self._broke else next(iter(self.graphs.values()), None)
        beside = None if earlier is None else earlier.graph
        try:
            self.graphs[kind] = capture(self._stage.module, self._stage, kind, self._forward, beside)
        except BaseException:
            self._broke = True  # PyTorch may think that it still captures into that memory
            raise

    def _drop_graphs(self) -> None:
        for captured in {id(c): c for c in self.graphs.values()}.values():
            captured.graph.close()
        self.graphs.clear()

    def _hook(self, needed: frozenset[int]) -> LayerHooks:
        """Before these layers, and no others."""
        self._drop_hooks()
        self._hooks = LayerHooks(self._learned, needed, self._stage.network)
        return self._hooks

    def _drop_hooks(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.remove()

    def _drop_script(self) -> None:
        del self._script  # its calls hold the arenas

    def eager(self, kind: str, marks: Marks | None = None) -> Any:
        """On the current stream, which is the compute stream."""
        script = self._script if kind == "cold" and marks is None else None
        walk = self._stage.walk(kind, marks=marks, script=script)
        hooks = self._hooks or self._hook(self._stage.needed())  # none where `watched` was stopped
        try:
            walk.begin()  # copies are under way while the module's tensors are re-pointed
            with self._stage.pointed(kind):
                hooks.start(walk)
                output = self._forward()
                hooks.stop()
            walk.finish()
        finally:
            hooks.abandon()
        return output

    def watched(self) -> list[spans.Row]:
        """An eager cold start, timing events round everything. Blocks."""
        stage, device = self._stage, self._device
        try:
            self._hook(frozenset(range(len(stage.network.layers))))
            marks = Marks(device, stage.compute, list(stage.streams.values()))
            with torch.no_grad(), device.on(stage.compute):
                self.eager("cold", marks)
            device.synchronize()
            return marks.rows()
        finally:
            self._drop_hooks()
            self._hook(stage.needed())
