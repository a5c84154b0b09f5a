"""`sim` as a user meets it: what each command prints and writes, what ships, and how fast it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sim.catalog import Request, find_host, find_profile, host_names, host_path, obtain_profile
from sim.cli import parse_gpus
from sim.errors import InputError
from sim.files import read_host, read_plan
from sim.output import check_outputs
from sim.sizes import parse_size
from tests import golden
from tests.simming import HERE, MACHINE, NETWORK, Sim, sim_in
from tests.test_console import PROBE


@pytest.fixture
def sim(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return sim_in(tmp_path, capsys, monkeypatch)


# From nothing to a plan and back


def test_search_writes_a_plan_that_simulate_predicts_alike(sim: Sim, tmp_path: Path) -> None:
    outputs = ("--out", "plan.yaml", "--trace", "out.json", "--plot", "out.png")
    done = sim("search", *HERE, *outputs, "--layers")
    assert (done.code, done.err) == (0, "wrote plan.yaml\nwrote out.json\nwrote out.png\n")
    assert "test, fp32, batch 1 on test, GPU 0 (ESTIMATED, not measured)" in done.out
    assert "0-Linear (0.286 MB) | " in done.out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out.json").read_text())["traceEvents"]

    plan = read_plan("plan.yaml")
    assert (plan.model, plan.batch, plan.dtype, plan.seq, plan.host) == ("test", 1, "fp32", None, "test")
    assert (plan.network_digest, plan.host_digest) == (NETWORK.digest, MACHINE.digest)
    made_from = (f"host:{MACHINE.digest}", f"network:{NETWORK.digest}", f"plan:{plan.plan.digest}")
    assert plan.provenance.inputs == made_from
    assert plan.bound_ns <= plan.predicted_ns

    again = sim("simulate", "plan.yaml", "--host", "./host.yaml", "--profile", "profile.yaml")
    assert again.code == 0
    assert "Plan best fits its host and network" in again.out
    assert ", as the file says; " in again.out
    found = json.loads(sim("simulate", "plan.yaml", *HERE[2:], "--json").out)
    assert found["latency_ms"] == found["recorded_ms"] == plan.predicted_ns / 1e6


def test_json_is_one_object_and_nothing_else(sim: Sim) -> None:
    done = sim("search", *HERE, "--json", "--layers", "--gpus", "1,0")
    assert done.err == ""
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert found["best"]["gpus"][0] == 1
    assert found["best"]["latency_ms"] <= min(s["latency_ms"] for s in found["strategies"])


def test_options_reach_the_search(sim: Sim) -> None:
    budget = json.loads(sim("search", *HERE, "--json", "--memory-budget", "0", "--gpus", "0").out)
    assert budget["best"]["copied_bytes"] == 0
    assert [s["name"] for s in budget["strategies"]] == ["best"]
    assert "in the mean of 3 runs; in the first: " in sim("search", *HERE, "--runs", "3").out
    alone = json.loads(sim("search", *HERE, "--json", "--gpus", "0").out)
    assert {tuple(s["gpus"]) for s in alone["strategies"]} == {(0,)}


def test_weights_that_stay_are_searched_written_and_predicted_again(sim: Sim, tmp_path: Path) -> None:
    found = json.loads(sim("search", *HERE, "--json", "--keep", "1.2x", "--out", "kept.yaml").out)
    best, before = found["best"], found["strategies"][-2]
    assert (best["name"], before["name"]) == ("kept", "best")
    assert best["kept_bytes"] > before["kept_bytes"] == 0
    assert best["cold_ms"] < before["cold_ms"]
    again = json.loads(sim("simulate", "kept.yaml", *HERE[2:], "--json").out)
    assert (again["latency_ms"], again["kept_bytes"]) == (best["cold_ms"], best["kept_bytes"])
    assert again["bound_ms"] <= again["latency_ms"]
    said = sim("simulate", "kept.yaml", *HERE[2:]).out
    assert "MiB kept between starts, over GPUs" in said
    assert "that keeps these weights can be under" in " ".join(said.split())


def test_hosts_and_layers_list_what_there_is(sim: Sim) -> None:
    listed = next(line for line in sim("hosts").out.splitlines() if "p3.8xlarge" in line)
    cells = [cell.strip() for cell in listed.split("│")[1:-1]]
    figures = "27 published, 2 derived, 7 fitted, 22 assumed"
    assert cells == ["p3.8xlarge", "4x Tesla V100-SXM2-16GB", "12.29", "24 to 48", "6", figures]
    assert "p3.8xlarge" in host_names()
    golden.compare("host", sim("hosts", "./host.yaml").out)
    shipped = sim("hosts", "p3.8xlarge").out
    for word in ("EMOGI", "GB/s", "published", "fitted", "assumed", "launch_cross_ns"):
        assert word in shipped
    layers = sim("layers", "--model", "resnet50")
    assert "resnet50, fp32, batch 1: 158 layers" in layers.out
    found = json.loads(sim("layers", "--model", "resnet50", "--json").out)
    assert len(found["layers"]) == 158
    assert found["layers"][0]["storages"] == ["conv1.weight"]
    assert found["total_bytes"] == 102_441_032


def test_models_lists_names(sim: Sim) -> None:
    done = sim("models")
    assert {"resnet50", "vit_b_16", "hf:bert-base"} <= set(done.out.split())


# What ships


def test_shipped_profiles_are_found_by_what_was_asked() -> None:
    machine = find_host("p3.8xlarge")
    for name in ("resnet50", "resnet101", "hf:bert-base"):
        for request in (Request(name), Request(name, 1, "fp32")):
            found = find_profile(machine, request)
            assert found is not None
            assert (found.network.model, found.network.batch, found.network.dtype) == (name, 1, "fp32")
            assert found.kind == "estimated"
    assert find_profile(machine, Request("resnet50", 2)) is None
    assert find_profile(machine, Request("resnet50", dtype="fp16")) is None
    assert find_profile(machine, Request("resnet50", seq=5)) is None
    assert find_profile(machine, Request("hf:bert-base", seq=383)) is None
    assert find_profile(machine, Request("../../hosts/p3.8xlarge")) is None
    assert find_profile(machine, Request("x" * 5000)) is None
    changed = replace(machine.costs, launch_ns=replace(machine.costs.launch_ns, value=1.0))
    assert find_profile(replace(machine, costs=changed), Request("resnet50")) is None


def test_a_shipped_length_is_the_models_own() -> None:
    from sim.models import build  # noqa: PLC0415 - torch only where a test needs it

    found = find_profile(find_host("p3.8xlarge"), Request("hf:bert-base"))
    assert found is not None
    pytest.importorskip("transformers")
    assert found.network.seq == build("hf:bert-base", device="meta").seq


def test_what_does_not_ship_is_traced_and_estimated(sim: Sim) -> None:
    done = sim("search", "--model", "squeezenet1_1", "--batch", "2", "--json")
    assert done.code == 0
    assert done.err == (
        "squeezenet1_1: no profile at hand; tracing it and estimating one for p3.8xlarge (imports torch)\n"
    )
    found = json.loads(done.out)
    assert (found["model"], found["profile_kind"]) == ("squeezenet1_1", "estimated")


# Start-up


def cpu_seconds(*args: str) -> tuple[float, str]:
    """CPU time of a new process: what a quiet machine would take, whatever else this one does."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", PROBE, *args], capture_output=True, text=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return spent, done.stdout


