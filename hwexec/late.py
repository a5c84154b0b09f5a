"""Best plans that came late in start after start, neither for the host nor for the links: which rows of a bench did, a look into
each in the same process, since in others the same plan comes in time, and what that found in words.

A look prepares the plan anew, times its starts, and then watches one. The profiler slows each later launch of a process, so a
look comes after all else that is timed, and its own watched start after its own times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from hwexec import pace
from hwexec.bench_record import Looked, Row, labelled
from hwexec.core import steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.host_memory import memory_error
from hwexec.peers import why
from hwexec.starts import Reference, start_cold, wake
from hwexec.timing import Samples, time_ns
from hwexec.verify import OpRow, join, predict
from sim.ops import Record, Wait
from sim.picture import stream_label
from sim.plan import Launch
from sim.profile import Profile, ProfileKind
from sim.program import Program
from sim.report import ms
from sim.timeline import SpanKind

SLOW_LINKS = 1.15
"""Copies that take so many times as long as the links allow are slow."""
LATE = 1.06
"""Starts that took so many times as long as predicted are late: of thirty best plans 29 were 3 % off at most
(results/h100-pair-4/bench/again.txt), the other 9 %."""
KNOWN = 1 / 2
"""Of what starts are late by: where host and links took longer by this much, the cause is known."""
SHARE = 1 / 3
"""Of what a start is late by: an operation that begins later than predicted by more than this is late itself."""
GATED = 5
"""Starts behind a gate."""

Ready = Callable[[], ColdStart]


# Which rows ------------------------------------------------------------------------------------------------------------


def slow_copies(row: Row, rates: Sequence[float]) -> tuple[float, float] | None:
    """Of a row whose copies by themselves took longer than links of these `rates` allow, their rate and the links', bytes per
    second; None of any other."""
    rate, most = _copy_rates(row, rates)
    return (rate, most) if most > SLOW_LINKS * rate else None


def _copy_rates(row: Row, rates: Sequence[float]) -> tuple[float, float]:
    """Of the row's copies by themselves, and of their links; both 0 where nobody timed them."""
    return (row.copied_bytes / row.copies_ns * 1e9, sum(rates[: row.lanes])) if row.copies_ns else (0.0, 0.0)


def is_late(row: Row, rates: Sequence[float], kind: ProfileKind) -> bool:
    """Whether a best plan came late in all its starts, and neither for the host nor for the links, whose bytes per second `rates`
    are. Nothing is late by an estimate."""
    if row.name != "best" or row.predicted_ns is None or not row.samples_ns or kind != "measured":
        return False
    samples = Samples(row.samples_ns)
    if samples.noisy or not _is_late(samples.median_ns, row.predicted_ns):
        return False
    rate, most = _copy_rates(row, rates)
    links_ns = max(0.0, 1 - rate / most) * (row.copies_ns or 0.0) if most else 0.0
    known_ns = pace.longer_ns(row.issued_ns, row.predicted_issued_ns) + links_ns
    return known_ns < KNOWN * (samples.median_ns - row.predicted_ns)


def _is_late(time_ns: float, predicted_ns: float) -> bool:
    return time_ns >= LATE * predicted_ns


# The look --------------------------------------------------------------------------------------------------------------


def looks(
    rows: Sequence[tuple[Row, Ready]],
    inputs: tuple[torch.Tensor, ...],
    profile: Profile,
    device: Device,
    runs: int,
    budget_s: float,
) -> Iterator[Looked]:
    """One look into each row, by what prepares its plan anew. Whatever fails in it is in its note: all else has been measured."""
    remark = ""
    for row, ready in rows:
        found = Looked(row.name, row.links, row.predicted_ns or 0.0)
        note = remark
        try:
            for so_far in _look(found, ready, inputs, profile, runs, budget_s):
                found = so_far
        except Exception as error:
            note = _joined(note, f"ended early: {why(memory_error(error, device) or error)}")
        if found.watched_ns is not None:
            remark = "timed after another look, whose profiler slows launches"
        yield replace(found, note=_joined(found.note, note))


def _look(
    looked: Looked,
    ready: Ready,
    inputs: tuple[torch.Tensor, ...],
    profile: Profile,
    runs: int,
    budget_s: float,
) -> Iterator[Looked]:
    """What is known so far, each time that there is more."""
    with ready() as cold:
        reference = Reference.of(partial(cold.resident, *inputs))
        with steady(cold.device):
            wake(cold, inputs)
            starts = start_cold(cold, inputs, reference.tensors, runs, budget_s, paused=0)
            looked = replace(looked, samples_ns=starts.samples.raw, issued_ns=starts.issued.median_ns)
            if not starts.worst.right(cold.network.dtype, reference.reproducible):
                looked = replace(looked, note="answers DIFFER", outputs_match=False)
            yield looked
            if cold.launch is not cold.plan.launch:
                yield replace(looked, note=_joined(looked.note, f"eager this time: {cold.why_eager}"))
                return
            if cold.launch is Launch.GRAPH:
                yield (looked := replace(looked, gated_ns=_gated_ns(cold, inputs)))
        cold.evict()
        measured = cold.timeline()
        predicted = predict(cold, profile)
        looked = replace(
            looked,
            watched_ns=measured.makespan_ns,
            watched_issued_ns=max((span.stop_ns for span in measured.of(SpanKind.ISSUE)), default=None),
            predicted_issued_ns=predicted.issued_ns,
            ops=join(predicted, measured),
        )
        first = first_late(looked)
        if first is not None:
            looked = replace(looked, first_late=first.op, waited_for=waited_for(cold.program, first.op))
        yield looked


