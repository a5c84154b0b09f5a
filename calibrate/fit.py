"""Samples to constants. Every model here is linear in its constants, and a fit that explains its samples badly is refused.

Points enter by their median, which outliers within a point do not move; soft_l1 on relative residuals keeps a whole bad
point from bending the rest, and gives 4 KiB and 1 GiB the same say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from calibrate.samples import Point
from sim.errors import InputError, require
from sim.simulate import Flow, fair_rates

Vector = NDArray[np.float64]

REFUSED_RESIDUAL = 0.10
"""Median relative residual above which a fit is refused."""
LEAST_SPREAD = 0.02
"""Stated spread is never below this part of the figure: two processes on one host differ by about as much."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A fitted number and the range that the spread of its samples allows."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Residual:
    """What a fit says of one point beside what was measured."""

    label: str
    size_bytes: int
    count: int
    edges: int
    measured_ns: float
    fitted_ns: float

    @property
    def relative(self) -> float:
        return (self.fitted_ns - self.measured_ns) / self.measured_ns


@dataclass(frozen=True, slots=True)
class Fit:
    """A model, its constants, and how far each point lies from it."""

    case: str
    model: str
    constants: tuple[Constant, ...]
    residuals: tuple[Residual, ...]

    def constant(self, name: str) -> Constant:
        return next(c for c in self.constants if c.name == name)

    @property
    def median_residual(self) -> float:
        return float(np.median([abs(r.relative) for r in self.residuals]))


Terms = Callable[[Point], Sequence[float]]


def fit_linear(
    case: str, model: str, names: Sequence[str], points: Sequence[Point], terms: Terms, *, refuse: bool = True
) -> Fit:
    """Constants, none negative, such that each point's nanoseconds are `terms(point)` times them.

    Raises InputError where there are fewer points than constants, or where the fit explains them badly.
    """
    require(
        len(points) >= len(names),
        f"{case}: {len(points)} points cannot give {len(names)} constants ({model}); measure more",
    )
    rows = np.array([terms(p) for p in points], dtype=float)
    medians = np.array([p.median_ns for p in points])
    require(
        bool((medians > 0).all()), f"{case}: a sample is not above 0 ns; the clock that took it is broken"
    )
    best = _solve(rows, medians)
    low, high = _range(rows, points, best)
    fitted = rows @ best
    fit = Fit(
        case,
        model,
        tuple(
            Constant(n, float(v), float(a), float(b))
            for n, v, a, b in zip(names, best, low, high, strict=True)
        ),
        tuple(
            Residual(p.label, p.size_bytes, p.count, p.edges, float(m), float(f))
            for p, m, f in zip(points, medians, fitted, strict=True)
        ),
    )
    if refuse:
        check(fit)
    return fit


def check(fit: Fit) -> None:
    """Raise InputError where a fit explains its samples badly: a wrong constant is worse than none."""
    if fit.median_residual <= REFUSED_RESIDUAL:
        return
    worst = max(fit.residuals, key=lambda r: abs(r.relative))
    found = ", ".join(f"{c.name} {c.value:.4g}" for c in fit.constants)
    raise InputError(
        f"{fit.case}: {fit.model} misses half of its {len(fit.residuals)} points by more than "
        f"{fit.median_residual:.0%} (limit {REFUSED_RESIDUAL:.0%}) at {found}; worst is {worst.label} "
        f"({worst.size_bytes} bytes x {worst.count}): {worst.measured_ns:.0f} ns measured, {worst.fitted_ns:.0f} fitted. "
        "Look at the samples (calibrate show --plot), stop other users of the GPU and measure again"
    )


def _solve(rows: Vector, times: Vector) -> Vector:
    """Robust, not negative, on relative residuals."""
    scaled = rows / times[:, None]
    start, _ = nnls(scaled, np.ones(len(times)))
    unit = np.where(start > 0, start, 1.0 / np.maximum(scaled.max(axis=0), 1e-300))

    def misses(x: Vector) -> Vector:
        return np.asarray((scaled * unit) @ x - 1.0, dtype=float)

    found = least_squares(misses, start / unit, bounds=(0, np.inf), loss="soft_l1", f_scale=0.03)
    return np.asarray(found.x * unit, dtype=float)


def _range(rows: Vector, points: Sequence[Point], best: Vector) -> tuple[Vector, Vector]:
    """Envelope of the fits to the points' 10th and 90th percentiles and of those that leave one point out."""
    found = [best * (1 - LEAST_SPREAD), best * (1 + LEAST_SPREAD)]
    for percent in (10, 90):
        times = np.array([np.percentile(p.samples_ns, percent) for p in points])
        if (times > 0).all():
            found.append(_solve(rows, times))
    medians = np.array([p.median_ns for p in points])
    for at in range(len(points)):
        keep = np.arange(len(points)) != at
        if np.linalg.matrix_rank(rows[keep]) == rows.shape[1]:
            found.append(_solve(rows[keep], medians[keep]))
    stack = np.stack(found)
    return np.asarray(stack.min(axis=0), dtype=float), np.asarray(stack.max(axis=0), dtype=float)


LATENCY, BYTE_NS = "latency_ns", "byte_ns"


def fit_route(case: str, points: Sequence[Point], *, refuse: bool = True) -> Fit:
    """Copies back to back: each pays a latency, then its bytes flow."""
    return fit_linear(
        case,
        "time = count x (latency + size / bandwidth)",
        (LATENCY, BYTE_NS),
        points,
        lambda p: (p.count, p.count * p.size_bytes),
        refuse=refuse,
    )


