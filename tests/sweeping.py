"""What tests of `hwexec sweep` share: its command lines, a folder to run them in, points by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwexec import commands, starts
from hwexec.plan_line import PlanLine
from hwexec.sweep import Point, SweepRecord
from sim.plan import Launch, Sync
from sim.profile import Provenance
from tests.test_hwexec_verify import MODEL, Stopwatch

ASK = ("sweep", "--model", MODEL, "--host", "p3.8xlarge", "--runs", "1", "--out", "here")
AGAIN = ("sweep", "--again", "here", "--model", MODEL)
MADE = Provenance("test", "GPU X", "hwexec sweep", "2026-01-01T00:00:00Z", "0" * 40)


def point(
    strategy: str,
    links: int,
    predicted: float,
    measured: float,
    *,
    match: bool = True,
    model: str = "m",
    launch: Launch = Launch.GRAPH,
) -> Point:
    plan = PlanLine(strategy, 0, launch, Sync.STREAM, 0, "c1", "+1")
    return Point(
        model, "fp32", 1, None, "d", "measured", links, strategy, 0, 1, 1, 0, match, predicted, measured, "", plan, (measured,)
    )  # fmt: skip


def record(points: tuple[Point, ...]) -> SweepRecord:
    return SweepRecord("pair", "0" * 64, "cuda", True, 0, MADE, MADE, points)


def folder_in(parent: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For `hwexec sweep --out here`, run on threads whose times are taken for figures."""
    monkeypatch.chdir(parent)
    monkeypatch.setattr(starts, "WAKE_S", 0.0)
    monkeypatch.setattr(commands, "open_device", lambda name, gpus: Stopwatch(gpus))
    return parent / "here"
