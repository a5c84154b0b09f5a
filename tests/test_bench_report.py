"""What a bench found, from samples by hand: its print, its record and its limits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hwexec import bench, bench_record, limit, report
from hwexec.cpu import CpuDevice
from hwexec.device import Stream
from hwexec.timing import Samples
from hwexec.verify import OpRow
from sim.errors import InputError
from sim.files import format_record, parse_record
from sim.profile import Provenance
from sim.tables import as_text
from tests import golden
from tests.builders import network

MADE = Provenance("pair", "GPU X", "hwexec bench", "2026-01-01T00:00:00Z", "abc", "580.1", "13.0", "2.11.0")
ROW = bench_record.Row(
    "best",
    1,
    "graph",
    102_000_000,
    0,
    1.86e6,
    0.8,
    True,
    True,
    0.0,
    "",
    3,
    (1.9e6, 1.88e6, 1.95e6),
    0.11e6,
    0.1e6,
)
MEASURED = bench_record.BenchReport(
    model="resnet50",
    dtype="fp32",
    batch=1,
    seq=None,
    gpus=(0, 1),
    device="cuda",
    figures=True,
    host="pair",
    profile_kind="measured",
    provenance=MADE,
    pinned_bytes_per_s=(55.4e9, 55.2e9),
    together_bytes_per_s=104.4e9,
    warm_graph_ns=0.91e6,
    limits=(limit.Limit(1, 102_000_000, 55.4e9, 1.841e6), limit.Limit(2, 102_000_000, 110.6e9, 0.922e6)),
    waived=(bench_record.Waived("peer:diffusers", "diffusers is not installed"),),
    rows=(
        replace(ROW, name="warm", copied_bytes=0, predicted_ns=None, samples_ns=(0.91e6, 0.92e6, 0.9e6)),
        replace(ROW, name="pipeline", launch="eager", predicted_ns=7.05e6, samples_ns=(7.1e6, 7.2e6, 7.0e6)),
        ROW,
        replace(
            ROW,
            links=2,
            direct_bytes=2**20,
            samples_ns=(1.0e6, 0.99e6, 1.05e6),
            paused_ns=1.31e6,
            roused_ns=1.1e6,
            predicted_ns=0.95e6,
            issued_ns=0.21e6,
            predicted_issued_ns=0.1e6,
        ),
        replace(
            ROW,
            name="peer:cuda",
            launch="eager",
            predicted_ns=None,
            samples_ns=(23.5e6, 24e6, 23e6),
            bit_equal=False,
            error=2e-4,
        ),
        replace(
            ROW,
            name="odd",
            asked=15,
            outputs_match=False,
            bit_equal=False,
            error=None,
            note="moved 3 bytes, 4 planned",
        ),
    ),
)


def test_the_print_of_a_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    golden.compare(
        "hwexec_bench",
        as_text(report.bench_title(MEASURED), report.bench_table(MEASURED), *report.bench_words(MEASURED)),
    )


def test_a_record_that_was_cut_off_is_never_taken_for_a_whole_one() -> None:
    lines = format_record(bench_record.BENCH, MEASURED).splitlines(keepends=True)
    assert parse_record("".join(lines).encode(), bench_record.BENCH) == MEASURED
    for count in range(len(lines)):
        with pytest.raises(InputError):
            parse_record("".join(lines[:count]).encode(), bench_record.BENCH)


def test_best_plans_whose_copies_had_slow_links_are_told() -> None:
    quick = [
        replace(r, copies_ns=1.1 * r.copied_bytes / (55.4 * r.links), lanes=r.links) for r in MEASURED.rows
    ]
    said = [*report.bench_words(replace(MEASURED, rows=tuple(quick)))]
    assert not any(line.startswith("Links:") for line in said)
    slow = [replace(row, copies_ns=1.65e6, lanes=row.links) for row in MEASURED.rows]
    said = [*report.bench_words(replace(MEASURED, rows=tuple(slow)))]
    assert [line for line in said if line.startswith("Links:")] == [
        "Links: around the starts of best over 2, its copies by themselves took 1.65 ms, 61.8 GB/s of 110.6: something else "
        "used the links."
    ]
    one_lane = [replace(row, copies_ns=1.86e6, lanes=1) for row in MEASURED.rows]
    said = [*report.bench_words(replace(MEASURED, rows=tuple(one_lane)))]
    assert not any(line.startswith("Links:") for line in said), (
        "a plan over one lane needs no more than that lane"
    )


LATE = replace(
    ROW, links=2, lanes=2, predicted_ns=2.0e6, samples_ns=(3.18e6, 3.17e6, 3.2e6), copies_ns=0.95e6
)


def test_best_plans_that_come_late_for_no_known_cause_are_told() -> None:
    def said(row: bench_record.Row) -> list[str]:
        return [w for w in report.bench_words(replace(MEASURED, rows=(row,))) if w.startswith("Late:")]

    assert said(LATE) == [
        "Late: best over 2 took 3.18 ms in start after start, predicted 2.00, which host and links do not explain: "
        "`hwexec verify` of its plan shows which operations are late."
    ]
    for known in (
        replace(LATE, samples_ns=(2.1e6, 3.2e6, 4.9e6)),
        replace(LATE, samples_ns=(2.1e6, 2.1e6, 2.11e6)),
        replace(LATE, issued_ns=0.9e6),
        replace(LATE, copies_ns=2.9e6),
        replace(LATE, name="pt+dha"),
    ):
        assert said(known) == []
    assert said(replace(LATE, issued_ns=None, predicted_issued_ns=None)), "nobody timed the host"


LOOKED = bench_record.Looked(
    "best",
    2,
    2.0e6,
    samples_ns=(3.17e6, 3.16e6, 3.2e6),
    issued_ns=0.11e6,
    gated_ns=3.1e6,
    watched_ns=3.2e6,
    watched_issued_ns=0.12e6,
    predicted_issued_ns=0.12e6,
    ops=(
        OpRow(3, "copy", "chunk 5 (1.25 MiB)", "p2p:1>0", 0.7e6, 0.1e6, 0.8e6, 0.1e6),
        OpRow(6, "run", "23-ReLU layer1.2.relu", "compute:0", 0.85e6, 0.02e6, 0.86e6, 0.02e6),
        OpRow(8, "run", "24-Conv2d layer2.0.conv1", "compute:0", 0.9e6, 0.05e6, 2.11e6, 0.05e6),
        OpRow(9, "run", "25-ReLU layer2.0.relu", "compute:0", 0.95e6, 0.05e6, 2.16e6, 0.05e6),
    ),
    first_late=8,
    waited_for=(3,),
)


def looked_into(look: bench_record.Looked) -> list[str]:
    said = [*report.bench_words(replace(MEASURED, rows=(LATE,), looked=(look,)))]
    return [line for line in said if line.startswith(("Late:", "Looked"))]


def test_what_was_found_of_a_late_plan_is_told_behind_it() -> None:
    assert looked_into(LOOKED) == [
        "Late: best over 2 took 3.18 ms in start after start, predicted 2.00, which host and links do not explain.",
        "Looked into best over 2: prepared anew it took 3.17 ms in 3 starts, 3.10 behind a gate; a watched start took 3.20 ms, "
        "and what first began late by more than 0.40 was layer 24-Conv2d layer2.0.conv1, at 2.11 ms, 1.21 after its predicted "
        "time, while chunk 5 (1.25 MiB), GPU 1 to GPU 0, had landed at 0.90 and 23-ReLU layer1.2.relu before it had ended at 0.88.",
    ]
    slow = replace(LOOKED.ops[1], measured_ns=1.22e6)
    _, said = looked_into(replace(LOOKED, ops=(LOOKED.ops[0], slow, *LOOKED.ops[2:])))
    assert said.endswith(
        "23-ReLU layer1.2.relu before it had ended at 2.08, having taken 1.20 longer than predicted."
    )


def test_a_look_that_found_less_says_so() -> None:
    in_time = replace(LOOKED, samples_ns=(2.06e6,), gated_ns=None, watched_ns=2.05e6, first_late=None)
    assert looked_into(in_time)[1] == (
        "Looked into best over 2: prepared anew it was not late (2.06 ms) in 1 start; a watched start was not late (2.05 ms)."
    )
    slow = replace(in_time, watched_ns=2.6e6, watched_issued_ns=0.62e6)
    assert (
        "a watched start was not late (2.60 ms, its host 0.50 slower than predicted)" in looked_into(slow)[1]
    )
    at_its_end = replace(LOOKED, first_late=None, waited_for=())
    assert (
        "a watched start took 3.20 ms, and no operation began late by more than 0.40."
        in looked_into(at_its_end)[1]
    )
    first, said = looked_into(bench_record.Looked("best", 2, 2.0e6, note="ended early: no such luck"))
    assert "`hwexec verify` of its plan shows which operations are late" in first, "nobody has seen them here"
    assert said == "Looked into best over 2: ended early: no such luck."


def test_a_look_is_kept_and_records_without_one_are_read() -> None:
    seen = replace(MEASURED, rows=(LATE,), looked=(LOOKED,))
    text = format_record(bench_record.BENCH, seen)
    assert parse_record(text.encode(), bench_record.BENCH) == seen
    earlier = format_record(bench_record.BENCH, MEASURED).replace("looked: []\n", "")
    assert "looked" not in earlier
    assert parse_record(earlier.encode(), bench_record.BENCH) == MEASURED


def test_without_figures_no_time_is_printed() -> None:
    rows = tuple(replace(row, samples_ns=(), set_up_s=None) for row in MEASURED.rows)
    played = replace(MEASURED, figures=False, warm_graph_ns=None, limits=(), rows=rows)
    text = as_text(report.bench_title(played), report.bench_table(played), *report.bench_words(played))
    assert " ms" not in text
    assert "set-up" not in text
    found = json.loads(report.bench_json(played))
    assert {row["median_ms"] for row in found["results"]} == {None}


def test_limits_take_the_best_plan_of_as_many_links_or_else_what_layers_read() -> None:
    net = network(1000, (500, 24))
    assert limit.needed_bytes(net) == 1524
    touched = replace(net.layers[0], reads=(replace(net.layers[0].reads[0], touched_bytes=10),))
    net = replace(net, layers=(touched, net.layers[1]))
    assert limit.needed_bytes(net) == 534
    best = replace(ROW, links=2, copied_bytes=900)
    # at a byte in a nanosecond over each link
    assert [*bench.limits(net, (1e9, 1e9), 100.0, [ROW, best])] == [
        limit.Limit(1, ROW.copied_bytes, 1e9, ROW.copied_bytes),
        limit.Limit(2, 900, 2e9, 450.0),
    ]
    assert [*bench.limits(net, (1e9,), 700.0, [best])] == [limit.Limit(1, 534, 1e9, 700.0)]
    assert [*bench.limits(net, (1e9,), None, [best])] == []


def test_where_weights_stay_a_row_is_held_against_what_it_copies_itself() -> None:
    kept = replace(ROW, name="kept", copied_bytes=60_940_000, kept_bytes=41_060_000, samples_ns=(1.21e6,) * 3)
    assert MEASURED.limit_ns(ROW) == 1.841e6
    assert MEASURED.limit_ns(kept) == pytest.approx(1.1e6)
    assert MEASURED.limit_ns(replace(kept, links=2)) == 0.91e6, "no start is faster than a warm run"
    assert MEASURED.limit_ns(replace(kept, links=3)) is None
    table = as_text(report.bench_table(replace(MEASURED, rows=(*MEASURED.rows, kept))))
    row = next(line for line in table.splitlines() if line.startswith("│ kept"))
    assert "1.100x" in row


def test_lanes_are_measured_alone_and_at_once_and_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limit, "PROBE_BYTES", 2**20)
    device = CpuDevice(2, delay_us=0.0)
    assert limit.together_rate(device, (0, 1)) is None, "times are no figures here"
    device.figures = True
    copied: list[str] = []
    copy = device.copy

    def told(stream: Stream, to: torch.Tensor, source: torch.Tensor) -> None:
        copied.append(f"{stream.name}>{stream.gpu}")
        copy(stream, to, source)

    monkeypatch.setattr(device, "copy", told)
    assert limit.together_rate(device, (0,)) is None
    assert copied == []
    rate = limit.together_rate(device, (0, 1))
    assert rate is not None
    assert rate > 0
    assert len(copied) % 2 == 0
    assert copied[:2] == ["h2d:probe>0", "h2d:probe>1"]
    assert (device.pinned, device.held_bytes(0), device.held_bytes(1)) == ({}, 0, 0)
    device.close()


def test_each_gpus_memory_is_there_while_copies_to_it_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy made ready keeps no tensor alive: all but the last GPU's had gone to whoever asked next."""
    monkeypatch.setattr(limit, "PROBE_BYTES", 2**20)
    device, held = CpuDevice(3, delay_us=0.0), list[list[int]]()
    device.figures = True

    def timed(*_: object) -> Samples:
        held.append([device.held_bytes(gpu) for gpu in range(3)])
        return Samples((1.0,))

    monkeypatch.setattr(device, "ready_copy", lambda *_: lambda: None)
    monkeypatch.setattr(limit, "time_ns", timed)
    assert limit.pinned_rates(device, (0, 2)) == (2**20 * 1e9,) * 2
    assert limit.together_rate(device, (0, 1, 2)) == 3 * 2**20 * 1e9
    assert held == [[2**20, 0, 0], [0, 0, 2**20], [2**20] * 3]
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]
    device.close()


def test_a_peer_with_wrong_answers_is_not_the_fastest_and_a_best_plan_with_such_is_not_compared() -> None:
    def said(rows: tuple[bench_record.Row, ...]) -> list[str]:
        words = report.bench_words(replace(MEASURED, rows=rows))
        return [line for line in words if "fastest peer" in line]

    right = said(MEASURED.rows)
    assert [line.split(" is ")[1] for line in right] == [
        "12.4 times as fast as peer:cuda, the fastest peer.",
        "23.5 times as fast as peer:cuda, the fastest peer.",
    ]
    peer = next(row for row in MEASURED.rows if row.name == "peer:cuda")
    quick = replace(peer, name="peer:quick", samples_ns=(1e3, 1e3, 1e3), outputs_match=False)
    assert said((*MEASURED.rows, quick)) == right
    assert said(tuple(row for row in (*MEASURED.rows, quick) if row is not peer)) == []
    wrong = tuple(replace(r, outputs_match=r.links == 1) if r.name == "best" else r for r in MEASURED.rows)
    assert said(wrong) == right[:1]
