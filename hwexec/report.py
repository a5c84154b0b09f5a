"""What was measured, as tables, words and JSON. Where times are no figures, none is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from hwexec import late, pace
from hwexec.bench_record import BenchReport, Row
from hwexec.limit import Limit
from hwexec.timing import PAUSE_S, Samples
from hwexec.verify import IN_PLACE, OpRow, VerifyReport
from sim.hints import run_words, size_words
from sim.picture import stream_label
from sim.report import PREDICTED, mib, ms

NO_FIGURES = "GPUs were played by threads of the CPU: bytes and answers are real, times are no figures and are not shown."
LARGEST = 12
"""Rows of the table of differences."""


def _gpus(gpus: tuple[int, ...]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {'+'.join(map(str, gpus))}"


def _table(title: str | None, left: tuple[str, ...], columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


# Verify ---------------------------------------------------------------------------------------------------------------


def verify_title(report: VerifyReport) -> str:
    made = report.provenance
    about = run_words(report.model, report.dtype, report.batch, report.seq)
    return f"{about}: plan {report.plan} on {made.host}, {_gpus(report.gpus)} ({made.gpu})"


def verify_words(report: VerifyReport) -> Iterator[str]:
    yield verify_title(report)
    same = "bit for bit" if report.bit_equal else "not bit for bit"
    if report.cold_match and not report.bit_equal:
        same = f"within {report.error_allowed:g}"
    made = report.starts_made or 1 + report.runs + len(report.paused_ns) + len(report.roused_ns)
    read = " (every weight read in place from host memory)" if report.reference == IN_PLACE else ""
    kept = f", but for {size_words(report.kept_bytes)} that stay on the GPU" if report.kept_bytes else ""
    yield (
        f"Answers: {made} cold starts (the first untimed) with arenas filled with 0xFF before each{kept}; "
        f"{'equal to' if report.cold_match else 'DIFFERENT from'} the {report.reference} run{read} launched as "
        f"{report.launch}, {same}."
    )
    if report.not_measured:
        yield f"Not measured: the warm run with every weight in GPU memory, and plain PyTorch's answer; {report.not_measured}."
    crossed = report.planned_relay_bytes or report.relayed_bytes
    relayed = f", {report.relayed_bytes} from GPU to GPU" if crossed else ""
    agree = (report.moved_bytes, report.relayed_bytes) == (report.planned_bytes, report.planned_relay_bytes)
    yield f"Bytes: {report.moved_bytes} left host memory{relayed}, {'as planned' if agree else 'NOT as planned'}."
    yield from (f"Note: {remark}." for remark in report.remarks)
    if not report.figures:
        yield NO_FIGURES
    else:
        yield from _times(report)
    yield from (f"FAILED: {failure}." for failure in report.failures)
    if report.passed:
        yield "Passed."


def _times(report: VerifyReport) -> Iterator[str]:
    samples = Samples(report.cold_ns)
    warm = f"{ms(Samples(report.warm_ns).median_ns)} ms" if report.warm_ns else "not measured"
    label = PREDICTED[report.profile_kind]
    yield (
        f"Time: measured {ms(samples.median_ns)} ms (median of {len(samples.raw)}, least {ms(samples.minimum_ns)}, "
        f"spread {samples.spread:.1%}); warm {warm}; set-up {report.set_up_s or 0:.2f} s."
    )
    if said := pace.apart_words(report.apart_ns, report.full_pace):
        yield f"Processor: {said}."
    if report.paused_ns:
        paused, rested = Samples(report.paused_ns), report.warm_paused_ns
        also = f", {ms(Samples(report.roused_ns).median_ns)} roused before" if report.roused_ns else ""
        also += f", warm {ms(Samples(rested).median_ns)}" if rested else ""
        yield (
            f"After {PAUSE_S:g} s without work: {ms(paused.median_ns)} ms (median of {len(paused.raw)}){also}; not predicted."
        )
    if report.predicted_ns:
        off = samples.median_ns / report.predicted_ns - 1
        yield f"Against the {label} {ms(report.predicted_ns)} ms: {off:+.1%}."
    issued = Samples(report.issued_ns).median_ns if report.issued_ns else None
    if said := pace.words("a start", issued, report.predicted_issued_ns, label):
        yield said
    # lanes copy at the same time: all their copies together would take longer than the whole start
    for lane in dict.fromkeys(op.stream for op in report.ops if op.kind == "copy"):
        copies = [op for op in report.ops if op.kind == "copy" and op.stream == lane]
        yield _together(f"Copies {stream_label(lane)}", copies, label)
    if layers := [op for op in report.ops if op.kind == "run"]:
        yield _together("Layers", layers, label)


def _together(what: str, ops: Sequence[OpRow], label: str) -> str:
    sums = sum(op.predicted_ns for op in ops), sum(op.measured_ns for op in ops)
    return (
        f"{what} in both timelines: {len(ops)}, together {label} {ms(sums[0])} ms, measured {ms(sums[1])} ms."
    )


def difference_table(report: VerifyReport) -> Table | None:
    """Copies and layers that took the longest otherwise than predicted."""
    ranked = sorted(report.ops, key=lambda op: (-abs(op.difference_ns), op.op))[:LARGEST]
    if not ranked:
        return None
    label = PREDICTED[report.profile_kind]
    columns = [
        "op",
        "what",
        "stream",
        "starts us",
        "measured",
        f"takes us, {label}",
        "measured",
        "difference",
    ]
    table = _table(f"Largest differences of {len(report.ops)} operations", ("what", "stream"), columns)
    for op in ranked:
        table.add_row(*(Text(cell) for cell in _cells(op)))
    return table


def _cells(op: OpRow) -> tuple[str, ...]:
    times = (op.predicted_start_ns, op.measured_start_ns, op.predicted_ns, op.measured_ns)
    return (str(op.op), op.label, op.stream, *map(us, times), f"{op.difference_ns / 1e3:+.1f}")


def us(time_ns: float) -> str:
    return f"{time_ns / 1e3:.1f}"


def verify_json(report: VerifyReport) -> str:
    return json.dumps(
        {
            "model": report.model,
            "dtype": report.dtype,
            "batch": report.batch,
            "seq": report.seq,
            "plan": report.plan,
            "gpus": list(report.gpus),
            "device": report.device,
            "passed": report.passed,
            "failures": list(report.failures),
            "outputs_match": report.outputs_match,
            "bit_equal": report.bit_equal,
            "reference": report.reference,
            "not_measured": report.not_measured or None,
            "launch": report.launch,
            **({"kept_bytes": report.kept_bytes} if report.kept_bytes else {}),
            "planned_bytes": report.planned_bytes,
            "moved_bytes": report.moved_bytes,
            "planned_relay_bytes": report.planned_relay_bytes,
            "relayed_bytes": report.relayed_bytes,
            "predicted_ms": _ms(report.predicted_ns),
            "measured_ms": _ms(report.measured_ns),
            "predicted_issued_ms": _ms(report.predicted_issued_ns),
            "issued_ms": _ms(Samples(report.issued_ns).median_ns) if report.issued_ns else None,
            "after_pause_ms": _ms(Samples(report.paused_ns).median_ns) if report.paused_ns else None,
            "runs": report.runs,
        },
        allow_nan=False,
    )


def _ms(time_ns: float | None) -> float | None:
    return None if time_ns is None else time_ns / 1e6


# Bench ----------------------------------------------------------------------------------------------------------------


def bench_title(report: BenchReport) -> str:
    kind = f"{'an' if report.profile_kind == 'estimated' else 'a'} {report.profile_kind}"
    return (
        f"{run_words(report.model, report.dtype, report.batch, report.seq)} on {_gpus(report.gpus)} "
        f"({report.provenance.gpu}); plans made from {kind} profile of {report.host}"
    )


def bench_table(report: BenchReport) -> Table:
    columns = ["strategy", "links", "launch", "copied MiB", "in place MiB"]
    if report.figures:
        columns[2:2] = [
            f"{PREDICTED[report.profile_kind]} ms",
            "average ms",
            "median ms",
            "min ms",
            "spread",
            "over limit",
        ]
        columns += ["set-up s"]
    columns += ["runs", "answers"]
    table = _table(None, ("strategy", "launch", "answers"), columns)
    for row in report.rows:
        cells = [row.name, str(row.links), row.launch, mib(row.copied_bytes), mib(row.direct_bytes)]
        if report.figures:
            cells[2:2] = _row_times(report, row)
            cells += [f"{row.set_up_s or 0:.2f}"]
        cells += [runs_of(row), _answers(row)]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if row.name == "best" else "")
    return table


def runs_of(row: Row) -> str:
    fewer = row.asked is not None and row.runs < row.asked
    return f"{row.runs} of {row.asked}" if fewer else str(row.runs)


def _row_times(report: BenchReport, row: Row) -> list[str]:
    samples, limit = Samples(row.samples_ns), report.limit_ns(row)
    average = sum(samples.raw) / len(samples.raw)
    over = "" if limit is None or row.name == "warm" else f"{samples.median_ns / limit:.3f}x"
    predicted = "" if row.predicted_ns is None else ms(row.predicted_ns)
    return [
        predicted,
        ms(average),
        ms(samples.median_ns),
        ms(samples.minimum_ns),
        f"{samples.spread:.1%}",
        over,
    ]


def _answers(row: Row) -> str:
    if not row.outputs_match:
        return "DIFFERENT"
    return "equal" if row.bit_equal else f"close ({row.error or 0:.1g})"


def bench_words(report: BenchReport) -> Iterator[str]:
    if report.stopped:
        left = ", ".join(report.not_run) or "the second look at the links"
        yield f"INCOMPLETE: {report.stopped}; still to run were {left}."
    if report.figures:
        warm = ms(report.warm_graph_ns or 0.0)
        for limit in report.limits:
            word = "link" if limit.links == 1 else "links"
            yield (
                f"Limit over {limit.links} {word}: {ms(limit.limit_ns)} ms, the larger of warm {warm} ms and "
                f"{mib(limit.copied_bytes)} MiB at {limit.bytes_per_s / 1e9:.1f} GB/s (pinned, measured here)."
                + _lanes_together(report, limit)
            )
        yield from _against_peers(report)
        for row in report.rows:
            if row.name == "best" and (
                said := pace.words(
                    row.label,
                    row.issued_ns,
                    row.predicted_issued_ns,
                    PREDICTED[report.profile_kind],
                )
            ):
                yield said
        yield from _after_a_pause(report)
        yield from _slow_links(report)
        yield from _late(report)
    else:
        yield NO_FIGURES
    for row in report.rows:
        if row.note:
            yield f"{row.label}: {row.note}"
    yield from (f"waived: {w.name} ({w.reason})" for w in report.waived)


def _lanes_together(report: BenchReport, limit: Limit) -> str:
    """What the limit would be by what all lanes carry at once, where that is less than each alone adds up to."""
    rate = report.together_bytes_per_s
    if rate is None or limit.links != len(report.gpus) or rate >= limit.bytes_per_s:
        return ""
    would = max(report.warm_graph_ns or 0.0, limit.copied_bytes / rate * 1e9)
    return f" All lanes at once carry {rate / 1e9:.1f} GB/s: by that it would be {ms(would)} ms."


def _after_a_pause(report: BenchReport) -> Iterator[str]:
    told = [
        f"{row.label} {ms(row.paused_ns)} ms"
        + ("" if row.roused_ns is None else f", {ms(row.roused_ns)} roused before")
        for row in report.rows
        if row.name in ("warm", "best") and row.paused_ns is not None
    ]
    if told:
        yield f"After {PAUSE_S:g} s without work: {'; '.join(told)}. None of this is predicted."


def _slow_links(report: BenchReport) -> Iterator[str]:
    """Best plans whose copies took longer by themselves than the links allow: others used these as well. Published plans copy
    layer by layer, which is slower on idle links too."""
    for row in report.rows:
        if (
            row.name == "best"
            and row.copies_ns
            and (found := late.slow_copies(row, report.pinned_bytes_per_s))
        ):
            rate, most = (rate / 1e9 for rate in found)
            yield (
                f"Links: around the starts of {row.label}, its copies by themselves took {ms(row.copies_ns)} ms, "
                f"{rate:.1f} GB/s of {most:.1f}: something else used the links."
            )


def _late(report: BenchReport) -> Iterator[str]:
    """Best plans that came late for no known cause, and what a look into each found."""
    label = PREDICTED[report.profile_kind]
    for row in report.rows:
        if not late.is_late(row, report.pinned_bytes_per_s, report.profile_kind):
            continue
        looks = [look for look in report.looked if (look.name, look.links) == (row.name, row.links)]
        other = (
            ""
            if any(look.ops for look in looks)
            else ": `hwexec verify` of its plan shows which operations are late"
        )
        yield (
            f"Late: {row.label} took {ms(Samples(row.samples_ns).median_ns)} ms in start after start, "
            f"{label} {ms(row.predicted_ns or 0.0)}, which host and links do not explain{other}."
        )
        yield from (late.words(look, label) for look in looks)


def _against_peers(report: BenchReport) -> Iterator[str]:
    right = [row for row in report.rows if row.outputs_match]
    peers = [row for row in right if row.name.startswith("peer:")]
    best = [row for row in right if row.name == "best"]
    if not peers or not best:
        return
    rival = min(peers, key=lambda row: Samples(row.samples_ns).median_ns)
    for row in best:
        times = Samples(rival.samples_ns).median_ns / Samples(row.samples_ns).median_ns
        word = "link" if row.links == 1 else "links"
        yield f"best over {row.links} {word} is {times:.1f} times as fast as {rival.name}, the fastest peer."


def bench_json(report: BenchReport) -> str:
    """One object. Times are null where they are no figures; a row has fewer runs than were asked for where its note says why."""
    return json.dumps(
        {
            "model": report.model,
            "dtype": report.dtype,
            "batch": report.batch,
            "seq": report.seq,
            "gpus": list(report.gpus),
            "device": report.device,
            "warm_graph_ms": _ms(report.warm_graph_ns),
            "limit_ms": {str(limit.links): limit.limit_ns / 1e6 for limit in report.limits},
            "complete": not report.stopped,
            "not_run": list(report.not_run),
            "waived": {waived.name: waived.reason for waived in report.waived},
            "results": [
                {
                    "name": row.name,
                    "links": row.links,
                    "predicted_ms": _ms(row.predicted_ns) if report.figures else None,
                    "median_ms": _ms(Samples(row.samples_ns).median_ns) if row.samples_ns else None,
                    "min_ms": _ms(min(row.samples_ns)) if row.samples_ns else None,
                    "after_pause_ms": _ms(row.paused_ns),
                    "runs": row.runs,
                    "runs_asked": row.asked,
                    "copied_bytes": row.copied_bytes,
                    **({"kept_bytes": row.kept_bytes} if row.kept_bytes else {}),
                    "outputs_match": row.outputs_match,
                    "note": row.note,
                }
                for row in report.rows
            ],
        },
        allow_nan=False,
    )
