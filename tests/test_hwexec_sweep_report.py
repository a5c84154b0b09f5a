"""What the points of a sweep say together: errors, ranks, regret, and targets met or not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwexec.ablate import MECHANISMS, UNCHARGED, AblationRecord, ablation, ablation_parts
from hwexec.sweep import Point
from hwexec.sweep_report import Errors, draw, error_cells, summarise, summary_parts
from sim.plan import Launch
from sim.tables import as_text
from tests import golden
from tests.sweeping import MADE, point

POINTS = (
    point("best", 1, 1.9e6, 2.0e6),
    point("pt", 2, 3.0e6, 3.0e6, launch=Launch.EAGER),
    point("best", 2, 1.0e6, 1.1e6, match=False),
    point("random", 1, 2.2e6, 1.6e6),
)
"""Of one network; the search picked wrongly over one link."""


def test_errors_ranks_and_regret() -> None:
    found = summarise(POINTS)
    assert found is not None
    (case,) = found.cases
    assert (found.errors.points, found.mismatches) == (4, 1)
    assert found.errors.median == pytest.approx((0.05 + 1 / 11) / 2)
    assert found.errors.worst == pytest.approx(0.375)
    assert case.errors.tau == pytest.approx(2 / 3)
    assert case.regrets == ((1, pytest.approx(1.25)), (2, 1.0))
    assert [(launch, errors.points, errors.tau) for launch, errors in found.by_launch] == [
        (Launch.GRAPH, 3, pytest.approx(1 / 3)),
        (Launch.EAGER, 1, None),
    ]
    assert found.by_pace == ()
    assert draw(POINTS, "about").startswith(b"\x89PNG")


def test_prints_of_summary_and_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    good = tuple(
        point(name, links, 1e6 * at, 1e6 * at * 1.01, model="n")
        for at, (name, links) in enumerate((("best", 2), ("best", 1), ("pt", 2), ("dha", 1)), 2)
    )
    points = (*POINTS, *(replace(p, plan=good[0].plan) for p in good))
    # two that the host issued as fast as predicted, one that it did not, and five when nobody looked
    paced = zip(points[:3], (1_000.0, 1_250.0, 1_260.0), strict=True)
    points = (*(replace(p, issued_ns=ns, predicted_issued_ns=1_000.0) for p, ns in paced), *points[3:])
    found = summarise(points)
    assert found is not None
    off = [replace(p, predicted_ns=0.8 * p.predicted_ns) for p in points]
    rows = tuple(ablation((points, *(off for _ in MECHANISMS))))[: 3 * 3]
    bought = AblationRecord("pair", "0" * 64, MADE, MADE, UNCHARGED, rows)
    parts = (*summary_parts(found, "8 plans on pair (GPU X)"), *ablation_parts(bought))
    golden.compare("hwexec_sweep", as_text(*parts))


def test_a_target_is_met_or_not_by_what_was_found_unrounded() -> None:
    def verdicts(points: tuple[Point, ...]) -> list[str]:
        found = summarise(points)
        assert found is not None
        lines = as_text(*summary_parts(found, "some")).splitlines()
        at = next(i for i, line in enumerate(lines) if "median absolute error" in line)
        return [line.split("│")[4].strip() for line in lines[at : at + 5]]

    exact = tuple(point(n, 1, p, 100.0) for n, p in (("best", 102.9), ("pt", 97.1), ("dha", 109.9)))
    assert verdicts(exact)[:2] == ["met", "met"]
    off = tuple(replace(p, predicted_ns=103.001) for p in exact[:2])
    assert verdicts((*off, *exact[2:]))[:2] == ["not met", "met"]
    assert verdicts(exact[1:2]) == ["met", "met", "met", "-", "-"]


def test_what_misses_its_target_does_not_print_as_if_it_met_it() -> None:
    errors = Errors(1, 0.030001, 0.0999999, 0.2, 0.89966)
    assert error_cells(errors) == ("3.01%", "10.00%", "20.00%", "0.899")
    assert error_cells(replace(errors, tau=0.9))[-1] == "0.900"
    points = tuple(point(name, 1, 100.0, took) for name, took in (("best", 103.01), ("pt", 100.0)))
    found = summarise(points)
    assert found is not None
    assert "1.031 over 1" in as_text(*summary_parts(found, "some"))
