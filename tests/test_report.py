"""Words and tables from records: each figure in them can be found in the timelines; pictures and traces of small stories."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import listing, report
from sim.account import account, in_place
from sim.baselines import BASELINES, Setting
from sim.catalog import find_host
from sim.errors import InputError
from sim.host import Figure, Host
from sim.network import Network
from sim.options import Candidate, Options, Outcome
from sim.picture import chrome_trace, picture, plot
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import Profile, Provenance, Timing
from sim.program import lower
from sim.search import search
from sim.simulate import simulate
from sim.tables import as_text, show
from sim.timeline import SpanKind, Timeline
from tests import golden
from tests import strategies as some
from tests.builders import FREE, copied, figure, host, network, profile

COSTS = replace(
    FREE,
    copy_latency_ns=figure(7_000),
    peer_latency_ns=figure(7_000),
    issue_copy_ns=figure(5_000),
    issue_event_ns=figure(1_000),
    wait_ns=figure(2_000),
    wait_cross_ns=figure(4_000),
    start_ns=figure(200_000),
    launch_ns=figure(30_000),
    launch_node_ns=figure(200),
    launch_cross_ns=figure(1_500),
    host_sync_ns=figure(10_000),
)
MACHINE = host(3, pcie=12.0, nvlink=24.0, costs=COSTS)
NETWORK = network(100_000, (2_000, 2_000), 0, 2_000_000, 4_000_000, (2_000, 2_000), 0, (4_000_000, 4_000_000))


AT = NETWORK.offsets
BEST = Plan(
    "best",
    0,
    Launch.GRAPH,
    (
        (Access.COPIED,),
        (Access.COPIED, Access.COPIED),
        (),
        (Access.COPIED,),
        (Access.COPIED,),
        (Access.DIRECT, Access.DIRECT),
        (),
        (Access.COPIED, Access.COPIED),
    ),
    (
        Chunk(0, AT[3], (0,)),
        Chunk(AT[3], AT[4], (1, 0)),
        Chunk(AT[4], AT[5], (0,)),
        Chunk(AT[7], AT[8], (1, 0)),
        Chunk(AT[8], AT[9], (0,)),
    ),
)


KEPT = replace(
    BEST,
    name="kept",
    access=((Access.RESIDENT,), (Access.RESIDENT, Access.RESIDENT), *BEST.access[2:]),
    chunks=BEST.chunks[1:],
)


def slow_in_place(machine: Host) -> Profile:
    """Only layer 5 is worth reading in place."""
    made = profile(NETWORK, machine, run=60_000, direct=900_000, issue=20_000)
    layers = list(made.layers)
    layers[5] = replace(layers[5], direct=(Timing(2_000), Timing(2_000)))
    return replace(made, layers=tuple(layers))


def answer(options: Options | None = None) -> report.Answer:
    """Published strategies and a best plan by hand, so that a better search does not change what is printed."""
    options = options or Options()
    made = slow_in_place(MACHINE)
    setting = Setting(made, MACHINE, 0, 2)
    plans = [b.make(setting) for b in BASELINES] + [BEST] + ([KEPT] if options.keeps else [])
    strategies = []
    for plan in plans:
        timeline = timeline_of(plan, NETWORK, MACHINE, made)
        ns = timeline.makespan_ns
        mean = (ns + (options.runs - 1) * made.warm_ns) / options.runs
        strategies.append(
            Candidate(plan.name, plan, ns, mean, options.runs > 1 and plan.name == "dha", timeline)
        )
    budget = options.memory_budget_bytes
    kept = [c for c in strategies if budget is None or c.plan.held_bytes(NETWORK) <= budget]
    left_out = tuple((c.name, "holds too much") for c in strategies if c not in kept)
    best = kept[-1]
    gap = best.mean_ns / 500_000 - 1
    outcome = Outcome(
        best=best,
        strategies=tuple(kept),
        left_out=left_out,
        bound_ns=500_000,
        gap=gap,
        exact=False,
        evaluated=42,
        seconds=0.25,
        warm_ns=made.warm_ns,
    )
    return report.Answer(made, MACHINE, options, outcome)


def printed(capsys: pytest.CaptureFixture[str], *parts: Any) -> str:
    show(*parts)
    return capsys.readouterr().out


# Tables and words


def test_search_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    made = answer()
    text = as_text(report.strategy_table(made), *report.search_words(made))
    golden.compare("search", text)


def test_print_with_runs_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    made = answer(Options(runs=4, memory_budget_bytes=14_105_000))
    text = as_text(report.strategy_table(made), *report.search_words(made))
    golden.compare("search_runs_memory", text)


def test_print_with_weights_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS")
    made = answer(Options(keep_bytes=2**20))
    text = as_text(report.strategy_table(made), *report.search_words(made))
    golden.compare("search_keep", text)
    layers = list(listing.layer_choices(made))
    assert layers[1].endswith("| O (stays)")


@pytest.mark.parametrize(
    ("options", "plan", "says"),
    [
        (Options(keep_ratio=10), KEPT, "a start takes N times a warm run of N ms, and no fewer were found to do for that."),
        (Options(keep_ratio=1.05), KEPT, "a start takes N times a warm run of N ms, and no plan was found that takes N times."),
        (Options(keep_ratio=10), BEST, "nothing of 13.5 MiB; a start takes N times a warm run of N ms."),
        (Options(keep_bytes=5), BEST, "nothing of 13.5 MiB (what is needed first takes 97.7 KiB); a start takes N times "),
        (Options(keep_bytes=2**20), BEST, "nothing of 13.5 MiB (so few make no start sooner); a start takes N times "),
        (Options(keep_bytes=0), BEST, "nothing of 13.5 MiB; a start takes N times a warm run of N ms."),
    ],
)  # fmt: skip
def test_what_stays_is_told_beside_what_it_brings(options: Options, plan: Plan, says: str) -> None:
    made = answer(options)
    kept = replace(made.outcome.best, plan=plan)
    text = report.kept_words(replace(made, outcome=replace(made.outcome, best=kept)))
    assert text.startswith("Kept: ")
    assert says in re.sub(r"[0-9.]+ (times|ms)", r"N \1", text)


def test_json_says_what_stays_where_it_was_asked() -> None:
    made = answer(Options(keep_ratio=1.5))
    found = json.loads(report.search_json(made))
    assert (found["keep_bytes"], found["keep_ratio"]) == (None, 1.5)
    assert [s["kept_bytes"] for s in found["strategies"][-2:]] == [0, KEPT.kept_bytes(NETWORK)]
    assert found["best"]["name"] == "kept"


def test_chunks_that_are_issued_ahead_of_the_launch_are_told_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = answer()
    plan = replace(made.outcome.best.plan, head=2)
    best = replace(made.outcome.best, plan=plan)
    behind = replace(made, outcome=replace(made.outcome, best=best))
    assert "(one graph launch of " in printed(capsys, *report.search_words(made))
    assert "(2 chunks issued and one graph launched in " in printed(capsys, *report.search_words(behind))


def test_nothing_fits_and_nothing_is_copied(capsys: pytest.CaptureFixture[str]) -> None:
    machine = host(1, pcie=12.0, costs=COSTS)
    made = slow_in_place(machine)
    options = Options(memory_budget_bytes=0)
    found = report.Answer(made, machine, options, search(made, machine, options))
    text = printed(capsys, report.strategy_table(found), *report.search_words(found))
    assert "Best plan: copies nothing, reads 13.5 MiB in place from host memory" in text
    assert "Why: no published strategy fits what was asked" in text
    assert "not shown: demand (" in text


def test_layer_table_in_the_published_form() -> None:
    lines = list(listing.layer_choices(answer()))
    golden.compare("layers", "\n".join(lines))
    assert lines[3] == "2-Linear (0.000 MB) | - | - | -"


def test_a_layer_may_do_both() -> None:
    made = answer()
    access = list(made.outcome.best.plan.access)
    access[1], access[5] = (Access.COPIED, Access.DIRECT), (Access.PEER, Access.PEER)
    plan = replace(made.outcome.best.plan, access=tuple(access))
    best = replace(made.outcome.best, plan=plan)
    lines = list(listing.layer_choices(replace(made, outcome=replace(made.outcome, best=best))))
    assert lines[2].endswith("| O + X (direct-host-access)")
    assert lines[6].endswith("| X (peer-direct-access)")


def test_measured_profiles_name_where_and_when() -> None:
    made = answer()
    provenance = Provenance(
        "h200-pair", "NVIDIA H200", "calibrate run", "2026-01-02T03:04:05Z", "abc", "580.1", "13.0", "2.11"
    )
    measured = replace(made.profile, kind="measured", provenance=provenance)
    assert report.title(measured, MACHINE, 0) == "test, fp32, batch 1 on test, GPU 0 (measured)"
    assert report.footnote(measured, measured_host(MACHINE), BEST) == (
        "Measured on h200-pair, NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.11, 2026-01-02T03:04:05Z."
    )
    # a host that nobody measured, wholly or in part
    text = report.footnote(measured, MACHINE, BEST)
    assert re.sub(r"by \d+\.\d%", "by P", text) == (
        "Layers measured on h200-pair, NVIDIA H200, driver 580.1, CUDA 13.0, torch 2.11, 2026-01-02T03:04:05Z. "
        "None of the 36 constants of test is measured (36 assumed); `sim hosts FILE` lists each with its source. Raised by 10%, "
        "these change this answer most: PCIe rates by P, all other costs by P."
    )
    unused = replace(measured_host(MACHINE).costs, peer_read_bytes_per_s=figure(1e9))
    assert report.footnote(measured, replace(measured_host(MACHINE), costs=unused), BEST).startswith(
        "Measured on"
    ), "nothing hangs on it"


def measured_host(host: Host) -> Host:
    def known(told: Figure) -> Figure:
        return replace(told, kind="measured")

    costs = {field.name: known(getattr(host.costs, field.name)) for field in fields(host.costs)}
    links = tuple(replace(link, bytes_per_s=known(link.bytes_per_s)) for link in host.links)
    return replace(host, costs=replace(host.costs, **costs), links=links)


def test_times_of_threads_are_called_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    made = answer()
    provenance = Provenance(
        "laptop", "GPU 0 played by threads", "calibrate run", "2026-01-02T03:04:05Z", "abc"
    )
    played = replace(made, profile=replace(made.profile, kind="played", provenance=provenance))
    text = printed(capsys, report.strategy_table(played), *report.search_words(played))
    assert "on test, GPU 0 (PLAYED by threads, no figures)" in text
    assert "NO FIGURES: threads of a processor played the GPUs of laptop" in text
    for word in ("estimated", "ESTIMATED", "Estimated", "predicted", "Measured"):
        assert word not in text


def test_estimates_say_in_one_line_how_much_nobody_measured_and_what_matters_of_it() -> None:
    made = answer()
    fitted = replace(figure(5_000), kind="fitted")
    machine = replace(MACHINE, costs=replace(COSTS, issue_copy_ns=fitted))
    text = report.footnote(made.profile, machine, BEST)
    assert re.sub(r"by \d+\.\d%", "by P", text) == (
        "Estimated: none of the 36 constants of test is measured (1 fitted, 35 assumed); `sim hosts FILE` lists each with "
        "its source. Raised by 10%, these change this answer most: PCIe rates by P, layer times by P, all other costs by P."
    )
    assert "ESTIMATED" in report.title(made.profile, machine, 0)
    known = replace(figure(12e9), kind="measured")
    links = tuple(replace(link, bytes_per_s=known) for link in MACHINE.links)
    part = report.footnote(made.profile, replace(machine, links=links), BEST)
    assert part.startswith(
        "Estimated: 27 of the 36 constants of test are not measured (9 measured, 1 fitted, 26 "
    )
    assert "rates" not in part, "what is measured is not in doubt"
    p3 = find_host("p3.8xlarge")
    assert "`sim hosts p3.8xlarge` lists" in report.footnote(slow_in_place(p3), p3, BEST)
    edited = replace(p3, costs=COSTS)
    assert "`sim hosts FILE` lists" in report.footnote(slow_in_place(edited), edited, BEST), "not what ships"


def test_no_gain_is_not_dressed_up() -> None:
    made = answer()
    rival = made.outcome.strategies[0]
    same = replace(made.outcome, best=rival, strategies=(rival, rival))
    assert report.why_faster(replace(made, outcome=same)).startswith("Why: demand is as fast, at ")


def test_json_has_exactly_the_agreed_keys() -> None:
    made = answer()
    found = json.loads(report.search_json(made))
    assert list(found) == [
        "model",
        "dtype",
        "batch",
        "seq",
        "host",
        "profile_kind",
        "gpus_asked",
        "memory_budget_bytes",
        "runs",
        "strategies",
        "not_shown",
        "best",
        "bound_ms",
        "gap",
        "search_seconds",
    ]
    keys = ["name", "latency_ms", "cold_ms", "copied_bytes", "direct_bytes", "held_bytes", "chunks", "gpus"]
    assert all(list(s) == keys for s in found["strategies"])
    assert list(found["best"]) == [*keys, "launch"]
    assert [s["name"] for s in found["strategies"]] == [c.name for c in made.outcome.strategies]
    assert found["best"]["latency_ms"] == made.outcome.best.makespan_ns / 1e6
    assert found["gap"] == pytest.approx(found["best"]["latency_ms"] / found["bound_ms"] - 1)


def test_json_says_what_was_asked_and_what_a_cold_start_itself_takes() -> None:
    plain = json.loads(report.search_json(answer()))
    asked = ("model", "dtype", "batch", "seq", "host", "gpus_asked", "memory_budget_bytes", "runs")
    assert [plain[key] for key in asked] == ["test", "fp32", 1, None, "test", None, None, 1]
    assert all(s["cold_ms"] == s["latency_ms"] for s in plain["strategies"])
    made = answer(Options(0, (2, 1), 14_105_000, runs=4))
    found = json.loads(report.search_json(made))
    assert [found[key] for key in asked[-3:]] == [[0, 2, 1], 14_105_000, 4]
    best = made.outcome.best
    assert (found["best"]["latency_ms"], found["best"]["cold_ms"]) == (
        best.mean_ns / 1e6,
        best.makespan_ns / 1e6,
    )
    assert found["best"]["cold_ms"] > found["best"]["latency_ms"], "warm runs are faster than the cold start"


# Where the time goes


def timeline_of(plan: Plan, net: Network, machine: Host, made: Profile) -> Timeline:
    return simulate(lower(plan, net, machine), made)


def test_account_of_a_small_story() -> None:
    net, machine = (
        network(4000, 2000),
        host(costs=replace(FREE, launch_ns=figure(100), launch_first_ns=figure(100))),
    )
    plan = copied(net, Chunk(0, 4096, (0,)), Chunk(4096, 6096, (0,)))
    found = account(plan, machine, timeline_of(plan, net, machine, profile(net, machine)))
    assert found.run_ns == 2000
    assert found.copies_ns == pytest.approx(4096 + 1000)
    assert found.host_ns == pytest.approx(100)
    assert (found.issued, found.issue_ns) == (1, 100)
    assert found.landed_ns == pytest.approx(100 + 6096)
    assert found.lanes == ((0, 6096),)
    assert found.together == 1


def test_links_together_is_the_share_of_time_that_both_carry() -> None:
    net, machine = network(4096, 2048), host(2, nvlink=1000.0)
    plan = copied(net, Chunk(0, 4096, (0,)), Chunk(4096, 6144, (1, 0)))
    found = account(plan, machine, timeline_of(plan, net, machine, profile(net, machine)))
    assert found.lanes == ((0, 4096), (1, 2048))
    assert found.together == pytest.approx(0.5)


def test_a_host_that_waits_for_copies_waits_for_bytes() -> None:
    made = answer()
    demand = next(c for c in made.outcome.strategies if c.name == "demand")
    found = account(demand.plan, MACHINE, demand.timeline)
    assert found.copies_ns > 0.8 * NETWORK.total_bytes / 12


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_parts_add_up_to_the_makespan(data: st.DataObject) -> None:
    machine = data.draw(some.hosts())
    net = data.draw(some.networks())
    made = data.draw(some.profiles(net, machine))
    plan = data.draw(some.plans(net, machine))
    try:
        timeline = timeline_of(plan, net, machine, made)
    except InputError:
        return
    found = account(plan, machine, timeline)
    assert found.run_ns + found.copies_ns + found.host_ns == pytest.approx(timeline.makespan_ns)
    assert min(found.run_ns, found.copies_ns) >= 0
    assert 0 <= found.together <= 1 + 1e-9
    assert sum(size for _, size in found.lanes) == plan.copied_bytes
    assert in_place(plan, net).size_bytes == plan.direct_bytes(net)


# Pictures and traces


def story() -> Timeline:
    net, machine = network(4096, 2048), host(2)
    plan = copied(net, Chunk(0, 4096, (0,)), Chunk(4096, 6144, (1, 0)), launch=Launch.EAGER)
    return timeline_of(plan, net, machine, profile(net, machine))


def test_trace_holds_every_span_and_link() -> None:
    timeline = story()
    content = json.loads(chrome_trace((timeline, replace(timeline, kind="measured")), "a title"))
    events = content["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["predicted: a title", "measured: a title"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 1}
    assert [n.split(" ")[0] for n in threads.values()] == list(timeline.streams)
    spans = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert len(spans) == len(timeline.spans)
    for event, span in zip(spans, timeline.spans, strict=True):
        assert threads[event["tid"]].startswith(span.stream)
        assert (event["ts"], event["dur"], event["cat"]) == (
            span.start_ns / 1e3,
            span.duration_ns / 1e3,
            span.kind.value,
        )
    stall = next(e for e in spans if e["cat"] == "stall")
    assert stall["args"]["waits for"]
    counters = [e for e in events if e["ph"] == "C" and e["pid"] == 1]
    assert {e["name"] for e in counters} == {f"link {u.link}" for u in timeline.links}
    last = {e["name"]: e["args"]["GB/s"] for e in counters}
    assert set(last.values()) == {0.0}


def test_pictures_are_drawn_of_one_or_two_timelines(tmp_path: Path) -> None:
    timeline = story()
    assert picture((timeline,), "one").startswith(b"\x89PNG")
    pair = (timeline, replace(timeline, kind="measured"))
    svg = picture(pair, "two $models$", ".svg").decode()
    assert picture(pair, "two $models$", ".svg").decode().count("<text") == svg.count("<text")
    plot(pair, tmp_path / "out.pdf", "two")
    assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(InputError, match=r"out\.gif: no format for a picture; end the name in \.png"):
        plot(pair, tmp_path / "out.gif", "two")
    empty = Timeline("predicted", 0.0, ())
    assert picture((empty,), "nothing").startswith(b"\x89PNG")


def test_texts_in_the_picture_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only here
    from matplotlib.text import Text  # noqa: PLC0415

    from sim import picture as module  # noqa: PLC0415

    best = answer().outcome.best.timeline
    assert best.of(SpanKind.COPY)
    figure_drawn = module.draw((best, replace(best, kind="measured")), "a title of a usual length, GPU 0")
    canvas = FigureCanvasAgg(figure_drawn)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [
        t.get_window_extent(renderer) for t in figure_drawn.findobj(Text) if t.get_text() and t.get_visible()
    ]
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:at])
