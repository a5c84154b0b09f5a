"""Sizes as a user writes them."""

from __future__ import annotations

import re

from sim.errors import InputError, require

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LEAST_BARE_BYTES = 10**6


def parse_size(text: str, option: str = "--memory-budget") -> int:
    """`200MiB`, `1.5GiB`, `300MB`, or plain bytes. Raises InputError for anything else.

    A few bytes without a unit are a unit forgotten: no network is that small, and what was meant is a million times as much.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if found is None or found[2] not in _UNITS:
        raise InputError(
            f"{option} {text!r}: must be a size of 0 or more, as 200MiB, 1.5GiB, 300MB or 200000000 (bytes)"
        )
    number, unit = found[1], _UNITS[found[2]]
    require(len(number) <= 20, f"{option} {text!r}: larger than any memory; give a smaller size")
    size = int(number) * unit if number.isdigit() else round(float(number) * unit)
    require(
        float(number) == 0 or size >= _LEAST_BARE_BYTES or bool(found[2]),
        f"{option} {text!r}: of which unit? Say {number}MiB or {number}GiB, or {number}B where bytes are meant",
    )
    return size


def parse_keep(text: str) -> tuple[int | None, float | None]:
    """`16MiB`: so many bytes at most. `1.05x`: what a start of so many times a warm run takes. InputError for anything else."""
    if ratio := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*x", text.strip(), re.ASCII):
        return None, float(ratio[1])
    try:
        return parse_size(text, "--keep"), None
    except InputError as error:
        raise InputError(f"{error}; or so many times a warm run, as 1.05x") from None
