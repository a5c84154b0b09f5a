"""Raw runs of a network to what its profile says: layers' times, and what copies beside them cost.

Every figure is made from samples that are on file, so a profile can be made again without a GPU. What reading in place adds
to a layer is shared out among its reads: the run with the largest read resident is what the small ones add, theirs by what
each adds alone, or by bytes where they are alike or nobody measured that; the largest takes the rest of what all add
together, or as much as the others each where that is more, and then all are scaled to what they add together. Without such a
run (a network too large for it) all share by bytes. Bytes alone can mislead: an index or a bias of some KiB that a kernel
reads again and again took 0.3 ms in place, as long as the megabyte of weights beside it (results/h100-pair-5/sweep).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from calibrate.fit import BUSY, WEIGHT, InPlaceRun, fit_in_place_runs
from calibrate.layers import LayerRun, LayersResult, Waited, alone_way
from calibrate.samples import Point
from calibrate.ways import BESIDE, MOST_ALONE, largest, places, uneven
from sim.errors import InputError
from sim.host import Costs, Figure
from sim.profile import LayerTiming, Timing


def timings(result: LayersResult, calls_ns: float = 0.0) -> tuple[LayerTiming, ...]:
    """A profile's layers: medians over the watched runs, spreads their interquartile ranges.

    `calls_ns` is what a cold start of one chunk takes the host for that: its copy, its events, and coming ahead of a layer.
    """
    resident, issue, direct = (_need(result, way) for way in ("resident", "issue", "direct"))
    issued = issue.columns() * _cooled(result, issue, calls_ns)
    peer = result.run("peer")
    alone = {p: run for p in range(1, MOST_ALONE + 1) if (run := result.run(alone_way(p))) is not None}
    direct_added = _added(result, resident, direct, result.run("direct-small"), alone)
    peer_added = _added(result, resident, peer, result.run("peer-small"), {}) if peer is not None else None
    beside = _beside(result, resident)
    return tuple(
        LayerTiming(
            _timing(resident.columns()[:, at]),
            _timing(issued[:, at]),
            direct_added[at],
            peer_added[at] if peer_added is not None else (),
            beside[at] if beside is not None else None,
        )
        for at in range(len(result.network.layers))
    )


def _cooled(result: LayersResult, issue: LayerRun, calls_ns: float) -> float:
    """What makes layers' medians, which are of runs in a loop, add up to the host's time in the modules of a cold start.

    A loop finds all that it needs in the core's caches. Before a cold start the host has waited for one: on two H100 that took 5 to
    24 % longer to issue, the more the longer it had waited (results/h100-pair-3/calibration).
    """
    if not result.hooked or result.around is None:
        return 1.0
    layers_ns = float(np.median(issue.columns(), axis=0).sum())
    return max(0.0, result.hooked[0].median_ns - calls_ns - result.around.median_ns) / layers_ns


def slowed(result: LayersResult) -> Figure | None:
    """Part by which the warm run takes longer beside copies, its spread from the rounds; None where nobody measured it."""
    alone, beside = result.alone, result.beside_copies
    if alone is None or beside is None:
        return None
    rounds = [b / a - 1 for a, b in zip(alone.samples_ns, beside.samples_ns, strict=True)]
    low, high = np.percentile(rounds, (10, 90))
    value = max(0.0, beside.median_ns / alone.median_ns - 1)
    source = f"calibrate layers, {beside.label} less {alone.label}, {len(rounds)} rounds"
    return Figure(value, "measured", source, max(0.0, min(float(low), value)), max(float(high), value))


def waits(found: Waited | None) -> tuple[Figure, Figure] | None:
    """What a layer begins later for a wait ahead of it that is over, alone and beside copies; None where nobody measured it.

    A network's own: on two H200 chains of one small kernel lost 0.7 us, and 0.8 beside copies, where fifteen networks lost 1.6 to
    2.6 and 2.0 to 4.8 (results/h200-pair-2/trials/pushes.txt).
    """
    if found is None:
        return None
    alone, beside = (_each_wait(*pair) for pair in zip(found.without, found.waiting, strict=True))
    return alone, beside


def _each_wait(without: Point, waiting: Point) -> Figure:
    """In the median round, and from the 10th to the 90th percentile."""
    each = [(b - a) / waiting.waits for a, b in zip(without.samples_ns, waiting.samples_ns, strict=True)]
    low, value, high = (max(0.0, float(x)) for x in np.percentile(each, (10, 50, 90)))
    source = (
        f"calibrate layers, {waiting.label} less {without.label}, {waiting.waits} waits, {len(each)} rounds"
    )
    return Figure(value, "measured", source, low, high)


def _beside(result: LayersResult, resident: LayerRun) -> tuple[Timing, ...] | None:
    """What copies to the same GPU add to each layer, from watched runs; all together as much as to the unwatched run.

    The copies end before the layers do where a network computes longer than it is copied: layers behind begin with the
    average part. A difference within its spread is none. All are then scaled to what the run took longer.
    """
    run, alone, busy = result.run(BESIDE), result.alone, result.beside_copies
    if run is None or alone is None or busy is None:
        return None
    rows, base = np.array(run.rows, dtype=float), np.array(resident.rows, dtype=float)
    part = max(0.0, busy.median_ns / alone.median_ns - 1)
    found = []
    for at in range(base.shape[1]):
        seen = rows[[index for index, count in enumerate(run.beside) if count > at], at]
        first = _timing(base[:, at])
        if len(seen) < 2:
            found.append(Timing(part * first.median_ns, first.spread_ns, 0))
            continue
        other = _timing(seen)
        spread = float(np.hypot(other.spread_ns, first.spread_ns))
        added = other.median_ns - first.median_ns
        found.append(Timing(added if added > spread else 0.0, spread, len(seen)))
    total = sum(timing.median_ns for timing in found)
    if total == 0 and part > 0:
        return None  # slower as a whole, and no layer by more than its spread: the network's average is all there is
    scale = part * alone.median_ns / total if total else 0.0
    return tuple(replace(timing, median_ns=scale * timing.median_ns) for timing in found)


def in_place(result: LayersResult) -> tuple[Figure, Figure] | None:
    """`direct_busy` and `direct_weight` of a profile: those with which its layers, read in place beside copies, take what the
    runs took that did so. None where they were not measured."""
    resident, beside = result.run("resident"), result.beside_copies
    found = []
    for point in result.in_place_beside:
        run = result.run(point.label)
        if run is not None and resident is not None and beside is not None:
            added = np.maximum(np.median(run.columns(), axis=0) - np.median(resident.columns(), axis=0), 0.0)
            if added.any() and point.median_ns > beside.median_ns:
                found.append(InPlaceRun(point.label, tuple(added), point.median_ns - beside.median_ns))
    if not found:
        return None
    fit = fit_in_place_runs(f"{result.network.model} in place beside copies", found)
    source = f"calibrate layers, {' and '.join(r.way for r in found)} beside copies"
    return fit.constant(BUSY).figure(source), fit.constant(WEIGHT).figure(source)


def start(result: LayersResult, costs: Costs) -> Figure | None:
    """What an eager start takes the host around its modules, and until it knows the answer."""
    if result.around is None:
        return None
    source = f"calibrate layers, {result.around.label}, and the host's start_ns"
    return _shifted(result.around, costs.start_ns.value, source)


def _shifted(point: Point, by: float, source: str, count: int = 1) -> Figure:
    """A point's median and its range from the 10th to the 90th percentile, moved, never below nothing, and shared by `count`."""
    low, value, high = (
        max(0.0, float(x) + by) / count for x in np.percentile(point.samples_ns, (10, 50, 90))
    )
    return Figure(value, "measured", source, low, high)


