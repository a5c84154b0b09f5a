"""Random weights that are filled late: once, in their last dtype, by all threads, and only those that live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

LARGE = 1 << 20
"""Random fillings of so many elements are put off; a piece of so many is filled by one thread from one seed."""


@dataclass(frozen=True, slots=True)
class Filling:
    """A random in-place operator that waits, over all of one storage, which may die before."""

    storage: StorageWeakRef
    dtype: torch.dtype
    operator: Any
    arguments: tuple[Any, ...]
    seed: int

    def alive(self) -> torch.UntypedStorage | None:
        return cast(torch.UntypedStorage | None, torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata))

    def fill(self, piece: Tensor, number: int) -> None:
        """Each piece has a seed of its own, so that the number of threads changes no value."""
        self.operator(piece, *self.arguments, generator=torch.Generator().manual_seed(self.seed + number))


class Later(TorchDispatchMode):
    """Puts off the random filling of tensors from `least` elements up until an operator reads them, or `write_all`.

    torch fills with one thread, and a model with rules of its own twice: minutes for eight billion weights. Put off, each
    is filled once, in its last dtype, by all threads; what dies or moves to the meta device before is not filled at all,
    and memory that nobody wrote takes no room. Whatever else a constructor computes is computed as ever.
    """

    _RANDOM = frozenset({"aten::normal_", "aten::uniform_", "aten::exponential_", "aten::log_normal_"})
    _DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._least = least
        self._fillings: dict[int, Filling] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.name() in self._RANDOM and not kwargs and self._may_wait(args[0]):
            storage, dtype = args[0].untyped_storage(), args[0].dtype
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
            self._fillings[storage._cdata] = Filling(weak(storage), dtype, func, tuple(args[1:]), seed)
            return args[0]
        if self._fillings and not func.is_view:
            self._write(_storages((*args, *kwargs.values())))
        return func(*args, **kwargs)

    def _may_wait(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.dtype not in self._DTYPES or tensor.numel() < self._least:
            return False
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        return whole and tensor.is_contiguous()

    def cast(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """`flat`, which is all of its storage, in `dtype`. A filling that was put off becomes one of the new storage."""
        old = flat.untyped_storage()
        filling = self._fillings.get(old._cdata)
        if filling is None or filling.dtype != flat.dtype:
            self._write([old])
            return flat.to(dtype)
        del self._fillings[old._cdata]
        made = torch.empty_like(flat, dtype=dtype)
        new = made.untyped_storage()
        self._fillings[new._cdata] = replace(filling, storage=weak(new), dtype=dtype)
        return made

    def write_all(self) -> None:
        """Fill what still lives and waits."""
        living = [filling.alive() for filling in self._fillings.values()]
        self._write(storage for storage in living if storage is not None)
        self._fillings.clear()

    def _write(self, storages: Iterable[torch.UntypedStorage]) -> None:
        jobs: list[tuple[Filling, Tensor, int]] = []
        for storage in storages:
            filling = self._fillings.pop(storage._cdata, None)
            if filling is not None:
                flat = torch.empty(0, dtype=filling.dtype).set_(storage)
                jobs += [(filling, piece, number) for number, piece in enumerate(torch.split(flat, LARGE))]
        if jobs:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(lambda job: job[0].fill(*job[1:]), jobs))


def weak(storage: torch.UntypedStorage) -> StorageWeakRef:
    """Keeps the identity `_cdata` from being used again, and no bytes."""
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _storages(values: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided:  # others have none
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)
