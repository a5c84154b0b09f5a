"""Plan files as `sim` reads them: what must fit, what is told where it does not, and that a file makes nothing run or open."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sim.files import PlanFile, read_plan, write_plan
from sim.plan import Access, Launch, Sync
from tests.simming import HERE, Sim, sim_in


@pytest.fixture
def sim(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sim:
    return sim_in(tmp_path, capsys, monkeypatch)


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
    says(
        "plan.yaml: made for test when it had other links, GPUs or costs than test has now (sha256 000000000000..."
    )
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


def test_json_says_what_was_simulated_and_whether_it_is_the_plan_that_was_made(sim: Sim) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    plan = read_plan("plan.yaml")

    def found(file: PlanFile) -> dict[str, object]:
        write_plan("plan.yaml", file, force=True)
        said: dict[str, object] = json.loads(sim("simulate", "plan.yaml", *HERE[2:], "--json").out)
        return said

    made = found(plan)
    assert [made[key] for key in ("dtype", "batch", "seq", "changed")] == ["fp32", 1, None, False]
    eager = replace(plan.plan, launch=Launch.EAGER, head=0, opening=0)
    assert found(replace(plan, plan=eager))["changed"] is True


@pytest.mark.parametrize("name", ["\x1b[31mred", "", " "])
def test_a_plan_whose_name_cannot_be_printed_is_refused(name: str, sim: Sim) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    plan = read_plan("plan.yaml")
    write_plan("plan.yaml", replace(plan, plan=replace(plan.plan, name=name)), force=True)
    done = sim("simulate", "plan.yaml", *HERE[2:])
    assert (done.code, done.out) == (2, "")
    assert done.err == f"sim: plan.yaml: the plan's name {name!r} cannot be printed; change it\n"


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


@pytest.mark.parametrize("time_ns", ["-5.0", "1.0e+300"])
def test_a_plan_file_predicts_no_time_that_none_can_be(sim: Sim, time_ns: str) -> None:
    assert sim("search", *HERE, "--out", "plan.yaml").code == 0
    text = Path("plan.yaml").read_text()
    Path("plan.yaml").write_text(re.sub(r"(?m)^predicted_ns: .*", f"predicted_ns: {time_ns}", text))
    done = sim("simulate", "plan.yaml", "--host", "./host.yaml", "--profile", "profile.yaml")
    assert (done.code, done.out) == (2, "")
    assert "a prediction is from 0 to 1e+18" in done.err
