"""Every layer of a network in running order: resident, read in place from host and from a peer, and the host's issue time.

The executor runs whole plans; here they are chosen so that what differs between two runs is what a layer costs. A layer's
time is from its first kernel to the next layer's first, so layers add up to the run. What reading in place adds is taken
twice: with all reads in place, and with each layer's largest read resident; where a layer has small reads of different
sizes, also with each of them in place alone. `timings.py` makes a profile of all that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from calibrate.beside import Pairs, runs_beside_copies
from calibrate.cold import eager_starts, graph_starts
from calibrate.samples import Point
from calibrate.ways import BESIDE, beside_copies, cut, everything, partner_of, reads_alone, small_reads
from hwexec.core import once_at_full_pace, steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.preparing import prepare
from hwexec.timing import Mismatch, Samples, Scatter, steadiest, time_ns, wall_ns
from sim.errors import InputError, require
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.ops import Wait, compute_stream
from sim.plan import Access, Launch, Plan
from sim.profile import Provenance
from sim.program import lower
from sim.timeline import SpanKind, Timeline

T = TypeVar("T")

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


def unwatched(
    built: Built,
    network: Network,
    host: Host,
    device: Device,
    *,
    repeats: int,
    progress: Callable[[str], None],
) -> Unwatched:
    """The first half of a network's measurement. Raises InputError where the network does not fit the GPU."""
    began = time.perf_counter()
    progress("issue")
    alone = beside = None
    hooked: tuple[Point, ...] = ()
    launched: tuple[Point, ...] = ()
    waited = None
    notes: list[str] = []
    plan = everything(network, Access.RESIDENT, launch=Launch.EAGER)
    with (
        prepare(built.module, plan, built.inputs, network=network, host=host, device=device) as cold,
        steady(device),
    ):
        take = partial(_issue, cold, built, network, device, repeats)
        failed = "issue: scatters, and taking it again failed"
        issue, around = _steadiest(take, lambda pair: (pair[0].whole, pair[1]), device, failed, notes)
    if device.figures:
        progress("beside copies")
        task = (built, network, host, device, 2 * repeats)
        try:
            (alone, beside), waited = _waited(*task)
        except InputError as error:
            notes.append(f"resident beside copies: not measured ({error})")
        if 0 < network.arena_bytes <= LARGE_BYTES:
            progress("cold starts")
            hooked = _or_note(partial(_steady_starts, task, notes), "eager cold starts", notes)
            launched = _or_note(partial(graph_starts, *task), "cold starts by graph", notes)
    seconds = time.perf_counter() - began
    return Unwatched(issue, around, alone, beside, tuple(notes), seconds, hooked, launched, waited)


def _waited(
    built: Built, network: Network, host: Host, device: Device, rounds: int
) -> tuple[tuple[Point, Point], Waited | None]:
    """The resident run alone and beside copies; and, where it is a graph, with waits."""
    given = built.inputs_on(device.torch_device(0))

    def taken(plan: Plan, graph: bool) -> Pairs:
        """Nothing where there is to be a graph and is none."""
        with (
            prepare(built.module, plan, built.inputs, network=network, host=host, device=device) as cold,
            steady(device),
        ):
            if graph and cold.launch is not Launch.GRAPH:
                return ()
            cold(*given)
            cold.resident(*given)
            runs: dict[str, Callable[[], object]] = {"whole": partial(cold.resident, *given)}
            if graph:
                runs["waits"] = partial(cold.landed, *given)
            return runs_beside_copies(runs, device, rounds)

    plan = cut(network)
    ops, stream = lower(plan, network, host).ops, compute_stream(plan.target)
    waits = sum(isinstance(op, Wait) and op.stream == stream for op in ops)
    if waits and (found := taken(plan, graph=True)):
        whole, (alone, beside) = found
        return whole, Waited(whole, (replace(alone, waits=waits), replace(beside, waits=waits)))
    (whole,) = taken(everything(network, Access.RESIDENT), graph=False)
    return whole, None


