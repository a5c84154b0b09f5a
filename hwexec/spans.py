"""What was measured, as a Timeline with the program's own spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hwexec.device import Activity
from sim.ops import HOST, Copy, Run, Wait
from sim.program import Program, cause_of
from sim.timeline import Span, SpanKind, Timeline

Row = tuple[int, float, float]
"""An operation of the program, its start and its stop in nanoseconds since the request."""


def of_rows(program: Program, rows: Iterable[Row], extra: Sequence[Span] = ()) -> Timeline:
    """Spans of operations, and between them the stalls of the compute stream with their cause."""
    spans, behind = list(extra), program.copies_behind()
    for index, start, stop in rows:
        op = program.ops[index]
        if isinstance(op, Copy):
            spans.append(
                Span(op.stream, SpanKind.COPY, start, stop, program.label(op), index, chunk=op.chunk)
            )
        elif isinstance(op, Run):
            spans.append(Span(op.stream, SpanKind.RUN, start, stop, program.label(op), index, layer=op.layer))
        else:
            cause = cause_of(behind[op.event])
            spans.append(Span(op.stream, SpanKind.STALL, start, stop, "wait", index, cause=cause))
    spans.extend(_stalls(program, spans, behind))
    end = max((span.stop_ns for span in spans), default=0.0)
    order = {name: at for at, name in enumerate((HOST, *program.streams))}
    return Timeline(
        "measured", end, tuple(sorted(spans, key=lambda s: (order[s.stream], s.start_ns, s.stop_ns)))
    )


def of_graph(program: Program, seen: Sequence[Activity], layer_nodes: tuple[int, ...] | None) -> Timeline:
    """Activities of a head and a replayed graph, told apart by order and size: a graph's own streams have no names.

    Copies of one size from one place to another keep their order; what is no copy of the program runs on the compute
    stream, in order, and `layer_nodes` says how many are of each layer. Without it, or where it does not add up, all
    kernels are one span.
    """
    launches = [a for a in seen if a.kind == "launch"]
    left = [a for a in seen if a.kind not in ("launch", "issue")]
    if not left:
        return of_rows(program, ())
    # the request is the host's first call: of a head a copy's, else the launch
    zero = min(a.start_ns for a in (seen if program.head_ops else launches or left))
    extra = [
        Span(HOST, SpanKind.ISSUE, a.start_ns - zero, a.stop_ns - zero, "launch graph") for a in launches
    ]
    rows: list[Row] = []
    landed: dict[int, float] = {}
    used: set[int] = set()
    for index, op in enumerate(program.ops):
        if not isinstance(op, Copy):
            continue
        kind = "h2d" if op.source is None else "d2d"
        gpus = {op.destination, op.source}  # a copy between two GPUs may be booked on either
        for at, activity in enumerate(left):
            if (
                at not in used
                and (activity.kind, activity.size_bytes) == (kind, op.size_bytes)
                and activity.gpu in gpus
                and activity.start_ns >= landed.get(op.chunk, 0.0)
            ):
                used.add(at)
                landed[op.chunk] = activity.stop_ns
                rows.append((index, activity.start_ns - zero, activity.stop_ns - zero))
                break
    runs = [(index, op) for index, op in enumerate(program.ops) if isinstance(op, Run)]
    kernels = [a for at, a in enumerate(left) if at not in used and a.gpu == program.plan.target]
    if layer_nodes is None or sum(layer_nodes) != len(kernels):
        if kernels:
            stop = max(k.stop_ns for k in kernels)
            stream = runs[0][1].stream
            extra.append(Span(stream, SpanKind.RUN, kernels[0].start_ns - zero, stop - zero, "all layers"))
        return of_rows(program, rows, extra)
    at = 0
    for (index, _), count in zip(runs, layer_nodes, strict=True):
        own = kernels[at : at + count]
        at += count
        if own:
            rows.append((index, own[0].start_ns - zero, max(k.stop_ns for k in own) - zero))
    return of_rows(program, rows, extra)


def _stalls(program: Program, spans: Sequence[Span], behind: Sequence[Copy | None]) -> list[Span]:
    """Gaps on the compute stream right before a layer that waits for something."""
    runs = sorted((s for s in spans if s.kind is SpanKind.RUN and s.op >= 0), key=lambda s: s.start_ns)
    found, before = [], 0.0
    for run in runs:
        at = run.op - 1
        if (
            run.start_ns > before
            and at >= 0
            and isinstance(op := program.ops[at], Wait)
            and op.stream == run.stream
        ):
            copy = behind[op.event]
            chunk, cause = -1 if copy is None else copy.chunk, cause_of(copy)
            found.append(
                Span(run.stream, SpanKind.STALL, before, run.start_ns, "stall", at, chunk=chunk, cause=cause)
            )
        before = max(before, run.stop_ns)
    return found
