"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def _whole_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are looked for in prose wherever a line of 80 columns would end; tests of wrapping and of prints say their own."""
    monkeypatch.setenv("COLUMNS", "9999")


@pytest.fixture(autouse=True)
def _full_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody slows the core, and it is awake: what is told by its pace is tested with a pace of the test's own."""
    if (core := sys.modules.get("hwexec.core")) is not None:
        monkeypatch.setattr(core, "slowed", lambda: False)
        monkeypatch.setattr(core, "AWAKE_S", 0.0)
        monkeypatch.setattr(core, "AWAKE_MOST_S", 0.0)
