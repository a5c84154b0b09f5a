"""Synthetic samples with known constants, noise and outliers: the fit gives the constants back, or refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fit import (
    Constant,
    InPlace,
    InPlaceRun,
    bandwidth,
    beside_ns,
    fit_in_place,
    fit_in_place_runs,
    fit_launch,
    fit_route,
    fit_step,
    measured,
)
from calibrate.samples import Point
from sim.errors import InputError
from sim.plan import Access, Chunk, Launch, Plan
from sim.program import lower
from sim.simulate import simulate
from sim.timeline import SpanKind
from tests.builders import FREE, figure, host, network, profile

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


def test_a_figures_range_has_its_value() -> None:
    told = [Constant("x", 5.0, *around).figure("a case") for around in ((4.0, 6.0), (6.0, 7.0), (1.0, 2.0))]
    assert [(f.low, f.value, f.high) for f in told] == [(4, 5, 6), (5, 5, 7), (1, 5, 5)]


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
    node=st.floats(20, 500),
    copy=st.floats(500, 8_000),
    wait=st.floats(300, 8_000),
    cross=st.none() | st.floats(0, 20_000),
    seed=st.integers(0, 99),
)
def test_a_launch_grows_by_its_layers_its_copies_its_waits_and_its_edges_between_devices(
    base: float, node: float, copy: float, wait: float, cross: float | None, seed: int
) -> None:
    """Without a second GPU there are no edges, and the other constants are found all the same."""
    rng = np.random.default_rng(seed)
    shapes = [(k, 0, 0, 0) for k in (1, 50, 200, 400)]
    shapes += [(200, own, 0, 0) for own in (1, 8, 24, 48)] + [(200, 0, 0, ahead) for ahead in (8, 24)]
    shapes += [(50, 8, 0, 0), (50, 24, 0, 0), (400, 24, 0, 8)]
    if cross is not None:
        shapes += [(200, 2 * n, n, 0) for n in (1, 8, 24)] + [(50, 16, 8, 0), (400, 56, 24, 8)]
    points = [
        Point(
            "graph", 0, k, noisy(base + k * node + c * copy + e * (cross or 0) + w * wait, rng, 0.1), e, c, w
        )
        for k, c, e, w in shapes
    ]
    fit = fit_launch("launch", points)
    assert [c.name for c in fit.constants] == [
        *("launch_ns", "node_ns", "copy_ns", "wait_ns"),
        *(["cross_ns"] if cross is not None else []),
    ]
    assert fit.constant("wait_ns").value == pytest.approx(wait, rel=0.15, abs=0.1 * (base + 200 * node) / 24)
    if cross is None:
        return
    assert fit.constant("launch_ns").value == pytest.approx(base, rel=0.1)
    assert fit.constant("node_ns").value == pytest.approx(node, rel=0.1, abs=0.1 * base / 400)
    assert fit.constant("copy_ns").value == pytest.approx(copy, rel=0.1, abs=0.1 * (base + 200 * node) / 32)
    assert fit.constant("cross_ns").value == pytest.approx(
        cross, rel=0.15, abs=0.1 * (base + 200 * node) / 24 + 0.2 * copy
    )


def test_launches_seen_by_hand_on_two_h200_are_explained() -> None:
    seen = ((1, 0, 28), (50, 0, 24), (200, 0, 31), (400, 0, 46), (200, 8, 77), (200, 1, 45), (30, 30, 96))
    fit = fit_launch("launch", [Point("graph", 0, k, (us * 1e3,), copies=c) for k, c, us in seen])
    assert 20_000 < fit.constant("launch_ns").value < 25_000
    assert 30 < fit.constant("node_ns").value < 80
    assert 2_000 < fit.constant("copy_ns").value < 5_500


READS = (4096, 65536, 2**18, 2**20, 2**22, 2**24, 2**26)


@few
@given(
    busy=st.floats(2_000, 15_000),
    ramp=st.floats(20_000, 200_000),
    weight=st.floats(4, 20),
    seed=st.integers(0, 2**32 - 1),
    outlier=st.none() | st.integers(0, len(READS) - 1),
)
def test_reads_in_place_beside_copies_give_their_three_constants_back(
    busy: float, ramp: float, weight: float, seed: int, outlier: int | None
) -> None:
    rng = np.random.default_rng(seed)
    alone = np.array([1_300 + size / 52.0 for size in READS for _ in range(2)])
    told = beside_ns(alone, busy, ramp, weight) * rng.normal(1.0, 0.01, len(alone))
    if outlier is not None:
        told[outlier] *= 1.7
    sizes = [size for size in READS for _ in range(2)]
    seen = [InPlace("read", s, float(a), float(b)) for s, a, b in zip(sizes, alone, told, strict=True)]
    fit = fit_in_place("direct", seen)
    found = [fit.constant(name).value for name in ("busy_ns", "ramp_ns", "weight")]
    # constants that trade against each other are right where they show: in the times of every read
    assert beside_ns(alone, *found) == pytest.approx(beside_ns(alone, busy, ramp, weight), rel=0.06)
    assert found[0] == pytest.approx(busy, rel=0.1, abs=1_000)
    assert found[1] == pytest.approx(ramp, rel=0.4)
    assert 1 / found[2] == pytest.approx(
        1 / weight, rel=0.3, abs=0.08
    )  # a long ramp leaves few reads to tell it from


def test_reads_seen_by_hand_on_an_h200_are_explained_and_wild_ones_refused() -> None:
    alone = (1.5, 2.7, 6.6, 21.8, 81, 321, 1279)
    beside = (6.1, 11.4, 18.4, 45.5, 123, 393, 1432)
    seen = [InPlace("read", s, a * 1e3, b * 1e3) for s, a, b in zip(READS, alone, beside, strict=True)]
    fit = fit_in_place("direct", seen)
    assert 2_500 < fit.constant("busy_ns").value < 6_000
    assert 25_000 < fit.constant("ramp_ns").value < 50_000
    assert 7 < fit.constant("weight").value < 14
    wild = (900, 4, 2_000, 3, 800, 1, 90)
    rows = [InPlace(s.label, s.size_bytes, s.alone_ns, 1e3 * b) for s, b in zip(seen, wild, strict=True)]
    with pytest.raises(InputError, match=r"direct: added = busy .* misses half of its 7 points"):
        fit_in_place("direct", rows)
    with pytest.raises(InputError, match="2 sizes cannot give 3 constants"):
        fit_in_place("direct", seen[:2])


LARGE = np.array([2_000_000.0, 900_000.0, 400_000.0, 250_000.0])
SMALL = np.array([300_000.0, 120_000.0, 60_000.0, 20_000.0, 5_000.0])
"""What reading layers in place adds to each alone, nanoseconds."""


@few
@given(busy=st.floats(0, 15_000), weight=st.floats(0.6, 30))
def test_runs_in_place_beside_copies_give_their_networks_busy_time_and_weight_back(
    busy: float, weight: float
) -> None:
    """Layers that add nothing alone read nothing: they do not wait either."""
    layers = {"direct": np.append(LARGE, [*SMALL, 0.0]), "direct-small": np.append(SMALL, 0.0)}
    runs = [
        InPlaceRun(way, tuple(map(float, x)), float(beside_ns(x[x > 0], busy, 0.0, weight).sum()))
        for way, x in layers.items()
    ]
    fit = fit_in_place_runs("toy", runs)
    assert fit.constant("busy_ns").value == pytest.approx(busy, rel=1e-3, abs=1.0)
    assert fit.constant("weight").value == pytest.approx(weight, rel=1e-3)
    assert all(c.low <= c.value <= c.high for c in fit.constants)
    assert fit.median_residual < 1e-3


@few
@given(weight=st.floats(0.6, 30))
def test_one_run_in_place_gives_the_weight_alone(weight: float) -> None:
    told = float(beside_ns(LARGE, 0.0, 0.0, weight).sum())
    fit = fit_in_place_runs("toy", [InPlaceRun("direct", tuple(map(float, LARGE)), told)])
    assert fit.constant("busy_ns").value == 0
    assert fit.constant("weight").value == pytest.approx(weight, rel=0.01)


def test_runs_that_copies_do_not_slow_give_the_largest_share_and_no_wait() -> None:
    runs = [InPlaceRun("direct", (4e5, 1e5), 4.9e5), InPlaceRun("direct-small", (1e4, 2e4), 2.9e4)]
    fit = fit_in_place_runs("toy", runs)
    assert (fit.constant("busy_ns").value, fit.constant("weight").value) == (0, 100)


@few
@given(
    read=st.floats(1_000, 500_000),
    busy=st.floats(0, 9_000),
    ramp=st.floats(0, 100_000),
    weight=st.floats(0.5, 50),
)
def test_the_simulator_charges_a_read_beside_a_copy_what_the_fit_says(
    read: float, busy: float, ramp: float, weight: float
) -> None:
    costs = replace(
        FREE, direct_busy_ns=figure(busy), direct_ramp_ns=figure(ramp), direct_weight=figure(weight)
    )
    net, machine = network(100, 10_000_000), host(costs=costs)
    access = ((Access.DIRECT,), (Access.COPIED,))
    plan = Plan("test", 0, Launch.GRAPH, access, (Chunk(net.offsets[1], net.arena_bytes, (0,)),))
    timeline = simulate(lower(plan, net, machine), profile(net, machine, run=7, direct=read))
    first = next(s for s in timeline.of(SpanKind.RUN) if s.layer == 0)
    told = float(beside_ns(np.array([read]), busy, ramp, weight)[0])
    assert first.stop_ns - first.start_ns == pytest.approx(told + 7, rel=1e-6)


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
