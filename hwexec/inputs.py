"""A module's inputs: where it reads them, and how a start's own come there.

Those in host memory go through no copy engine: its queue is full of weights by then, and a copy behind them was 0.9 to 2.9 ms
late (results/h100-pair-5/trials/inputs.txt). They are staged in pinned memory while the first weights are under way, and a kernel
ahead of the first layer reads them there in place.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

from hwexec.arena import HostArena
from hwexec.device import Device, Event, Stream
from hwexec.walk import Pairs
from sim.draft import aligned
from sim.errors import require


@dataclass(frozen=True, slots=True, eq=False)
class _Staged:
    """One input's place in pinned host memory, the same as bytes that the GPU reads, and the bytes that they go to."""

    host: torch.Tensor
    source: torch.Tensor
    destination: torch.Tensor


@dataclass(slots=True, eq=False)
class _Side:
    """A place for each input. `read` is when a kernel last had read all that was staged there, if it is `unread` before."""

    places: dict[int, _Staged]
    read: Event
    unread: bool = False


SIDES = 2
"""Starts whose inputs are staged at the same time."""


class Inputs:
    """A module's inputs at addresses that never move; each start brings its own to them."""

    def __init__(
        self, device: Device, gpu: int, model: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model = model
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        where = device.torch_device(gpu)
        self._leaves = [
            leaf.detach().clone().to(where) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        flat = not kwargs and len(tensors) == len(args) and all(isinstance(a, torch.Tensor) for a in args)
        self._tensors: list[torch.Tensor] | None = tensors if flat else None
        """All inputs, where all are tensors given by position."""
        self._device = device
        plain = [t for t in tensors if type(t) is torch.Tensor and t.layout is torch.strided]
        self._host = HostArena(device, SIDES * sum(aligned(t.nbytes) for t in plain), gpu)
        whole, at = self._host.view(gpu) if self._host.size_bytes else self._host.tensor, 0
        self._sides: list[_Side] = []
        """Taken in turn: a start need not wait until the one before it has read its inputs."""
        for _ in range(SIDES):
            places: dict[int, _Staged] = {}
            for fixed in plain:
                here = slice(at, at + fixed.nbytes)
                places[id(fixed)] = _staged(self._host.tensor[here], whole[here], fixed)
                at += aligned(fixed.nbytes)
            self._sides.append(_Side(places, device.event()))

    def fixed(self) -> Any:
        """The module's arguments by position and by keyword."""
        return pytree.tree_unflatten(self._leaves, self._spec)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pairs:
        """Each tensor, with what a start was given for it. InputError where they are not like the example's."""
        flat = self._tensors
        if flat is not None and not kwargs and len(args) == len(flat):
            for fixed, given in zip(flat, args, strict=True):
                if (
                    type(given) is not torch.Tensor
                    or given.dtype != fixed.dtype
                    or given.shape != fixed.shape
                    or given.is_meta
                    or given.layout is not fixed.layout
                ):
                    break
            else:
                return list(zip(flat, args, strict=True))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:  # the same names, it may be, in another order
            leaves, spec = pytree.tree_flatten(_in_order((args, kwargs), self.fixed()))
        who, pairs = self._model, []
        require(
            spec == self._spec,
            f"{who}: the inputs are not built like the example's; give as many, by the same names",
        )
        for number, (fixed, given) in enumerate(zip(self._leaves, leaves, strict=True)):
            _refuse_kind(who, number, given)
            if not isinstance(fixed, torch.Tensor) or not isinstance(given, torch.Tensor):
                require(
                    _same(fixed, given),
                    f"{who}: input {number} is {shown(given)}, but {shown(fixed)} in the example; prepare the module "
                    "again for that",
                )
                continue
            require(
                (given.shape, given.dtype) == (fixed.shape, fixed.dtype),
                f"{who}: input {number} is {given.dtype} {list(given.shape)}, but {fixed.dtype} {list(fixed.shape)} in the "
                "example; a prepared module takes that only",
            )
            require(
                given.layout is fixed.layout,
                f"{who}: input {number} is {given.layout}, but {fixed.layout} in the example; convert it",
            )
            pairs.append((fixed, given))
        return pairs

    def rehearse(self, stream: Stream) -> None:
        """The example's inputs brought as a start's are, from each place: kernels are loaded when they first run. `stream` is
        current."""
        with torch.no_grad():
            pairs = [(t, t.to("cpu")) for t in self._leaves if isinstance(t, torch.Tensor)]
        for _ in self._sides:
            self.stage(stream, pairs)()

    def stage(self, stream: Stream, pairs: Pairs) -> Callable[[], None]:
        """Those given in host memory, copied to where the GPU can read them; the call brings all to where the module reads them,
        with `stream` current. Blocks while the GPU may still read those of the start before the last."""
        here: list[tuple[torch.Tensor, torch.Tensor]] = []
        there: list[tuple[torch.Tensor, torch.Tensor]] = []
        for fixed, given in pairs:
            staged = given.device.type == "cpu" and id(fixed) in self._sides[0].places
            (here if staged else there).append((fixed, given))
        if not here:
            return partial(self._bring, stream, there)
        self.wait()
        self._sides.append(side := self._sides.pop(0))
        with torch.no_grad():
            for fixed, given in here:
                side.places[id(fixed)].host.copy_(given)
        return partial(self._bring, stream, there, side, [side.places[id(fixed)] for fixed, _ in here])

    def wait(self) -> None:
        """Until the GPU has read what was staged by the start before the last."""
        side = self._sides[0]
        if side.unread:
            self._device.wait_on_host(side.read)
            side.unread = False

    def _bring(
        self, stream: Stream, there: Pairs, side: _Side | None = None, staged: Sequence[_Staged] = ()
    ) -> None:
        for fixed, given in there:
            self._device.assign(stream, fixed, given)
        for place in staged:
            self._device.read(stream, place.destination, place.source)
        if side is not None:
            self._device.record(stream, side.read)
            side.unread = True

    def clear(self) -> None:
        self._leaves.clear()
        for side in self._sides:
            side.places.clear()
        self._tensors = None
        self._host.close()


def check_example(who: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """InputError where an example's input is of a kind that no start could bring."""
    for number, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        _refuse_kind(who, number, leaf)


def shown(value: object) -> str:
    """A value in a few words on one line, whatever it says of itself."""
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor {list(value.shape)}"
    return " ".join(reprlib.repr(value).split())


def _refuse_kind(who: str, number: int, value: object) -> None:
    require(
        not isinstance(value, numpy.ndarray),
        f"{who}: input {number} is a numpy array; pass torch.from_numpy(...) of it",
    )
    require(
        not (isinstance(value, torch.Tensor) and value.is_meta),
        f"{who}: input {number} is on the meta device and has no values; give one that has",
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs that are no tensors are alike; a NaN is like a NaN."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        return bool(one == other) or bool(one != one and other != other)
    except Exception:  # of a kind that cannot say
        return False


def _in_order(given: Any, example: Any) -> Any:
    """`given` with each mapping in the example's order: keywords mean the same in any."""
    if type(given) is not type(example):
        return given
    if type(given) is dict and given.keys() == example.keys():
        return {key: _in_order(given[key], value) for key, value in example.items()}
    if type(given) in (list, tuple) and len(given) == len(example):
        return type(given)(map(_in_order, given, example))
    return given


def _staged(mine: torch.Tensor, source: torch.Tensor, fixed: torch.Tensor) -> _Staged:
    """A place of as many bytes, laid out as `fixed` is: a clone is dense, whatever its strides."""
    like = mine.view(fixed.dtype) if fixed.nbytes else torch.empty(0, dtype=fixed.dtype)
    return _Staged(like.as_strided(fixed.shape, fixed.stride()), source, _bytes(fixed))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of a dense tensor's bytes, in the order in which they lie."""
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    start = tensor.storage_offset() * tensor.itemsize
    return whole.set_(tensor.untyped_storage(), start, (tensor.nbytes,), (1,))
