"""Model names to torch modules with example inputs: torchvision, `hf:` shapes, any importable factory.

Nothing is downloaded: weights are random. On the meta device a module has shapes and no bytes, whatever its size.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sim.errors import InputError, require
from sim.hf import SHAPES, hf_shape, make_transformer
from sim.hints import error_line, unknown
from sim.making import Recipe, construct, default_dtype, finish
from sim.names import DTYPE_NAMES, import_torchvision, torchvision_models
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
_IMPORTABLE = "a module of an installed package or of the current folder"


@dataclass(frozen=True, slots=True, eq=False)
class Built:
    """A module in eval mode without gradients, and inputs it accepts as `module(*inputs, **named)`.

    `seq` is the tokens per sample, None where the input is no token sequence. `batch` is the samples in `inputs`.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    batch: int
    dtype: str
    seq: int | None
    name: str
    named: Mapping[str, Any] = field(default_factory=dict)

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
    recipe = Recipe(name, batch, DTYPES[dtype], seq, device, seed, asked)
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


def _check_count(what: str, value: int, limit: int | None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= 1, f"{what} {value!r}: must be a whole number from 1 up")
    require(limit is None or value <= limit, f"{what} {value}: at most {limit}; ask for less")


# -- torchvision ------------------------------------------------------------------------------------------------------


def _build_torchvision(recipe: Recipe) -> tuple[nn.Module, tuple[Tensor, ...]]:
    names = torchvision_models()
    if recipe.name not in names:
        raise unknown("model", recipe.name, (*names, *SHAPES), "sim models")
    get_model = import_torchvision().models.get_model
    options = _QUIET.get(recipe.name, {})
    module, late = construct(lambda: get_model(recipe.name, weights=None, **options), recipe)
    finish(module, recipe, late, vary=True)
    return module, (recipe.image(_IMAGE_SIZES.get(recipe.name, _IMAGE_SIZE)),)


# -- transformers -----------------------------------------------------------------------------------------------------


def _build_hf(recipe: Recipe, dtype: str) -> Built:
    shape = hf_shape(recipe.name)
    seq = shape.tokens(recipe.name, recipe.seq)
    with default_dtype(recipe.dtype):
        # in its dtype from the start: what transformers keeps in fp32 (rotary frequencies) stays so, as in a real load
        module, late = construct(lambda: make_transformer(recipe.name, shape), recipe)
    finish(module, recipe, late, vary=True, buffers=False)
    return Built(module, (recipe.tokens(seq, shape.vocab),), recipe.batch, dtype, seq, recipe.name)


# -- factories --------------------------------------------------------------------------------------------------------


def _build_factory(recipe: Recipe) -> tuple[nn.Module, tuple[Tensor, ...]]:
    factory = _load_factory(recipe.name)
    try:
        made, late = construct(factory, recipe)
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
    check_shows_operators(made, recipe.name)
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
    finish(made, recipe, late, vary=False)
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


def check_shows_operators(module: nn.Module, name: str) -> None:
    """InputError where a module or a part of it runs what cannot be followed operator by operator."""
    for key, part in module.named_modules():
        # the first is what Module.compile leaves there, the second torch.compile
        compiled = part._compiled_call_impl is not None or "_orig_mod" in part._modules
        scripted = isinstance(part, torch.jit.ScriptModule)
        what = "TorchScript" if scripted else "compiled"
        require(
            not scripted and not compiled,
            f"model {name!r}: module {key or ROOT!r} is {what}, which shows no operators; give the module that it was made from",
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
        remedy = f"as {path.removesuffix('.py')}:{attribute}" if path.endswith(".py") else _IMPORTABLE
        raise InputError(
            f"model {name!r}: {path!r} cannot be imported: {error_line(error)}; name {remedy}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], n=3)
            hint = f"; nearest: {', '.join(near)}" if near else "; name a function of it that makes a module"
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


def _example_inputs(recipe: Recipe, given: object) -> tuple[Tensor, ...]:
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
