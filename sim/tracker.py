"""Layers seen while a module runs: which module an operator belongs to, and which storages it reads.

A dispatch mode sees every operator with its tensors, and module hooks say whose forward is running. `LayerTracker` holds the
rules that make layers of operators. It knows no device, so an executor that runs a module under it meets the layers that a
trace on the meta device met, in the same order, whichever kernels the device picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = "(root)"
"""What the outermost module is called in layers."""

_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(slots=True)
class Held:
    """A storage as the module holds it: its first name, and the names of all modules that own a tensor in it."""

    name: str
    size_bytes: int
    dtype: str
    owners: list[str]
    storage: torch.UntypedStorage


class StorageTable:
    """The distinct storages under a module's parameters and buffers, in the order of their first names.

    Tensors are told apart by the storage object they view: on the meta device there are no addresses.
    """

    def __init__(self, module: nn.Module) -> None:
        self.held: list[Held] = []
        self._index: dict[int, int] = {}
        for owner, child in module.named_modules():
            for key, tensor in own_tensors(child):
                storage = tensor.untyped_storage()
                if storage.nbytes() == 0:
                    continue
                name = f"{owner}.{key}" if owner else key
                index = self._index.setdefault(storage._cdata, len(self.held))
                if index == len(self.held):
                    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
                    self.held.append(Held(name, storage.nbytes(), dtype, [], storage))
                self.held[index].owners.append(owner)

    def find(self, tensor: Tensor) -> int | None:
        """Which storage of the module `tensor` is a view of, if any."""
        try:
            return self._index.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):  # sparse and the like have none
            return None


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


class Listener:
    """What a LayerTracker tells, in the order in which it happens. Every method may be left out."""

    def module_starts(self, name: str, next_layer: int) -> None:
        """The forward of module `name` begins; the next new layer will have the index `next_layer`."""

    def layer_starts(self, layer: int, name: str, kind: str) -> None:
        """The first operator of this layer comes next. Layers count from 0 in each forward of the root."""

    def weights_written(self, layer: int, name: str, storages: tuple[int, ...]) -> None:
        """The operator of `layer`, of module `name`, that comes next writes these storages in place, and what was there before
        counts: it was read, or is written in part or on top of."""

    def operator_starts(self, layer: int, storages: tuple[int, ...]) -> None:
        """An operator of `layer` that reads these storages comes next. -1 before the first layer: it counts for layer 0."""

    def operator_ended(self, layer: int, call: Call) -> None:
        """The operator was issued, and `call` has its tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One operator as it was called. `reads` pairs each weight among the arguments with its storage."""

    func: torch._ops.OpOverload[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    result: Any
    reads: tuple[tuple[int, Tensor], ...]


@dataclass(slots=True)
class _Frame:
    """One call of a module. `number` tells two calls of a module apart."""

    name: str
    kind: str
    leaf: bool
    number: int


class LayerTracker:
    """While entered, forwards of `root` on this thread are split into layers, told to `listener`.

    An operator belongs to the innermost module whose forward runs. Views and empty allocations run no kernel and count
    nowhere. Each call of a leaf (a module without children) that runs an operator is a layer; an operator outside of leaves
    is a layer where it reads a weight, unless the layer before it is of the same module call, and else part of the layer
    before it, or of layer 0 if there is none. Copies into contiguous memory make no layer by themselves: whether there is
    one may depend on the memory format that a device's kernel before it chose.

    `find` maps a tensor to the storage it views, or None; an executor that has moved weights passes its own. Torch's fused
    transformer kernels are off while entered, since with them nn.TransformerEncoderLayer would be one layer on some devices.
    Torch's operators run unchanged otherwise; each costs some 20 us more on the host.
    """

    def __init__(self, root: nn.Module, find: Callable[[Tensor], int | None], listener: Listener) -> None:
        self.layer = -1
        """Index of the layer that runs."""
        self.module = ""
        """Name of the module whose forward or operator began last; kept when a forward fails."""
        self._root = root
        self._find = find
        self._listener = listener
        self._frames: list[_Frame] = []
        self._calls = 0
        self._layer_call = -1
        self._used: set[int] = set()
        """Storages that an operator of this forward took."""
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name, module in self._root.named_modules():
                enter = partial(self._module_starts, name or ROOT, not any(True for _ in module.children()))
                # first in and last out, so that what other hooks run belongs to the module, too
                stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._module_ended, always_call=True).remove)
            stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(_Watch(self._operator))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._frames.clear()
        self._exit.close()

    def _module_starts(self, name: str, leaf: bool, module: nn.Module, _args: object) -> None:
        if not self._frames:
            self.layer, self._layer_call = -1, -1
            self._used.clear()
        self._calls += 1
        self._frames.append(_Frame(name, type(module).__name__, leaf, self._calls))
        self.module = name
        self._listener.module_starts(name, self.layer + 1)

    def _module_ended(self, _module: nn.Module, _args: object, _result: object) -> None:
        if self._frames:
            self._frames.pop()

    def _operator(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not self._frames:
            return func(*args, **kwargs)
        frame = self._frames[-1]
        self.module = frame.name
        reads: list[tuple[int, Tensor]] = []
        for tensor in tensors_in((args, kwargs)):
            storage = self._find(tensor)
            if storage is not None:
                reads.append((storage, tensor))
        begins = bool(reads) or (frame.leaf and _nature(func) != "copy")
        if begins and self._layer_call != frame.number:
            self.layer += 1
            self._layer_call = frame.number
            self._listener.layer_starts(self.layer, frame.name, frame.kind)
        written = {storage: t for t in _written(func, args, kwargs) if (storage := self._find(t)) is not None}
        lost = tuple(
            storage for storage, t in written.items() if storage in self._used or not _replaces(func, t)
        )
        if lost:
            self._listener.weights_written(self.layer, frame.name, lost)
        self._used |= {storage for storage, _ in reads}
        self._listener.operator_starts(self.layer, tuple(dict.fromkeys(storage for storage, _ in reads)))
        result = func(*args, **kwargs)
        self._listener.operator_ended(self.layer, Call(func, args, kwargs, result, tuple(reads)))
        return result


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Hands every operator that runs a kernel to `run`.

    In inference mode composite operators arrive whole: they are taken apart here, as autograd's dispatch would do, but for
    the few that a device runs as one kernel.
    """

    def __init__(self, run: Callable[[Any, Sequence[Any], dict[str, Any]], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = run

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        nature = _nature(func)
        if nature == "composite":
            with self:
                return func.decompose(*args, **kwargs)
        if nature == "silent":
            return func(*args, **kwargs)
        return self._run(func, args, kwargs)


_WHOLE = frozenset({"aten.linear", "aten.scaled_dot_product_attention"})
"""Composite operators kept whole: one kernel, or one call of a library, on the devices that matter."""

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

_SILENT = frozenset(
    {
        "aten._unsafe_view",  # a view whose schema does not say so
        "aten.empty",
        "aten.empty_like",
        "aten.empty_strided",
        "aten.new_empty",
        "aten.new_empty_strided",
        "aten.empty_permuted",
        "aten.size",
        "aten.stride",
        "aten.numel",
        "aten.dim",
        "aten.sym_size",
        "aten.sym_stride",
        "aten.sym_numel",
        "aten.sym_storage_offset",
        "aten.is_contiguous",
    }
)


@lru_cache(maxsize=4096)
def _nature(func: Any) -> Literal["composite", "silent", "copy", "kernel"]:
    if not isinstance(func, torch._ops.OpOverload):
        return "kernel"
    packet = str(func.overloadpacket)
    if packet in _SILENT or func.namespace == "prim":
        return "silent"
    if packet == "aten.clone":
        return "copy"
    if packet not in _WHOLE and func.has_kernel_for_dispatch_key(_COMPOSITE):
        return "composite"
    # a pure view: its result aliases an argument and no argument is written
    aliases = [r.alias_info for r in func._schema.returns]
    view = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
    return "silent" if view else "kernel"


_REPLACING = frozenset({"aten.copy_", "aten.fill_", "aten.zero_"})


def _replaces(func: Any, tensor: Tensor) -> bool:
    """Whether an operator writes all of a storage, whatever was there before."""
    whole = tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
    return str(func.overloadpacket) in _REPLACING and whole


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments whose bytes it writes."""
    for position, name in _places_written(func):
        for tensor in tensors_in(args[position] if position < len(args) else kwargs.get(name)):
            if tensor.numel():
                yield tensor


@lru_cache(maxsize=4096)
def _places_written(func: Any) -> tuple[tuple[int, str], ...]:
    """Of what an operator writes among its arguments, the position and the name."""
    # detach_, t_ and their like say that they write, and leave every byte as it is
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.inplace_view in func.tags:
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors among arguments or results, lists looked into."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
