"""Memsets and copies of a captured graph made kernels, on a driver that keeps its graph in Python; on a real one in
test_gpu_executor."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwexec import nodes

OK, REFUSED, LOSSY = 0, 1, 918
KERNEL = 0
KERNELS = {"fill": 8, "copy4": 9, "copy16": 10}
HOST, DEVICE = 1, 2


@dataclass
class Node:
    kind: int
    memset: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Address, value, bytes of an element, elements and rows; of a kernel made of one, address, words, value, blocks, threads."""
    memcpy: dict[str, int] = field(default_factory=dict)
    """Fields of a copy that are not 0."""
    kernel: str = ""
    before: list[int] = field(default_factory=list)


class Driver:
    """libcuda, as far as graphs go. `refuses` names the calls that fail, `annotated` nodes whose edges say more."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.refuses: set[str] = set()
        self.annotated: set[int] = set()
        self.owners: dict[int, tuple[int, int]] = {}
        """By address, of what kind its memory is and which GPU's."""
        self.loaded = 0
        self.handles = count(100)

    def add(self, kind: int, *before: int, memset: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)) -> int:
        handle = next(self.handles)
        self.nodes[handle] = Node(kind, memset, before=list(before))
        return handle

    def behind(self, handle: int) -> list[int]:
        return [at for at, node in self.nodes.items() if handle in node.before]

    def kernels(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.kind == KERNEL and node.memset[1]]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        call = getattr(self, f"_{name}", None)
        if call is None:
            raise AttributeError(name)
        return lambda *given: REFUSED if name in self.refuses else call(*given)

    def _cuModuleLoadData(self, module: Any, image: bytes) -> int:
        assert image.endswith(b"\0")
        self.loaded += 1
        module._obj.value = 7
        return OK

    def _cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        assert module.value == 7
        function._obj.value = KERNELS[name.decode()]
        return OK

    def _list(self, handles: list[int], nodes: Any, count: Any) -> int:
        for at, handle in enumerate(handles if nodes is not None else ()):
            nodes[at] = handle
        count._obj.value = len(handles)
        return OK

    def _cuGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        return self._list(list(self.nodes), nodes, count)

    def _cuGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = self.nodes[node.value].kind
        return OK

    def _cuGraphMemsetNodeGetParams(self, node: Any, params: Any) -> int:
        found = params._obj
        found.to, found.value, found.element, found.width, found.height = self.nodes[node.value].memset
        return OK

    def _cuGraphMemcpyNodeGetParams(self, node: Any, params: Any) -> int:
        for name, value in self.nodes[node.value].memcpy.items():
            setattr(params._obj, name, value)
        return OK

    def _cuPointerGetAttribute(self, value: Any, attribute: int, address: Any) -> int:
        if address.value not in self.owners:
            return REFUSED
        value._obj.value = self.owners[address.value][(2, 9).index(attribute)]
        return OK

    def _cuGraphNodeGetDependencies(self, node: Any, nodes: Any, count: Any) -> int:
        if node.value in self.annotated:
            return LOSSY
        return self._list(self.nodes[node.value].before, nodes, count)

    def _cuGraphNodeGetDependentNodes(self, node: Any, nodes: Any, count: Any) -> int:
        return self._list(self.behind(node.value), nodes, count)

    def _cuGraphAddKernelNode(self, new: Any, graph: Any, before: Any, count: Any, params: Any) -> int:
        kernel = params._obj
        name = next(n for n, handle in KERNELS.items() if handle == kernel.function)
        kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32 if name == "fill" else ctypes.c_uint64)
        given = [kind.from_address(kernel.arguments[at]).value for at, kind in enumerate(kinds)]
        listed = list(before[: count.value]) if count.value else []
        handle = self.add(KERNEL, *listed, memset=(*given, kernel.gridx, kernel.blockx))
        self.nodes[handle].kernel = name
        new._obj.value = handle
        return OK

    def _cuGraphAddDependencies(self, graph: Any, origins: Any, ends: Any, count: Any) -> int:
        for at in range(count.value):
            self.nodes[ends[at]].before.append(origins[at])
        return OK

    def _cuGraphDestroyNode(self, node: Any) -> int:
        del self.nodes[node.value]
        for other in self.nodes.values():
            other.before = [handle for handle in other.before if handle != node.value]
        return OK


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(nodes, "load_driver", lambda: made)
    nodes._function.cache_clear()
    nodes._module.cache_clear()
    yield made
    nodes._function.cache_clear()
    nodes._module.cache_clear()


def copied(driver: Driver, origin: int, to: int, size_bytes: int, *before: int, kind: int = DEVICE) -> int:
    """A copy of one row to GPU 0; of pinned host memory the driver says the same, or that it is the host's."""
    handle = driver.add(nodes.MEMCPY, *before)
    where = "host" if kind == HOST else "device"
    driver.nodes[handle].memcpy = {
        "origin_kind": kind, f"origin_{where}": origin, "to_kind": DEVICE, "to_device": to,
        "width": size_bytes, "height": 1, "depth": 1,
    }  # fmt: skip
    driver.owners |= {origin: (kind, 0), to: (DEVICE, 0)}
    return handle


