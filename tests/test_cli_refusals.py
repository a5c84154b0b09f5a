"""What `sim` refuses: bad input is one line with its remedy, exit code 2, nothing left."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sim.catalog import find_host
from sim.errors import InputError
from sim.files import write_host, write_profile
from sim.memory import HEADROOM_BYTES, activation_bytes
from sim.output import make_folder
from tests.builders import host, profile
from tests.simming import HERE, MACHINE, NETWORK, Run, Sim, sim_in


@pytest.fixture
def sim(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return sim_in(tmp_path, capsys, monkeypatch)


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
        ("--memory-budget 0.1", "of which unit? Say 0.1MiB"),
        ("--memory-budget 999999", "of which unit?"),
        ("--memory-budget 1e9", "must be a size"),
        ("--memory-budget=", "must be a size"),
        ("--memory-budget " + "9" * 50, "larger than any memory"),
        (
            "--keep lots",
            "--keep 'lots': must be a size of 0 or more, as 200MiB, 1.5GiB, 300MB or 200000000 (bytes); or so many "
            "times a warm run, as 1.05x",
        ),
        ("--keep 5", "--keep '5': of which unit? Say 5MiB"),
        ("--keep -1x", "--keep '-1x': must be a size"),
        ("--keep 0.5x", "--keep 0.5x: a start that is faster than a warm run is asked; give 1x or more"),
        (
            "--keep 9MiB --memory-budget 8MiB",
            "--keep 9.0 MiB: more than the --memory-budget of 8.0 MiB, towards which",
        ),
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


@pytest.mark.parametrize("budget", ["", "--memory-budget 0", "--memory-budget 50MiB"])
def test_a_batch_whose_activations_do_not_fit_is_none_for_any_budget(
    budget: str, sim: Sim, tmp_path: Path
) -> None:
    done = sim("search", "--model", "resnet50", "--batch", "65536", *budget.split(), "--out", "plan.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1].startswith(
        "sim: resnet50: with --batch 65536 its activations and libraries take "
    )
    assert done.err.splitlines()[-1].endswith("wherever the weights are; ask for a smaller --batch")
    assert not (tmp_path / "plan.yaml").exists()


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


@pytest.mark.parametrize("rate", ["memory_bytes_per_s", "peak_fp32_flops_per_s", "direct_stream_bytes_per_s"])
def test_a_roofline_whose_rate_is_nothing_is_refused(rate: str, sim: Sim, tmp_path: Path) -> None:
    write_host("host.yaml", find_host("p3.8xlarge"), force=True)
    whole = (tmp_path / "host.yaml").read_text()
    none = re.sub(rf"({rate}: \{{value: )[0-9.e+]+", r"\g<1>0.0", whole)
    assert none != whole
    (tmp_path / "host.yaml").write_text(none)
    done = sim("search", "--model", "resnet50", "--host", "./host.yaml")
    refused(done, f"roofline: {rate} 0; a rate is 1 or more", tmp_path)
    assert "host.yaml" in done.err


def test_an_estimate_needs_a_roofline(sim: Sim, tmp_path: Path) -> None:
    refused(sim("search", "--model", "resnet50", "--host", "./host.yaml"), "no roofline figures", tmp_path)


def test_weights_that_the_gpu_cannot_hold_want_a_budget(sim: Sim, tmp_path: Path) -> None:
    small = replace(
        MACHINE,
        gpus=tuple(
            replace(gpu, memory_bytes=HEADROOM_BYTES + activation_bytes(NETWORK) + NETWORK.arena_bytes - 1)
            for gpu in MACHINE.gpus
        ),
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


def test_usage_without_a_model_or_a_command(sim: Sim, tmp_path: Path) -> None:
    refused(sim("search"), "Missing option '--model'; see `sim search --help`", tmp_path)
    refused(sim("serach"), "No such command 'serach'", tmp_path)
    assert sim().code == 2
    assert sim("--help").code == 0


def test_folders_that_cannot_be_made_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(InputError, match=r"file/x: cannot be made \(Not a directory\); choose another --out"):
        make_folder(tmp_path / "file" / "x")
