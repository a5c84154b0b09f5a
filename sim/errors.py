"""The one exception a user may cause: its message names the value, the rule and the remedy."""

from __future__ import annotations


class InputError(Exception):
    """Bad input. Commands print the message as one line and exit with code 2."""


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless `condition` holds. Unlike assert it survives `python -O`."""
    if not condition:
        raise InputError(message)
