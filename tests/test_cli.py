"""`sim` as a user meets it: what each command prints, writes and refuses. Bad input is one line, exit code 2, nothing left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sim.catalog import Request, find_host, find_profile, host_names, obtain_profile
from sim.cli import cli, parse_gpus, parse_size
from sim.console import run_command
from sim.errors import InputError
from sim.files import PlanFile, read_plan, write_host, write_plan, write_profile
from sim.output import make_folder
from sim.plan import Access, Launch, Sync
from tests import golden
from tests.builders import host, network, profile
from tests.test_console import PROBE

NETWORK = network(300_000, 0, (200_000, 5_000), 1_000_000)
MACHINE = host(3, pcie=12.0)


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Sim = Callable[..., Run]


@pytest.fixture
def sim(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    """Runs `sim` in a folder that holds host.yaml and profile.yaml."""
    monkeypatch.chdir(tmp_path)
    write_host("host.yaml", MACHINE)
    write_profile("profile.yaml", profile(NETWORK, MACHINE, run=20_000, direct=50_000))

    def run(*args: str) -> Run:
        code = run_command(cli, "sim", args)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


HERE = ("--model", "test", "--host", "./host.yaml", "--profile", "profile.yaml")


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


def test_hosts_and_layers_list_what_there_is(sim: Sim) -> None:
    listed = next(line for line in sim("hosts").out.splitlines() if "p3.8xlarge" in line)
    cells = [cell.strip() for cell in listed.split("│")[1:-1]]
    figures = "27 published, 2 derived, 7 fitted, 19 assumed"
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


# Bad input


def refused(done: Run, says: str, folder: Path) -> None:
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("sim: ")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert sorted(p.name for p in folder.iterdir()) == ["host.yaml", "profile.yaml"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--memory-budget -5MiB", "--memory-budget '-5MiB': must be a size of 0 or more, as 200MiB"),
        ("--memory-budget lots", "--memory-budget 'lots': must be a size"),
        ("--memory-budget 5Mb", "must be a size"),
        ("--memory-budget nan", "must be a size"),
        ("--memory-budget 200", "--memory-budget '200': of which unit? Say 200MiB or 200GiB, or 200B where"),
        ("--memory-budget 1.5", "of which unit? Say 1.5MiB"),
        ("--memory-budget 999999", "of which unit?"),
        ("--memory-budget 1e9", "must be a size"),
        ("--memory-budget=", "must be a size"),
        ("--memory-budget " + "9" * 50, "larger than any memory"),
        ("--gpus 0,,2", "--gpus '0,,2': must be GPU numbers with commas between"),
        ("--gpus a", "must be GPU numbers"),
        ("--gpus -1", "must be GPU numbers"),
        ("--gpus 0,0", "a GPU is named twice"),
        ("--gpus 9", "GPU 9: test has GPUs 0 to 2; choose among them"),
        ("--gpus 0,9", "GPU 9: test has GPUs 0 to 2"),
        ("--runs 0", "--runs 0: at least the cold start itself must run"),
        ("--runs x", "Invalid value for '--runs': 'x' is not a valid integer; see `sim search --help`"),
        ("--dtype fp8", "'fp8' is not one of 'fp32', 'fp16', 'bf16'"),
        ("--frobnicate", "No such option"),
        ("--batch 2", "profile.yaml: a profile of another network: its batch is 1, not 2"),
        ("--dtype bf16", "a profile of another network: its dtype is fp32, not bf16"),
        ("--seq 12", "a profile of another network: its seq is None, not 12"),
        ("--model resnet50", "a profile of another network: its model is test, not resnet50"),
        ("--host p3.8xlarge", "profile.yaml: a profile made on test, not for p3.8xlarge"),
        ("--host p3.8xlarg", "host 'p3.8xlarg' is not known; nearest: p3.8xlarge"),
        ("--host ./none.yaml", "none.yaml: there is no such file"),
        ("--host profile.yaml", "profile.yaml: kind is 'profile'; a host file says `kind: host`"),
        ("--profile host.yaml", "host.yaml: kind is 'host'; a profile file says `kind: profile`"),
        ("--profile .", "is not a regular file"),
        ("--out host.yaml", "host.yaml: is read by this command and would be lost; choose another path"),
        ("--out none/plan.yaml", "none/plan.yaml: there is no folder"),
        ("--out .", "is a directory"),
        ("--plot out.gif", "out.gif: no format for a picture; end the name in .png, .svg, .pdf"),
        ("--out same.png --plot same.png", "same.png: named for two outputs"),
        ("--out plan.yaml --plot none/out.png", "there is no folder"),
    ],
)
def test_bad_input_is_one_line(args: str, says: str, sim: Sim, tmp_path: Path) -> None:
    refused(sim("search", *HERE, *args.split(" ")), says, tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        "simulate plan.yaml --trace plan.yaml",
        "simulate plan.yaml --trace other/../host.yaml",
        "simulate plan.yaml --trace link.json",
        "search --model test --trace ./profile.yaml",
        "search --model test --out host.yaml",
    ],
)
def test_no_output_replaces_what_is_read_even_by_force(args: str, sim: Sim, tmp_path: Path) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    (tmp_path / "other").mkdir()
    os.link("plan.yaml", "link.json")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.yaml")}
    assert (
        "plan.yaml: exists; choose another path or pass --force"
        in sim("search", *HERE, "--out", "plan.yaml").err
    )
    done = sim(*args.split(), *HERE[2:], "--force")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert ": is read by this command and would be lost" in done.err
    assert {path: path.read_bytes() for path in tmp_path.glob("*.yaml")} == before


def test_an_unknown_model_answers_with_the_nearest(sim: Sim, tmp_path: Path) -> None:
    done = sim("search", "--model", "resnet5O", "--out", "plan.yaml")
    (error,) = done.err.splitlines()
    assert error.startswith("sim: model 'resnet5O': not known; nearest: resnet50")
    assert (done.code, done.out) == (2, "")
    assert not (tmp_path / "plan.yaml").exists()


def test_a_partner_without_a_route(sim: Sim, tmp_path: Path) -> None:
    lonely = host(3, pcie=12.0, peers=False)
    write_host("host.yaml", lonely, force=True)
    write_profile("profile.yaml", profile(NETWORK, lonely), force=True)
    refused(sim("search", *HERE, "--gpus", "0,2"), "GPU 2 has no route to GPU 0 on test", tmp_path)


def test_an_estimate_needs_a_roofline(sim: Sim, tmp_path: Path) -> None:
    refused(sim("search", "--model", "resnet50", "--host", "./host.yaml"), "no roofline figures", tmp_path)


def test_weights_that_the_gpu_cannot_hold_want_a_budget(sim: Sim, tmp_path: Path) -> None:
    small = replace(
        MACHINE, gpus=tuple(replace(gpu, memory_bytes=NETWORK.arena_bytes - 1) for gpu in MACHINE.gpus)
    )
    write_host("host.yaml", small, force=True)
    write_profile("profile.yaml", profile(NETWORK, small), force=True)
    refused(sim("search", *HERE), "of weights do not fit in the", tmp_path)
    assert sim("search", *HERE, "--memory-budget", "0").code == 0


def test_a_model_that_nobody_measured_on_a_measured_host_is_told_with_those_that_were(
    sim: Sim, tmp_path: Path
) -> None:
    done = sim("search", "--model", "squeezenet1_1", "--host", "h200-pair")
    refused(done, "squeezenet1_1 in fp32, batch 1: no profile for host 'h200-pair'", tmp_path)
    assert "profiles ship of convnext_base, hf:bert-base, " in done.err
    assert "`calibrate run`" in done.err


def test_a_model_measured_there_in_another_dtype_is_told_with_what_was_measured(
    sim: Sim, tmp_path: Path
) -> None:
    done = sim("search", "--model", "vit_b_16", "--dtype", "fp16", "--host", "h200-pair")
    refused(done, "vit_b_16 in fp16, batch 1: no profile for host 'h200-pair'", tmp_path)
    assert "; of vit_b_16 profiles ship in bf16, batch 1, and in fp32, batch 1; measure" in done.err
    longer = sim("search", "--model", "hf:gpt2", "--seq", "77", "--host", "h200-pair").err
    assert (
        "of hf:gpt2 profiles ship in bf16, batch 1, 1024 tokens, and in fp32, batch 1, 1024 tokens;" in longer
    )
    assert "hf:gpt2 in fp32, batch 1, 77 tokens: no profile" in longer
    machine = find_host("h200-pair")
    write_host(
        "slower.yaml", replace(machine, costs=replace(machine.costs, wait_ns=machine.costs.wait_cross_ns))
    )
    edited = sim("search", "--model", "resnet50", "--host", "./slower.yaml").err
    assert "; profiles that ship hold for the shipped constants of h200-pair alone;" in edited


def test_what_a_budget_leaves_out_is_told_in_the_unit_that_budgets_have(sim: Sim) -> None:
    done = sim("search", "--model", "resnet50", "--memory-budget", "60MiB")
    assert "not shown: demand (holds 97.7 MiB, over the memory budget)" in done.out


def test_usage_without_a_model_or_a_command(sim: Sim, tmp_path: Path) -> None:
    refused(sim("search"), "Missing option '--model'; see `sim search --help`", tmp_path)
    refused(sim("serach"), "No such command 'serach'", tmp_path)
    assert sim().code == 2
    assert sim("--help").code == 0


def test_a_plan_must_fit_its_host_and_network(sim: Sim, tmp_path: Path) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    plan = read_plan("plan.yaml")
    here = ("--host", "./host.yaml", "--profile", "profile.yaml")

    def says(text: str) -> None:
        done = sim("simulate", "plan.yaml", *here)
        assert (done.code, done.out) == (2, "")
        assert done.err.count("\n") == 1
        assert text in done.err

    write_plan("plan.yaml", replace(plan, network_digest="0" * 64), force=True)
    says("plan.yaml: made for another network than test is here")
    write_plan("plan.yaml", replace(plan, host_digest="0" * 64), force=True)
    says("plan.yaml: made for test with other constants than test has now")
    copied = tuple(tuple(Access.COPIED for _ in row) for row in plan.plan.access)
    write_plan(
        "plan.yaml", replace(plan, plan=replace(plan.plan, access=copied, chunks=(), head=0)), force=True
    )
    says("but no chunks bring all of it to GPU 0")
    write_plan("plan.yaml", replace(plan, plan=replace(plan.plan, target=7)), force=True)
    says("GPU 7: test has GPUs 0 to 2")
    (tmp_path / "plan.yaml").write_text((tmp_path / "plan.yaml").read_text()[:700])
    says("plan.yaml: ")
    for depth in (33, 10**6):  # libyaml looks ahead, and may refuse the second by a limit of its own
        (tmp_path / "plan.yaml").write_text("[" * depth)
        says("nested deeper than 32 levels")


def test_a_prediction_that_is_not_the_files_says_why(sim: Sim) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    plan = read_plan("plan.yaml")

    def says(file: PlanFile) -> str:
        write_plan("plan.yaml", file, force=True)
        done = sim("simulate", "plan.yaml", *HERE[2:])
        assert done.code == 0
        return re.findall(r"Predicted: \S+ ms, (.*?); no plan", done.out)[0]

    assert says(replace(plan, plan=replace(plan.plan, name="mine"))) == "as the file says"
    eager = replace(plan.plan, launch=Launch.EAGER, head=0)
    recorded = f"{plan.predicted_ns / 1e6:.2f} ms"
    edited = replace(plan, plan=replace(eager, sync=Sync.HOST_ALL))
    assert says(edited) == f"where the file says {recorded} (the plan was changed after it was made)"
    other = "from another profile, or by another version"
    assert says(replace(plan, predicted_ns=plan.predicted_ns + 20_000)).endswith(f"({other})")
    before = replace(edited, provenance=replace(plan.provenance, inputs=()))
    assert says(before) == f"where the file says {recorded} ({other}, or of another plan)"


def test_what_a_plan_file_gets_wrong_is_told_with_its_name(sim: Sim) -> None:
    assert sim("search", "--model", "resnet50", "--out", "plan.yaml").code == 0
    assert sim("simulate", "plan.yaml", "--profile", "host.yaml").err.startswith(
        "sim: host.yaml: kind is 'host'"
    )
    plan = read_plan("plan.yaml")
    for wrong, text in (
        (replace(plan, seq=5), "seq 5: model 'resnet50' takes no token sequence"),
        (replace(plan, dtype="fp8"), "dtype 'fp8': not known"),
        (replace(plan, model="resnet5O"), "model 'resnet5O': not known"),
        (replace(plan, plan=replace(plan.plan, target=7)), "GPU 7: p3.8xlarge has GPUs 0 to 3"),
    ):
        write_plan("plan.yaml", wrong, force=True)
        done = sim("simulate", "plan.yaml")
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert done.err.startswith(f"sim: plan.yaml: {text}")


def test_a_plan_file_makes_nothing_run_or_open(sim: Sim, tmp_path: Path) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    plan = read_plan("plan.yaml")

    def says(text: str, *args: str) -> None:
        done = sim("simulate", "plan.yaml", *args)
        assert (done.code, done.out) == (2, "")
        assert done.err.count("\n") == 1
        assert text in done.err

    says("made for host 'test', which does not ship; pass its file with --host")
    write_plan("plan.yaml", replace(plan, host="./host.yaml"), force=True)
    says("made for host './host.yaml', which does not ship")
    write_plan("plan.yaml", replace(plan, model="evil:run"), force=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    says("made for evil:run, which would be imported and called", "--host", "./host.yaml")
    says("made for model evil:run, not test", "--host", "./host.yaml", "--model", "test")


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


def test_folders_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match=r"file/x: cannot be made \(Not a directory\); choose another --out"):
        make_folder(tmp_path / "file" / "x")


@pytest.mark.parametrize("time_ns", ["-5.0", "1.0e+300"])
def test_a_plan_file_predicts_no_time_that_none_can_be(sim: Sim, time_ns: str) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    text = Path("plan.yaml").read_text()
    Path("plan.yaml").write_text(re.sub(r"(?m)^predicted_ns: .*", f"predicted_ns: {time_ns}", text))
    done = sim("simulate", "plan.yaml", "--host", "./host.yaml", "--profile", "profile.yaml")
    assert (done.code, done.out) == (2, "")
    assert "a prediction is from 0 to 1e+18" in done.err
