"""Noticing where layers begin.

A layer begins at its first operator. Under capture a dispatch mode sees it, once, at no cost to a replay. In eager mode
that would cost more than it measures, so `learn` runs the network once with the mode and notes the last module hook
before each layer's first operator; later runs use those hooks alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hwexec.device import HOST_MUST_SEE
from hwexec.walk import Walk, differs
from sim.errors import InputError
from sim.network import Network
from sim.tracker import LayerTracker, Listener, tensors_in


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One call of a module, just before or just after its forward; `layers` are those that begin behind it."""

    module: torch.nn.Module
    after: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """What one run with the dispatch mode showed."""

    points: tuple[HookPoint, ...]
    """Every hook event of one run, in order."""
    first: tuple[int, ...]
    """Layers that begin before any hook."""
    blocker: str
    """The first operator that no graph can hold, with the layer it stands in; empty where there is none."""


class _Sniffer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notices operators whose result the host must see."""

    def __init__(self, where: torch.device, note: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.note = where, note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in HOST_MUST_SEE and any(t.device.type == self.where.type for t in tensors_in(args)):
            self.note(str(name))
        return func(*args, **(kwargs or {}))


class Finder:
    """Which storage of the network a tensor views, by its address: bound tensors share the arenas' storages."""

    def __init__(self, pairs: Iterable[tuple[int, torch.Tensor]]) -> None:
        rows = {
            (view.data_ptr(), view.data_ptr() + view.numel(), storage)
            for storage, view in pairs
            if view.numel()
        }
        self._rows = sorted(rows)
        self._starts = [row[0] for row in self._rows]

    def __call__(self, tensor: torch.Tensor) -> int | None:
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        return self._rows[at][2] if at >= 0 and tensor.data_ptr() < self._rows[at][1] else None


class _Steps(Listener):
    """Compares the layers that run with the network's, and passes each on."""

    def __init__(
        self, network: Network, reach: Callable[[int], None], near: Callable[[int], None] | None
    ) -> None:
        self.network, self.reach, self.near = network, reach, near
        self.reads = [frozenset(r.storage for r in layer.reads) for layer in network.layers]

    def module_starts(self, name: str, next_layer: int) -> None:
        layers = self.network.layers
        if self.near is not None and next_layer < len(layers) and layers[next_layer].name == name:
            self.near(next_layer)

    def layer_starts(self, layer: int, name: str, kind: str) -> None:
        layers = self.network.layers
        if layer >= len(layers) or layers[layer].name != name:
            wanted = f"layer {layer} ({layers[layer].name})" if layer < len(layers) else "the end"
            raise InputError(differs(self.network, f"layer {layer} ({name})", wanted))
        self.reach(layer)

    def operator_starts(self, layer: int, storages: tuple[int, ...]) -> None:
        strange = [s for s in storages if s not in self.reads[max(layer, 0)]]
        if strange:
            name, storage = self.network.layers[max(layer, 0)].name, self.network.storages[strange[0]].name
            raise InputError(differs(self.network, f"a read of {storage}", f"none in layer {layer} ({name})"))


def follow(
    module: torch.nn.Module,
    network: Network,
    find: Finder,
    reach: Callable[[int], None],
    near: Callable[[int], None] | None = None,
) -> LayerTracker:
    """While entered, `reach` is told of each layer before its first operator. InputError where layers are not the network's.

    `near` is told of a layer when its module is called, before any view is taken of its weights: views run no operator.
    """
    return LayerTracker(module, find, _Steps(network, reach, near))


def learn(
    module: torch.nn.Module, network: Network, find: Finder, where: torch.device, forward: Callable[[], Any]
) -> Learned:
    """Run `forward` once, on `where`, and note at which hook each layer begins, and what no graph could hold."""
    events: list[tuple[torch.nn.Module, bool]] = []
    begins: list[int] = []
    blockers: list[str] = []

    def reach(layer: int) -> None:
        begins.append(len(events) - 1)

    def note(operator: str) -> None:
        at = max(0, len(begins) - 1)
        blockers.append(
            f"layer {at} ({network.layers[at].name}) needs a tensor's values on the host ({operator})"
        )

    handles = []
    try:
        for child in module.modules():
            handles.append(child.register_forward_pre_hook(lambda m, _: events.append((m, False))))
            handles.append(child.register_forward_hook(lambda m, *_: events.append((m, True))))
        with _Sniffer(where, note), follow(module, network, find, reach):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if len(begins) != len(network.layers):
        raise InputError(
            differs(network, "the end", f"layer {len(begins)} ({network.layers[len(begins)].name})")
        )
    at_event: dict[int, list[int]] = {}
    for layer, event in enumerate(begins):
        at_event.setdefault(event, []).append(layer)
    points = tuple(HookPoint(m, after, tuple(at_event.get(i, ()))) for i, (m, after) in enumerate(events))
    return Learned(points, tuple(at_event.get(-1, ())), blockers[0] if blockers else "")


class LayerHooks:
    """Cheap hooks that tell a walk which layer comes. Inert while no walk is active."""

    def __init__(self, learned: Learned, needed: frozenset[int], network: Network) -> None:
        """`needed`: layers before which something must be issued; hooks of others are not made."""
        self.network = network
        self.walk: Walk | None = None
        self.first = max(learned.first, default=-1)
        used = {(id(p.module), p.after) for p in learned.points if needed.intersection(p.layers)}
        self._order = [p for p in learned.points if (id(p.module), p.after) in used]
        self._at = 0
        self._handles: list[Any] = []
        modules = {id(p.module): p.module for p in self._order}
        for key, after in sorted(used, key=str):
            module = modules[key]
            self._handles.append(
                module.register_forward_hook(self._hook(module, True))
                if after
                else module.register_forward_pre_hook(self._hook(module, False))
            )

    def _hook(self, module: torch.nn.Module, after: bool) -> Callable[..., None]:
        def met(*_: Any) -> None:
            walk = self.walk
            if walk is None:
                return
            at = self._at
            if (
                at >= len(self._order)
                or self._order[at].module is not module
                or self._order[at].after is not after
            ):
                raise walk.differs(f"a call of {type(module).__name__}")
            self._at = at + 1
            layers = self._order[at].layers
            if layers:
                walk.reach(layers[-1])

        return met

    def start(self, walk: Walk) -> None:
        self.walk, self._at = walk, 0
        if self.first >= 0:
            walk.reach(self.first)

    def stop(self) -> None:
        """The network has run: every hook must have been met, and layers behind the last one count as reached."""
        walk, self.walk = self.walk, None
        if walk is None:
            return
        if self._at != len(self._order):
            raise walk.differs("the end")
        walk.reach(len(self.network.layers) - 1)

    def abandon(self) -> None:
        self.walk = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
