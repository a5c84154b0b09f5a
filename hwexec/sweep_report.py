"""What the points of a sweep say together: errors, ranks, regret, targets met or not, a picture of predicted over measured."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor

from rich.table import Table

from hwexec.pace import SLOWER, is_slower
from hwexec.sweep import Point
from sim.hints import run_words
from sim.plan import Launch

MEDIAN, P95, WORST, TAU, REGRET = 0.03, 0.10, 0.20, 0.9, 1.03
"""Targets: the absolute errors and the regret are to be no larger, Kendall's tau of every network no smaller."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Absolute errors of points. `tau`: the mean of the networks' rank correlations, None where none can be ranked."""

    points: int
    median: float
    p95: float
    worst: float
    tau: float | None


@dataclass(frozen=True, slots=True)
class CaseSummary:
    """One network. `errors.tau`: Kendall's rank correlation of prediction and measurement.

    `regrets`: per number of links, the measured time of the plan that search picked, over the least measured of all plans
    that use no more links.
    """

    name: str
    errors: Errors
    regrets: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """`by_launch`: those of graphs and of eager plans apart, where there are any. `by_pace`: those whose starts
    the host issued about as fast as predicted (True), and those it took longer for; empty where nobody looked."""

    mismatches: int
    errors: Errors
    by_launch: tuple[tuple[Launch, Errors], ...]
    by_pace: tuple[tuple[bool, Errors], ...]
    cases: tuple[CaseSummary, ...]


def summarise(points: Sequence[Point]) -> Summary | None:
    """None where nothing was measured."""
    known = [p for p in points if p.measured_ns is not None]
    errors = errors_of(known)
    if errors is None:
        return None
    return Summary(
        sum(not p.outputs_match for p in known),
        errors,
        tuple(by_launch(known)),
        tuple(_by_pace(known)),
        tuple(_case(found) for found in _cases(known)),
    )


def errors_of(points: Sequence[Point]) -> Errors | None:
    """None where none of them was measured."""
    known = [p for p in points if p.measured_ns is not None]
    if not known:
        return None
    errors = sorted(abs(p.off) for p in known)
    taus = [tau for found in _cases(known) if (tau := _tau(found)) is not None]
    return Errors(
        len(errors),
        statistics.median(errors),
        errors[min(len(errors) - 1, int(0.95 * len(errors)))],
        errors[-1],
        statistics.fmean(taus) if taus else None,
    )


def by_launch(points: Sequence[Point]) -> Iterator[tuple[Launch, Errors]]:
    for launch in (Launch.GRAPH, Launch.EAGER):
        errors = errors_of([p for p in points if p.launch is launch])
        if errors is not None:
            yield launch, errors


def _by_pace(points: Sequence[Point]) -> Iterator[tuple[bool, Errors]]:
    known = [
        (point, not is_slower(point.issued_ns, point.predicted_issued_ns))
        for point in points
        if point.issued_ns is not None and point.predicted_issued_ns is not None
    ]
    for fast in (True, False):
        errors = errors_of([point for point, was_fast in known if was_fast is fast])
        if errors is not None:
            yield fast, errors


def _cases(points: Sequence[Point]) -> list[list[Point]]:
    found: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        found.setdefault(point.case, []).append(point)
    return list(found.values())


def _case(points: list[Point]) -> CaseSummary:
    first, errors = points[0], errors_of(points)
    assert errors is not None
    regrets = []
    for best in (p for p in points if p.strategy == "best"):
        least = min(p.measured_ns or float("inf") for p in points if p.links <= best.links)
        regrets.append((best.links, (best.measured_ns or 0.0) / least))
    return CaseSummary(
        run_words(first.model, first.dtype, first.batch, first.seq), errors, tuple(sorted(regrets))
    )


def _tau(points: list[Point]) -> float | None:
    """None of fewer than three, and where either side has all alike."""
    from scipy.stats import kendalltau  # noqa: PLC0415 - scipy.stats takes a second to import, and only this needs it

    if len(points) < 3:
        return None
    found = float(kendalltau([p.predicted_ns for p in points], [p.measured_ns for p in points]).statistic)
    return found if found == found else None


# Tables ---------------------------------------------------------------------------------------------------------------


def table_of(title: str, columns: Sequence[str], left: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def summary_parts(found: Summary, about: str) -> Iterator[Table | str]:
    """Which targets are met, then the errors by launch and by network."""
    yield f"{about}: {found.mismatches} with wrong answers."
    yield _target_table(found)
    table = table_of("By launch", ("launch", "plans", *ERRORS, "mean tau"), ("launch",))
    for launch, errors in found.by_launch:
        table.add_row(launch.value, str(errors.points), *error_cells(errors))
    yield table
    if found.by_pace:
        table = table_of("By the host's pace", ("host", "plans", *ERRORS, "mean tau"), ("host",))
        for fast, errors in found.by_pace:
            what = "as predicted" if fast else f"slower: over {SLOWER:g} times as long to issue a start"
            table.add_row(what, str(errors.points), *error_cells(errors))
        yield table
    words = (
        "network",
        tau := f"at least {TAU:g}",
        "regret, by number of links",
        most := f"at most {REGRET:g}",
    )
    table = table_of("By network", (words[0], "plans", *ERRORS, "tau", tau, words[2], most), words)
    for case in found.cases:
        regrets = ", ".join(f"{_regret_words(value)} over {links}" for links, value in case.regrets) or "-"
        table.add_row(
            case.name,
            str(case.errors.points),
            *error_cells(case.errors),
            _met(case.errors.tau is not None, (case.errors.tau or 0.0) >= TAU),
            regrets,
            _met(bool(case.regrets), all(value <= REGRET for _, value in case.regrets)),
        )
    yield table


def _target_table(found: Summary) -> Table:
    taus = [case.errors.tau for case in found.cases if case.errors.tau is not None]
    regrets = [value for case in found.cases for _, value in case.regrets]
    table = table_of("Targets", ("target", "found", "asked", ""), ("target", "asked", ""))
    for what, value, limit in (
        ("median absolute error", found.errors.median, MEDIAN),
        ("95th percentile of it", found.errors.p95, P95),
        ("worst", found.errors.worst, WORST),
    ):
        table.add_row(what, _part(value), f"at most {limit:.0%}", _met(True, value <= limit))
    table.add_row(
        "Kendall's tau, the least of all networks",
        _tau_words(min(taus)) if taus else "-",
        f"at least {TAU:g}",
        _met(bool(taus), all(tau >= TAU for tau in taus)),
    )
    table.add_row(
        "regret, the largest of all networks",
        _regret_words(max(regrets)) if regrets else "-",
        f"at most {REGRET:g}",
        _met(bool(regrets), all(regret <= REGRET for regret in regrets)),
    )
    return table


def _met(known: bool, met: bool) -> str:
    return "-" if not known else "met" if met else "not met"


ERRORS = ("median", "95th", "worst")


def error_cells(errors: Errors) -> tuple[str, ...]:
    """Under `ERRORS` and a column for tau."""
    tau = "-" if errors.tau is None else _tau_words(errors.tau)
    return (_part(errors.median), _part(errors.p95), _part(errors.worst), tau)


# what misses its target must not look as if it met it: errors and regrets are rounded up, tau is rounded down


def _part(error: float) -> str:
    return f"{ceil(round(error * 1e4, 6)) / 1e4:.2%}"


def _regret_words(regret: float) -> str:
    return f"{ceil(round(regret * 1e3, 6)) / 1e3:.3f}"


def _tau_words(tau: float) -> str:
    return f"{floor(round(tau * 1e3, 6)) / 1e3:.3f}"


# Picture --------------------------------------------------------------------------------------------------------------

_COLOURS = {
    "best": "#D55E00", "random": "#999999", "demand": "#000000", "pipeline": "#56B4E9", "pipeswitch": "#0072B2",
    "dha-static": "#F0E442", "dha": "#E69F00", "pt": "#009E73", "pt+dha": "#CC79A7",
}  # fmt: skip
"""Okabe & Ito's palette."""


def draw(points: Sequence[Point], about: str) -> bytes:
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
