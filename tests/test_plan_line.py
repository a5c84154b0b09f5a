"""Plans as a sweep's file keeps them: a line of text each, which loses nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hwexec.plan_line import PlanLine, as_line
from hwexec.sweep import SWEEP, random_plan
from sim.errors import InputError
from sim.files import (
    FileKind,
    format_record,
    parse_record,
)
from sim.plan import Access, Chunk, Launch, Plan
from tests import strategies as some
from tests.builders import host, network
from tests.sweeping import point, record

KEPT = FileKind("kept", 1, PlanLine)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_plan_comes_back_from_its_text(data: st.DataObject) -> None:
    machine, net = data.draw(some.hosts()), data.draw(some.networks())
    plan = data.draw(some.plans(net, machine))
    kept = parse_record(format_record(KEPT, as_line(plan)).encode(), KEPT)
    assert kept.plan(net) == plan
    assert kept.gpus == set(plan.gpus)


def test_plan_lines_can_be_read_by_eye_and_lose_nothing() -> None:
    access = ((Access.COPIED,), (Access.COPIED, Access.DIRECT), (), (Access.PEER,))
    chunks = (Chunk(0, 512, (0,)), Chunk(512, 768, (2, 0)), Chunk(1024, 2048, (2,)))
    kept = as_line(Plan("odd", 0, Launch.GRAPH, access, chunks, head=1))
    assert (kept.access, kept.chunks) == ("c2 d1 p1", "+512 +256@2>0 1024+1024@2")
    assert (kept.gpus, replace(kept, chunks="+512", target=1).gpus) == ({0, 2}, {1})
    assert [f.name for f in fields(PlanLine)] == [
        "name",
        "target",
        "launch",
        "sync",
        "head",
        "access",
        "chunks",
        "opening",
    ]
    assert {f.name for f in fields(PlanLine)} == {f.name for f in fields(Plan)}


def test_a_plan_line_of_another_network_or_with_odd_words_is_refused() -> None:
    kept = as_line(random_plan(network(512, 512), host(1), (0,), "0"))
    with pytest.raises(InputError, match="access for 2 reads, but test has 3"):
        kept.plan(network(512, 512, 512))
    with pytest.raises(InputError, match="'x3' in its access; words there are as in 'c4 d1 c12'"):
        replace(kept, access="c1 x3")
    with pytest.raises(InputError, match="'12' in its chunks"):
        replace(kept, chunks="12")


def test_six_hundred_plans_of_four_hundred_layers_stay_within_a_few_mib() -> None:
    net, machine = network(*((400_000, 2_000) for _ in range(400))), host(2)
    plans = [as_line(random_plan(net, machine, (0, 1), f"{seed}")) for seed in range(30)]
    one = point("random", 1, 1.0, 1.0)
    points = tuple(replace(one, number=at, plan=plan) for at, plan in enumerate(plans))
    text = format_record(SWEEP, record(points)).encode()
    assert len(text) * 600 / 30 < 3 * 2**20
    assert parse_record(text, SWEEP).points == points