def _steady_starts(task: tuple[Built, Network, Host, Device, int], notes: list[str]) -> tuple[Point, ...]:
    """Eager cold starts, again where they scatter: all that an eager plan is predicted by hangs on them.

    RegNet-Y was issued a tenth to a fifth faster than in a take that scattered by 15 % (results/h100-pair-7/sweep).
    """
    *_, device, _ = task
    failed = "eager cold starts: scatter, and taking them again failed"
    return _steadiest(partial(eager_starts, *task), lambda points: points, device, failed, notes)


def _steadiest(
    take: Callable[[], T],
    parts: Callable[[T], Sequence[Scatter]],
    device: Device,
    failed: str,
    notes: list[str],
) -> T:
    """The steadiest take, and a note where making one again `failed`."""
    found = steadiest(take, parts, device)
    if found.failed:
        notes.append(f"{failed}: {found.failed}")
    return found.kept


def _or_note(starts: Callable[[], tuple[Point, ...]], what: str, notes: list[str]) -> tuple[Point, ...]:
    """Points, or where these starts cannot be made none and a note. A wrong answer is no reason to go on."""
    try:
        return starts()
    except Mismatch:
        raise
    except InputError as error:
        notes.append(f"{what}: not measured ({error}); the host's costs hold")
        return ()


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


def _issue(
    cold: ColdStart, built: Built, network: Network, device: Device, repeats: int
) -> tuple[LayerRun, Point]:
    """Host time between the starts of layers' modules in eager mode; few enough kernels that the host never waits.

    Beside it, what the host takes around the modules.
    """
    inputs = built.inputs_on(device.torch_device(0))
    rows, whole, around = [], [], []

    def sample(everywhere: bool) -> tuple[list[tuple[str, int]], int]:
        with _clocked(built.module, everywhere=everywhere) as seen:
            device.synchronize()
            began = time.perf_counter_ns()
            cold.resident(*inputs)
            took = time.perf_counter_ns() - began
        return seen, took

    for index in range(2 * repeats + 2):  # in turn: a host's pace drifts
        for everywhere in (False, True):
            seen, took = once_at_full_pace(partial(sample, everywhere), device)
            if index < 2:
                continue
            if everywhere:
                rows.append(issue_times(seen, [layer.name for layer in network.layers]))
            else:
                whole.append(float(seen[-1][1] - seen[0][1]))
                around.append(took - whole[-1])
    device.synchronize()
    run = LayerRun("issue", Launch.EAGER.value, tuple(rows), Point("whole issue", 0, 1, tuple(whole)))
    return run, Point("around the modules", 0, 1, tuple(around))


@contextmanager
def _clocked(module: torch.nn.Module, *, everywhere: bool) -> Iterator[list[tuple[str, int]]]:
    """Name and host clock at the start of each module's forward, the root's end last."""
    seen: list[tuple[str, int]] = []
    handles = []
    for name, child in module.named_modules():
        if everywhere or child is module:

            def met(_module: torch.nn.Module, _args: object, name: str = name) -> None:
                seen.append((name or "(root)", time.perf_counter_ns()))

            handles.append(child.register_forward_pre_hook(met))
    handles.append(module.register_forward_hook(lambda *_: seen.append(("(end)", time.perf_counter_ns()))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def issue_times(seen: Sequence[tuple[str, int]], layers: Sequence[str]) -> tuple[float, ...]:
    """Time between layers' starts; layers that begin without a call of their own module share with the one before."""
    require(len(seen) >= 2, "no module was called: the host's issue time cannot be told")
    starts: list[int | None] = []
    at = 0
    for name in layers:
        found = next((i for i in range(at, len(seen) - 1) if seen[i][0] == name), None)
        starts.append(None if found is None else seen[found][1])
        at = at if found is None else found + 1
    starts[0] = seen[0][1]  # what runs before the first layer counts for it
    result: list[float] = []
    index = 0
    while index < len(layers):
        until = next((i for i in range(index + 1, len(layers)) if starts[i] is not None), len(layers))
        begin = starts[index]
        end = starts[until] if until < len(layers) else seen[-1][1]
        assert begin is not None
        assert end is not None
        result += [(end - begin) / (until - index)] * (until - index)
        index = until
    return tuple(result)


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
