"""The meta device, shapes without bytes: copies there of a caller's module, and autocast that knows it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sim.tracker import StorageTable, own_tensors


class Unlike(Exception):
    """The copy is not the module, or a run of the copy went past it, to the module itself."""


@dataclass(frozen=True, slots=True, eq=False)
class Bare:
    """The copies. `check` raises Unlike for a tensor of the module's own: who takes one went past the copy."""

    module: nn.Module
    inputs: tuple[Any, ...]
    check: Callable[[Tensor], None]


@contextmanager
def bare(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[Bare]:
    """Both on the meta device. Names are the same, and what shares a storage shares one there.

    A copy, and not the module with other tensors lent to it (torch.func.functional_call): a forward may keep what it
    made, a mask or a cache, in an attribute or a list, and would find it without values when it really runs. What a
    closure or a hook still refers to is the module itself; that is noticed, as long as this is entered, and raises Unlike.
    Raises whatever keeps a module or its inputs from being copied.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    own = [tensor for child in module.modules() for _, tensor in own_tensors(child)]
    given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    memo: dict[int, Any] = {id(tensor): _shaped(tensor, storages) for tensor in (*own, *given)}
    copied, taken = copy.deepcopy((module, inputs), memo)
    with away_from(module, copied) as check:
        yield Bare(copied, taken, check)


@contextmanager
def away_from(module: nn.Module, copied: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """While entered, a run of the copy that calls a module of the original's raises Unlike, and so does what is yielded for a
    tensor of the original's own."""
    if _names(copied) != _names(module):
        raise Unlike("its copy has other modules or tensors")
    table = StorageTable(module)

    def check(tensor: Tensor) -> None:
        if table.find(tensor) is not None:
            raise Unlike("it reads a weight of the module itself")

    def called(*_: object) -> None:
        raise Unlike("it calls the module itself")

    with ExitStack() as stack:
        for child in module.modules():
            stack.callback(child.register_forward_pre_hook(called, prepend=True).remove)
        yield check


def _shaped(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """The same shape, strides and dtype on the meta device; `storages` has what stands for each storage there."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise Unlike("a tensor is no plain one")
    old = tensor.untyped_storage()
    if old._cdata not in storages:
        storages[old._cdata] = torch.UntypedStorage(old.nbytes(), device="meta")  # type: ignore[no-untyped-call]
    made = torch.empty(0, dtype=tensor.dtype, device="meta")
    made.set_(storages[old._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)  # what a forward may look for on a weight
    return made


def _names(module: nn.Module) -> list[tuple[str, str, tuple[str, ...]]]:
    """Of every module, its name, its kind and its own tensors: what a trace names layers and storages by."""
    return [
        (name, type(child).__name__, tuple(key for key, _ in own_tensors(child)))
        for name, child in module.named_modules()
    ]


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def meta_autocast() -> Iterator[None]:
    """Let models name the meta device to torch.autocast, which does not know it; often they only switch it off there."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def is_enabled(device_type: str | None = None) -> bool:
        return False if device_type == "meta" else enabled() if device_type is None else enabled(device_type)

    torch.autocast, torch.is_autocast_enabled = _Autocast, is_enabled  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast, torch.is_autocast_enabled = autocast, enabled  # type: ignore[misc]
