"""Parts of a line of words: the nearest known names, a model's run, a size, and an exception from elsewhere in few words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sim.errors import InputError


def unknown(what: str, name: str, known: Iterable[str], all_by: str = "") -> InputError:
    """`model 'resnet5': not known; nearest: resnet50, ...`: up to four of `known`, the most like `name` first.

    `all_by` is the command that lists all, where there is one.
    """
    nearest = difflib.get_close_matches(name, sorted(known), n=4, cutoff=0.0)
    remedy = f"; `{all_by}` lists all" if all_by else ""
    return InputError(f"{what} {name!r}: not known; nearest: {', '.join(nearest)}{remedy}")


def run_words(model: str, dtype: str, batch: int, seq: int | None) -> str:
    """`resnet50, fp32, batch 1`; `seq`, where the model takes tokens, is how many a sample has."""
    return f"{model}, {options_words(dtype, batch, seq)}"


def options_words(dtype: str, batch: int, seq: int | None) -> str:
    return f"{dtype}, batch {batch}" + ("" if seq is None else f", {seq} tokens")


def size_words(size_bytes: int) -> str:
    """In MiB, or the smaller unit where 0.0 MiB would puzzle."""
    if size_bytes >= 0.1 * 2**20:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / 1024:.1f} KiB" if size_bytes >= 1024 else f"{size_bytes} bytes"


def first_line(error: BaseException) -> str:
    """Of an exception's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_line(error: BaseException) -> str:
    """Type and first line of the message of an exception, at most about 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
