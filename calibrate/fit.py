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
from sim.host import Figure

Vector = NDArray[np.float64]

REFUSED_RESIDUAL = 0.10
"""Median relative residual above which a fit is refused."""
LAUNCH_RESIDUAL = 0.20
"""The same of launches: the driver issues a graph in batches, which no line follows closely."""
LEAST_SPREAD = 0.02
"""Stated spread is never below this part of the figure: two processes on one host differ by about as much."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A fitted number and the range that the spread of its samples allows."""

    name: str
    value: float
    low: float
    high: float

    def figure(self, source: str) -> Figure:
        """As measured. A median of differences may lie outside of what their spread allows: the range has it all the same."""
        low, high = min(self.low, self.value), max(self.high, self.value)
        return Figure(self.value, "measured", source, low, high)


@dataclass(frozen=True, slots=True)
class Residual:
    """What a fit says of one point beside what was measured."""

    label: str
    size_bytes: int
    count: int
    edges: int
    measured_ns: float
    fitted_ns: float
    copies: int = 0

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
    case: str,
    model: str,
    names: Sequence[str],
    points: Sequence[Point],
    terms: Terms,
    *,
    refuse: bool = True,
    limit: float = REFUSED_RESIDUAL,
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
            Residual(p.label, p.size_bytes, p.count, p.edges, float(m), float(f), p.copies)
            for p, m, f in zip(points, medians, fitted, strict=True)
        ),
    )
    if refuse:
        check(fit, limit)
    return fit


