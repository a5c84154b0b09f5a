"""Model names to torch modules with example inputs: torchvision, `hf:` shapes, any importable factory.

Nothing is downloaded: weights are random. On the meta device a module has shapes and no bytes, whatever its size.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from sim import later
from sim.errors import InputError, require
from sim.hf import SHAPES, hf_shape, make_transformer
from sim.hints import error_line, unknown
from sim.later import Later, weak
from sim.names import DTYPE_NAMES
from sim.tracker import ROOT

DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
MAX_BATCH = 65536
"""More samples than any GPU holds; a larger number is a typing mistake."""

_IMAGE_SIZES = {"inception_v3": 299}
_IMAGE_SIZE = 224
_QUIET: dict[str, dict[str, bool]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}
"""Both warn, then sample for seconds, unless told not to initialise."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A module in eval mode without gradients, and inputs it accepts as `module(*inputs)`.

    `seq` is the tokens per sample, None where the input is no token sequence. `batch` is the samples in `inputs`.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    batch: int
    dtype: str
    seq: int | None
    name: str

    def inputs_on(self, where: torch.device) -> tuple[Tensor, ...]:
        return tuple(tensor.to(where) for tensor in self.inputs)


def build(
    name: str,
    *,
    batch: int = 1,
    dtype: str | None = None,
    seq: int | None = None,
    device: Literal["cpu", "meta"] = "cpu",
    seed: int = 0,
) -> Built:
    """The module called `name`, its floating-point weights of `dtype`, and `batch` samples of input on `device`.

    Without a `dtype` they are fp32, and a factory's module must be so of itself.

    Names: a torchvision classification model; `hf:bert-base` and the like; `hf:llama-1b:hidden=1024,layers=4`;
    `package.module:callable`, called without arguments, returning a module or `(module, inputs)`. A factory's module
    without inputs takes its `example_inputs` attribute or else one image, (batch, 3, 224, 224). `seq` is for `hf:`
    names. On the CPU the same `seed` gives the same weights and inputs.
    Raises InputError for whatever the name, the numbers or the factory get wrong.
    """
    asked, dtype = dtype is not None, dtype or "fp32"
    require(dtype in DTYPES, f"dtype {dtype!r}: not known; use one of {', '.join(DTYPES)}")
    _check_count("batch", batch, MAX_BATCH)
    require(device in ("cpu", "meta"), f"device {device!r}: a model is built on 'cpu' or 'meta'")
    if seq is not None:
        _check_count("seq", seq, None)
    recipe = _Recipe(name, batch, DTYPES[dtype], seq, device, seed, asked)
    if name.startswith("hf:"):
        return _build_hf(recipe, dtype)
    require(
        seq is None, f"seq {seq}: model {name!r} takes no token sequence; leave --seq out, or use an hf: name"
    )
    if ":" in name:
        module, inputs = _build_factory(recipe)
        first = inputs[0]
        return Built(module, inputs, first.shape[0] if first.ndim else batch, dtype, None, name)
    module, inputs = _build_torchvision(recipe)
    return Built(module, inputs, batch, dtype, None, name)


@dataclass(frozen=True, slots=True)
class _Recipe:
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


def _check_count(what: str, value: int, limit: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= 1, f"{what} {value!r}: must be a whole number from 1 up")
    require(limit is None or value <= limit, f"{what} {value}: at most {limit}; ask for less")


# -- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision() -> Any:
    try:
        import torchvision  # noqa: PLC0415 - takes more than a second, and hf: names and factories do without
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        raise InputError(
            f"torchvision cannot be imported ({error_line(error)}); install the pair together: pip install torch torchvision"
        ) from error
    return torchvision


def torchvision_models() -> tuple[str, ...]:
    """Names of its classification models, sorted."""
    models = _torchvision().models
    return tuple(models.list_models(module=models))


def _build_torchvision(recipe: _Recipe) -> tuple[nn.Module, tuple[Tensor, ...]]:
    names = torchvision_models()
    if recipe.name not in names:
        raise unknown("model", recipe.name, (*names, *SHAPES), "sim models")
    get_model = _torchvision().models.get_model
    options = _QUIET.get(recipe.name, {})
    module, late = _construct(lambda: get_model(recipe.name, weights=None, **options), recipe)
    _settle(module, recipe, late, vary=True)
    return module, (recipe.image(_IMAGE_SIZES.get(recipe.name, _IMAGE_SIZE)),)


# -- transformers -----------------------------------------------------------------------------------------------------


def _build_hf(recipe: _Recipe, dtype: str) -> Built:
    shape = hf_shape(recipe.name)
    seq = shape.tokens(recipe.name, recipe.seq)
    with _default_dtype(recipe.dtype):
        # in its dtype from the start: what transformers keeps in fp32 (rotary frequencies) stays so, as in a real load
        module, late = _construct(lambda: make_transformer(recipe.name, shape), recipe)
    _settle(module, recipe, late, vary=True, buffers=False)
    return Built(module, (recipe.tokens(seq, shape.vocab),), recipe.batch, dtype, seq, recipe.name)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- factories --------------------------------------------------------------------------------------------------------


