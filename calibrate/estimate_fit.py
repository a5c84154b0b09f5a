"""What published figures cannot give, fitted; and the estimate held against all figures that were left out.

Two fits. The roofline's four matrix constants to DeepBench's V100 kernel times; three host costs (issue of a copy, issue of
a kernel, start of an eager request) to five published ResNet-50 latencies. Every other constant stays at its published
value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
from scipy.optimize import least_squares, minimize

from calibrate.published import Decision, KernelTime, Latency, Published, deepbench_v100
from sim.baselines import BASELINES, Setting, published_partner
from sim.errors import InputError
from sim.estimate import estimate
from sim.host import Figure, Host, Roofline
from sim.plan import Access
from sim.profile import Profile, Provenance
from sim.program import lower
from sim.simulate import simulate
from sim.trace import Trace

FITTED_COSTS = ("issue_copy_ns", "issue_kernel_ns", "start_ns")
FITTED_ROOFLINE = ("gemm_efficiency", "gemm_half_outputs", "gemm_half_depth", "gemm_floor_ns")


@dataclass(frozen=True, slots=True)
class Residual:
    """One published latency beside the estimate. `error` is estimate / published - 1."""

    latency: Latency
    estimated_ms: float

    @property
    def error(self) -> float:
        return self.estimated_ms / self.latency.ms - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """One published decision beside the static plan: how many of the layers it names are decided alike."""

    decision: Decision
    layers: int
    agree: int


@dataclass(frozen=True, slots=True)
class KernelFit:
    """Relative errors of the roofline against DeepBench's kernels: median of the absolute, and the 90th percentile."""

    kernels: int
    median_error: float
    p90_error: float


@dataclass(frozen=True, slots=True)
class Estimation:
    host: Host
    kernels: KernelFit
    residuals: tuple[Residual, ...]
    verdicts: tuple[Verdict, ...]


TraceOf = Callable[[str, int, int | None], Trace]
"""Model, batch, tokens -> trace; a parameter so that tests need not trace."""


def fit(host: Host, published: Published, trace_of: TraceOf, provenance: Provenance) -> Estimation:
    """Raises InputError where the host has no roofline or nothing published is marked `fitted`."""
    if host.roofline is None:
        raise InputError(f"host {host.name!r} has no roofline figures; an estimate needs them")
    targets = tuple(row for row in published.latencies if row.fitted)
    if len(targets) < len(FITTED_COSTS):
        raise InputError(
            f"{len(targets)} published latencies of {host.name} are marked fitted; {len(FITTED_COSTS)} constants need as many"
        )
    roofline, kernels = fit_roofline(host.roofline, deepbench_v100())
    host = fit_costs(replace(host, roofline=roofline), targets, trace_of, provenance)
    profiles = _Profiles(host, trace_of, provenance)
    residuals = tuple(Residual(row, predict_ms(host, profiles.of(row), row)) for row in published.latencies)
    verdicts = tuple(verdict(host, profiles.model(d.model), d) for d in published.decisions)
    return Estimation(host, kernels, residuals, verdicts)


def fit_roofline(roofline: Roofline, kernels: tuple[KernelTime, ...]) -> tuple[Roofline, KernelFit]:
    """Least squares on the logarithm of time, outliers damped: kernels differ by four orders of magnitude."""
    table = np.array([(k.m, k.n, k.k, k.window, k.seconds) for k in kernels], dtype=float)
    m, n, k, window, seconds = table.T
    peak, memory = roofline.peak_fp32_flops_per_s.value, roofline.memory_bytes_per_s.value

    def log_error(x: np.ndarray) -> np.ndarray:
        efficiency, half_outputs, half_depth, floor = np.exp(x)
        outputs = m * n
        rate = peak * efficiency * outputs / (outputs + half_outputs) * k / (k + half_depth)
        moved = 4 * (m * k / window + n * k + m * n)
        error: np.ndarray = np.log((floor + np.maximum(2 * m * n * k / rate, moved / memory)) / seconds)
        return error

    start = np.log([0.9, 2e4, 50.0, 5e-6])
    solution = least_squares(
        log_error, start, loss="soft_l1", bounds=(np.log([0.1, 1, 1, 1e-7]), np.log([1, 1e7, 1e4, 1e-3]))
    )
    efficiency, half_outputs, half_depth, floor = np.exp(solution.x)
    error = np.abs(np.expm1(log_error(solution.x)))
    found = KernelFit(len(kernels), float(np.median(error)), float(np.quantile(error, 0.9)))
    source = (
        f"calibrate estimate: least squares to {len(kernels)} DeepBench V100 fp32 kernels, "
        f"median error {found.median_error:.0%}"
    )
    values = (efficiency, half_outputs, half_depth, floor * 1e9)
    figures = {name: _fitted(value, source) for name, value in zip(FITTED_ROOFLINE, values, strict=True)}
    return replace(roofline, **figures), found