def check(fit: Fit, limit: float = REFUSED_RESIDUAL) -> None:
    """Raise InputError where a fit explains its samples badly: a wrong constant is worse than none."""
    if fit.median_residual <= limit:
        return
    worst = max(fit.residuals, key=lambda r: abs(r.relative))
    found = ", ".join(f"{c.name} {c.value:.4g}" for c in fit.constants)
    raise InputError(
        f"{fit.case}: {fit.model} misses half of its {len(fit.residuals)} points by more than "
        f"{fit.median_residual:.0%} (limit {limit:.0%}) at {found}; worst is {worst.label} "
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


def fit_blocked(case: str, points: Sequence[Point], *, refuse: bool = True) -> Fit:
    """Chains in which each operation waits for the one before, and their copies and kernels alone: what one wait adds."""
    return fit_linear(
        case,
        "time = base + copies x copy + kernels x kernel + waits x wait",
        ("base_ns", "copy_ns", "kernel_ns", "wait_ns"),
        points,
        lambda p: (1.0, p.copies, p.count - p.copies, p.edges),
        refuse=refuse,
    )


LAUNCH_TERMS = (
    ("node_ns", "layers", "count"),
    ("copy_ns", "copies", "copies"),
    ("wait_ns", "waits for a head", "waits"),
    ("cross_ns", "edges between devices", "edges"),
)
"""Constants of a launch, what each is multiplied by, and the attribute of a point that says how many."""


def fit_launch(case: str, points: Sequence[Point], *, refuse: bool = True) -> Fit:
    """Launch of a graph by its layers, and by copies, waits for a head and edges between devices where points have any."""
    terms = [row for row in LAUNCH_TERMS if row[0] == "node_ns" or any(getattr(p, row[2]) for p in points)]
    model = " + ".join(["time = launch", *(f"{words} x {name}" for name, words, _ in terms)])
    return fit_linear(
        case,
        model,
        ["launch_ns", *(name for name, *_ in terms)],
        points,
        lambda point: (1.0, *(getattr(point, attribute) for *_, attribute in terms)),
        refuse=refuse,
        limit=LAUNCH_RESIDUAL,
    )


@dataclass(frozen=True, slots=True)
class InPlace:
    """What reading `size_bytes` in place adds to a kernel, with the link idle and with one copy after another on it."""

    label: str
    size_bytes: int
    alone_ns: float
    beside_ns: float


BUSY, RAMP, WEIGHT = "busy_ns", "ramp_ns", "weight"
WEIGHTS = (0.5, 100.0)
"""Least and most that a fit may find: beyond, the copies get all or nothing."""


def beside_ns(alone_ns: Vector, busy: float, ramp: float, weight: float) -> Vector:
    """What the simulator makes of reads of `alone_ns` beside one copy: a wait, an equal share, then a share by weight."""
    first = np.minimum(alone_ns, ramp)
    return np.asarray(busy + 2 * first + (alone_ns - first) * (1 + 1 / weight), dtype=float)


def fit_in_place(case: str, seen: Sequence[InPlace], *, refuse: bool = True) -> Fit:
    """The three constants of reads in place beside copies, on relative residuals of `beside_ns`."""
    require(len(seen) >= 3, f"{case}: {len(seen)} sizes cannot give 3 constants; measure more")
    alone, beside = (np.maximum([getattr(s, f"{w}_ns") for s in seen], 1.0) for w in ("alone", "beside"))
    ramps = [0.0, *np.geomspace(alone.min(), alone.max(), 12)]
    value = _solve_in_place(alone, beside, ramps)
    left_out = [np.arange(len(seen)) != at for at in range(len(seen))] if len(seen) > 3 else []
    stack = np.stack([value, *(_solve_in_place(alone[keep], beside[keep], [value[1]]) for keep in left_out)])
    low = np.minimum(stack.min(axis=0), value * (1 - LEAST_SPREAD))
    high = np.maximum(stack.max(axis=0), value * (1 + LEAST_SPREAD))
    fitted = beside_ns(alone, *map(float, value))
    fit = Fit(
        case,
        "added = busy + 2 x first (up to ramp) + rest x (1 + 1 / weight)",
        tuple(
            Constant(name, float(v), float(a), float(b))
            for name, v, a, b in zip((BUSY, RAMP, WEIGHT), value, low, high, strict=True)
        ),
        tuple(
            Residual(s.label, s.size_bytes, 1, 0, float(m), float(f))
            for s, m, f in zip(seen, beside, fitted, strict=True)
        ),
    )
    if refuse:
        check(fit)
    return fit


def _solve_in_place(alone: Vector, beside: Vector, ramps: Sequence[float]) -> Vector:
    """The best of fits begun at these ramps: for a given one the rule is linear in the others."""

    def misses(x: Vector) -> Vector:
        return np.asarray(beside_ns(alone, x[0], x[1], 1 / x[2]) / beside - 1, dtype=float)

    def found(x: Vector) -> tuple[float, Vector]:
        best = least_squares(
            misses, np.clip(x, low, high), bounds=(low, high), x_scale=scale, loss="soft_l1", f_scale=0.03
        )
        return float(best.cost), np.asarray(best.x, dtype=float)

    most = float(alone.max())
    low, high = np.array([0.0, 0.0, 1 / WEIGHTS[1]]), np.array([float(beside.max()), most, 1 / WEIGHTS[0]])
    scale = np.array([max(1.0, float(beside.min())), most, 1.0])
    tries = [found(np.array([float(beside.min()) / 2, ramp, 0.1])) for ramp in ramps]
    busy, ramp, part = min(tries, key=lambda row: row[0])[1]
    return np.array([busy, ramp, 1 / part])


@dataclass(frozen=True, slots=True)
class InPlaceRun:
    """A network's run with layers read in place: what that adds to each layer alone, and to the whole run beside copies."""

    way: str
    alone_ns: tuple[float, ...]
    beside_ns: float


def fit_in_place_runs(case: str, runs: Sequence[InPlaceRun]) -> Fit:
    """A network's own busy time and weight: each run's layers, alone and with both, add up to what it took beside copies.

    One run alone gives the weight, without a busy time. The range is what 2 % more or less of the runs' times would give.
    """
    rows = np.array(
        [[sum(x > 0 for x in run.alone_ns) if len(runs) > 1 else 0, sum(run.alone_ns)] for run in runs],
        dtype=float,
    )
    times = np.array([run.beside_ns for run in runs], dtype=float)
    most, least = WEIGHTS[1], WEIGHTS[0]

    def solved(wanted: Vector) -> Vector:
        part, _ = nnls(rows / wanted[:, None], np.maximum(1 - rows[:, 1] / wanted, 0.0))
        return np.array([part[0], min(most, max(least, 1 / max(part[1], 1e-9)))])

    value = solved(times)
    stack = np.stack([value, solved(times * (1 - LEAST_SPREAD)), solved(times * (1 + LEAST_SPREAD))])
    fitted = rows @ np.array([value[0], 1 + 1 / value[1]])
    return Fit(
        case,
        "added to the run = sum over layers of busy + alone x (1 + 1 / weight)",
        tuple(
            Constant(name, float(v), float(a), float(b))
            for name, v, a, b in zip((BUSY, WEIGHT), value, stack.min(axis=0), stack.max(axis=0), strict=True)
        ),
        tuple(
            Residual(r.way, 0, 1, 0, float(m), float(f)) for r, m, f in zip(runs, times, fitted, strict=True)
        ),
    )


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
