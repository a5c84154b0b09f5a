"""The model names known here, without importing torch, which takes seconds."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sim.errors import InputError
from sim.hf import SHAPES
from sim.hints import error_line

DTYPE_NAMES = ("fp32", "fp16", "bf16")
"""What weights may be made, the default first; sim.models has PyTorch's own."""
_REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n|[ \t)].*\n)*def (\w+)\(", re.MULTILINE)


def known_models() -> tuple[str, ...]:
    """Every name that needs no further options: torchvision's, sorted, then the `hf:` names."""
    return (*torchvision_names(), *SHAPES)


def torchvision_names() -> tuple[str, ...]:
    """The classification models of the torchvision installed here, by its source, or by itself where that names none."""
    found = find_spec("torchvision")
    folders = [] if found is None else found.submodule_search_locations or []
    sources = (path for folder in folders for path in Path(folder, "models").glob("*.py"))
    names = [name for path in sources for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))]
    if names:
        return tuple(sorted(names))
    return torchvision_models()


def import_torchvision() -> Any:
    """The package. InputError where it is missing or made for another torch."""
    try:
        import torchvision  # noqa: PLC0415 - takes more than a second, and hf: names and factories do without
    except Exception as error:  # a torchvision made for another torch raises RuntimeError
        raise InputError(
            f"torchvision cannot be imported ({error_line(error)}); install the pair together: pip install torch torchvision"
        ) from error
    return torchvision


def torchvision_models() -> tuple[str, ...]:
    """Names of its classification models, sorted."""
    models = import_torchvision().models
    return tuple(models.list_models(module=models))
