"""Whether the host issued starts as fast as predicted. A processor that others share has slow moments, in which a driver's call
takes several times as long as when it was calibrated: first copies, launches and eager layers are late then, whatever the
links do."""

from __future__ import annotations

from sim.report import PREDICTED, ms

SLOWER = 1.25
"""A host that takes so many times as long to issue a start as was predicted is called slow."""


def is_slower(issued_ns: float | None, predicted_ns: float | None) -> bool:
    """False where either is unknown."""
    return issued_ns is not None and predicted_ns is not None and issued_ns > SLOWER * predicted_ns


def words(
    what: str, issued_ns: float | None, predicted_ns: float | None, label: str = PREDICTED["measured"]
) -> str:
    """How long it took to issue `what`, and where that was long what it means; empty where either is unknown."""
    if issued_ns is None or predicted_ns is None:
        return ""
    said = f"Host: {what} was issued in {ms(issued_ns)} ms, {label} {ms(predicted_ns)}"
    if not is_slower(issued_ns, predicted_ns):
        return f"{said}."
    late = ms(issued_ns - predicted_ns)
    than = "when it was calibrated" if label == PREDICTED["measured"] else label
    return f"{said}: slower than {than}, so that first copies and layers begin up to {late} ms later."
