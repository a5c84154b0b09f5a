"""What a user would run instead of a plan, in the same process: each with its own fair set-up, each taken away again.

All are timed as cold starts are: inputs on the GPU, from the request until the answer is there. Their caching allocator
is warm after one untimed start, which favours them: no GPU memory is asked of the driver while they are timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hwexec.host_memory import check_free
from sim.errors import InputError, require
from sim.hints import error_line


class Snapshot:
    """A module's parameters and buffers, the objects and where their bytes were; `restore` brings both back.

    `Module.to` re-points parameters but replaces buffers; offloaders replace both, and leave a `forward` behind.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._modules = list(module.modules())
        self._plain = [m for m in self._modules if "forward" not in m.__dict__]
        self._rows: list[tuple[dict[str, Any], str, Any, Any]] = [
            (held, key, tensor, None if tensor is None else tensor.data)
            for m in self._modules
            for held in (m._parameters, m._buffers)
            for key, tensor in held.items()
        ]

    def restore(self) -> None:
        _point(self._rows)
        for module in self._plain:
            module.__dict__.pop("forward", None)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        """Makes `change` of every tensor once, and returns what puts those in the tensors' place."""
        made = {id(t): change(data) for _, _, t, data in self._rows if t is not None}
        rows = [(held, key, t, None if t is None else made[id(t)]) for held, key, t, _ in self._rows]
        return lambda: _point(rows)

    @property
    def total_bytes(self) -> int:
        """Of all tensors, a tied one counted once."""
        storages = {}
        for _, _, tensor, data in self._rows:
            if tensor is not None:
                held = data.untyped_storage()
                storages[held._cdata] = held.nbytes()
        return sum(storages.values())


def _point(rows: list[tuple[dict[str, Any], str, Any, Any]]) -> None:
    for held, key, tensor, data in rows:
        held[key] = tensor
        if tensor is not None:
            tensor.data = data


@dataclass(frozen=True, slots=True)
class Scene:
    """A module at rest in host memory, and inputs where it will run."""

    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    where: torch.device
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Ready:
    """A peer set up: `before` makes the next `call` a cold start, untimed; `about` says which version of what ran."""

    before: Callable[[], None]
    call: Callable[[], Any]
    about: str


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    about: str
    set_up: Callable[[Scene], AbstractContextManager[Ready]]


def eager_output(scene: Scene) -> Any:
    """The module's answer as plain PyTorch gives it, all weights on the GPU. The module is back at rest afterwards."""
    try:
        with torch.no_grad():
            scene.module.to(scene.where)
            return scene.module(*scene.inputs)
    finally:
        scene.snapshot.restore()


@contextmanager
def _pageable(scene: Scene) -> Iterator[Ready]:
    def call() -> Any:
        scene.module.to(scene.where)
        return scene.module(*scene.inputs)

    try:
        yield Ready(scene.snapshot.restore, call, f"torch {torch.__version__}")
    finally:
        scene.snapshot.restore()


@contextmanager
def _pinned(scene: Scene) -> Iterator[Ready]:
    def call() -> Any:
        scene.module.to(scene.where, non_blocking=True)
        return scene.module(*scene.inputs)

    require(scene.where.type == "cuda", "memory is pinned for CUDA, and there is none")
    check_free(scene.snapshot.total_bytes, "a pinned copy of the module")
    try:
        yield Ready(scene.snapshot.mapped(_pin), call, f"torch {torch.__version__}")
    finally:
        scene.snapshot.restore()


def _pin(data: torch.Tensor) -> torch.Tensor:
    return data.pin_memory()


@contextmanager
def _accelerate(scene: Scene) -> Iterator[Ready]:
    try:
        import accelerate  # noqa: PLC0415 - optional: a peer, no part of this project
        from accelerate.hooks import remove_hook_from_module  # noqa: PLC0415
    except Exception as error:  # a half-installed package raises anything
        raise _absent("accelerate", error) from None
    try:
        accelerate.cpu_offload(scene.module, execution_device=scene.where, offload_buffers=True)
        yield Ready(_nothing, lambda: scene.module(*scene.inputs), _version("accelerate"))
    finally:
        remove_hook_from_module(scene.module, recurse=True)
        scene.snapshot.restore()


@contextmanager
def _diffusers(scene: Scene) -> Iterator[Ready]:
    try:
        from diffusers.hooks import apply_group_offloading  # noqa: PLC0415 - optional: a peer
    except Exception as error:  # as above
        raise _absent("diffusers", error) from None
    pins = scene.where.type == "cuda"
    copies = "a copy of the module, and that pinned" if pins else "a copy of the module"
    check_free(scene.snapshot.total_bytes * (2 if pins else 1), copies)
    module = copy.deepcopy(scene.module)  # its hooks have no way back
    apply_group_offloading(
        module,
        onload_device=scene.where,
        offload_type="leaf_level",
        use_stream=pins,
        record_stream=pins,
    )
    # the untimed start is the dummy forward in which it learns the order of layers
    yield Ready(_nothing, lambda: module(*scene.inputs), _version("diffusers"))


def _nothing() -> None:
    """Offloaders let go of every layer after it ran: the next call is cold as it is."""


def _absent(package: str, error: Exception) -> InputError:
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return InputError(f"{package} is not installed")
    return InputError(f"{package} cannot be imported: {error_line(error)}")


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def why(error: BaseException) -> str:
    """One line that says why a peer is waived, or what stopped a bench."""
    return str(error) if isinstance(error, InputError) else error_line(error)


PEERS: tuple[Peer, ...] = (
    Peer("peer:cuda", "module.to(GPU) from pageable memory, then run", _pageable),
    Peer("peer:pinned", "module.to(GPU, non_blocking) of a module pinned beforehand, then run", _pinned),
    Peer("peer:accelerate", "accelerate.cpu_offload, buffers too", _accelerate),
    Peer("peer:diffusers", "diffusers' group offloading, leaf level, with streams", _diffusers),
)