def product(driver: Driver) -> tuple[int, int, int, int]:
    """Two kernels ahead of a memset of 1000 bytes, and a kernel behind it."""
    first, second = driver.add(KERNEL), driver.add(KERNEL)
    memset = driver.add(nodes.MEMSET, first, second, memset=(0x1000, 0xAB, 1, 1000, 1))
    return first, second, memset, driver.add(KERNEL, memset)


def test_a_kernel_takes_the_place_of_a_memset(driver: Driver) -> None:
    first, second, memset, last = product(driver)
    assert nodes.to_kernels(1, 0) == 1
    assert memset not in driver.nodes
    (fill,) = driver.kernels()
    assert fill.memset == (0x1000, 250, 0xABABABAB, 1, nodes.THREADS)
    assert fill.before == [first, second]
    (made,) = driver.nodes[last].before
    assert driver.nodes[made] is fill


def test_a_first_memset_that_nothing_waits_for_is_replaced_as_well(driver: Driver) -> None:
    driver.add(nodes.MEMSET, memset=(0x1000, 0, 4, 2**20, 1))
    assert nodes.to_kernels(1, 0) == 1
    (fill,) = driver.kernels()
    assert fill.memset == (0x1000, 2**20, 0, nodes.MOST_BLOCKS, nodes.THREADS)
    assert fill.before == []


def test_memsets_one_behind_the_other_keep_their_order(driver: Driver) -> None:
    first = driver.add(nodes.MEMSET, memset=(0x1000, 1, 4, 8, 1))
    driver.add(nodes.MEMSET, first, memset=(0x1000, 2, 4, 8, 1))
    assert nodes.to_kernels(1, 0) == 2
    one, two = driver.kernels()
    assert (one.memset[2], two.memset[2]) == (1, 2)
    assert driver.nodes[two.before[0]] is one
    assert one.before == []


@pytest.mark.parametrize(
    "memset", [(0x1000, 0, 1, 1000, 2), (0x1001, 0, 1, 1000, 1), (0x1000, 0, 1, 1001, 1)]
)
def test_rows_and_odd_bytes_stay_memsets(driver: Driver, memset: tuple[int, int, int, int, int]) -> None:
    handle = driver.add(nodes.MEMSET, memset=memset)
    assert nodes.to_kernels(1, 0) == 0
    assert list(driver.nodes) == [handle]


def test_edges_that_say_more_keep_their_memset(driver: Driver) -> None:
    _, _, memset, _ = product(driver)
    driver.annotated.add(memset)
    assert nodes.to_kernels(1, 0) == 0
    assert len(driver.nodes) == 4


@pytest.mark.parametrize(
    "call",
    [
        "cuGraphGetNodes",
        "cuGraphNodeGetType",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuGraphMemsetNodeGetParams",
        "cuGraphNodeGetDependentNodes",
        "cuGraphAddKernelNode",
        "cuGraphAddDependencies",
    ],
)
def test_a_driver_that_refuses_leaves_the_graph_as_it_was(driver: Driver, call: str) -> None:
    _, _, memset, last = product(driver)
    before = {handle: list(node.before) for handle, node in driver.nodes.items()}
    driver.refuses.add(call)
    assert nodes.to_kernels(1, 0) == 0
    assert {handle: node.before for handle, node in driver.nodes.items()} == before
    assert driver.nodes[last].before == [memset]


def test_a_memset_that_cannot_be_taken_away_writes_the_same_beside_its_kernel(driver: Driver) -> None:
    first, second, memset, last = product(driver)
    driver.refuses.add("cuGraphDestroyNode")
    assert nodes.to_kernels(1, 0) == 0
    (fill,) = driver.kernels()
    assert fill.before == driver.nodes[memset].before == [first, second]
    assert [driver.nodes[at] for at in driver.nodes[last].before] == [driver.nodes[memset], fill]


def test_a_module_that_could_not_be_loaded_is_tried_again(driver: Driver) -> None:
    product(driver)
    driver.refuses.add("cuModuleLoadData")
    assert nodes.to_kernels(1, 0) == 0
    driver.refuses.clear()
    assert nodes.to_kernels(1, 0) == 1


@pytest.mark.parametrize("kind", [HOST, DEVICE])
@pytest.mark.parametrize(
    ("origin", "to", "size_bytes", "kernel", "words"),
    [
        (0x1000, 0x2000, 1152, "copy16", 72),
        (0x1004, 0x2000, 1152, "copy4", 288),
        (0x1000, 0x2000, 20, "copy4", 5),
    ],
)
def test_a_copy_of_a_layer_is_a_kernel(
    origin: int, to: int, size_bytes: int, kernel: str, words: int, kind: int, driver: Driver
) -> None:
    first = driver.add(KERNEL)
    last = driver.add(KERNEL, copied(driver, origin, to, size_bytes, first, kind=kind))
    assert nodes.to_kernels(1, 0, []) == 1
    (made,) = driver.kernels()
    assert (made.kernel, made.memset[:3], made.before) == (kernel, (to, words, origin), [first])
    (before,) = driver.nodes[last].before
    assert driver.nodes[before] is made