def _build_factory(recipe: _Recipe) -> tuple[nn.Module, tuple[Tensor, ...]]:
    factory = _load_factory(recipe.name)
    try:
        made, late = _construct(factory, recipe)
    except (Exception, SystemExit) as error:  # a script that exits is a factory that failed
        raise InputError(
            f"model {recipe.name!r}: the factory raised {error_line(error)}; call it alone to see why"
        ) from error
    given: object = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
        require(given is not None, f"model {recipe.name!r}: the factory returned no inputs beside the module")
    if not isinstance(made, nn.Module):
        raise InputError(
            f"model {recipe.name!r}: the factory returned {type(made).__name__}; it must return a torch.nn.Module or a "
            "(module, inputs) tuple"
        )
    check_not_scripted(made, recipe.name)
    if not recipe.asked:
        _check_own_dtype(made, recipe.name)
    for key, parameter in made.named_parameters():
        require(
            not nn.parameter.is_lazy(parameter),
            f"model {recipe.name!r}: parameter {key!r} has no shape yet; run the module once in the factory",
        )
    if given is None:
        given = getattr(made, "example_inputs", None)
    # before the inputs are read: they too may still have to be filled
    _settle(made, recipe, late, vary=False)
    return made, (recipe.image(_IMAGE_SIZE),) if given is None else _example_inputs(recipe, given)


def _check_own_dtype(module: nn.Module, name: str) -> None:
    """InputError where casting a module's weights to fp32 would come as a surprise."""
    first = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    own = next((known for known, dtype in DTYPES.items() if dtype is first and known != "fp32"), None)
    require(
        own is None,
        f"model {name!r}: its weights are in {own}; pass --dtype {own} to take them as they are, or --dtype fp32 to have them "
        "cast",
    )


def check_not_scripted(module: nn.Module, name: str) -> None:
    """InputError where a module or a part of it is TorchScript."""
    scripted = [key or ROOT for key, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    require(
        not scripted,
        f"model {name!r}: module {''.join(scripted[:1])!r} is TorchScript, which shows no operators; give the module that "
        "it was made from",
    )


def _load_factory(name: str) -> Callable[[], object]:
    path, _, attribute = name.partition(":")
    wanted = f"model {name!r}: a factory is named package.module:callable"
    require(bool(path and attribute), wanted)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # console scripts do not look there, and that is where a user's factory lies
    try:
        found: Any = importlib.import_module(path)
    except (Exception, SystemExit) as error:
        raise InputError(f"model {name!r}: {path!r} cannot be imported: {error_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"model {name!r}: {path!r} has no {part!r}{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise InputError(
            f"{wanted}; {attribute!r} is a {type(found).__name__}, not a function that makes a module"
        )
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise InputError(
            f"model {name!r}: the factory is called without arguments, but {error_line(error)}; wrap it in a function that "
            "takes none"
        ) from error
    except ValueError:
        pass  # some builtins have no signature: the call will tell
    factory: Callable[[], object] = found
    return factory


def _example_inputs(recipe: _Recipe, given: object) -> tuple[Tensor, ...]:
    """The factory's inputs with `recipe.batch` samples. One sample is repeated; more are taken as they are."""
    if isinstance(given, Mapping):
        raise InputError(
            f"model {recipe.name!r}: example inputs by keyword ({', '.join(map(repr, given))}) are not taken; wrap the "
            "module in one whose forward takes them by position, and give a tuple"
        )
    inputs = (given,) if isinstance(given, Tensor) else given
    if not isinstance(inputs, tuple | list) or not inputs or not all(isinstance(i, Tensor) for i in inputs):
        raise InputError(f"model {recipe.name!r}: example inputs must be a tensor or a tuple of tensors")
    made = []
    for tensor in inputs:
        if recipe.batch > 1:
            require(
                tensor.ndim > 0 and tensor.shape[0] in (1, recipe.batch),
                f"batch {recipe.batch}: model {recipe.name!r} brings inputs of shape {tuple(tensor.shape)}; give it "
                "inputs of one sample, to be repeated",
            )
            tensor = tensor.expand(recipe.batch, *tensor.shape[1:]).contiguous()
        require(
            recipe.device == "meta" or tensor.device.type != "meta",
            f"model {recipe.name!r}: example inputs on the meta device have no values; make them on the CPU",
        )
        dtype = recipe.dtype if tensor.is_floating_point() else tensor.dtype
        made.append(tensor.detach().to(recipe.device, dtype))
    return tuple(made)


# -- making and converting --------------------------------------------------------------------------------------------


def _construct(make: Callable[[], _T], recipe: _Recipe) -> tuple[_T, Later]:
    """`make()` under the device and the seed asked for, and what waits to be filled; the caller's random state is left alone.

    A constructor that reads values (RegNet computes its widths with tensors) cannot run on the meta device: then it runs on
    the CPU, fills only what it reads, and `_settle` moves the result. So a factory may be called twice.
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


def _settle(module: nn.Module, recipe: _Recipe, late: Later, *, vary: bool, buffers: bool = True) -> None:
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


def _move(module: nn.Module, recipe: _Recipe) -> None:
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


def _cast(module: nn.Module, recipe: _Recipe, late: Later, buffers: bool) -> None:
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
