"""A plan file for another network or host: told in the same words whoever reads it, each with value, rule and remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import pytest

from hwexec.cli import cli
from sim.catalog import find_host
from sim.cli import cli as sim_cli
from sim.console import run_command
from sim.errors import InputError
from sim.files import PlanFile, read_plan, write_host, write_plan
from sim.made_for import check_host, check_network, host_named, other_host
from sim.plan import Chunk
from sim.profile import Provenance
from tests.builders import FREE, copied, figure, host, network
from tests.test_hwexec_verify import MODEL

NETWORK, MACHINE = network(1000, (200, 300)), host(2)
FILE = PlanFile(
    model="test",
    dtype="fp32",
    batch=1,
    seq=None,
    network_digest=NETWORK.digest,
    host="test",
    host_digest=MACHINE.digest,
    profile_kind="estimated",
    provenance=Provenance("test", "GPU", "test", "", ""),
    plan=copied(NETWORK, Chunk(0, NETWORK.arena_bytes, (0,))),
    mean_ns=None,
    predicted_ns=2.0,
    bound_ns=1.0,
)


def test_a_plan_for_this_network_and_host_is_taken() -> None:
    check_network("plan.yaml", FILE, NETWORK)
    check_host("plan.yaml", FILE, MACHINE)
    assert other_host(FILE, MACHINE) == ""


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            replace(NETWORK, batch=2),
            "plan.yaml: made for test, fp32, batch 1, not for test, fp32, batch 2; pass a plan for that, or search one",
        ),
        (
            replace(NETWORK, model="other", seq=7),
            "plan.yaml: made for test, fp32, batch 1, not for other, fp32, batch 1, 7 tokens; pass a plan for that, or search one",
        ),
        (
            network(1000),
            "plan.yaml: made for another network than test is here: it has 2 layers, test has 1 here; "
            "search again with the packages installed here",
        ),
        (
            network(1000, 500),
            "plan.yaml: made for another network than test is here: layer 1 (layer1) reads 1 storages here and 2 there; "
            "search again with the packages installed here",
        ),
        (
            network(1000, (200, 301)),
            "plan.yaml: made for another network than test is here: layers, storages or their names differ "
            f"(sha256 {NETWORK.digest[:12]}..., here {network(1000, (200, 301)).digest[:12]}...); "
            "search again with the packages installed here",
        ),
    ],
)
def test_another_network_is_told_with_what_differs(found, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as raised:
        check_network("plan.yaml", FILE, found)
    assert str(raised.value) == says


def test_another_host_and_other_constants_of_this_one_are_told_apart() -> None:
    dearer = replace(MACHINE, costs=replace(FREE, wait_ns=figure(5)))
    elsewhere = replace(dearer, name="elsewhere")
    remedy = "or pass the file of the host that it was made for with --host"
    for machine, says in (
        (
            elsewhere,
            f"plan.yaml: made for host test, not for elsewhere; search again for elsewhere, {remedy}",
        ),
        (
            dearer,
            "plan.yaml: made for test when it had other links, GPUs or costs than test has now "
            f"(sha256 {MACHINE.digest[:12]}..., now {dearer.digest[:12]}...); search again for test, {remedy}",
        ),
    ):
        with pytest.raises(InputError) as raised:
            check_host("plan.yaml", FILE, machine)
        assert str(raised.value) == says
        with pytest.raises(InputError, match=r"--host, or pass --anyway$"):
            check_host("plan.yaml", FILE, machine, instead=", or pass --anyway")


def test_a_file_names_no_path_to_open() -> None:
    assert host_named("plan.yaml", "p3.8xlarge", None).name == "p3.8xlarge"
    assert host_named("plan.yaml", "./host.yaml", "p3.8xlarge").name == "p3.8xlarge"
    with pytest.raises(
        InputError, match=r"^plan.yaml: made for host './host.yaml', which does not ship; pass its file"
    ):
        host_named("plan.yaml", "./host.yaml", None)


def test_every_command_that_reads_a_plan_file_tells_it_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(sim_cli, "sim", ["search", "--model", MODEL, "--gpus", "0", "--out", "plan.yaml"]) == 0
    p3, file = find_host("p3.8xlarge"), read_plan("plan.yaml")
    write_host("other.yaml", replace(p3, costs=replace(p3.costs, wait_ns=figure(5))))
    write_plan("odd.yaml", replace(file, network_digest="0" * 64))

    def said(command: click.Command, *args: str) -> str:
        capsys.readouterr()
        assert run_command(command, "run", args) == 2
        return capsys.readouterr().err.splitlines()[-1]

    for plan, machine, words in (
        (
            "plan.yaml",
            "./other.yaml",
            "plan.yaml: made for p3.8xlarge when it had other links, GPUs or costs",
        ),
        (
            "odd.yaml",
            "p3.8xlarge",
            "odd.yaml: made for another network than tests.test_hwexec_verify:toy is here",
        ),
    ):
        where = ("--model", MODEL, "--host", machine)
        there = {
            said(sim_cli, "simulate", plan, *where),
            said(cli, "bench", "-e", f"./{plan}", "--device", "cpu", *where).replace("./", "", 1),
            said(cli, "verify", plan, "--device", "cpu", *where).removesuffix(
                ", or --anyway to run it all the same"
            ),
        }
        (line,) = there
        assert line.startswith(f"run: {words}")