def test_help_answers_within_half_a_second() -> None:
    spent, out = min(cpu_seconds("--help") for _ in range(2))
    assert "search" in out
    assert spent < 0.5


def test_the_main_job_answers_within_two_seconds() -> None:
    spent, out = min(cpu_seconds("search", "--model", "resnet50") for _ in range(2))
    assert "Bound: " in out
    assert spent < 2.0


def test_names_are_listed_within_a_second() -> None:
    spent, out = min(cpu_seconds("models") for _ in range(2))
    assert "resnet50" in out
    assert spent < 1.0


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from sim.cli import cli; from sim.console import run_command\n"
        "heavy = ('torch', 'simpy', 'rich', 'scipy', 'matplotlib', 'yaml', 'numpy')\n"
        "print([m for m in heavy if m in sys.modules])\n"
        "run_command(cli, 'sim', ['search', '--model', 'resnet50', '--json'])\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, _, last = done.stdout.splitlines()
    assert (first, last) == ("[]", "[]")


def test_what_a_budget_leaves_out_is_told_in_the_unit_that_budgets_have(sim: Sim) -> None:
    done = sim("search", "--model", "resnet50", "--memory-budget", "60MiB")
    assert "not shown: demand (holds 97.7 MiB, over the memory budget)" in done.out


def test_a_host_that_was_named_has_a_path_that_outputs_are_held_against() -> None:
    """By its name alone it was no input, and --force put a plan in its place."""
    path = host_path("h200-pair")
    assert path is not None
    assert read_host(path) == find_host("h200-pair")
    assert [host_path(given) for given in (None, "nosuch", "./nosuch.yaml")] == [None, None, "./nosuch.yaml"]
    with pytest.raises(InputError, match="is read by this command and would be lost"):
        check_outputs((path,), (host_path("h200-pair"),), force=True)


def test_the_name_of_a_shipped_host_may_be_a_user_file(sim: Sim) -> None:
    with pytest.raises(InputError, match="not known"):
        find_host("host")
    assert find_host("host.yaml") == MACHINE
    made = obtain_profile(MACHINE, Request("test", None, None, None), "profile.yaml")
    assert made.network == NETWORK


# Sizes and GPUs


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1_000_000),
        ("200MiB", 200 * 2**20),
        ("200 MiB", 200 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("300MB", 300_000_000),
        ("1kB", 1000),
        ("0.5KiB", 512),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_gpus() -> None:
    assert parse_gpus("0,2") == (0, 2)
    assert parse_gpus(" 1 , 3,0") == (1, 3, 0)
