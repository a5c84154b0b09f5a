"""A module's tensors as views of arenas, filled from wherever its weights are, and given back.

A module that is bound has its parameters and buffers re-pointed, the very same tensor objects. At rest they are CPU views
of the host arena: they can be read and loaded as ever, and what is written there is what the next cold start brings.
`Binding.release` gives the module its own memory back.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sim.errors import InputError, require
from sim.hints import first_line
from sim.network import Network
from sim.tracker import StorageTable

Weights = Mapping[str, torch.Tensor] | str | Path | Sequence[str | Path]
"""Where weights may come from beside the module itself: a state_dict, or safetensors files."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A tensor of a module, and how it lies in its storage. `original` shares the memory it had."""

    names: tuple[str, ...]
    tensor: torch.Tensor
    storage: int
    original: torch.Tensor
    persistent: bool

    def on(self, storage: torch.Tensor) -> torch.Tensor:
        """The same shape, strides and dtype over other bytes: uint8, as many as the storage has."""
        like = self.original
        whole = storage[: storage.numel() // like.itemsize * like.itemsize].view(like.dtype)
        return whole.as_strided(like.shape, like.stride(), whole.storage_offset() + like.storage_offset())


def slots_of(module: torch.nn.Module, network: Network) -> tuple[Slot, ...]:
    """Every parameter and buffer of a module, with its storage in `network`. InputError where the two do not fit.

    Tensors without bytes are in no storage: -1.
    """
    check_tensors(module)
    tensors: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in _named(module):
        tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
    table = StorageTable(module)
    by_name = {storage.name: index for index, storage in enumerate(network.storages)}
    index_of: dict[int, int] = {}
    for at, held in enumerate(table.held):
        index = by_name.pop(held.name, None)
        if index is None:
            raise InputError(
                f"module {type(module).__name__}: {held.name!r} is no storage of network {network.model!r}; "
                "the plan was made for another network"
            )
        storage = network.storages[index]
        require(
            (held.size_bytes, held.dtype) == (storage.size_bytes, storage.dtype),
            f"{held.name!r} has {held.size_bytes} bytes of {held.dtype}, but {storage.size_bytes} of {storage.dtype} in "
            f"network {network.model!r}; build the module as it was traced, or make a plan for this one",
        )
        index_of[at] = index
    require(
        not by_name,
        f"network {network.model!r} has {next(iter(by_name), '')!r}, but the module has no such tensor; "
        "the plan was made for another network",
    )
    persistent = set(module.state_dict(keep_vars=True))
    found = []
    for tensor, names in tensors.values():
        at_table = table.find(tensor)
        index = -1 if at_table is None else index_of[at_table]
        found.append(Slot(tuple(names), tensor, index, tensor.data, any(n in persistent for n in names)))
    return tuple(found)


def check_tensors(module: torch.nn.Module) -> None:
    """InputError where a tensor of a module cannot be bound: its bytes cannot be moved, or another binding has it."""
    if any(id(tensor) in _bound for _, tensor in _named(module)):
        gc.collect()  # a ColdStart that nobody has any more
    for name, tensor in _named(module):
        require(
            id(tensor) not in _bound,
            f"{name!r} is in use by another ColdStart; close that, or prepare a copy (copy.deepcopy)",
        )
        _check_plain(name, tensor)


def _named(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, a tied one by each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    plain = plain and not torch.nn.parameter.is_lazy(tensor)
    plain = plain and type(tensor.data) is torch.Tensor and not (tensor.is_conj() or tensor.is_neg())
    require(
        plain and not tensor.is_inference(),
        f"{name!r} is a {type(tensor).__name__} ({tensor.layout}) whose bytes cannot be moved; "
        "only plain strided tensors made outside inference mode can: convert it first",
    )


def load(
    slots: Sequence[Slot], network: Network, arena: torch.Tensor, weights: Weights | None, model: str
) -> None:
    """Fill a host arena with a module's storages; with `weights`, theirs for every tensor that a state_dict would name."""
    done: set[int] = set()
    for slot in slots:
        if slot.storage in done or slot.storage < 0:
            continue
        if slot.original.is_meta:
            missing = next((s for s in slots if s.storage == slot.storage and s.persistent), None)
            require(
                weights is not None and missing is not None,
                f"{model}: {slot.names[0]!r} is on the meta device and has no bytes; give weights=, or build it on the CPU",
            )
            continue
        done.add(slot.storage)
        whole = torch.empty(0, dtype=torch.uint8, device=slot.original.device)
        whole.set_(slot.original.untyped_storage())
        region(network, arena, slot.storage).copy_(whole)
    if weights is None:
        return
    if isinstance(weights, Mapping):
        _Loader(slots, network, arena).take(weights, "the state_dict")
        return
    paths = [weights] if isinstance(weights, (str, Path)) else list(weights)
    _load_files(_Loader(slots, network, arena), [Path(p) for p in paths])


def region(network: Network, arena: torch.Tensor, storage: int) -> torch.Tensor:
    """The bytes of one storage in a buffer that holds the whole arena; of -1, none."""
    if storage < 0:
        return arena[:0]
    start = network.offsets[storage]
    return arena[start : start + network.storages[storage].size_bytes]


def _alone(part: torch.Tensor) -> torch.Tensor:
    """The same bytes as a storage that has no others."""
    return torch.from_numpy(part.numpy()) if part.numel() else part


def _lies(slot: Slot) -> tuple[object, ...]:
    """Equal for tensors that are the same bytes read the same way: tied ones, one object or two."""
    like = slot.original
    return slot.storage, like.storage_offset(), like.dtype, like.shape, like.stride()


class _Loader:
    """Named tensors into the arena, each checked against the module's."""

    def __init__(self, slots: Sequence[Slot], network: Network, arena: torch.Tensor) -> None:
        self.slots = {name: slot for slot in slots for name in slot.names}
        self.left = {_lies(slot): slot for slot in slots if slot.persistent}
        self.network, self.arena = network, arena

    def put(self, name: str, tensor: torch.Tensor, origin: str) -> None:
        slot = self.slots.get(name)
        if slot is None or not slot.persistent:
            raise InputError(f"{origin} has {name!r}, which the module has not; give the model's own weights")
        want = slot.original
        require(
            isinstance(tensor, torch.Tensor),
            f"{origin}: {name!r} is a {type(tensor).__name__}; pass a tensor",
        )
        require(
            not tensor.is_meta,
            f"{origin}: {name!r} is on the meta device and has no bytes; give one that has",
        )
        require(
            tensor.shape == want.shape and tensor.dtype == want.dtype,
            f"{origin}: {name!r} is {_dtype(tensor)} {list(tensor.shape)}, but {_dtype(want)} {list(want.shape)} in the "
            "module; convert it first: the arena holds what kernels read",
        )
        slot.on(region(self.network, self.arena, slot.storage)).copy_(tensor)
        self.left.pop(_lies(slot), None)

    def take(self, weights: Mapping[str, torch.Tensor], origin: str) -> None:
        for name, tensor in weights.items():
            self.put(name, tensor, origin)
        self.finish(origin)

    def finish(self, origin: str) -> None:
        """One name of a tied tensor is enough: a safetensors file keeps only one."""
        missing = [slot.names[0] for slot in self.left.values()]
        require(
            not missing,
            f"{origin} lacks {len(missing)} tensors of the module, first {missing[:1]}; give them all",
        )


def _load_files(loader: _Loader, paths: Sequence[Path]) -> None:
    try:
        # optional: only those who load files need it
        from safetensors import SafetensorError, safe_open  # noqa: PLC0415
    except ImportError:
        raise InputError("weights from files need the safetensors package: pip install safetensors") from None
    names = ", ".join(str(p) for p in paths)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a handle, not a mapping
                    loader.put(name, file.get_tensor(name), str(path))
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{path}: no readable safetensors file ({reason}); nothing else is read"
            ) from None
    loader.finish(names)


_bound: weakref.WeakValueDictionary[int, Binding] = weakref.WeakValueDictionary()
"""Who has a tensor now, by the tensor's identity, which is nobody else's as long as a binding holds it."""


class Binding:
    """A module whose tensors are views of arenas. At rest they are CPU views of the host arena."""

    def __init__(self, slots: Sequence[Slot], network: Network, arena: torch.Tensor) -> None:
        self.slots = slots
        self.by_storage: dict[int, list[Slot]] = {}
        for slot in slots:
            self.by_storage.setdefault(slot.storage, []).append(slot)
        # each a storage of its own, as in the module: a copy of one in use (copy.deepcopy) has its bytes alone
        own = {at: _alone(region(network, arena, at)) for at in self.by_storage}
        self._rest = [(slot.tensor, slot.on(own[slot.storage])) for slot in slots]
        self._meta: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Tensors of the meta device cannot be re-pointed: the object lends its identity to another, which is kept here."""
        try:
            for slot, (tensor, view) in zip(slots, self._rest, strict=True):
                if slot.original.is_meta:
                    self._lend(slot, tensor, view.detach())
            self.rest()
        except BaseException:
            self._give_back()
            raise
        self._versions = [slot.tensor._version for slot in slots]
        _bound.update((id(slot.tensor), self) for slot in slots)

    def _lend(self, slot: Slot, tensor: torch.Tensor, stand_in: torch.Tensor) -> None:
        if isinstance(tensor, torch.nn.Parameter):
            stand_in = torch.nn.Parameter(stand_in, requires_grad=tensor.requires_grad)
        try:
            swap(tensor, stand_in)
        except RuntimeError as error:
            raise InputError(
                f"{slot.names[0]!r} is on the meta device and cannot be given bytes ({first_line(error)}); let go of what else "
                "refers to it, or build the module on the CPU"
            ) from None
        self._meta.append((tensor, stand_in))

    def views(self, storage: int, region: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Pairs for `point`: the tensors of one storage, and views of them over other bytes."""
        return tuple((slot.tensor, slot.on(region)) for slot in self.by_storage.get(storage, []))

    def rest(self) -> None:
        point(self._rest)

    def release(self) -> None:
        """Each tensor its own memory back. What was written into one while bound (load_state_dict) is carried over."""
        for slot, version, (_, at_rest) in zip(self.slots, self._versions, self._rest, strict=True):
            if slot.tensor._version != version and not slot.original.is_meta:
                slot.original.copy_(at_rest)
        try:
            self._give_back()
        finally:
            for slot in self.slots:
                _bound.pop(id(slot.tensor), None)
            self.slots, self.by_storage, self._rest, self._versions = (), {}, [], []

    def _give_back(self) -> None:
        point([(slot.tensor, slot.original) for slot in self.slots if not slot.original.is_meta])
        stuck: RuntimeError | None = None
        left = []
        for pair in reversed(self._meta):
            try:
                swap(*pair)
            except RuntimeError as error:
                stuck = error
                left.append(pair)
        self._meta = left
        if stuck is not None:
            raise InputError(
                f"a tensor cannot go back to the meta device ({first_line(stuck)}); let go of what else refers to it first"
            )


swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors
"""Exchange two tensors' bodies and keep their identities."""


def point(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Re-point tensors at other memory."""
    for tensor, view in pairs:
        tensor.data = view
