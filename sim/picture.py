"""Timelines to look at: a picture, and a trace for Perfetto or chrome://tracing. One or several, as predicted above measured."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import require
from sim.output import write_file
from sim.timeline import Span, SpanKind, Timeline

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class _Look:
    label: str
    face: str
    edge: str
    hatch: str


# Okabe & Ito's palette, told apart by lightness and hatching too.
_LOOKS = {
    SpanKind.COPY: _Look("copy", "#E69F00", "#FFFFFF", ""),
    SpanKind.RUN: _Look("run", "#0072B2", "#FFFFFF", ""),
    SpanKind.STALL: _Look("stall", "#FFFFFF", "#D55E00", "////"),
    SpanKind.ISSUE: _Look("issue", "#BBBBBB", "#666666", ""),
}
_ROW_INCHES = 0.42
_WIDTH_INCHES = 11.0
_CHARACTER_INCHES = 0.075
"""Width of one character of the labels in bars, with some air."""


def check_format(path: str | Path) -> None:
    """Raises InputError for a picture that could not be written in the format its name asks for."""
    suffix = Path(path).suffix.lower()
    require(suffix in FORMATS, f"{path}: no format for a picture; end the name in {', '.join(FORMATS)}")


def plot(timelines: tuple[Timeline, ...], path: str | Path, about: str, *, force: bool = False) -> None:
    """Draw timelines one above the other and write the picture, whole or not at all."""
    check_format(path)
    write_file(path, picture(timelines, about, Path(path).suffix), force=force)


def picture(timelines: tuple[Timeline, ...], about: str, suffix: str = ".png") -> bytes:
    """The bytes of a picture file. The same timelines make the same bytes: no date is in it."""
    made = io.BytesIO()
    key = {".svg": "Date", ".pdf": "CreationDate"}.get(suffix.lower())
    metadata = {} if key is None else {key: None}
    draw(timelines, about).savefig(made, format=suffix.lower().lstrip("."), dpi=150, metadata=metadata)
    return made.getvalue()


def draw(timelines: tuple[Timeline, ...], about: str) -> Any:
    """A matplotlib figure: streams as rows, time to the right on one scale.

    `about` is the title: what, where, estimated or measured.
    """
    # Imported here: matplotlib takes most of a second and only pictures need it.
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    rows = [max(1, len(t.streams)) for t in timelines]
    height = _ROW_INCHES * sum(rows) + 0.75 * len(timelines) + 1.0
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    figure.suptitle(about, fontsize=11, x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=rows)
    end_ms = max(t.makespan_ns for t in timelines) / 1e6
    for (axes,), timeline in zip(panels, timelines, strict=True):
        _draw(axes, timeline, end_ms or 1.0)
    panels[-1][0].set_xlabel("ms since the request; numbers in copies are chunks")
    kinds = [k for k in _LOOKS if any(t.of(k) for t in timelines)]
    marks = [
        Patch(
            facecolor=look.face,
            edgecolor="#D55E00" if look.hatch else look.face,
            hatch=look.hatch,
            label=look.label,
        )
        for look in (_LOOKS[k] for k in kinds)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, handlelength=3)
    return figure


def _draw(axes: Any, timeline: Timeline, end_ms: float) -> None:
    streams = timeline.streams
    per_ms = (_WIDTH_INCHES - 1.6) / end_ms
    for row, stream in enumerate(streams):
        for kind, look in _LOOKS.items():
            spans = [s for s in timeline.spans if s.stream == stream and s.kind is kind]
            if not spans:
                continue
            typical = sorted(s.duration_ns for s in spans)[len(spans) // 2] / 1e6 * per_ms
            distinct = typical > 0.04
            axes.broken_barh(
                [(s.start_ns / 1e6, s.duration_ns / 1e6) for s in spans],
                (row - 0.36, 0.72),
                facecolor=look.face,
                edgecolor=look.edge if distinct or look.hatch else look.face,
                hatch=look.hatch,
                linewidth=0.5 if distinct or not look.hatch else 0.0,
            )
            if kind is SpanKind.COPY and distinct:
                _number(axes, row, spans, per_ms)
    axes.set_yticks(range(len(streams)), [stream_label(s) for s in streams], fontsize=9)
    axes.set_ylim(max(1, len(streams)) - 0.5, -0.5)
    axes.set_xlim(0, end_ms * 1.01)
    axes.axvline(timeline.makespan_ns / 1e6, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(f"{timeline.kind}: {timeline.makespan_ns / 1e6:.2f} ms", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _number(axes: Any, row: int, spans: list[Span], per_ms: float) -> None:
    """Chunk numbers in the bars that are wide enough for them."""
    for span in spans:
        text = str(span.chunk)
        if span.chunk >= 0 and span.duration_ns / 1e6 * per_ms > _CHARACTER_INCHES * (len(text) + 1):
            middle = (span.start_ns + span.stop_ns) / 2e6
            axes.text(middle, row, text, ha="center", va="center", fontsize=7, color="black", clip_on=True)


def stream_label(stream: str) -> str:
    """`compute:0`, `h2d:0`, `p2p:3>0` in words."""
    what, _, where = stream.partition(":")
    if what == "compute":
        return f"GPU {where} kernels"
    if what == "h2d":
        return f"host to GPU {where}"
    if what == "p2p":
        source, _, destination = where.partition(">")
        return f"GPU {source} to GPU {destination}"
    return "host thread" if stream == "host" else stream


# Trace ---------------------------------------------------------------------------------------------------------------


def chrome_trace(timelines: tuple[Timeline, ...], about: str) -> bytes:
    """Chrome's trace event format: a process per timeline, a thread per stream, a counter per link; microseconds."""
    events = [e for pid, t in enumerate(timelines, 1) for e in _events(pid, t, about)]
    content = {"displayTimeUnit": "ms", "otherData": {"about": about}, "traceEvents": events}
    return (json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _events(pid: int, timeline: Timeline, about: str) -> Iterator[dict[str, object]]:
    yield _meta(pid, 0, "process_name", name=f"{timeline.kind}: {about}")
    yield _meta(pid, 0, "process_sort_index", sort_index=pid)
    threads = {stream: tid for tid, stream in enumerate(timeline.streams, 1)}
    for stream, tid in threads.items():
        yield _meta(pid, tid, "thread_name", name=f"{stream} ({stream_label(stream)})")
        yield _meta(pid, tid, "thread_sort_index", sort_index=tid)
    for span in timeline.spans:
        yield {
            "ph": "X",
            "pid": pid,
            "tid": threads[span.stream],
            "ts": span.start_ns / 1e3,
            "dur": span.duration_ns / 1e3,
            "name": span.label or span.kind.value,
            "cat": span.kind.value,
            "args": _facts(span),
        }
    yield from _counters(pid, timeline)


def _facts(span: Span) -> dict[str, object]:
    facts: dict[str, object] = {"op": span.op, "chunk": span.chunk, "layer": span.layer}
    known = {key: value for key, value in facts.items() if value != -1}
    return known | ({"waits for": span.cause} if span.cause else {})


def _counters(pid: int, timeline: Timeline) -> Iterator[dict[str, object]]:
    """A link's rate at each change, and 0 where it falls idle."""
    for link in dict.fromkeys(use.link for use in timeline.links):
        until: float | None = None
        for use in timeline.links:
            if use.link != link:
                continue
            if until is not None and use.start_ns > until:
                yield _counter(pid, link, until, 0.0)
            yield _counter(pid, link, use.start_ns, use.bytes_per_s)
            until = use.stop_ns
        if until is not None:
            yield _counter(pid, link, until, 0.0)


def _counter(pid: int, link: str, at_ns: float, bytes_per_s: float) -> dict[str, object]:
    return {
        "ph": "C",
        "pid": pid,
        "tid": 0,
        "ts": at_ns / 1e3,
        "name": f"link {link}",
        "args": {"GB/s": bytes_per_s / 1e9},
    }


def _meta(pid: int, tid: int, what: str, **args: object) -> dict[str, object]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}
