"""The one exception a user may cause: its message names the value, the rule and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input. Commands print the message as one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds. Unlike assert it survives `python -O`."""
    if not condition:
        raise InputError(message)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Where a file's content is put to use: what is wrong with it is told with the file's name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
