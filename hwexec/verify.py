"""One plan put to the test: right answers, the bytes it says, the time that was predicted."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

from hwexec.core import FEWEST
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.peers import Scene, Snapshot
from hwexec.preparing import prepare
from hwexec.starts import (
    PAUSED,
    TOLERANCES,
    Likeness,
    Reference,
    likeness,
    nothing,
    plain_answer,
    shows_nothing,
    start_cold,
    take,
)
from sim.errors import require
from sim.files import FileKind
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.plan import Launch, Plan
from sim.profile import Profile, ProfileKind, Provenance
from sim.program import lower
from sim.simulate import simulate
from sim.timeline import SpanKind, Timeline

# Predicted beside measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpRow:
    """One copy or one layer in both timelines, nanoseconds since the request."""

    op: int
    kind: str
    label: str
    stream: str
    predicted_start_ns: float
    predicted_ns: float
    measured_start_ns: float
    measured_ns: float

    @property
    def difference_ns(self) -> float:
        return self.measured_ns - self.predicted_ns


def join(predicted: Timeline, measured: Timeline) -> tuple[OpRow, ...]:
    """Copies and layers that both timelines have, in the program's order."""
    found = _by_op(measured)
    rows = []
    for op, (kind, label, stream, start, stop) in sorted(_by_op(predicted).items()):
        if op in found:
            *_, began, ended = found[op]
            rows.append(OpRow(op, kind, label, stream, start, stop - start, began, ended - began))
    return tuple(rows)


def _by_op(timeline: Timeline) -> dict[int, tuple[str, str, str, float, float]]:
    found: dict[int, tuple[str, str, str, float, float]] = {}
    for span in timeline.spans:
        if span.op < 0 or span.kind not in (SpanKind.COPY, SpanKind.RUN):
            continue
        start, stop = span.start_ns, span.stop_ns
        if span.op in found:
            *_, low, high = found[span.op]
            start, stop = min(start, low), max(stop, high)
        found[span.op] = (span.kind.value, span.label, span.stream, start, stop)
    return found


# The verification -----------------------------------------------------------------------------------------------------

RESIDENT, IN_PLACE = "resident", "in-place"
"""References: the run with every weight in GPU memory, and the one with every weight read in place from host memory."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `hwexec verify` found. Without `figures` no time is kept: GPUs were played by threads."""

    model: str
    dtype: str
    batch: int
    seq: int | None
    plan: str
    gpus: tuple[int, ...]
    device: str
    figures: bool
    provenance: Provenance
    profile_kind: ProfileKind
    passed: bool
    failures: tuple[str, ...]
    remarks: tuple[str, ...]
    launch: str
    runs: int
    outputs_match: bool
    bit_equal: bool
    largest_error: float | None
    error_allowed: float
    reproducible: bool
    eager_bit_equal: bool | None
    """Whether the reference, launched as the plan is, gives the bits of plain PyTorch; None where that was not measured."""
    planned_bytes: int
    moved_bytes: int
    planned_relay_bytes: int
    relayed_bytes: int
    set_up_s: float | None
    predicted_ns: float | None
    measured_ns: float | None
    """Median of `cold_ns`."""
    tolerance: float | None
    cold_ns: tuple[float, ...]
    warm_ns: tuple[float, ...]
    """Runs with every weight in GPU memory, launched the same way; none where that was not measured."""
    ops: tuple[OpRow, ...]
    predicted_issued_ns: float | None = None
    """Until the host thread has issued a start."""
    issued_ns: tuple[float, ...] = ()
    """The same, measured in each of `cold_ns`."""
    paused_ns: tuple[float, ...] = ()
    """Further cold starts, each after 0.1 s in which nothing was asked of host and GPUs."""
    roused_ns: tuple[float, ...] = ()
    """Others after such a pause, but announced by `ColdStart.rouse` half a millisecond before."""
    warm_paused_ns: tuple[float, ...] = ()
    """Warm runs after such a pause."""
    reference: str = RESIDENT
    """What cold answers are held against, launched as the plan is: RESIDENT or IN_PLACE."""
    apart_ns: tuple[float, ...] = ()
    """Further cold starts, which do not count: others slowed the host's core when they were made."""
    full_pace: bool = True
    """Whether those of `cold_ns` were made at the core's full pace; false where there were too few of them, and all count."""
    starts_made: int = 0
    """All cold starts whose answers were compared, untimed ones and those of `apart_ns` too; 0 where nobody counted."""
    kept_bytes: int = 0
    """Of weights that stay on the target GPU between starts."""
    not_measured: str = ""
    """Why no run with every weight in GPU memory was made, plain PyTorch's included; empty where both were."""

    @property
    def cold_match(self) -> bool:
        """Whether cold answers are the reference's, as nearly as those repeat. `outputs_match` asks for PyTorch's own as well."""
        near = self.largest_error is not None and self.largest_error <= self.error_allowed
        return self.bit_equal or (near and not self.reproducible)


