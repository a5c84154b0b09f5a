"""Prints compared with a file in tests/goldens. DEEPPLAN_UPDATE_GOLDENS=1 writes the files anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "goldens"


def compare(name: str, text: str) -> None:
    """Trailing blanks and seconds of search do not count."""
    lines = (re.sub(r", \d+\.\d\d s\)", ", T s)", line.rstrip()) for line in text.splitlines())
    text = "\n".join(lines) + "\n"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("DEEPPLAN_UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()
