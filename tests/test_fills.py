"""Memsets of a captured graph made kernels, on a driver that keeps its graph in Python; on a real one in test_gpu_executor."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwexec import fills

OK, REFUSED, LOSSY = 0, 1, 918
KERNEL = 0


@dataclass
class Node:
    kind: int
    memset: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    """Address, value, bytes of an element, elements and rows; of a kernel made of one, address, words, value, blocks, threads."""
    before: list[int] = field(default_factory=list)


class Driver:
    """libcuda, as far as graphs go. `refuses` names the calls that fail, `annotated` nodes whose edges say more."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.refuses: set[str] = set()
        self.annotated: set[int] = set()
        self.loaded = 0
        self.handles = count(100)

    def add(self, kind: int, *before: int, memset: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)) -> int:
        handle = next(self.handles)
        self.nodes[handle] = Node(kind, memset, list(before))
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
        assert (module.value, name) == (7, b"fill")
        function._obj.value = 8
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

    def _cuGraphNodeGetDependencies(self, node: Any, nodes: Any, count: Any) -> int:
        if node.value in self.annotated:
            return LOSSY
        return self._list(self.nodes[node.value].before, nodes, count)

    def _cuGraphNodeGetDependentNodes(self, node: Any, nodes: Any, count: Any) -> int:
        return self._list(self.behind(node.value), nodes, count)

    def _cuGraphAddKernelNode(self, new: Any, graph: Any, before: Any, count: Any, params: Any) -> int:
        kernel = params._obj
        assert kernel.function == 8
        kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32)
        given = [kind.from_address(kernel.arguments[at]).value for at, kind in enumerate(kinds)]
        listed = list(before[: count.value]) if count.value else []
        handle = self.add(KERNEL, *listed, memset=(*given, kernel.gridx, kernel.blockx))
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
    monkeypatch.setattr(fills, "load_driver", lambda: made)
    fills._fill.cache_clear()
    yield made
    fills._fill.cache_clear()


def product(driver: Driver) -> tuple[int, int, int, int]:
    """Two kernels ahead of a memset of 1000 bytes, and a kernel behind it."""
    first, second = driver.add(KERNEL), driver.add(KERNEL)
    memset = driver.add(fills.MEMSET, first, second, memset=(0x1000, 0xAB, 1, 1000, 1))
    return first, second, memset, driver.add(KERNEL, memset)


def test_a_kernel_takes_the_place_of_a_memset(driver: Driver) -> None:
    first, second, memset, last = product(driver)
    assert fills.memsets_to_kernels(1, 0) == 1
    assert memset not in driver.nodes
    (fill,) = driver.kernels()
    assert fill.memset == (0x1000, 250, 0xABABABAB, 1, fills.THREADS)
    assert fill.before == [first, second]
    (made,) = driver.nodes[last].before
    assert driver.nodes[made] is fill


def test_a_first_memset_that_nothing_waits_for_is_replaced_as_well(driver: Driver) -> None:
    driver.add(fills.MEMSET, memset=(0x1000, 0, 4, 2**20, 1))
    assert fills.memsets_to_kernels(1, 0) == 1
    (fill,) = driver.kernels()
    assert fill.memset == (0x1000, 2**20, 0, fills.MOST_BLOCKS, fills.THREADS)
    assert fill.before == []


def test_memsets_one_behind_the_other_keep_their_order(driver: Driver) -> None:
    first = driver.add(fills.MEMSET, memset=(0x1000, 1, 4, 8, 1))
    driver.add(fills.MEMSET, first, memset=(0x1000, 2, 4, 8, 1))
    assert fills.memsets_to_kernels(1, 0) == 2
    one, two = driver.kernels()
    assert (one.memset[2], two.memset[2]) == (1, 2)
    assert driver.nodes[two.before[0]] is one
    assert one.before == []


@pytest.mark.parametrize(
    "memset", [(0x1000, 0, 1, 1000, 2), (0x1001, 0, 1, 1000, 1), (0x1000, 0, 1, 1001, 1)]
)
def test_rows_and_odd_bytes_stay_memsets(driver: Driver, memset: tuple[int, int, int, int, int]) -> None:
    handle = driver.add(fills.MEMSET, memset=memset)
    assert fills.memsets_to_kernels(1, 0) == 0
    assert list(driver.nodes) == [handle]


def test_edges_that_say_more_keep_their_memset(driver: Driver) -> None:
    _, _, memset, _ = product(driver)
    driver.annotated.add(memset)
    assert fills.memsets_to_kernels(1, 0) == 0
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
    assert fills.memsets_to_kernels(1, 0) == 0
    assert {handle: node.before for handle, node in driver.nodes.items()} == before
    assert driver.nodes[last].before == [memset]


def test_a_memset_that_cannot_be_taken_away_writes_the_same_beside_its_kernel(driver: Driver) -> None:
    first, second, memset, last = product(driver)
    driver.refuses.add("cuGraphDestroyNode")
    assert fills.memsets_to_kernels(1, 0) == 0
    (fill,) = driver.kernels()
    assert fill.before == driver.nodes[memset].before == [first, second]
    assert [driver.nodes[at] for at in driver.nodes[last].before] == [driver.nodes[memset], fill]


def test_a_module_that_could_not_be_loaded_is_tried_again(driver: Driver) -> None:
    product(driver)
    driver.refuses.add("cuModuleLoadData")
    assert fills.memsets_to_kernels(1, 0) == 0
    driver.refuses.clear()
    assert fills.memsets_to_kernels(1, 0) == 1


def test_parameters_lie_where_the_driver_looks_for_them() -> None:
    """Offsets of CUDA_MEMSET_NODE_PARAMS_v1 and CUDA_KERNEL_NODE_PARAMS_v1 in cuda.h, 64 bits."""

    def offsets(kind: type[ctypes.Structure], *names: str) -> list[int]:
        return [getattr(kind, name).offset for name in names]

    memset = offsets(fills._Memset, "to", "pitch", "value", "element", "width", "height")
    assert (memset, ctypes.sizeof(fills._Memset)) == ([0, 8, 16, 20, 24, 32], 40)
    kernel = offsets(
        fills._Kernel, "function", "gridx", "gridz", "blockx", "shared_bytes", "arguments", "extra"
    )
    assert (kernel, ctypes.sizeof(fills._Kernel)) == ([0, 8, 16, 20, 32, 40, 48], 56)


def test_a_driver_without_such_calls_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fills, "load_driver", object)
    assert fills.memsets_to_kernels(1, 0) == 0
    monkeypatch.setattr(fills, "load_driver", lambda: None)
    assert fills.memsets_to_kernels(1, 0) == 0


def test_the_kernel_is_made_once_and_only_where_it_is_needed(driver: Driver) -> None:
    driver.add(KERNEL)
    assert fills.memsets_to_kernels(1, 0) == 0
    assert driver.loaded == 0
    for _ in range(2):
        product(driver)
        assert fills.memsets_to_kernels(1, 0) == 1
    assert driver.loaded == 1


@given(value=st.integers(0, 2**32 - 1), element=st.sampled_from((1, 2, 4)))
def test_words_repeat_what_a_memset_writes(value: int, element: int) -> None:
    word = fills._repeated(value, element).to_bytes(4, "little")
    assert word == value.to_bytes(4, "little")[:element] * (4 // element)
