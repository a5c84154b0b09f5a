"""A fresh module made and brought to the device, dtype and values that were asked for; what shared bytes goes on sharing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sim import later
from sim.errors import InputError, require
from sim.later import Later, weak

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is asked for of a model, whoever makes it."""

    name: str
    batch: int
    dtype: torch.dtype
    seq: int | None
    device: Literal["cpu", "meta"]
    seed: int
    asked: bool
    """Whether the dtype was asked for."""

    def image(self, size: int) -> Tensor:
        shape = (self.batch, 3, size, size)
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def tokens(self, seq: int, vocabulary: int) -> Tensor:
        """Token numbers, (batch, seq) int64; the first ten are left out: paddings and marks live there."""
        if self.device == "meta":
            return torch.empty((self.batch, seq), dtype=torch.int64, device="meta")
        generator = torch.Generator().manual_seed(self.seed)
        low = min(10, vocabulary - 1)
        return torch.randint(low, vocabulary, (self.batch, seq), generator=generator)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating-point tensors made inside are of `dtype` where nobody says otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def construct(make: Callable[[], _T], recipe: Recipe) -> tuple[_T, Later]:
    """`make()` under the device and the seed asked for, and what waits to be filled; the caller's random state is left alone.

    A constructor that reads values (RegNet computes its widths with tensors) cannot run on the meta device: then it runs on
    the CPU, fills only what it reads, and `finish` moves the result. So a factory may be called twice.
    """
    late = Later(later.LARGE if recipe.device == "cpu" else 1)
    if recipe.device == "meta":
        try:
            with torch.device("meta"):
                return make(), late
        except InputError:
            raise
        except Exception:
            pass  # to the CPU, below
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), late:
        torch.manual_seed(recipe.seed)
        return make(), late


def finish(module: nn.Module, recipe: Recipe, late: Later, *, vary: bool, buffers: bool = True) -> None:
    """Bring a fresh module, in place, to its device and dtype, eval mode and no gradients, and fill what `late` put off.

    Floating-point parameters take the dtype, and floating-point buffers too if `buffers`, as Module.to does. `vary` adds
    noise to weights that are one constant (biases, BatchNorm statistics, ViT's head), else outputs of a fresh network may
    be all zero, and a weight bound to the wrong place would go unseen.
    """
    _move(module, recipe)
    _cast(module, recipe, late, buffers)
    if recipe.device != "meta":
        late.write_all()
        if vary:
            _add_noise(module, recipe.seed)
    module.eval()
    module.requires_grad_(False)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield owner, key, parameter
        for key, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            yield owner, key, buffer


def _move(module: nn.Module, recipe: Recipe) -> None:
    """To the recipe's device. Module.to would give each tensor a storage of its own; here what was shared stays shared."""
    storages: dict[int, torch.UntypedStorage] = {}
    keep: list[torch.UntypedStorage] = []  # an identity may not be used again while we look things up by it
    done: dict[int, Tensor] = {}
    for owner, key, tensor in list(_tensors(module)):
        if tensor.device.type == recipe.device:
            continue
        require(
            tensor.device.type != "meta",
            f"model {recipe.name!r}: {key!r} is on the meta device and has no values; make it on the CPU",
        )
        require(
            tensor.layout is torch.strided,
            f"model {recipe.name!r}: {key!r} is {tensor.layout}, whose bytes cannot be moved; make it a dense tensor",
        )
        if id(tensor) not in done:
            old = tensor.untyped_storage()
            if old._cdata not in storages:
                keep.append(old)
                new = torch.UntypedStorage(old.nbytes(), device=recipe.device)  # type: ignore[no-untyped-call]
                storages[old._cdata] = new.copy_(old, False) if recipe.device != "meta" else new
            moved = torch.empty(0, dtype=tensor.dtype, device=recipe.device)
            moved.set_(storages[old._cdata], tensor.storage_offset(), tensor.size(), tensor.stride())
            done[id(tensor)] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
        setattr(owner, key, done[id(tensor)])  # not into _parameters: an RNN keeps a second list in step here


def _cast(module: nn.Module, recipe: Recipe, late: Later, buffers: bool) -> None:
    """Floating-point tensors to the recipe's dtype; what was shared stays shared, as views of one new storage.

    An old storage goes with the last tensor that leaves it, so that few bytes are there twice.
    """
    flats: dict[int, tuple[torch.dtype, Tensor, StorageWeakRef]] = {}
    done: set[int] = set()
    for _, key, tensor in list(_tensors(module)):
        if id(tensor) in done or not tensor.is_floating_point() or not tensor.numel():
            continue
        done.add(id(tensor))
        if tensor.dtype == recipe.dtype or not (buffers or isinstance(tensor, nn.Parameter)):
            continue
        old = tensor.untyped_storage()
        if old._cdata not in flats:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(old)
            flats[old._cdata] = tensor.dtype, late.cast(flat, recipe.dtype), weak(old)
        was, flat, _ = flats[old._cdata]
        require(
            was == tensor.dtype,
            f"model {recipe.name!r}: {key!r} shares its storage with a tensor of another dtype, so neither can be "
            f"converted; build it in {recipe.dtype} or pass another --dtype",
        )
        tensor.data = flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def _add_noise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for _, _, tensor in _tensors(module):
            identity = tensor.untyped_storage()._cdata
            if identity in seen or not tensor.is_floating_point() or not tensor.numel():
                continue
            seen.add(identity)
            flat = tensor.flatten()
            if bool(flat[-1] == flat[0]) and bool((flat == flat[0]).all()):  # most end at the first question
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.add_(noise.to(tensor.dtype), alpha=0.02)
