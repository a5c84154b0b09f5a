"""A torch module to a Network: one forward, run for its shapes, becomes layers, storages and the work of each operator."""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sim.errors import InputError
from sim.hints import error_line
from sim.meta import away_from, bare, meta_autocast
from sim.models import DTYPES, Built, build, check_shows_operators
from sim.network import Layer, Network, Read, Storage
from sim.operators import Op, op_of
from sim.tracker import ROOT, Call, LayerTracker, Listener, StorageTable


@dataclass(frozen=True, slots=True)
class Trace:
    """A network, and the operators of each of its layers: `work[i]` are those of `network.layers[i]`."""

    network: Network
    work: tuple[tuple[Op, ...], ...]


def trace_model(name: str, *, batch: int = 1, dtype: str | None = None, seq: int | None = None) -> Trace:
    """Trace the model called `name` on the meta device: neither memory nor a GPU is needed.

    Raises InputError where `sim.models.build` or `trace` does.
    """
    return trace(build(name, batch=batch, dtype=dtype, seq=seq, device="meta"))


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple of positional arguments or a mapping of keyword arguments, as a call takes them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def trace_module(module: torch.nn.Module, inputs: Any) -> Trace:
    """Trace a module without a name here: its class gives one, its first weight the dtype, its first tensor the batch.

    `inputs`: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
    Traced is a copy without bytes, on the meta device. Where that cannot be (a forward looks at values, a module cannot
    be copied), a copy of it runs once, or else the module itself, with copies of its inputs.
    """
    args, kwargs = arguments(inputs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    batch = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = next((n for n, d in DTYPES.items() if floats and d is floats[0]), "fp32")
    built = Built(module, args, batch, dtype, None, type(module).__name__, kwargs)
    check_shows_operators(module, built.name)
    for way in (_without_values, _copied):
        try:
            return way(built)
        except _Lost:
            raise
        except Exception:
            continue
    return _run(_cloned(built))


def _without_values(built: Built) -> Trace:
    with bare(built.module, (built.inputs, built.named)) as copied:
        args, kwargs = copied.inputs
        return _run(replace(built, module=copied.module, inputs=args, named=kwargs), copied.check)


def _copied(built: Built) -> Trace:
    """With values, of a copy: what a forward keeps from inference mode, no later run could write."""
    module = copy.deepcopy(built.module)
    with away_from(built.module, module) as check:
        return _run(replace(_cloned(built), module=module), check)


def _cloned(built: Built) -> Built:
    """The same with copies of its inputs."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (built.inputs, built.named))
    return replace(built, inputs=args, named=kwargs)


class _Lost(InputError):
    """A forward writes what a cold start brings. No other way to run it would help."""


def trace(built: Built) -> Trace:
    """Run `built` once and record layers, storages and operators. No hook stays.

    Raises InputError where the module's forward fails, and there names the layer it had reached, or where it is about
    to write one of the module's own tensors.
    """
    check_shows_operators(built.module, built.name)
    return _run(built)


def _run(built: Built, check: Callable[[Tensor], None] | None = None) -> Trace:
    """`check` is shown every tensor that an operator takes."""
    table = StorageTable(built.module)

    def find(tensor: Tensor) -> int | None:
        if check is not None:
            check(tensor)
        return table.find(tensor)

    recorder = _Recorder(table, built.name)
    tracker = LayerTracker(built.module, find, recorder)
    try:
        with torch.inference_mode(), meta_autocast(), tracker:
            built.module(*built.inputs, **built.named)
    except _Lost:
        raise
    except Exception as error:
        raise InputError(_forward_failed(built, tracker, error)) from error
    return recorder.trace(built)


_OTHER_DEVICE = re.compile(r"expected device|same device")


def _forward_failed(built: Built, tracker: LayerTracker, error: Exception) -> str:
    where = f"in layer {tracker.layer}" if tracker.layer >= 0 else "before its first layer"
    message = f"model {built.name!r} stopped {where}, module {tracker.module!r}: {error_line(error)}"
    says = str(error)
    if "quantize" in error_line(error):  # further lines may name the files of kernels for others
        return f"{message}; quantized operators cannot be traced: give the module as it was before it was quantized"
    if "meta" in says and "cpu" in says and _OTHER_DEVICE.search(says):
        return (
            f"{message}; a network is traced on the meta device, and there its forward met a tensor of the CPU: make it "
            "on its input's device (device=x.device), or register it as a buffer"
        )
    if "meta" in says or isinstance(error, NotImplementedError):
        return (
            f"{message}; a network is traced without values, so what it runs may depend on shapes only: take the "
            "branch on values out of its forward"
        )
    given = [_like(i) for i in built.inputs] + [f"{name}={_like(i)}" for name, i in built.named.items()]
    taken = f"inputs of {', '.join(given)}" if given else "no inputs"
    return f"{message}; check that its forward takes {taken}"


def _like(given: Any) -> str:
    return str(tuple(given.shape)) if isinstance(given, Tensor) else " ".join(reprlib.repr(given).split())


# -- recording --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Draft:
    """A layer while it is recorded: `touched` has bytes by storage of the table, in order of first read."""

    name: str
    kind: str
    ops: list[Op] = field(default_factory=list)
    touched: dict[int, int] = field(default_factory=dict)


class _Recorder(Listener):
    """Gathers layers and operators, then numbers storages in the order in which they are needed."""

    def __init__(self, table: StorageTable, model: str) -> None:
        self._table = table
        self._model = model
        self._layers: list[_Draft] = []
        self._early: list[Op] = []
        self._first: dict[str, int] = {}

    def module_starts(self, name: str, next_layer: int) -> None:
        self._first.setdefault(name, next_layer)

    def layer_starts(self, layer: int, name: str, kind: str) -> None:
        self._layers.append(_Draft(name, kind))

    def weights_written(self, layer: int, name: str, storages: tuple[int, ...]) -> None:
        tensor = self._table.held[storages[0]].name
        raise _Lost(
            f"model {self._model!r}: layer {layer} ({name}) writes its own tensor {tensor!r}; a cold start brings every "
            "weight anew, so what a run writes is lost: take it out of forward"
        )

    def operator_ended(self, layer: int, call: Call) -> None:
        op, touched = op_of(call)
        if layer < 0:
            self._early.append(op)
            return
        draft = self._layers[layer]
        draft.ops.append(op)
        for storage, size in touched:
            limit = self._table.held[storage].size_bytes
            draft.touched[storage] = min(limit, draft.touched.get(storage, 0) + size)

    def trace(self, built: Built) -> Trace:
        """The trace, once the forward has ended."""
        if self._layers:
            self._layers[0].ops[:0] = self._early
        homes = self._homes()
        order = sorted(range(len(homes)), key=lambda storage: homes[storage])
        number = {storage: index for index, storage in enumerate(order)}
        held = self._table.held
        storages = tuple(
            Storage(held[s].name, held[s].size_bytes, held[s].dtype, homes[s].layer if homes[s].runs else -1)
            for s in order
        )
        work = tuple(
            tuple(replace(op, reads=tuple(number[s] for s in op.reads)) for op in draft.ops)
            for draft in self._layers
        )
        layers = tuple(
            Layer(
                draft.name,
                draft.kind,
                tuple(Read(number[s], size) for s, size in draft.touched.items()),
                sum(op.flops for op in ops),
                sum(op.moved_bytes for op in ops),
            )
            for draft, ops in zip(self._layers, work, strict=True)
        )
        return Trace(Network(built.name, built.dtype, built.batch, built.seq, layers, storages), work)

    def _homes(self) -> list[_Home]:
        """Where each storage of the table belongs. One that nobody reads follows those of the module that owns it."""
        last = len(self._layers)
        homes: dict[int, _Home] = {}
        for layer, draft in enumerate(self._layers):
            for position, storage in enumerate(draft.touched):
                homes.setdefault(storage, _Home(layer, position))
        for storage, held in enumerate(self._table.held):
            if storage in homes:
                continue
            calls = [self._first[owner or ROOT] for owner in held.owners if (owner or ROOT) in self._first]
            layer = min(min(calls), last - 1) if calls else last
            homes[storage] = _Home(layer, len(self._table.held) + storage, runs=bool(calls))
        return [homes[storage] for storage in range(len(homes))]


@dataclass(frozen=True, slots=True, order=True)
class _Home:
    """Sorts storages into arena order: by layer, then by first read."""

    layer: int
    position: int
    runs: bool = True