def bandwidth(fit: Fit) -> Constant:
    """Bytes per second of a fitted route. Raises InputError where time did not grow with bytes."""
    byte, latency = fit.constant(BYTE_NS), fit.constant(LATENCY)
    largest = max(r.size_bytes for r in fit.residuals)
    require(
        byte.low > 0 and byte.value * largest > latency.value,
        f"{fit.case}: time hardly grows with the bytes moved (up to {largest}); measure larger copies, or they were not made",
    )
    return Constant("bytes_per_s", 1e9 / byte.value, 1e9 / byte.high, 1e9 / byte.low)


def fit_step(case: str, points: Sequence[Point], *, refuse: bool = True) -> Fit:
    """A chain of `count` kernels with `edges` waits in it: what one more wait adds."""
    return fit_linear(
        case,
        "time = base + kernels x kernel + waits x wait",
        ("base_ns", "kernel_ns", "wait_ns"),
        points,
        lambda p: (1.0, p.count, p.edges),
        refuse=refuse,
    )


def fit_launch(case: str, points: Sequence[Point], *, refuse: bool = True) -> Fit:
    """Launch of a graph, `count` operations with `edges` of them between devices. Without any edges there is no cross_ns."""
    if not any(p.edges for p in points):
        model, names = "time = launch + operations x node", ("launch_ns", "node_ns")
        return fit_linear(case, model, names, points, lambda p: (1.0, p.count), refuse=refuse)
    return fit_linear(
        case,
        "time = launch + operations x node + edges between devices x cross",
        ("launch_ns", "node_ns", "cross_ns"),
        points,
        lambda p: (1.0, p.count, p.edges),
        refuse=refuse,
    )


@dataclass(frozen=True, slots=True)
class Contention:
    """Rates measured at once on one link: a kernel that reads in place beside copies."""

    label: str
    direct_bytes_per_s: float
    copy_bytes_per_s: float


def fit_sharing(
    case: str, seen: Sequence[Contention], capacity: float, limit: float, *, refuse: bool = True
) -> Fit:
    """The weight at which the simulator's own sharing gives what was seen. `limit` is the read's rate alone.

    Residuals are times: of a read of SHARED_BYTES in place, and of a copy of as many that starts with it and has the link
    to itself when the read is done.
    """
    require(bool(seen), f"{case}: nothing was measured on a shared link")

    def times(direct: float, copy: float) -> tuple[float, float]:
        read_s = SHARED_BYTES / direct
        return read_s, read_s + max(0.0, SHARED_BYTES - copy * read_s) / capacity

    def misses(log_weight: Vector, rows: Sequence[Contention]) -> Vector:
        fitted = times(*shared_rates(float(np.exp(log_weight[0])), capacity, limit))
        out = []
        for row in rows:
            measured = times(row.direct_bytes_per_s, row.copy_bytes_per_s)
            out += [f / m - 1 for f, m in zip(fitted, measured, strict=True)]
        return np.array(out)

    def best(rows: Sequence[Contention]) -> float:
        tried = np.linspace(np.log(0.05), np.log(100), 200)
        start = min(tried, key=lambda w: float(np.abs(misses(np.array([w]), rows)).sum()))
        found = least_squares(misses, [start], args=(rows,), loss="soft_l1", f_scale=0.05)
        return float(np.exp(found.x[0]))

    value = best(seen)
    each = [best([row]) for row in seen]
    fitted = times(*shared_rates(value, capacity, limit))
    residuals = tuple(
        Residual(f"{row.label} {what}", SHARED_BYTES, 1, 0, measured * 1e9, predicted * 1e9)
        for row in seen
        for what, measured, predicted in zip(
            ("read", "copy"), times(row.direct_bytes_per_s, row.copy_bytes_per_s), fitted, strict=True
        )
    )
    fit = Fit(
        case,
        "weighted fair sharing of the link's time",
        (
            Constant(
                "weight",
                value,
                min([value * (1 - LEAST_SPREAD), *each]),
                max([value * (1 + LEAST_SPREAD), *each]),
            ),
        ),
        residuals,
    )
    if refuse:
        check(fit)
    return fit


SHARED_BYTES = 512 * 2**20


def shared_rates(weight: float, capacity: float, limit: float) -> tuple[float, float]:
    """Bytes per second that the simulator gives a read in place of this weight, `limit` alone, and one copy beside it.

    A read alone has the whole link however few bytes it makes of it, so it is a flow of the link's own bytes: its rate here is
    its share of `limit`.
    """
    read = Flow(("link",), 1.0, weight, None)  # type: ignore[arg-type]  # nothing waits for this flow's end
    copy = Flow(("link",), 1.0, 1.0, None)  # type: ignore[arg-type]
    fair_rates([read, copy], {"link": capacity})
    return read.rate / capacity * limit, copy.rate


def measured(point: Point) -> Constant:
    """A figure taken straight from one point: per operation, 10th to 90th percentile."""
    low, high = np.percentile(point.samples_ns, (10, 90)) / point.count
    value = point.each_ns
    return Constant(
        point.label,
        value,
        min(float(low), value * (1 - LEAST_SPREAD)),
        max(float(high), value * (1 + LEAST_SPREAD)),
    )
