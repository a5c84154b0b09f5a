"""What one operator of a layer costs: its kind, its size as a product, FLOPs, activations, and bytes of the weights it touches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sim.tracker import Call, tensors_in

OpKind = Literal["conv", "gemm", "gather", "norm", "attention", "other"]


@dataclass(frozen=True, slots=True)
class Op:
    """One operator of a layer, as its kernels cost.

    A product has `groups` independent products of m rows, n columns and depth k; 2 * groups * m * n * k FLOPs. Convolution as
    an implicit product: m = batch * output pixels, n = output channels of a group, k = input channels of a group * window.
    Attention: groups = batch * heads, m = queries, n = keys, k = width of a head, and two such products. All 0 elsewhere,
    where one FLOP per element of the output is counted, and none for gathers and copies.
    """

    kind: OpKind
    name: str
    """As torch calls it, without the overload: `aten.addmm`."""
    flops: int
    moved_bytes: int
    """Activations read and written, each tensor once; weights are not counted."""
    reads: tuple[int, ...]
    """Storages of the network that the operator reads, in the order of its arguments."""
    m: int = 0
    n: int = 0
    k: int = 0
    groups: int = 0
    window: int = 0
    """Pixels of a convolution's kernel, kh * kw."""
    stride: int = 0
    """A convolution's stride in its last dimension."""


@dataclass(frozen=True, slots=True)
class _Product:
    """The sizes of an operator as a matrix product; see Op."""

    m: int
    n: int
    k: int
    groups: int = 1
    window: int = 0
    stride: int = 0
    flops: int = 0
    """Where it is not 2 * groups * m * n * k."""


def _product(a: Tensor, b: Tensor) -> _Product:
    """[..., m, k] @ [..., k, n], either with the leading dimensions of a batch or a plain vector."""
    m = a.shape[-2] if a.ndim > 1 else 1
    n = b.shape[-1] if b.ndim > 1 else 1
    return _Product(m, n, a.shape[-1], math.prod(a.shape[:-2]))


def _linear(a: Tensor, weight: Tensor) -> _Product:
    depth = a.shape[-1]
    return _Product(math.prod(a.shape[:-1]), weight.shape[0] if weight.ndim > 1 else 1, depth)


def _vector(a: Tensor, x: Tensor) -> _Product:
    """A matrix by a vector: the matrix is the weight, so its rows are the columns of the product."""
    return _Product(1, a.shape[0], a.shape[1])


