"""What holds for every test."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _whole_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words are looked for in prose wherever a line of 80 columns would end; tests of wrapping and of prints say their own."""
    monkeypatch.setenv("COLUMNS", "9999")