def _need(result: LayersResult, way: str) -> LayerRun:
    run = result.run(way)
    if run is None:
        raise InputError(
            f"{result.network.model}: no {way} run was measured; run `calibrate run` again to go on"
        )
    return run


def _timing(samples: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Timing:
    low, middle, high = np.percentile(samples, (25, 50, 75))
    return Timing(max(0.0, float(middle)), float(high - low), len(samples))


def _added(
    result: LayersResult,
    resident: LayerRun,
    whole: LayerRun,
    small: LayerRun | None,
    alone: Mapping[int, LayerRun],
) -> tuple[tuple[Timing, ...], ...]:
    """Per layer and read, what `whole` adds to `resident`, shared out as the module says."""
    base, full = resident.columns(), whole.columns()
    part = small.columns() if small is not None else None
    single = {place: np.median(run.columns(), axis=0).tolist() for place, run in alone.items()}
    found = []
    for at, layer in enumerate(result.network.layers):
        first = _timing(base[:, at])
        total = _timing(full[:, at])
        added = max(0.0, total.median_ns - first.median_ns)
        spread = float(np.hypot(total.spread_ns, first.spread_ns))
        most = largest(result.network, at)
        by = [0.0 if i == most else float(r.touched_bytes) for i, r in enumerate(layer.reads)]
        others = sum(by)
        touched = others + (layer.reads[most].touched_bytes if layer.reads else 0)
        if part is not None:
            little = min(added, max(0.0, float(np.median(part[:, at])) - first.median_ns))
        else:
            little = added * others / touched if touched else 0.0
        if len(layer.reads) == 1:
            little = 0.0
        # reads of one kernel overlap: beside the others the largest may add nothing, but it does in a plan that reads it alone
        rest = max(added - little, little / (len(layer.reads) - 1)) if len(layer.reads) > 1 else added
        scale = added / (rest + little) if added else 0.0
        if single and uneven(result.network, at):
            by = _by_time(
                by, places(result.network, at), {p: t[at] - first.median_ns for p, t in single.items()}
            )
        parts = sum(by)
        shares = [
            scale * (rest if i == most else (little * part / parts if parts else 0.0))
            for i, part in enumerate(by)
        ]
        found.append(tuple(Timing(share, spread, total.samples) for share in shares))
    return tuple(found)


def _by_time(sizes: Sequence[float], at: Sequence[int], added_ns: Mapping[int, float]) -> list[float]:
    """What small reads share by: what each adds alone, those of one place theirs by bytes; by bytes where none adds anything."""
    shares = []
    for size, place in zip(sizes, at, strict=True):
        together = sum(s for s, p in zip(sizes, at, strict=True) if p == place)
        shares.append(max(0.0, added_ns.get(place, 0.0)) * size / together if together else 0.0)
    return shares if any(shares) else list(sizes)