def _convolution(call: Call) -> _Product:
    source, weight = call.args[0], call.args[1]
    stride, transposed, groups = call.args[3], call.args[6], call.args[8]
    window = math.prod(weight.shape[2:])
    if transposed:  # every input pixel makes a window of outputs
        pixels = math.prod(source.shape[2:]) * source.shape[0]
        return _Product(
            pixels, weight.shape[1] * window, weight.shape[0] // groups, groups, window, stride[-1]
        )
    pixels = math.prod(call.result.shape[2:]) * call.result.shape[0]
    return _Product(pixels, weight.shape[0] // groups, weight.shape[1] * window, groups, window, stride[-1])


def _attention(call: Call) -> _Product:
    query, key, value = call.args[:3]
    m, k = query.shape[-2:]
    n, groups = key.shape[-2], math.prod(query.shape[:-2])
    return _Product(m, n, k, groups, flops=2 * groups * m * n * (k + value.shape[-1]))


_PRODUCTS: dict[str, Callable[[Call], _Product]] = {
    "aten.linear": lambda c: _linear(c.args[0], c.args[1]),
    "aten.mm": lambda c: _product(c.args[0], c.args[1]),
    "aten.bmm": lambda c: _product(c.args[0], c.args[1]),
    "aten._scaled_mm": lambda c: _product(c.args[0], c.args[1]),
    "aten.dot": lambda c: _product(c.args[0], c.args[1]),
    "aten.mv": lambda c: _vector(c.args[0], c.args[1]),
    "aten.addmm": lambda c: _product(c.args[1], c.args[2]),
    "aten._addmm_activation": lambda c: _product(c.args[1], c.args[2]),
    "aten.baddbmm": lambda c: _product(c.args[1], c.args[2]),
    "aten.addmv": lambda c: _vector(c.args[1], c.args[2]),
    "aten.convolution": _convolution,
    "aten.scaled_dot_product_attention": _attention,
}
_CONVOLUTIONS = frozenset({"aten.convolution"})
_GATHERS = frozenset(
    {
        "aten.embedding",
        "aten.embedding_bag",
        "aten._embedding_bag_forward_only",
        "aten.index_select",
        "aten.index",
    }
    | {"aten.gather", "aten.take", "aten._unsafe_index"}
)
_LOOKUPS = frozenset({"aten.embedding", "aten.embedding_bag", "aten._embedding_bag_forward_only"})
_COPIES = frozenset(
    {"aten.clone", "aten._to_copy", "aten.copy_", "aten.cat", "aten.stack", "aten.fill_", "aten.zeros"}
)


def op_of(call: Call) -> tuple[Op, tuple[tuple[int, int], ...]]:
    """The record of an operator, storages numbered as in the table, and how many bytes of which one it touches."""
    name = str(call.func.overloadpacket) if isinstance(call.func, torch._ops.OpOverload) else str(call.func)
    weights = {id(tensor) for _, tensor in call.reads}
    results = tuple(tensors_in(call.result))
    if "_norm" in name:
        results = results[:1]  # what follows is statistics for training; some devices leave them empty
    activations = [t for t in tensors_in((call.args, call.kwargs)) if id(t) not in weights]
    moved = sum(map(_bytes, activations)) + sum(map(_bytes, results))
    written = sum(t.numel() for t in results)
    touched = tuple((storage, _touched(call, name, tensor)) for storage, tensor in call.reads)
    reads = tuple(dict.fromkeys(storage for storage, _ in call.reads))
    if name in _PRODUCTS:
        size = _PRODUCTS[name](call)
        kind: OpKind = "gemm"
        if name in _CONVOLUTIONS:
            kind = "conv"
        elif size.flops:
            kind = "attention"
        flops = size.flops or 2 * size.groups * size.m * size.n * size.k
        op = Op(
            kind, name, flops, moved, reads, size.m, size.n, size.k, size.groups, size.window, size.stride
        )
        return op, touched
    if "dot_product" in name or "attention" in name:
        return Op("attention", name, _counted(call, written), moved, reads), touched
    if name in _GATHERS:
        return Op("gather", name, 0, moved, reads), touched
    if "_norm" in name:
        return Op("norm", name, written, moved, reads), touched
    flops = 0 if name in _COPIES else _counted(call, written)
    return Op("other", name, flops, moved, reads), touched


def _counted(call: Call, written: int) -> int:
    """FLOPs as torch's own counter has them, or one for each element of the output."""
    formula = flop_registry.get(getattr(call.func, "overloadpacket", None))
    if formula is None:
        return written
    flops: int = formula(*call.args, **call.kwargs, out_val=call.result)
    return flops


def _bytes(tensor: Tensor) -> int:
    """Distinct bytes of a dense tensor: a dimension of stride 0 is one element, however long."""
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod([size if stride else min(size, 1) for size, stride in lengths]) * tensor.element_size()


def _touched(call: Call, name: str, weight: Tensor) -> int:
    """Bytes of a weight that an operator reads: the view it was given, or the rows it looks up."""
    whole: int = min(_bytes(weight), weight.untyped_storage().nbytes())
    if name in _LOOKUPS and weight is call.args[0]:
        indices: Tensor = call.args[1]
        row_bytes: int = weight.shape[1:].numel() * weight.element_size()
        return min(whole, indices.numel() * row_bytes)
    if name in _GATHERS and weight is call.args[0]:
        return min(whole, sum(t.numel() * t.element_size() for t in tensors_in(call.result)))
    return whole
