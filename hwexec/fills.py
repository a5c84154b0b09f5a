"""Memsets of a captured graph made kernels.

Libraries zero workspaces ahead of some products (split-K). A graph hands such a memset to a copy engine, and layers stand still
until that has come round to it: on two H100 7 us for one, and 14 to 21 in four of five networks while the engines bring weights;
resnet50 has 9, convnext_base 30 (results/h100-pair-4/trials/layers.txt). A kernel that writes the same bytes stays on the
compute engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from hwexec.driver import load_driver

MEMSET = 2
"""CU_GRAPH_NODE_TYPE_MEMSET."""
THREADS, MOST_BLOCKS = 256, 1024
WORD = 4
"""Bytes that a thread writes at once."""

_PTX = b"""
.version 6.0
.target sm_70
.address_size 64
.visible .entry fill(.param .u64 to, .param .u64 words, .param .u32 value)
{
    .reg .pred %past;
    .reg .b32 %value, %block, %threads, %thread, %blocks;
    .reg .b64 %to, %words, %at, %thread64, %step, %address;
    ld.param.u64 %to, [to];
    ld.param.u64 %words, [words];
    ld.param.u32 %value, [value];
    cvta.to.global.u64 %to, %to;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mov.u32 %thread, %tid.x;
    mov.u32 %blocks, %nctaid.x;
    mul.wide.u32 %at, %block, %threads;
    cvt.u64.u32 %thread64, %thread;
    add.u64 %at, %at, %thread64;
    mul.wide.u32 %step, %blocks, %threads;
next:
    setp.ge.u64 %past, %at, %words;
    @%past bra done;
    shl.b64 %address, %at, 2;
    add.u64 %address, %to, %address;
    st.global.u32 [%address], %value;
    add.u64 %at, %at, %step;
    bra next;
done:
    ret;
}
\0"""


class _Memset(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS_v1."""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Kernel(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
    )


def memsets_to_kernels(graph: int, gpu: int) -> int:
    """Replace what memsets of this CUgraph a kernel can do, its context `gpu`'s and current; how many those were.

    The graph must not be capturing any more, nor be instantiated yet. A memset stays where the driver refuses a step, where it
    writes rows or odd bytes, or where its edges say more than that one node comes before another.
    """
    driver = load_driver()
    if driver is None:
        return 0
    try:
        found = [node for node in _nodes(driver, graph) if _is_memset(driver, node)]
        return sum(_replace(driver, graph, node, _fill(gpu)) for node in found)
    except (_Refused, AttributeError):  # a driver that lacks one of these calls
        return 0


class _Refused(Exception):
    pass


def _checked(code: int) -> None:
    if code != 0:
        raise _Refused


@cache
def _fill(gpu: int) -> int:
    """The kernel in the context of `gpu`, which is current, as long as the process lasts. _Refused where it cannot be had now."""
    driver = load_driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _checked(driver.cuModuleLoadData(ctypes.byref(module), _PTX))
    _checked(driver.cuModuleGetFunction(ctypes.byref(function), module, b"fill"))
    return function.value or 0


def _nodes(driver: Any, graph: int) -> Sequence[int]:
    return _listed(lambda nodes, count: driver.cuGraphGetNodes(ctypes.c_void_p(graph), nodes, count))


def _listed(call: Any) -> Sequence[int]:
    """Nodes by a call that first says how many there are, and then which."""
    count = ctypes.c_size_t()
    _checked(call(None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    if count.value:
        _checked(call(nodes, ctypes.byref(count)))
    return [node for node in nodes if node is not None]


def _is_memset(driver: Any, node: int) -> bool:
    kind = ctypes.c_int()
    _checked(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
    return kind.value == MEMSET


def _replace(driver: Any, graph: int, node: int, function: int) -> bool:
    """Whether a kernel stands in the place of this memset now. Where it does not, the graph writes what it wrote."""
    owner, old = ctypes.c_void_p(graph), ctypes.c_void_p(node)
    memset = _Memset()
    try:
        _checked(driver.cuGraphMemsetNodeGetParams(old, ctypes.byref(memset)))
        size_bytes = memset.width * memset.element
        if memset.height != 1 or memset.to % WORD or size_bytes % WORD:
            return False
        # without edge data these refuse edges that have some
        before = _listed(lambda nodes, count: driver.cuGraphNodeGetDependencies(old, nodes, count))
        behind = _listed(lambda nodes, count: driver.cuGraphNodeGetDependentNodes(old, nodes, count))
    except _Refused:
        return False
    words = size_bytes // WORD
    given = (
        ctypes.c_uint64(memset.to),
        ctypes.c_uint64(words),
        ctypes.c_uint32(_repeated(memset.value, memset.element)),
    )
    arguments = (ctypes.c_void_p * len(given))(*(ctypes.addressof(value) for value in given))
    blocks = max(1, min(MOST_BLOCKS, -(-words // THREADS)))
    kernel = _Kernel(function, blocks, 1, 1, THREADS, 1, 1, 0, arguments, None)
    new = ctypes.c_void_p()
    code = driver.cuGraphAddKernelNode(
        ctypes.byref(new), owner, _pointers(before), ctypes.c_size_t(len(before)), ctypes.byref(kernel)
    )
    if code != 0:
        return False
    news = [new.value or 0] * len(behind)
    code = driver.cuGraphAddDependencies(
        owner, _pointers(news), _pointers(behind), ctypes.c_size_t(len(behind))
    )
    if code != 0:
        driver.cuGraphDestroyNode(new)
        return False
    # were this refused, both would write the same bytes, in the same place of the order
    return bool(driver.cuGraphDestroyNode(old) == 0)


def _pointers(nodes: Sequence[int]) -> Any:
    return (ctypes.c_void_p * len(nodes))(*nodes) if nodes else None


def _repeated(value: int, element: int) -> int:
    """A memset's value of 1, 2 or 4 bytes, as often as a word has room for it."""
    return int.from_bytes(
        (value & (1 << 8 * element) - 1).to_bytes(element, "little") * (WORD // element), "little"
    )
