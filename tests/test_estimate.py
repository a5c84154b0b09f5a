"""The P3.8xlarge against what was published about it: latencies, planners' decisions, and what the best plan says."""

from __future__ import annotations

import pytest

from calibrate.estimate_fit import FITTED_COSTS, FITTED_ROOFLINE, fit_roofline, predict_ms, verdict
from calibrate.published import deepbench_v100, published
from sim.baselines import Setting
from sim.catalog import Request, find_host, find_profile
from sim.host import Figure
from sim.options import Options
from sim.profile import Profile
from sim.search import search

HOST = find_host("p3.8xlarge")
FACTS = published("p3.8xlarge")


def shipped(model: str) -> Profile:
    profile = find_profile(HOST, Request(model))
    assert profile is not None, f"{model}: rerun `calibrate estimate --out scenarios --force`"
    return profile


@pytest.mark.parametrize("row", [r for r in FACTS.latencies if r.fitted], ids=lambda r: r.strategy)
def test_the_five_published_latencies_are_met_within_five_percent(row) -> None:  # type: ignore[no-untyped-def]
    assert predict_ms(HOST, shipped(row.model), row) == pytest.approx(row.ms, rel=0.05)


def test_the_first_print_shows_the_same_machines_spread() -> None:
    rows = [r for r in FACTS.latencies if "first print" in r.source]
    assert len(rows) == 4
    for row in rows:
        assert predict_ms(HOST, shipped(row.model), row) == pytest.approx(row.ms, rel=0.06)


@pytest.mark.parametrize("decision", FACTS.decisions, ids=lambda d: f"{d.model} {d.about} {d.layers}")
def test_the_static_plan_decides_as_all_published_tables_do(decision) -> None:  # type: ignore[no-untyped-def]
    found = verdict(HOST, shipped(decision.model), decision)
    assert found.layers > 0
    assert found.agree == found.layers


def test_the_adaptive_plan_of_a_transformer_reads_only_embeddings_in_place() -> None:
    profile = shipped("hf:bert-base")
    chosen = Setting(profile, HOST, 0, 2).adaptive
    kinds = {profile.network.layers[i].kind for i in chosen}
    assert kinds <= {"Embedding", "BertEmbeddings"}
    assert "Embedding" in kinds


def test_three_constants_are_fitted_to_latencies_and_all_others_keep_to_their_range() -> None:
    figures = {name: getattr(HOST.costs, name) for name in HOST.costs.__dataclass_fields__}
    assert {name for name, f in figures.items() if f.kind == "fitted"} == set(FITTED_COSTS)
    assert len(FITTED_COSTS) == 3
    assert HOST.roofline is not None
    roof = {name: getattr(HOST.roofline, name) for name in HOST.roofline.__dataclass_fields__}
    assert {name for name, f in roof.items() if f.kind == "fitted"} == set(FITTED_ROOFLINE)
    every: list[Figure] = [*figures.values(), *roof.values(), *(link.bytes_per_s for link in HOST.links)]
    for figure in every:
        if figure.low is not None and figure.high is not None:
            assert figure.low <= figure.value <= figure.high
        assert figure.source


def test_the_roofline_is_what_deepbench_gives() -> None:
    assert HOST.roofline is not None
    refitted, quality = fit_roofline(HOST.roofline, deepbench_v100())
    for name in FITTED_ROOFLINE:
        assert getattr(refitted, name).value == pytest.approx(getattr(HOST.roofline, name).value, rel=1e-3)
    assert quality.median_error < 0.1


@pytest.mark.parametrize("model", ["resnet50", "hf:bert-base"])
def test_the_best_plan_beats_both_links_of_deepplan(model: str) -> None:
    found = search(shipped(model), HOST, Options())
    rival = next(c for c in found.strategies if c.name == "pt+dha")
    assert found.best.makespan_ns < rival.makespan_ns
    assert found.gap < 0.1