def fit_costs(host: Host, targets: tuple[Latency, ...], trace_of: TraceOf, provenance: Provenance) -> Host:
    """Minimise the sum of squared relative errors over the targets (Nelder-Mead: a simulation has no gradient)."""
    start = np.array([getattr(host.costs, name).value for name in FITTED_COSTS])

    def moved(scale: np.ndarray) -> Host:
        return _with_costs(host, tuple(start * scale), "being fitted")

    def loss(scale: np.ndarray) -> float:
        trial = moved(scale)
        profiles = _Profiles(trial, trace_of, provenance)
        return sum((predict_ms(trial, profiles.of(row), row) / row.ms - 1) ** 2 for row in targets)

    low, high = 0.05, 20.0
    solution = minimize(
        loss,
        np.ones(len(start)),
        method="Nelder-Mead",
        bounds=[(low, high)] * len(start),
        options={"maxiter": 200, "xatol": 1e-3, "fatol": 1e-7},
    )
    names = ", ".join(f"{row.strategy} {row.ms} ms" for row in targets)
    source = f"calibrate estimate: with {len(start) - 1} others to {len(targets)} latencies of {targets[0].model}: {names}"
    return _with_costs(host, tuple(start * solution.x), source)


def predict_ms(host: Host, profile: Profile, row: Latency) -> float:
    """Milliseconds of a published latency's strategy on this host."""
    if row.strategy == "kernels":
        return profile.warm_ns * 1e-6
    if row.strategy == "warm":
        issue = sum(t.issue.median_ns for t in profile.layers)
        return (host.costs.start_ns.value + max(issue, profile.warm_ns)) * 1e-6
    for baseline in BASELINES:
        if baseline.name == row.strategy:
            plan = baseline.make(Setting(profile, host, 0, published_partner(host, 0)))
            return simulate(lower(plan, profile.network, host), profile, detail=False).makespan_ns * 1e-6
    raise InputError(
        f"published strategy {row.strategy!r} is no baseline; use one of {', '.join(b.name for b in BASELINES)}"
    )


class _Profiles:
    """Profiles of one host, each estimated once."""

    def __init__(self, host: Host, trace_of: TraceOf, provenance: Provenance) -> None:
        self.host, self.trace_of, self.provenance = host, trace_of, provenance
        self.made: dict[tuple[str, int, int | None], Profile] = {}

    def of(self, row: Latency) -> Profile:
        return self._made(row.model, row.batch, row.seq)

    def model(self, name: str) -> Profile:
        return self._made(name, 1, None)

    def _made(self, model: str, batch: int, seq: int | None) -> Profile:
        key = (model, batch, seq)
        if key not in self.made:
            self.made[key] = estimate(self.trace_of(*key), self.host, self.provenance)
        return self.made[key]


def verdict(host: Host, profile: Profile, decision: Decision) -> Verdict:
    """Hold the static plan against one published decision."""
    (static,) = (b for b in BASELINES if b.name == "dha-static")
    plan = static.make(Setting(profile, host, 0, None))
    alike = [
        (Access.DIRECT in accesses) is decision.direct
        for layer, accesses in zip(profile.network.layers, plan.access, strict=True)
        if accesses and fnmatchcase(layer.name, decision.layers)
    ]
    return Verdict(decision, len(alike), sum(alike))


def _fitted(value: float, source: str) -> Figure:
    return Figure(float(f"{value:.4g}"), "fitted", source)


def _with_costs(host: Host, values: tuple[float, ...], source: str) -> Host:
    figures = {name: _fitted(value, source) for name, value in zip(FITTED_COSTS, values, strict=True)}
    return replace(host, costs=replace(host.costs, **figures))
