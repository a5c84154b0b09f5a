"""What the points of a sweep say together: errors, ranks, regret, and a picture of predicted over measured."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from hwexec.sweep import Point


@dataclass(frozen=True, slots=True)
class CaseSummary:
    """One network. `tau`: Kendall's rank correlation of prediction and measurement; None where there is too little to rank.

    `regrets`: per number of links, the measured time of the plan that search picked, over the least measured of all plans
    that use no more links.
    """

    name: str
    points: int
    median_error: float
    worst_error: float
    tau: float | None
    regrets: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    points: int
    mismatches: int
    median_error: float
    p95_error: float
    worst_error: float
    cases: tuple[CaseSummary, ...]


def summarise(points: tuple[Point, ...]) -> Summary | None:
    """None where nothing was measured."""
    known = [p for p in points if p.measured_ns is not None]
    if not known:
        return None
    errors = sorted(abs(p.off) for p in known)
    cases: dict[tuple[object, ...], list[Point]] = {}
    for point in known:
        cases.setdefault(point.case, []).append(point)
    return Summary(
        len(known),
        sum(not p.outputs_match for p in known),
        statistics.median(errors),
        errors[min(len(errors) - 1, int(0.95 * len(errors)))],
        errors[-1],
        tuple(_case(found) for found in cases.values()),
    )


def _case(points: list[Point]) -> CaseSummary:
    first = points[0]
    tokens = "" if first.seq is None else f", {first.seq} tokens"
    errors = [abs(p.off) for p in points]
    regrets = []
    for best in (p for p in points if p.strategy == "best"):
        least = min(p.measured_ns or float("inf") for p in points if p.links <= best.links)
        regrets.append((best.links, (best.measured_ns or 0.0) / least))
    return CaseSummary(
        f"{first.model}, {first.dtype}, batch {first.batch}{tokens}",
        len(points),
        statistics.median(errors),
        max(errors),
        _tau(points),
        tuple(sorted(regrets)),
    )


def _tau(points: list[Point]) -> float | None:
    from scipy.stats import kendalltau  # noqa: PLC0415 - scipy.stats takes a second to import, and only this needs it

    if len(points) < 3:
        return None
    found = float(kendalltau([p.predicted_ns for p in points], [p.measured_ns for p in points]).statistic)
    return found if found == found else None


def summary_words(found: Summary, about: str) -> Iterator[str]:
    yield (
        f"{about}: absolute error median {found.median_error:.1%}, 95th percentile {found.p95_error:.1%}, worst "
        f"{found.worst_error:.1%}; {found.mismatches} with wrong answers."
    )
    for case in found.cases:
        tau = "-" if case.tau is None else f"{case.tau:.3f}"
        regrets = ", ".join(f"{value:.3f} over {links}" for links, value in case.regrets) or "-"
        yield (
            f"{case.name}: {case.points} plans, median error {case.median_error:.1%}, worst {case.worst_error:.1%}, Kendall's "
            f"tau {tau}, regret {regrets}"
        )


# Picture --------------------------------------------------------------------------------------------------------------

_COLOURS = {
    "best": "#D55E00", "random": "#999999", "demand": "#000000", "pipeline": "#56B4E9", "pipeswitch": "#0072B2",
    "dha-static": "#F0E442", "dha": "#E69F00", "pt": "#009E73", "pt+dha": "#CC79A7",
}  # fmt: skip
"""Okabe & Ito's palette."""


def draw(points: tuple[Point, ...], about: str) -> bytes:
    """Predicted over measured, both on logarithmic axes, with the diagonal and 5 % to either side, as PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes most of a second, and only pictures need it

    known = [p for p in points if p.measured_ns is not None]
    figure = Figure(figsize=(7.5, 7.0), layout="constrained")
    axes = figure.subplots()
    measured = {p.key: (p.measured_ns or 0.0) / 1e6 for p in known}
    values = [*measured.values(), *(p.predicted_ns / 1e6 for p in known)]
    ends = [0.8 * min(values), 1.25 * max(values)]
    axes.fill_between(
        ends, [0.95 * e for e in ends], [1.05 * e for e in ends], color="#DDDDDD", label="within 5 %"
    )
    axes.plot(ends, ends, color="black", linewidth=0.8)
    for strategy in sorted({p.strategy for p in known}, key=lambda s: (s == "best", s != "random", s)):
        chosen = [p for p in known if p.strategy == strategy]
        axes.scatter(
            [measured[p.key] for p in chosen],
            [p.predicted_ns / 1e6 for p in chosen],
            s=26 if strategy == "best" else 16,
            color=_COLOURS.get(strategy, "#882255"),
            marker="*" if strategy == "best" else "o",
            linewidths=0,
            label=strategy,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("measured ms")
    axes.set_ylabel("predicted ms")
    axes.set_title(about, fontsize=10, loc="left", parse_math=False)
    axes.legend(frameon=False, fontsize=8)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=150)
    return made.getvalue()