VERIFY = FileKind("verify-report", 2, VerifyReport, last="figures")


@dataclass(frozen=True, slots=True)
class Verified:
    report: VerifyReport
    timelines: tuple[Timeline, ...]
    """Predicted and measured; none where times are no figures."""


@dataclass(frozen=True, slots=True)
class Task:
    """A plan, all that it was made for, and how hard to try it.

    `only_planned`: why the target is to hold what the plan brings there and no more; empty where it has room for all weights.
    """

    built: Built
    plan: Plan
    network: Network
    profile: Profile
    host: Host
    provenance: Provenance
    runs: int = 20
    tolerance: float | None = None
    only_planned: str = ""


def verify(task: Task, device: Device) -> Verified:
    """Run a plan cold many times on a device and hold it against its promises. Raises InputError where it cannot run.

    Where the target holds only what the plan brings, nothing that needs all weights there is run.
    """
    require(task.runs >= 1, f"--runs {task.runs}: at least one cold start must be made")
    plan, dtype = task.plan, task.built.dtype
    where = device.torch_device(plan.target)
    inputs = task.built.inputs_on(where)
    settles, plain = not task.only_planned, None
    if settles:
        plain = plain_answer(Scene(task.built.module, inputs, where, Snapshot(task.built.module)), device)
    began = time.perf_counter()
    with prepare(
        task.built.module,
        plan,
        inputs,
        network=task.network,
        host=task.host,
        device=device,
        settles=settles,
    ) as cold:
        device.synchronize()
        set_up_s = time.perf_counter() - began
        run = partial(cold.resident if settles else cold.in_place, *inputs)
        reference = Reference.of(run)
        eager = None if plain is None else likeness(reference.tensors, plain)
        repeats = take(
            run,
            device,
            plan.target,
            reference.tensors,
            nothing,
            task.runs if settles else min(task.runs, FEWEST),
            paused=PAUSED if settles else 0,
        )
        starts = start_cold(cold, inputs, reference.tensors, task.runs)
        moved, relayed = cold.brought()
        timelines: tuple[Timeline, ...] = ()
        if device.figures:
            cold.evict()
            measured = cold.timeline()
            timelines = (predict(cold, task.profile), measured)
        launch, why_eager = cold.launch, cold.why_eager
    kind = RESIDENT if settles else IN_PLACE
    reproducible = reference.reproducible and repeats.worst.bit_equal
    match = starts.worst.right(dtype, reproducible)
    remarks, failures = [], []
    if blank := shows_nothing(reference.tensors):
        failures.append(f"the {kind} answer {blank}; give inputs, or weights, that it hangs on")
    if why_eager:
        remarks.append(f"the plan is launched as {plan.launch.value}, but ran {launch.value}: {why_eager}")
    if not reproducible:
        remarks.append(
            f"the {kind} run does not give the same bits twice (difference "
            f"{_error(reference.again.worse(repeats.worst))}), so cold answers are compared within "
            f"{TOLERANCES[dtype]:g}, as {dtype} allows"
        )
    if eager is not None and not eager.bit_equal and eager.within(dtype):
        remarks.append(
            f"launched as {launch.value}, the resident run chooses other library algorithms than plain PyTorch: difference "
            f"{_error(eager)}, allowed {TOLERANCES[dtype]:g}"
        )
    if not match:
        failures.append(f"the cold answer is not the {kind} one (difference {_error(starts.worst)})")
    if eager is not None and not eager.within(dtype):
        failures.append(
            f"the resident answer is not plain PyTorch's (difference {_error(eager)}, allowed {TOLERANCES[dtype]:g}): a "
            "forward that keeps state or writes its inputs does that"
        )
    hops = sum(c.size_bytes * (len(c.path) - 1) for c in plan.chunks)
    if moved != plan.copied_bytes:
        failures.append(f"{moved} bytes left host memory, {plan.copied_bytes} are planned")
    if relayed != hops:
        failures.append(f"{relayed} bytes went from GPU to GPU, {hops} are planned")
    predicted_ns = timelines[0].makespan_ns if timelines else None
    median_ns = starts.samples.median_ns if device.figures else None
    if task.tolerance is not None and predicted_ns is not None and median_ns is not None:
        off = median_ns / predicted_ns - 1
        if abs(off) > task.tolerance:
            failures.append(f"measured {off:+.1%} against the prediction, allowed {task.tolerance:.1%}")
    report = VerifyReport(
        model=task.built.name,
        dtype=dtype,
        batch=task.built.batch,
        seq=task.built.seq,
        plan=plan.name,
        gpus=plan.gpus,
        device=device.kind,
        figures=device.figures,
        provenance=task.provenance,
        profile_kind=task.profile.kind,
        passed=not failures,
        failures=tuple(failures),
        remarks=tuple(remarks),
        launch=launch.value,
        runs=task.runs,
        outputs_match=match and not blank and (eager is None or eager.within(dtype)),
        bit_equal=starts.worst.bit_equal,
        largest_error=starts.worst.error,
        error_allowed=TOLERANCES[dtype] if not reproducible else 0.0,
        reproducible=reproducible,
        eager_bit_equal=None if eager is None else eager.bit_equal,
        planned_bytes=plan.copied_bytes,
        moved_bytes=moved,
        planned_relay_bytes=hops,
        relayed_bytes=relayed,
        set_up_s=set_up_s if device.figures else None,
        predicted_ns=predicted_ns,
        measured_ns=median_ns,
        tolerance=task.tolerance,
        cold_ns=starts.samples.raw if device.figures else (),
        warm_ns=repeats.samples.raw if device.figures and settles else (),
        ops=join(*timelines) if timelines else (),
        predicted_issued_ns=timelines[0].issued_ns if timelines else None,
        issued_ns=starts.issued.raw if device.figures else (),
        paused_ns=starts.paused.raw if starts.paused else (),
        roused_ns=starts.roused.raw if starts.roused else (),
        warm_paused_ns=repeats.paused.raw if repeats.paused else (),
        reference=kind,
        apart_ns=starts.samples.apart,
        full_pace=starts.samples.full_pace,
        starts_made=starts.made,
        kept_bytes=task.plan.kept_bytes(task.network),
        not_measured=task.only_planned,
    )
    return Verified(report, timelines)


def predict(cold: ColdStart, profile: Profile) -> Timeline:
    """Of what really ran: a plan that could not be captured is predicted as it was launched."""
    program = cold.program
    if cold.launch is not program.launch:
        program = lower(as_run(cold.plan, cold.launch), program.network, program.host)
    return simulate(program, profile)


def as_run(plan: Plan, launch: Launch) -> Plan:
    """A graph that could not be captured ran eagerly, without a head, and is predicted and kept so."""
    return plan if launch is Launch.GRAPH else replace(plan, launch=launch, head=0, opening=0)


def _error(found: Likeness) -> str:
    return "no number" if found.error is None else f"{found.error:.2g}"
