"""Every layer of a network in running order: resident, read in place from host and from a peer, and the host's issue time.

The executor runs whole plans; here they are chosen so that what differs between two runs is what a layer costs. A layer's
time is from its first kernel to the next layer's first, so layers add up to the run. What reading in place adds is taken
twice: with all reads in place, and with each layer's largest read resident; where a layer has small reads of different
sizes, also with each of them in place alone. `timings.py` makes a profile of all that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from calibrate.beside import runs_beside_copies
from calibrate.samples import Point
from calibrate.ways import BESIDE, beside_copies, everything, partner_of, reads_alone, small_reads
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.preparing import prepare
from hwexec.timing import Samples, time_ns, wall_ns
from sim.errors import InputError
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.plan import Access, Plan
from sim.profile import Provenance
from sim.timeline import SpanKind, Timeline

LARGE_BYTES = 4 * 2**30
"""Above this, each preparation takes seconds: the runs with the largest read resident are left out."""
SLOW_NS = 0.5e9
"""A run that takes longer is repeated twice only."""
EXPLAINED = 0.05
"""Layers that miss their run by more than this part have it explained in the file."""


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One way to run a network. `rows[i]` are the layers' nanoseconds in the i-th watched run; `whole` unwatched runs."""

    way: str
    launch: str
    rows: tuple[tuple[float, ...], ...]
    whole: Point
    beside: tuple[int, ...] = ()
    """By watched run, how many first layers had ended before the copies beside them did; empty where there were none."""

    @property
    def ratio(self) -> float:
        """Sum of the layers over the run they came from: above 1 where watching slowed them."""
        return float(np.median([sum(row) for row in self.rows])) / self.whole.median_ns

    def columns(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Runs by layers, scaled so that the layers add up to the unwatched run."""
        return np.array(self.rows, dtype=float) / self.ratio


@dataclass(frozen=True, slots=True)
class Waited:
    """A network in GPU memory as a graph, alone and beside copies of host memory: without waits, and with `waits` ahead of its
    layers for copies that have landed. All four in turn."""

    without: tuple[Point, Point]
    waiting: tuple[Point, Point]


@dataclass(frozen=True, slots=True)
class LayersResult:
    """Everything measured for one network on `host`: enough to make its profile again, without a GPU."""

    network: Network
    runs: tuple[LayerRun, ...]
    beside_copies: Point | None
    notes: tuple[str, ...]
    host: str
    seconds: float
    alone: Point | None = None
    """The same run without copies, taken in turn with `beside_copies`."""
    around: Point | None = None
    """Host thread, of an eager run before its first module begins and after its last has ended."""
    in_place_beside: tuple[Point, ...] = ()
    """Runs that read in place while host memory is copied to the same GPU all along, labelled by their way."""
    hooked: tuple[Point, ...] = ()
    """Host thread, of eager starts in one chunk, in one for each storage, and these relayed; empty where nobody measured them."""
    launched: tuple[Point, ...] = ()
    """Host thread, of starts by graph behind a head; empty as `hooked` is, and where there is no graph."""
    waited: Waited | None = None
    """None where there is no graph, nothing to wait for, or nobody measured it."""
    provenance: Provenance | None = None
    """Of the call that measured it; None in files from before that was kept, and the session's first call stands in."""

    def run(self, way: str) -> LayerRun | None:
        return next((r for r in self.runs if r.way == way), None)


@dataclass(frozen=True, slots=True)
class Unwatched:
    """What is timed without the profiler: once that has run in a process, every later launch takes the host longer."""

    issue: LayerRun
    around: Point
    alone: Point | None
    beside_copies: Point | None
    notes: tuple[str, ...]
    seconds: float
    hooked: tuple[Point, ...] = ()
    launched: tuple[Point, ...] = ()
    waited: Waited | None = None


def measure(
    built: Built,
    network: Network,
    host: Host,
    device: Device,
    first: Unwatched,
    *,
    repeats: int,
    progress: Callable[[str], None],
) -> LayersResult:
    """The second half, with the profiler. Raises InputError where the network's kernels cannot be told apart."""
    began = time.perf_counter()
    large = network.arena_bytes > LARGE_BYTES
    partner = partner_of(host)
    ways: list[tuple[str, Plan]] = [("resident", everything(network, Access.RESIDENT))]
    if network.arena_bytes:
        ways.append((BESIDE, beside_copies(network)))
    ways.append(("direct", everything(network, Access.DIRECT)))
    if not large:
        ways.append(("direct-small", small_reads(network, Access.DIRECT)))
        ways += [(alone_way(place), plan) for place, plan in reads_alone(network, Access.DIRECT).items()]
    if partner is not None:
        ways.append(("peer", everything(network, Access.PEER, partner)))
        if not large:
            ways.append(("peer-small", small_reads(network, Access.PEER, partner)))
    runs: list[LayerRun] = []
    loaded: list[Point] = []
    given = built.inputs_on(device.torch_device(0))
    notes = list(first.notes)
    for way, plan in ways:
        progress(way)
        with prepare(built.module, plan, built.inputs, network=network, host=host, device=device) as cold:
            if cold.why_eager:
                notes.append(f"{way}: no graph ({cold.why_eager}); measured eagerly")
            # what is added in place is large beside its noise, and each look through the profiler takes a third of a second
            count = repeats if way == "resident" else max(2, repeats // 2)
            if device.figures and way in ("direct", "direct-small"):
                try:
                    cold(*given)
                    ((_, beside),) = runs_beside_copies({way: partial(cold.warm, *given)}, device, 2)
                    loaded.append(replace(beside, label=way))
                except InputError as error:
                    notes.append(f"{way} beside copies: not measured ({error})")
            runs.append(_watch(way, cold, given, network, device, count))
    runs.append(first.issue)
    notes += [note for run in runs if (note := _explain(run))]
    seconds = first.seconds + time.perf_counter() - began
    return LayersResult(
        network, tuple(runs), first.beside_copies, tuple(notes), host.name, seconds,
        first.alone, first.around, tuple(loaded), first.hooked, first.launched,
        first.waited,
    )  # fmt: skip


def alone_way(place: int) -> str:
    """What the run of a plan of `reads_alone` is called."""
    return f"direct-alone-{place}"


def _watch(
    way: str,
    cold: ColdStart,
    inputs: tuple[torch.Tensor, ...],
    network: Network,
    device: Device,
    repeats: int,
) -> LayerRun:
    """Unwatched runs first, then the executor's own timelines of as many."""
    cold(*inputs)
    device.synchronize()
    stream = device.stream("calibrate", 0)

    def taken(count: int) -> Samples:
        if (
            not device.figures
        ):  # such a device's compute stream is the calling thread, which events do not time
            return wall_ns(lambda: cold.warm(*inputs), device, repeats=count, warmup=1)
        return time_ns(lambda: cold.warm(*inputs), device, [stream], repeats=count, warmup=1)

    count = repeats if taken(1).median_ns < SLOW_NS else 2
    whole = taken(2 * count)
    device.close_stream(stream)
    watched = [cold.timeline() for _ in range(count)]
    rows = tuple(layer_times(timeline, len(network.layers)) for timeline in watched)
    ended = tuple(layers_beside(timeline) for timeline in watched) if way == BESIDE else ()
    return LayerRun(way, cold.launch.value, rows, Point(f"whole {way}", 0, 1, whole.raw), ended)


def layer_times(timeline: Timeline, layers: int) -> tuple[float, ...]:
    """From each layer's first kernel to the next layer's, the last to its own end. 0 for a layer without kernels."""
    runs = sorted((s for s in timeline.of(SpanKind.RUN) if s.layer >= 0), key=lambda s: s.start_ns)
    if not runs or any(s.layer < 0 for s in timeline.of(SpanKind.RUN)):
        raise InputError(
            "the profiler's kernels do not add up to the captured layers, so no layer can be timed; "
            "run again, and if it stays report the model and PyTorch's version"
        )
    found = [0.0] * layers
    stops = [*(s.start_ns for s in runs[1:]), runs[-1].stop_ns]
    for span, stop in zip(runs, stops, strict=True):
        found[span.layer] += stop - span.start_ns
    return tuple(found)


def layers_beside(timeline: Timeline) -> int:
    """How many first layers had ended before the last copy did; one without kernels has no span, and ends with the one before."""
    copied = max((s.stop_ns for s in timeline.of(SpanKind.COPY)), default=0.0)
    runs = timeline.of(SpanKind.RUN)
    late = [s.layer for s in runs if s.stop_ns > copied]
    return min(late) if late else max((s.layer for s in runs), default=-1) + 1


def _explain(run: LayerRun) -> str | None:
    """Why layers and their run differ, where they do by more than 5 %; they are scaled to the run either way."""
    off = run.ratio - 1
    if run.way == BESIDE or abs(off) <= EXPLAINED:  # its unwatched run is the resident one's
        return None
    if run.way == "issue":
        why = "the clock hooks on every module cost host time"
    elif off > 0:
        why = "watched kernels are spaced apart by the profiler"
    else:
        why = "the unwatched run counts what comes before its first kernel: the replay's start and the inputs' copy"
    return f"{run.way}: layers add up to {run.ratio:.3f} of the unwatched run ({why}); they are scaled to it"
