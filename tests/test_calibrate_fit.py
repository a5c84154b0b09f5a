"""Synthetic samples with known constants, noise and outliers: the fit gives the constants back, or refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fit import (
    Contention,
    bandwidth,
    fit_launch,
    fit_route,
    fit_sharing,
    fit_step,
    measured,
    shared_rates,
)
from calibrate.samples import Point
from sim.errors import InputError

SIZES = tuple(4096 * 4**k for k in range(10))
few = settings(max_examples=25, deadline=None)


def noisy(truth: float, rng: np.random.Generator, outliers: float, runs: int = 15) -> tuple[float, ...]:
    """Two percent of noise; an outlier is a run that something else disturbed: up to ten times as long."""
    samples = truth * rng.normal(1.0, 0.02, runs)
    disturbed = rng.random(runs) < outliers
    return tuple(float(x) for x in np.where(disturbed, samples * rng.uniform(1.5, 10, runs), samples))


def copies(latency_ns: float, bytes_per_s: float, seed: int = 0, outliers: float = 0.0) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [
        Point("h2d:0", size, 16, noisy(16 * (latency_ns + size / bytes_per_s * 1e9), rng, outliers))
        for size in SIZES
    ]


@few
@given(
    latency_ns=st.floats(500, 50_000),
    gigabytes=st.floats(1, 500),
    seed=st.integers(0, 2**32 - 1),
    outliers=st.floats(0, 0.2),
)
def test_a_route_gives_its_latency_and_bandwidth_back(
    latency_ns: float, gigabytes: float, seed: int, outliers: float
) -> None:
    fit = fit_route("h2d", copies(latency_ns, gigabytes * 1e9, seed, outliers))
    smallest_ns = latency_ns + SIZES[0] / gigabytes  # noise is relative to this: no copy shows less
    assert fit.constant("latency_ns").value == pytest.approx(latency_ns, abs=0.06 * smallest_ns)
    assert bandwidth(fit).value == pytest.approx(gigabytes * 1e9, rel=0.06)
    assert len(fit.residuals) == len(SIZES)


def test_a_whole_bad_point_does_not_bend_the_rest() -> None:
    points = copies(2_000, 50e9)
    points[6] = Point("h2d:0", SIZES[6], 16, tuple(3 * x for x in points[6].samples_ns))
    fit = fit_route("h2d", points)
    assert bandwidth(fit).value == pytest.approx(50e9, rel=0.05)
    assert max(fit.residuals, key=lambda r: abs(r.relative)).size_bytes == SIZES[6]


def test_copies_measured_on_two_h200_are_explained() -> None:
    seen = {4: 3.0, 64: 4.1, 256: 7.9, 1024: 22.4, 2048: 42, 4096: 79, 8192: 155, 16384: 308}
    fit = fit_route("h2d", [Point("h2d:0", kib << 10, 1, (us * 1e3,)) for kib, us in seen.items()])
    assert 50e9 < bandwidth(fit).value < 58e9
    assert 2_000 < fit.constant("latency_ns").value < 4_000
    assert fit.median_residual < 0.05


@few
@given(
    wait_ns=st.floats(200, 40_000),
    kernel_ns=st.floats(500, 5_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_wait_is_what_a_chain_with_it_takes_longer(wait_ns: float, kernel_ns: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = [
        Point(
            "chain", 0, kernels, noisy(5_000 + kernels * kernel_ns + waits * wait_ns, rng, 0.1), edges=waits
        )
        for kernels in (64, 128)
        for waits in (0, 16, 64)
    ]
    assert fit_step("wait", points).constant("wait_ns").value == pytest.approx(
        wait_ns, abs=0.05 * wait_ns + 0.06 * 2 * kernel_ns
    )


@few
@given(
    base=st.floats(5_000, 50_000),
    node=st.floats(100, 3_000),
    cross=st.floats(0, 300_000),
    seed=st.integers(0, 99),
)
def test_a_launch_grows_by_its_operations_and_by_its_edges_between_devices(
    base: float, node: float, cross: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    points = [
        Point("launch", 0, ops, noisy(base + ops * node + edges * cross, rng, 0.1), edges=edges)
        for ops, edges in ((4, 0), (64, 0), (256, 0), (1024, 0), (64, 8), (256, 32), (512, 64))
    ]
    fit = fit_launch("launch", points)
    assert fit.constant("node_ns").value == pytest.approx(node, rel=0.25)
    assert fit.constant("cross_ns").value == pytest.approx(cross, rel=0.15, abs=0.15 * base)


@few
@given(weight=st.floats(0.2, 20), capacity=st.floats(5e9, 100e9), ceiling=st.floats(0.5, 1.2))
def test_a_sharing_weight_is_found_where_it_shows(weight: float, capacity: float, ceiling: float) -> None:
    direct, copy = shared_rates(weight, capacity, ceiling * capacity)
    fit = fit_sharing("share", [Contention("both", direct, copy)], capacity, ceiling * capacity)
    again = shared_rates(fit.constant("weight").value, capacity, ceiling * capacity)
    assert again == pytest.approx((direct, copy), rel=0.02)


def test_the_h200_pairs_reads_in_place_win_the_link() -> None:
    fit = fit_sharing("share", [Contention("both", 42.9e9, 9e9)], 54.9e9, 48.8e9)
    assert 5 < fit.constant("weight").value < 9


def test_a_fit_that_explains_its_samples_badly_is_refused_and_says_what_it_saw() -> None:
    rng = np.random.default_rng(1)
    points = [Point("h2d:0", size, 1, (float(rng.uniform(1e3, 1e7)),)) for size in SIZES]
    with pytest.raises(
        InputError, match=r"h2d: time = count .* misses half of its 10 points .*limit 10%.*worst is h2d:0"
    ):
        fit_route("h2d", points)


def test_too_few_points_or_time_that_does_not_grow_are_refused() -> None:
    with pytest.raises(InputError, match="1 points cannot give 2 constants"):
        fit_route("h2d", [Point("h2d:0", 4096, 1, (1e3,))])
    with pytest.raises(InputError, match="hardly grows with the bytes"):
        bandwidth(fit_route("h2d", [Point("h2d:0", size, 1, (1e3,)) for size in SIZES]))


def test_a_figure_taken_straight_keeps_its_spread() -> None:
    figure = measured(Point("issue", 0, 10, tuple(float(x) for x in range(900, 1101, 10))))
    assert (figure.value, figure.low, figure.high) == (100.0, 92.0, 108.0)
