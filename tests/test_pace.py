"""Whether the host issued starts as fast as predicted."""

from __future__ import annotations

import pytest

from hwexec.pace import SLOWER, words


@pytest.mark.parametrize(
    ("issued", "predicted", "said"),
    [
        (None, 1e5, ""),
        (1e5, None, ""),
        (1.1e5, 1e5, "Host: a start was issued in 0.11 ms, predicted 0.10."),
        (SLOWER * 2e5, 2e5, "Host: a start was issued in 0.25 ms, predicted 0.20."),
        (
            4.1e5,
            1.2e5,
            "Host: a start was issued in 0.41 ms, predicted 0.12: slower than when it was calibrated, so that first copies and "
            "layers begin up to 0.29 ms later.",
        ),
    ],
)
def test_a_host_that_is_slower_than_predicted_is_told(
    issued: float | None, predicted: float | None, said: str
) -> None:
    assert words("a start", issued, predicted) == said


def test_a_host_that_nobody_calibrated_is_not_called_slower_than_then() -> None:
    assert words("a start", 4.1e5, 1.2e5, "estimated") == (
        "Host: a start was issued in 0.41 ms, estimated 0.12: slower than estimated, so that first copies and layers begin up to "
        "0.29 ms later."
    )
