"""An opening: first layers launched as a graph of their own, while the copies that others need are still issued."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwexec.cpu import CpuDevice, CpuGraph
from hwexec.device import Stream
from sim.errors import InputError
from sim.ops import Run
from sim.plan import Chunk, Launch, Plan
from sim.program import Program, lower
from sim.timeline import SpanKind
from tests import strategies as some
from tests import toys
from tests.builders import copied, host, network
from tests.test_simulate import launched
from tests.toys import cold_start, dealt

CHUNKS = Chunk(0, 1, (0,)), Chunk(256, 257, (0,)), Chunk(512, 513, (0,))


def told(program: Program) -> list[str]:
    return [f"{type(op).__name__} {op.stream}" for op in program.ops]


def test_an_opening_stands_behind_the_copies_that_it_needs_and_before_all_others() -> None:
    net, machine = network(1, 1, 1), host(2)
    plan = replace(copied(net, *CHUNKS), head=3, opening=1)
    program = lower(plan, net, machine)
    one = ["Copy h2d:0", "Record h2d:0"]
    layer = ["Wait compute:0", "Run compute:0"]
    assert told(program) == [*one, *layer, *one, *one, *layer, *layer]
    assert (program.opening, program.head_ops) == (range(2, 4), 8)
    # a first layer that needs the last chunk has nothing to go before
    late = lower(replace(plan, chunks=CHUNKS[::-1]), net, machine)
    assert late.opening.stop == late.head_ops
    assert lower(replace(plan, opening=0), net, machine).opening == range(0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head": 2}, "an opening of 1 layers; only a graph plan with all 3 chunks in its head has one"),
        ({"opening": 3}, "an opening of 3 layers; .* has one, of 1 to 2 layers: write 0"),
        ({"opening": -1}, "an opening of -1 layers"),
        ({"launch": Launch.EAGER, "head": 0}, "an opening of 1 layers; only a graph plan"),
    ],
)
def test_an_opening_that_cannot_be_is_refused(change: dict[str, object], says: str) -> None:
    net = network(1, 1, 1)
    plan = replace(copied(net, *CHUNKS), head=3, opening=1)
    with pytest.raises(InputError, match=says):
        lower(replace(plan, **change), net, host(2))  # type: ignore[arg-type]


def test_its_launch_is_that_of_a_small_graph_and_the_rest_is_issued_behind_it() -> None:
    net, machine = network(1, 1, 1), host()
    plan = replace(copied(net, *CHUNKS), head=3)
    # of the launch: 100, 1 a layer, 8 for each wait; copies of a head cost nothing here
    assert launched(plan, net, machine)[0] == ("host", 0, 100 + 3 + 3 * 8)
    assert launched(replace(plan, opening=1), net, machine) == [
        ("host", 0, 109),
        ("host", 109, 109 + 100 + 2 + 2 * 8),
        ("h2d:0", 0, 1),
        ("h2d:0", 109, 110),
        ("h2d:0", 110, 111),
        *(("compute:0", 109 + 1000 * at, 1109 + 1000 * at) for at in range(3)),
    ]


@pytest.mark.parametrize("links", [1, 2])
def test_whatever_the_opening_a_start_is_bit_equal_also_right_behind_another(links: int) -> None:
    made = toys.text(("linear", "norm", "bare"))
    plan = dealt(made, links=links)
    plan = replace(plan, head=len(plan.chunks))
    for opening in range(len(made.network.layers)):
        device = CpuDevice(2, seed=opening, delay_us=300)
        with cold_start(made, replace(plan, opening=opening), device) as cold:
            toys.check_cold_then_again(made, cold)
            assert torch.equal(cold.warm(*made.inputs), made.answer)
            cold.evict()
            timeline = cold.timeline()
            assert [s.layer for s in timeline.of(SpanKind.RUN)] == list(range(len(made.network.layers)))
            assert len(timeline.of(SpanKind.ISSUE)) == 1 + bool(opening), "each launch is seen"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_openings_with_relays_are_bit_equal_whatever_is_late(data: st.DataObject) -> None:
    made = data.draw(toys.toys().filter(lambda toy: len(toy.network.layers) > 1))
    machine = data.draw(some.hosts(min_gpus=2, max_gpus=3, joined=True))
    plan = data.draw(some.plans(made.network, machine, launch=Launch.GRAPH))
    opening = data.draw(st.integers(1, len(made.network.layers) - 1))
    plan = replace(plan, head=len(plan.chunks), opening=opening)
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=400)
    with cold_start(made, plan, device, machine) as cold:
        assert [op.layer for op in cold.program.ops[: cold.program.head_ops] if isinstance(op, Run)] == list(
            range(opening)
        )
        for poisoned in data.draw(st.lists(st.booleans(), min_size=2, max_size=4)):
            if poisoned:
                cold.evict()
            assert torch.equal(cold(*made.inputs), made.answer)
    device.synchronize()
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("idle", [True, False])
def test_the_host_issues_and_launches_in_the_order_of_the_program(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device = toys.text(("linear", "norm")), CpuDevice(2)
    plan = opened(dealt(made))
    with cold_start(made, plan, device) as cold:
        story: list[str] = []
        for name in ("copy", "read"):
            tell(story, device, name, monkeypatch)
        monkeypatch.setattr(device, "idle", lambda stream: idle)
        replay = CpuGraph.replay

        def launch(graph: CpuGraph, part: int = 0) -> None:
            story.append(f"launch {part}")
            replay(graph, part)

        monkeypatch.setattr(CpuGraph, "replay", launch)
        assert torch.equal(cold(*made.inputs), made.answer)
        program = cold.program
    copies = [f"copy {op.stream}" for op in program.ops if hasattr(op, "source")]
    before = sum(hasattr(op, "source") for op in program.ops[: program.opening.start])
    assert 0 < before < len(copies)
    inputs = ["read compute:0"] * len(made.inputs)
    assert story == [*copies[:before], *inputs, "launch 0", *copies[before:], "launch 1"]


def tell(story: list[str], device: CpuDevice, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = getattr(device, name)

    def told(stream: Stream, *given: object) -> None:
        story.append(f"{name} {stream.name}")
        call(stream, *given)

    monkeypatch.setattr(device, name, told)


def opened(plan: Plan) -> Plan:
    return replace(plan, head=len(plan.chunks), opening=1)


def test_where_the_capture_breaks_between_its_parts_the_plan_runs_eagerly() -> None:
    made = toys.text(("linear", "norm"))
    with cold_start(made, opened(dealt(made)), CpuDevice(2, fail_at="cut")) as cold:
        assert cold.launch is Launch.EAGER
        assert "injected error between two parts" in cold.why_eager
        assert torch.equal(cold(*made.inputs), made.answer)
