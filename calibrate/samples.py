"""Raw samples: what one case measured, kept whole beside everything that is derived from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwexec.timing import NOISY
from sim.errors import require


@dataclass(frozen=True, slots=True)
class Point:
    """One thing timed again and again. Each sample is the nanoseconds of all `count` operations together.

    `size_bytes` is what one operation moves, 0 where it moves nothing. `edges` counts dependencies (waits, or edges
    between devices), `copies` copies and `waits` waits for a graph's head where a case varies them beside `count`.
    """

    label: str
    size_bytes: int
    count: int
    samples_ns: tuple[float, ...]
    edges: int = 0
    copies: int = 0
    waits: int = 0

    def __post_init__(self) -> None:
        require(bool(self.samples_ns), f"{self.label}: no samples; a point needs at least one")
        require(self.count > 0, f"{self.label}: {self.count} operations; at least one must be timed")

    @property
    def median_ns(self) -> float:
        return float(np.median(self.samples_ns))

    @property
    def each_ns(self) -> float:
        """Median of one operation."""
        return self.median_ns / self.count

    @property
    def iqr_ns(self) -> float:
        low, high = np.percentile(self.samples_ns, (25, 75))
        return float(high - low)

    @property
    def bytes_per_s(self) -> float:
        """Rate of all operations together, at the median."""
        return self.size_bytes * self.count / self.median_ns * 1e9

    @property
    def spread(self) -> float:
        """Interquartile range, as a part of the median."""
        return self.iqr_ns / self.median_ns if self.median_ns else float("inf") if self.iqr_ns else 0.0

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of one case. `waived` says why it was not measured; `verified` whether moved bytes were compared."""

    case: str
    about: str
    points: tuple[Point, ...] = ()
    waived: str | None = None
    verified: bool | None = None
    seconds: float = 0.0
    takes: int = 1
    """How often it was measured; the steadiest take is here."""
    looks: int = 1
    """At how many times, far apart, it was measured."""
    other: tuple[Point, ...] = ()
    """The look that was not kept; it widens the ranges of what is told by the one that was."""
    failed: str = ""
    """Why measuring it again came to nothing; empty where it was not tried, or did."""
    apart: int = 0
    """Samples set apart, since the host's core was slowed when they were made."""
    slowed: int = 0
    """How often too few were left, so that those count as well."""

    def labelled(self, label: str) -> tuple[Point, ...]:
        return tuple(p for p in self.points if p.label == label)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.label for p in self.points))
