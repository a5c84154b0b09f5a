"""The first half of a network's measurement, without the profiler: once that has run in a process, every later launch takes the
host longer. The host's issue time of each layer, the run beside copies and with waits, and cold starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from calibrate.beside import Pairs, runs_beside_copies
from calibrate.cold import eager_starts, graph_starts
from calibrate.layers import LARGE_BYTES, LayerRun, Unwatched, Waited
from calibrate.samples import Point
from calibrate.ways import cut, everything
from hwexec.core import once_at_full_pace, steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.preparing import prepare
from hwexec.timing import Mismatch, Scatter, steadiest
from sim.errors import InputError, require
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.ops import Wait, compute_stream
from sim.plan import Access, Launch, Plan
from sim.program import lower

T = TypeVar("T")


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
