"""What a start was seen to do, as a timeline with the plan's own spans."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from hwexec.cpu import CpuDevice
from hwexec.device import Activity
from hwexec.spans import of_graph
from hwexec.walk import Mark, Marks
from sim.plan import Chunk, Launch
from sim.program import lower
from sim.timeline import SpanKind
from tests import toys
from tests.toys import TWO, cold_start, dealt


def test_on_one_clock_no_gpu_is_late_by_when_its_origin_came() -> None:
    """A push was seen to land after the layer that had waited for it: each GPU's times began at an event of its own."""
    device = CpuDevice(2, delay_us=2000)
    compute, push = device.stream("compute:0", 0), device.stream("p2p:1>0", 1)
    marks = Marks(device, compute, [compute, push])
    begun = device.event(timing=True)
    device.record(push, begun)
    device.wait(compute, begun)
    ended = marks.at(compute)
    device.synchronize()
    marks.found = [Mark(0, "p2p:1>0", begun, begun), Mark(1, "compute:0", ended, ended)]
    (_, pushed, _), (_, waited, _) = marks.rows()
    assert 0 <= pushed <= waited
    assert waited - pushed == pytest.approx(device.elapsed_ns(begun, ended))
    device.close()


@pytest.mark.parametrize(
    ("launch", "head"), [(Launch.EAGER, 0), (Launch.GRAPH, 0), (Launch.GRAPH, 3), (Launch.GRAPH, 99)]
)
def test_the_timeline_has_the_plans_own_spans(launch: Launch, head: int) -> None:
    made = toys.text(("linear", "norm"))
    plan = dealt(made, launch)
    plan = replace(plan, head=min(head, len(plan.chunks)))
    with cold_start(made, plan, CpuDevice(2, delay_us=500)) as cold:
        cold(*made.inputs)
        timeline = cold.timeline()
    assert timeline.kind == "measured"
    runs, copies = timeline.of(SpanKind.RUN), timeline.of(SpanKind.COPY)
    assert [s.layer for s in runs] == list(range(len(made.network.layers)))
    assert len(copies) == sum(len(c.path) for c in plan.chunks)
    landed = {s.chunk: s.stop_ns for s in copies}
    for run in runs:
        for read in made.network.layers[run.layer].reads:
            start = made.network.offsets[read.storage]
            stop = start + made.network.storages[read.storage].size_bytes
            needed = [i for i, c in enumerate(plan.chunks) if c.start_bytes < stop and c.stop_bytes > start]
            assert all(landed[i] <= run.start_ns for i in needed)
    assert timeline.makespan_ns >= max(s.stop_ns for s in copies)
    if head < len(plan.chunks):
        assert any("pcie" in s.cause or "nvlink" in s.cause for s in timeline.of(SpanKind.STALL))
    for stream in cold.program.streams:  # also where the head begins one and the graph goes on
        own = sorted((s for s in copies if s.stream == stream), key=lambda s: s.op)
        assert all(a.stop_ns <= b.start_ns for a, b in pairwise(own))
    if launch is Launch.GRAPH:
        assert [s.label for s in timeline.of(SpanKind.ISSUE)] == ["launch graph"]


def test_activities_of_a_head_and_of_the_graph_behind_it_are_told_apart() -> None:
    """As a profiler shows them: copies of one size, calls of the host before all, the launch while the head is under way."""
    made = toys.text(("linear",))
    size = made.network.arena_bytes // 4 // 256 * 256
    cuts = [(i * size, (i + 1) * size) for i in range(4)]
    cuts[-1] = (cuts[-1][0], made.network.arena_bytes)
    chunks = tuple(Chunk(*cut, path) for cut, path in zip(cuts, ((0,), (1, 0), (0,), (1, 0)), strict=True))
    program = lower(replace(dealt(made), chunks=chunks, head=2), made.network, TWO)
    layers = len(made.network.layers)
    seen = [
        Activity("issue", -1, 100, 101, 0, "cuMemcpyAsync"),
        Activity("issue", -1, 102, 103, 0, "cuMemcpyAsync"),
        Activity("launch", -1, 110, 150, 0, "cudaGraphLaunch"),
        Activity("h2d", 0, 111, 160, size, "head"),
        Activity("h2d", 1, 112, 161, size, "head"),
        Activity("d2d", 0, 162, 165, size, "head"),
        Activity("h2d", 0, 170, 180, size, "graph"),
        Activity("h2d", 1, 171, 181, made.network.arena_bytes - cuts[-1][0], "graph"),
        Activity("d2d", 0, 182, 184, made.network.arena_bytes - cuts[-1][0], "graph"),
        *(Activity("kernel", 0, 190 + i, 191 + i, 0, "k") for i in range(layers)),
    ]
    timeline = of_graph(program, seen, (1,) * layers)
    copies = sorted(timeline.of(SpanKind.COPY), key=lambda s: s.op)
    assert [(s.chunk, s.start_ns) for s in copies] == [(0, 11), (1, 12), (1, 62), (2, 70), (3, 71), (3, 82)]
    assert [(s.start_ns, s.stop_ns) for s in timeline.of(SpanKind.ISSUE)] == [(10, 50)]
    assert [s.start_ns for s in timeline.of(SpanKind.RUN)] == [90 + i for i in range(layers)]
    whole = of_graph(lower(replace(program.plan, head=0), made.network, TWO), seen[2:], (1,) * layers)
    assert [s.start_ns for s in whole.of(SpanKind.ISSUE)] == [0.0], (
        "without a head, the launch is the request"
    )


def test_a_measured_stall_for_a_relayed_chunk_of_the_head_names_the_chunk() -> None:
    made = toys.text(("linear",))
    size = made.network.arena_bytes
    program = lower(replace(dealt(made), chunks=(Chunk(0, size, (1, 0)),), head=1), made.network, TWO)
    layers = len(made.network.layers)
    seen = [
        Activity("launch", -1, 0, 50, 0, "cudaGraphLaunch"),
        Activity("h2d", 1, 10, 60, size, "head"),
        Activity("d2d", 0, 60, 80, size, "head"),
        *(Activity("kernel", 0, 90 + i, 91 + i, 0, "k") for i in range(layers)),
    ]
    (stall,) = of_graph(program, seen, (1,) * layers).of(SpanKind.STALL)
    assert (stall.start_ns, stall.stop_ns, stall.chunk) == (0, 90, 0)
    assert stall.cause == "chunk 0 over nvlink1>0"
