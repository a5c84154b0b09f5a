"""Whether the host issued starts as fast as predicted, and which it made while others slowed its core (`core.py`), in words.
First copies, launches and eager layers are late then, whatever the links do."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from hwexec.core import MOST
from sim.report import PREDICTED, ms

SLOWER = 1.25
"""A host that takes so many times as long to issue a start as was predicted is called slow."""


def is_slower(issued_ns: float | None, predicted_ns: float | None) -> bool:
    """False where either is unknown."""
    return issued_ns is not None and predicted_ns is not None and issued_ns > SLOWER * predicted_ns


def longer_ns(issued_ns: float | None, predicted_ns: float | None) -> float:
    """What the host took longer to issue a start than predicted; 0 where it did not, or either is unknown."""
    return 0.0 if issued_ns is None or predicted_ns is None else max(0.0, issued_ns - predicted_ns)


def words(
    what: str, issued_ns: float | None, predicted_ns: float | None, label: str = PREDICTED["measured"]
) -> str:
    """How long it took to issue `what`, and where that was long what it means; empty where either is unknown."""
    if issued_ns is None or predicted_ns is None:
        return ""
    said = f"Host: {what} was issued in {ms(issued_ns)} ms, {label} {ms(predicted_ns)}"
    if not is_slower(issued_ns, predicted_ns):
        return f"{said}."
    late = ms(longer_ns(issued_ns, predicted_ns))
    than = "when it was calibrated" if label == PREDICTED["measured"] else label
    return f"{said}: slower than {than}, so that first copies and layers begin up to {late} ms later."


def fewer_words(made: int, asked: int, apart: int, tried: int, limit: str) -> str:
    """Why fewer starts count than were asked for: `limit`, or that others slowed too many of the `tried` times MOST that are made
    at most; empty where as many do."""
    if made >= asked:
        return ""
    if made < tried and made + apart >= MOST * tried:
        limit = "others slowed the processor's core in most"
    return f"{made} of {asked} runs, since {limit}"


def apart_words(apart_ns: Sequence[float], full_pace: bool) -> str:
    """What became of starts that others slowed; empty where there were none."""
    if not full_pace:
        return "others slowed the processor's core too often, so starts made then count as well"
    if not apart_ns:
        return ""
    made = f"{len(apart_ns)} more start{'s' if len(apart_ns) > 1 else ''}"
    return f"{made}, {ms(median(apart_ns))} ms, set apart: others slowed the processor's core"
