"""One kind of run as a captured graph, behind what its start issues first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hwexec.device import CaptureError, Graph
from hwexec.hooks import follow
from hwexec.script import Head, do
from hwexec.stage import Stage
from hwexec.walk import Walk


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph to be replayed, behind the head that its start issues first, if any."""

    graph: Graph
    output: Any
    layer_nodes: tuple[int, ...] | None
    """Kernels and copies of each layer; None where nobody counted."""
    head: Head | None

    def start(self, assign: Callable[[], None], *, ahead: bool) -> Any:
        """Enqueue all of it on the current stream, the compute stream, `assign` before the first layer. The output is the graph's
        own. `ahead`: the head's first calls have been made."""
        head = self.head
        if head is not None and not ahead:
            do(head.fork)
            do(head.copies)
        assign()
        self.graph.replay()
        if head is not None and head.opened:
            do(head.later)
            self.graph.replay(1)
        return self.output


def capture(
    module: torch.nn.Module, stage: Stage, kind: str, forward: Callable[[], Any], beside: Graph | None
) -> Captured:
    """A run of this kind (see `Stage.ways`) as a graph, without its head; `forward` runs the module. Activations and outputs lie
    where those of `beside` do.

    Raises CaptureError, which names the layer that it had reached.
    """
    program, network, device = stage.program, stage.network, stage.device
    head = stage.head() if kind == "cold" and program.head_ops else None
    walk: Walk | None = None
    try:
        # out of inference mode, whose outputs a later replay could not write
        with (
            torch.inference_mode(False),
            stage.pointed(kind),
            torch.no_grad(),
            device.capture(stage.compute, list(stage.arenas.values()), beside) as graph,
        ):
            walk = stage.walk(kind, graph=graph, head=head)
            walk.begin()
            with follow(module, network, stage.find, walk.reach, walk.near):
                output = forward()
            walk.finish()
    except CaptureError as error:
        at = max(0, walk.reached if walk is not None else 0)
        raise CaptureError(f"layer {at} ({network.layers[at].name}) cannot be captured: {error}") from None
    return Captured(graph, output, walk.layer_nodes(), head)
