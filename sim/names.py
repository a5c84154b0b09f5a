"""The model names known here, without importing torch, which takes seconds."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from sim.hf import SHAPES

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
    from sim.models import torchvision_models  # noqa: PLC0415 - imports torch

    return torchvision_models()