@pytest.mark.parametrize("in_arena", [True, False])
def test_of_a_partners_memory_only_arenas_are_read_by_kernels(in_arena: bool, driver: Driver) -> None:
    """GPUs are let into each other's memory for these."""
    arena = torch.empty(4096, dtype=torch.uint8)
    origin = arena.data_ptr() + 64 if in_arena else 0x1000
    copied(driver, origin, 0x2000, 16)
    driver.owners[origin] = (DEVICE, 1)
    assert nodes.to_kernels(1, 0, [arena]) == in_arena


def test_copies_into_arenas_and_of_no_one_who_gives_arenas_stay(driver: Driver) -> None:
    arena = torch.empty(4096, dtype=torch.uint8)
    own = copied(driver, 0x1000, arena.data_ptr() + 4092, 4)
    behind = copied(driver, 0x1000, arena.data_ptr() + 4096, 4)
    assert nodes.to_kernels(1, 0) == 0
    assert nodes.to_kernels(1, 0, [arena]) == 1
    assert own in driver.nodes
    assert behind not in driver.nodes


@pytest.mark.parametrize(
    "odd",
    [
        {"height": 2}, {"depth": 2}, {"origin_x": 4}, {"to_y": 1}, {"to_array": 5}, {"width": 1151}, {"to_device": 0x2002},
        {"origin_device": 0x7000}, {"to_device": 0x3000}, {"to_device": 0x4000},
    ],
)  # fmt: skip
def test_a_copy_that_no_kernel_can_do_stays(odd: dict[str, int], driver: Driver) -> None:
    """Rows, offsets, arrays, odd bytes, memory that the driver does not know, another GPU's, and the host's."""
    handle = copied(driver, 0x1000, 0x2000, 1152)
    driver.owners |= {0x2002: (DEVICE, 0), 0x3000: (DEVICE, 1), 0x4000: (HOST, 0)}
    driver.nodes[handle].memcpy |= odd
    assert nodes.to_kernels(1, 0, []) == 0
    assert list(driver.nodes) == [handle]


@pytest.mark.parametrize("call", ["cuGraphMemcpyNodeGetParams", "cuPointerGetAttribute"])
def test_a_driver_that_says_nothing_of_copies_has_its_memsets_replaced(call: str, driver: Driver) -> None:
    product(driver)
    copied(driver, 0x1000, 0x2000, 1152)
    driver.refuses.add(call)
    assert nodes.to_kernels(1, 0, []) == 1
    assert [node.kernel for node in driver.kernels()] == ["fill"]


def test_parameters_lie_where_the_driver_looks_for_them() -> None:
    """Offsets of CUDA_MEMSET_NODE_PARAMS_v1, CUDA_KERNEL_NODE_PARAMS_v1 and CUDA_MEMCPY3D_v2 in cuda.h, 64 bits."""

    def offsets(kind: type[ctypes.Structure], *names: str) -> list[int]:
        return [getattr(kind, name).offset for name in names]

    memset = offsets(nodes._Memset, "to", "pitch", "value", "element", "width", "height")
    assert (memset, ctypes.sizeof(nodes._Memset)) == ([0, 8, 16, 20, 24, 32], 40)
    kernel = offsets(
        nodes._Kernel, "function", "gridx", "gridz", "blockx", "shared_bytes", "arguments", "extra"
    )
    assert (kernel, ctypes.sizeof(nodes._Kernel)) == ([0, 8, 16, 20, 32, 40, 48], 56)
    memcpy = offsets(
        nodes._Memcpy, "origin_kind", "origin_host", "origin_device", "origin_array", "origin_pitch", "to_x", "to_kind",
        "to_host", "to_device", "to_array", "to_pitch", "width", "depth",
    )  # fmt: skip
    assert memcpy == [32, 40, 48, 56, 72, 88, 120, 128, 136, 144, 160, 176, 192]
    assert ctypes.sizeof(nodes._Memcpy) == 200


def test_a_driver_without_such_calls_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "load_driver", object)
    assert nodes.to_kernels(1, 0) == 0
    monkeypatch.setattr(nodes, "load_driver", lambda: None)
    assert nodes.to_kernels(1, 0) == 0


def test_the_kernel_is_made_once_and_only_where_it_is_needed(driver: Driver) -> None:
    driver.add(KERNEL)
    assert nodes.to_kernels(1, 0) == 0
    assert driver.loaded == 0
    for _ in range(2):
        product(driver)
        assert nodes.to_kernels(1, 0) == 1
    assert driver.loaded == 1


@given(value=st.integers(0, 2**32 - 1), element=st.sampled_from((1, 2, 4)))
def test_words_repeat_what_a_memset_writes(value: int, element: int) -> None:
    word = nodes._repeated(value, element).to_bytes(4, "little")
    assert word == value.to_bytes(4, "little")[:element] * (4 // element)