def _gated_ns(cold: ColdStart, inputs: tuple[torch.Tensor, ...]) -> float | None:
    """Median from where a gate opens; None where the host took longer to issue a start than any gate holds."""
    stream = cold.device.stream("gated", cold.plan.target)
    try:
        samples = time_ns(
            partial(cold, *inputs), cold.device, [stream], repeats=GATED, warmup=1, before=cold.evict
        )
    finally:
        cold.device.close_stream(stream)
    return samples.median_ns if samples.gated else None


def host_ns(looked: Looked) -> float:
    """What the host took longer to issue the watched start than predicted: that much the profiler makes all of it late."""
    return pace.longer_ns(looked.watched_issued_ns, looked.predicted_issued_ns)


def late_by_ns(looked: Looked) -> float:
    """What the watched start was late by, the profiler aside; 0 where it was in time or there is none."""
    if looked.watched_ns is None:
        return 0.0
    own_ns = looked.watched_ns - host_ns(looked)
    return own_ns - looked.predicted_ns if _is_late(own_ns, looked.predicted_ns) else 0.0


def first_late(looked: Looked) -> OpRow | None:
    """The operation that was to begin first of those that began late; None where the watched start was in time."""
    least_ns = SHARE * late_by_ns(looked) + host_ns(looked)
    if not late_by_ns(looked):
        return None
    ordered = sorted(looked.ops, key=lambda op: (op.predicted_start_ns, op.op))
    return next((op for op in ordered if op.measured_start_ns - op.predicted_start_ns > least_ns), None)


def waited_for(program: Program, index: int) -> tuple[int, ...]:
    """The copies, as operations, that this operation is the first on its stream to wait for."""
    behind, ops = program.copies_behind(), program.ops
    found: list[int] = []
    for op in reversed(ops[:index]):
        if op.stream != ops[index].stream or isinstance(op, Record):
            continue
        if not isinstance(op, Wait):
            break
        if (copy := behind[op.event]) is not None:
            found.append(ops.index(copy))
    return tuple(sorted(found))


# In words --------------------------------------------------------------------------------------------------------------


def words(looked: Looked, label: str) -> str:
    """What a look found; `label` is what a prediction is called."""
    found = []
    if looked.samples_ns:
        again, runs = Samples(looked.samples_ns).median_ns, len(looked.samples_ns)
        took = (
            f"took {ms(again)} ms"
            if _is_late(again, looked.predicted_ns)
            else f"was not late ({ms(again)} ms)"
        )
        found.append(f"prepared anew it {took} in {runs} start{'' if runs == 1 else 's'}")
        if looked.gated_ns is not None:
            found[0] += f", {ms(looked.gated_ns)} behind a gate"
    if looked.watched_ns is not None:
        found.append(_watched(looked, label))
    if looked.note:
        found.append(looked.note)
    return f"Looked into {labelled(looked.name, looked.links)}: {'; '.join(found)}."


def _watched(looked: Looked, label: str) -> str:
    took, host = ms(looked.watched_ns or 0.0), host_ns(looked)
    slow = "" if ms(host) == ms(0.0) else f", its host {ms(host)} slower than {label}"
    by_ns = late_by_ns(looked)
    if not by_ns:
        return f"a watched start was not late ({took} ms{slow})"
    said = f"a watched start took {took} ms{slow}, and"
    ops = {op.op: op for op in looked.ops}
    if looked.first_late is None or looked.first_late not in ops:
        return f"{said} no operation began late by more than {ms(SHARE * by_ns)}"
    first = ops[looked.first_late]
    behind = first.measured_start_ns - first.predicted_start_ns
    said += (
        f" what first began late by more than {ms(SHARE * by_ns)} was {_named(first)}, at {ms(first.measured_start_ns)} ms, "
        f"{ms(behind)} after its {label} time"
    )
    ends = [
        f"{_named(ops[op])} had landed at {ms(_end_ns(ops[op]))}" for op in looked.waited_for if op in ops
    ]
    before = [op for op in looked.ops if op.stream == first.stream and op.op < first.op]
    if before:
        last, longer_ns = before[-1], before[-1].difference_ns
        longer = f", having taken {ms(longer_ns)} longer than {label}" if longer_ns > SHARE * by_ns else ""
        ends.append(f"{last.label} before it had ended at {ms(_end_ns(last))}{longer}")
    return f"{said}, while {' and '.join(ends)}" if ends else said


def _named(op: OpRow) -> str:
    return (
        f"{op.label}, {stream_label(op.stream)}," if op.kind == SpanKind.COPY.value else f"layer {op.label}"
    )


def _end_ns(op: OpRow) -> float:
    return op.measured_start_ns + op.measured_ns


def _joined(one: str, other: str) -> str:
    return "; ".join(text for text in (one, other) if text)
