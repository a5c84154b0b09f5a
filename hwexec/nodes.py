"""What a captured graph would have copy engines do for its layers, done by kernels.

A graph hands memsets and copies to a copy engine, and that is busy in a cold start. Libraries zero workspaces ahead of some
products (split-K): on two H100 7 us for one, and 14 to 21 in four of five networks while the engines bring weights; resnet50
has 9, convnext_base 30 (results/h100-pair-4/trials/layers.txt). A layer that copies a weight before it uses it (`clone`, as each
attention of Swin-V2 does with a bias) and reads that in place from host memory stands behind all weights that are under way: one
such bias of 1 KiB made a start of 5.6 ms take 7.1 (results/h100-pair-7/sweep). Kernels that write the same bytes stay on the
compute engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from hwexec.driver import load_driver

MEMCPY, MEMSET = 1, 2
"""CU_GRAPH_NODE_TYPE_MEMCPY and _MEMSET."""
THREADS, MOST_BLOCKS = 256, 1024
WORD, WIDE = 4, 16
"""Bytes that a thread writes at once; of a copy `WIDE` where all is aligned to that."""
_HOST, _GPU = 1, 2
"""CU_MEMORYTYPE_HOST and _DEVICE."""
_KIND, _ORDINAL = 2, 9
"""CU_POINTER_ATTRIBUTE_MEMORY_TYPE and _DEVICE_ORDINAL: the driver refuses them for memory that it does not know."""

_LOOP = """
.visible .entry %(name)s(.param .u64 to, .param .u64 words, %(given)s)
{
    .reg .pred %%past;
    .reg .b32 %%value, %%block, %%threads, %%thread, %%blocks, %%b, %%c, %%d;
    .reg .b64 %%to, %%origin, %%words, %%at, %%thread64, %%step, %%offset, %%address;
    ld.param.u64 %%to, [to];
    ld.param.u64 %%words, [words];
    cvta.to.global.u64 %%to, %%to;
    %(begin)s
    mov.u32 %%block, %%ctaid.x;
    mov.u32 %%threads, %%ntid.x;
    mov.u32 %%thread, %%tid.x;
    mov.u32 %%blocks, %%nctaid.x;
    mul.wide.u32 %%at, %%block, %%threads;
    cvt.u64.u32 %%thread64, %%thread;
    add.u64 %%at, %%at, %%thread64;
    mul.wide.u32 %%step, %%blocks, %%threads;
next:
    setp.ge.u64 %%past, %%at, %%words;
    @%%past bra done;
    shl.b64 %%offset, %%at, %(shift)s;
    add.u64 %%address, %%to, %%offset;
    %(word)s
    add.u64 %%at, %%at, %%step;
    bra next;
done:
    ret;
}
"""
_ORIGIN = {
    "given": ".param .u64 origin",
    "begin": "ld.param.u64 %origin, [origin]; cvta.to.global.u64 %origin, %origin;",
}
_FOUR = "{%value, %b, %c, %d}"
_PTX = "\n.version 6.0\n.target sm_70\n.address_size 64\n" + "".join(
    _LOOP % kernel
    for kernel in (
        {
            "name": "fill",
            "given": ".param .u32 value",
            "begin": "ld.param.u32 %value, [value];",
            "shift": "2",
            "word": "st.global.u32 [%address], %value;",
        },
        _ORIGIN
        | {
            "name": "copy4",
            "shift": "2",
            "word": "add.u64 %offset, %origin, %offset; ld.global.u32 %value, [%offset]; st.global.u32 [%address], %value;",
        },
        _ORIGIN
        | {
            "name": "copy16",
            "shift": "4",
            "word": "add.u64 %offset, %origin, %offset; "
            f"ld.global.v4.u32 {_FOUR}, [%offset]; st.global.v4.u32 [%address], {_FOUR};",
        },
    )
)


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


class _Memcpy(ctypes.Structure):
    """CUDA_MEMCPY3D_v2; `origin` and `to` are what it has of host and of device, whichever its kind says."""

    _fields_ = (
        *((f"origin_{what}", ctypes.c_size_t) for what in ("x", "y", "z", "level")),
        ("origin_kind", ctypes.c_int),
        *((f"origin_{what}", ctypes.c_uint64) for what in ("host", "device", "array", "context")),
        *((f"origin_{what}", ctypes.c_size_t) for what in ("pitch", "height")),
        *((f"to_{what}", ctypes.c_size_t) for what in ("x", "y", "z", "level")),
        ("to_kind", ctypes.c_int),
        *((f"to_{what}", ctypes.c_uint64) for what in ("host", "device", "array", "context")),
        *((f"to_{what}", ctypes.c_size_t) for what in ("pitch", "height")),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
        ("depth", ctypes.c_size_t),
    )

    def one_row(self) -> tuple[int, int] | None:
        """Where it reads and where it writes; None of a copy of rows, or of one that begins elsewhere than at its pointers."""
        ends = [
            getattr(self, f"{end}_{what}")
            for end in ("origin", "to")
            for what in ("x", "y", "z", "level", "array")
        ]
        if any(ends) or self.height > 1 or self.depth > 1:
            return None
        origin = self.origin_host if self.origin_kind == _HOST else self.origin_device
        to = self.to_host if self.to_kind == _HOST else self.to_device
        return origin, to


class _Kernel(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
    )


def to_kernels(graph: int, gpu: int, arenas: Sequence[torch.Tensor] | None = None) -> int:
    """Replace what memsets of this CUgraph a kernel can do, its context `gpu`'s and current; how many nodes those were.

    With `arenas` also copies, but for those into them, which are a plan's own. The graph must not be capturing any more, nor be
    instantiated yet. A node stays where the driver refuses a step, where it writes rows, odd bytes or memory that is not the
    GPU's, where it reads memory that is neither that nor pinned nor an arena, or where its edges say more than that one node
    comes before another.
    """
    driver = load_driver()
    if driver is None:
        return 0
    work_of: dict[int, _WorkOf] = {MEMSET: _as_fill}
    if arenas is not None:
        work_of[MEMCPY] = partial(_as_copy, gpu, arenas)
    try:
        found = [(node, work_of.get(_kind(driver, node))) for node in _nodes(driver, graph)]
        return sum(_replace(driver, graph, node, gpu, work) for node, work in found if work is not None)
    except (_Refused, AttributeError):  # a driver that lacks one of these calls
        return 0


class _Refused(Exception):
    pass


def _checked(code: int) -> None:
    if code != 0:
        raise _Refused


@dataclass(frozen=True, slots=True)
class _Work:
    """What a kernel is to do: its name, how many words, and its arguments."""

    kernel: str
    words: int
    given: tuple[Any, ...]


_WorkOf = Callable[[Any, ctypes.c_void_p], _Work | None]
"""What a kernel is to do in the place of a node; None where it cannot. _Refused where the driver does not say."""


@cache
def _function(gpu: int, kernel: str) -> int:
    """The kernel in the context of `gpu`, which is current, as long as the process lasts. _Refused where it cannot be had now."""
    function = ctypes.c_void_p()
    _checked(load_driver().cuModuleGetFunction(ctypes.byref(function), _module(gpu), kernel.encode()))
    return function.value or 0


@cache
def _module(gpu: int) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    _checked(load_driver().cuModuleLoadData(ctypes.byref(module), _PTX.encode() + b"\0"))
    return module


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


def _kind(driver: Any, node: int) -> int:
    kind = ctypes.c_int()
    _checked(driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)))
    return kind.value


def _as_fill(driver: Any, node: ctypes.c_void_p) -> _Work | None:
    memset = _Memset()
    _checked(driver.cuGraphMemsetNodeGetParams(node, ctypes.byref(memset)))
    size_bytes = memset.width * memset.element
    if memset.height != 1 or memset.to % WORD or size_bytes % WORD:
        return None
    words = size_bytes // WORD
    value = ctypes.c_uint32(_repeated(memset.value, memset.element))
    return _Work("fill", words, (ctypes.c_uint64(memset.to), ctypes.c_uint64(words), value))


def _as_copy(gpu: int, arenas: Sequence[torch.Tensor], driver: Any, node: ctypes.c_void_p) -> _Work | None:
    memcpy = _Memcpy()
    _checked(driver.cuGraphMemcpyNodeGetParams(node, ctypes.byref(memcpy)))
    ends, size_bytes = memcpy.one_row(), memcpy.width
    if ends is None:
        return None
    origin, to = ends
    own = (_GPU, gpu)
    if _in(arenas, to) or _memory(driver, to) != own:
        return None
    kind, owner = _memory(driver, origin)
    # of another GPU's memory kernels here may read arenas alone
    if kind != _HOST and (kind, owner) != own and not _in(arenas, origin):
        return None
    word = next((w for w in (WIDE, WORD) if not (origin % w or to % w or size_bytes % w)), None)
    if word is None:
        return None
    words = size_bytes // word
    return _Work(f"copy{word}", words, (ctypes.c_uint64(to), ctypes.c_uint64(words), ctypes.c_uint64(origin)))


def _in(arenas: Sequence[torch.Tensor], address: int) -> bool:
    return any(arena.data_ptr() <= address < arena.data_ptr() + arena.numel() for arena in arenas)


def _memory(driver: Any, address: int) -> tuple[int, int]:
    """Of what kind it is, and whose: pinned host memory the GPU's that pinned it. _Refused where the driver does not know it."""
    found = []
    for attribute in (_KIND, _ORDINAL):
        value = ctypes.c_int()
        _checked(driver.cuPointerGetAttribute(ctypes.byref(value), attribute, ctypes.c_uint64(address)))
        found.append(value.value)
    kind, gpu = found
    return kind, gpu


def _replace(driver: Any, graph: int, node: int, gpu: int, work_of: _WorkOf) -> bool:
    """Whether a kernel stands in the place of this node now. Where it does not, the graph writes what it wrote."""
    owner, old = ctypes.c_void_p(graph), ctypes.c_void_p(node)
    try:
        work = work_of(driver, old)
        if work is None:
            return False
        # without edge data these refuse edges that have some
        before = _listed(lambda nodes, count: driver.cuGraphNodeGetDependencies(old, nodes, count))
        behind = _listed(lambda nodes, count: driver.cuGraphNodeGetDependentNodes(old, nodes, count))
        function = _function(gpu, work.kernel)
    except _Refused:
        return False
    arguments = (ctypes.c_void_p * len(work.given))(*(ctypes.addressof(value) for value in work.given))
    blocks = max(1, min(MOST_BLOCKS, -(-work.words // THREADS)))
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
