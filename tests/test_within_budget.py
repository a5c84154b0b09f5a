"""A plan made under a memory budget runs where the plan has room and the model has not, and answers with the very same bits."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hwexec
from hwexec import commands, verify
from hwexec.cli import cli
from hwexec.cpu import CpuDevice
from hwexec.rouse import ROUSE_BYTES
from sim.cli import cli as sim_cli
from sim.console import run_command
from sim.errors import InputError
from sim.files import read_plan, read_record
from sim.host import Host
from sim.memory import HEADROOM_BYTES, activation_bytes
from sim.network import Network
from sim.options import Options
from sim.plan import Access, Chunk, Launch, Plan
from sim.search import search
from sim.timeline import SpanKind
from sim.trace import trace_model
from tests import builders, toys
from tests import strategies as some
from tests.test_arena import fingerprint
from tests.test_hwexec_verify import MODEL, Forgetful, Stopwatch
from tests.toys import TWO, Toy


def sized(network: Network, weight_bytes: int, gpus: int = 2) -> CpuDevice:
    """GPUs with room for so many bytes of weights and what running takes, and not a byte more."""
    return CpuDevice(gpus, memory_bytes=weight_bytes + HEADROOM_BYTES + activation_bytes(network))


def budgeted(made: Toy, budget: int, host: Host = TWO) -> Plan:
    """The best plan that holds no more on the target."""
    timings = builders.profile(made.network, host, direct=10**6)
    plan = search(timings, host, Options(memory_budget_bytes=budget, partners=())).best.plan
    assert 0 < plan.held_bytes(made.network) <= budget < made.network.arena_bytes
    return plan


def within(made: Toy, plan: Plan, device: CpuDevice, host: Host = TWO) -> hwexec.ColdStart:
    return hwexec.prepare(
        made.module, plan, made.inputs, network=made.network, host=host, device=device, settles=False
    )


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_plan_under_a_budget_runs_where_the_model_does_not_fit(launch: Launch, share: float) -> None:
    made = toys.text()
    before, threads = fingerprint(made.module), threading.active_count()
    budget = int(made.network.arena_bytes * share)
    plan = replace(budgeted(made, budget), launch=launch, head=0)
    device = sized(made.network, budget, 1)
    with within(made, plan, device) as cold:
        assert (cold.launch, cold.why_eager) == (launch, "")
        assert device.held_bytes(0) - ROUSE_BYTES == plan.held_bytes(made.network) <= budget
        for _ in range(2):
            assert torch.equal(cold(*made.inputs), made.answer)
            assert cold.brought()[0] == plan.copied_bytes
            assert torch.equal(cold.warm(*made.inputs), made.answer)
            assert torch.equal(cold.in_place(*made.inputs), made.answer)
            cold.evict()
            with pytest.raises(InputError, match="make a cold start before a warm run"):
                cold.warm(*made.inputs)
            assert torch.equal(cold.in_place(*made.inputs), made.answer), (
                "it needs nothing of the GPU's arena"
            )
        copies = cold.timeline().of(SpanKind.COPY)
        assert len(copies) == len(plan.chunks)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        other = tuple((t + 3) % 29 for t in made.inputs)
        with torch.no_grad():
            assert torch.equal(cold(*other), made.module(*other))
        assert device.held_bytes(0) - ROUSE_BYTES <= budget
    assert fingerprint(made.module) == before
    gc.collect()
    assert (device.pinned, device.held_bytes(0)) == ({}, 0)
    assert threading.active_count() == threads


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_valid_plan_is_bit_equal_in_the_memory_that_it_takes(data: st.DataObject) -> None:
    made = data.draw(toys.toys())
    host = data.draw(some.hosts(max_gpus=3))
    plan = data.draw(some.plans(made.network, host))
    device = CpuDevice(3, seed=data.draw(st.integers(0, 99)), delay_us=40)
    with within(made, plan, device, host) as cold:
        assert (cold.launch, cold.why_eager) == (plan.launch, "")
        assert device.held_bytes(plan.target) - ROUSE_BYTES == plan.held_bytes(made.network)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert cold.brought()[0] == plan.copied_bytes
        assert torch.equal(cold.warm(*made.inputs), made.answer)
        if data.draw(st.booleans()):
            assert torch.equal(cold.in_place(*made.inputs), made.answer)
        cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in range(3)] == [0, 0, 0]


def test_what_takes_all_weights_is_refused_with_its_remedy() -> None:
    made = toys.text(("linear", "norm"))
    plan = budgeted(made, made.network.arena_bytes // 2)
    with within(made, plan, CpuDevice(1)) as cold:
        for call in (cold.settle, lambda: cold.resident(*made.inputs)):
            with pytest.raises(
                InputError, match="is prepared with settles=False, and GPU 0 holds only"
            ) as told:
                call()
            assert "prepare it with settles=True" in str(told.value)
            assert "\n" not in str(told.value)
        assert torch.equal(cold(*made.inputs), made.answer), "what was refused did no harm"
        with pytest.raises(InputError, match="settles=False"):
            cold.settle()
        assert torch.equal(cold.warm(*made.inputs), made.answer)


def test_a_gpu_without_room_for_the_model_is_told_what_has_room() -> None:
    made = toys.text(("linear", "norm"))
    plan = budgeted(made, made.network.arena_bytes // 2)
    held = plan.held_bytes(made.network)
    device = sized(made.network, held, 1)
    need = device.memory_bytes
    with pytest.raises(InputError, match=rf"settles=False, which needs {need} for plan 'best'"):
        toys.cold_start(made, plan, device)
    within(made, plan, device).close()
    device.memory_bytes -= 1
    with pytest.raises(
        InputError, match=rf"needs {need} there; .* search a plan with a smaller --memory-budget"
    ):
        within(made, plan, device)
    assert device.pinned == {}


def test_with_room_for_all_a_run_in_place_is_one_more_reference() -> None:
    made = toys.text()
    with toys.cold_start(made, toys.dealt(made), CpuDevice(2)) as cold:
        assert torch.equal(cold.in_place(*made.inputs), made.answer)
        assert torch.equal(cold.resident(*made.inputs), made.answer)


def test_a_budget_of_nothing_holds_nothing() -> None:
    made = toys.text(("linear", "bare"))
    access = tuple(tuple(Access.DIRECT for _ in layer.reads) for layer in made.network.layers)
    device = sized(made.network, 0, 1)
    with within(made, Plan("none", 0, Launch.GRAPH, access, ()), device) as cold:
        assert device.held_bytes(0) == ROUSE_BYTES
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold.warm(*made.inputs), made.answer)


def test_the_target_may_only_pass_bytes_on() -> None:
    """They cross the target's memory on their way to a partner, where they are read."""
    made = toys.text(("linear", "norm"), tied=False)
    access = tuple(tuple(Access.PEER for _ in layer.reads) for layer in made.network.layers)
    size = made.network.arena_bytes
    plan = Plan("over", 0, Launch.GRAPH, access, (Chunk(0, size, (0, 1)),))
    assert plan.held_bytes(made.network) == size
    with within(made, plan, CpuDevice(2)) as cold:
        assert torch.equal(cold(*made.inputs), made.answer)


# hwexec verify


@dataclass(frozen=True)
class Verified:
    code: int
    out: str
    err: str
    report: verify.VerifyReport | None


Verify = Callable[..., Verified]


@pytest.fixture
def verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Verifies the best plan of a 3 MiB model that holds 2 MiB at most, on a GPU that another may be put in the place of."""
    monkeypatch.chdir(tmp_path)
    args = ["search", "--model", MODEL, "--gpus", "0", "--memory-budget", "2MiB", "--out", "plan.yaml"]
    assert run_command(sim_cli, "sim", args) == 0

    def run(*args: str, device: CpuDevice) -> Verified:
        monkeypatch.setattr(commands, "open_device", lambda name, gpus: device)
        capsys.readouterr()
        given = ("verify", "plan.yaml", "--model", MODEL, "--anyway", "--runs", "2", "--out", "here")
        code = run_command(cli, "hwexec", (*given, *args))
        said = capsys.readouterr()
        made = Path("here", "report.yaml")
        return Verified(code, said.out, said.err, read_record(made, verify.VERIFY) if made.exists() else None)

    return run


def bytes_of(path: str = "plan.yaml") -> tuple[int, int, int]:
    """What its plan holds, what all weights take, and what running takes beside either."""
    net = trace_model(MODEL).network
    held = read_plan(path).plan.held_bytes(net)
    assert held <= 2 * 2**20 < net.arena_bytes
    return held, net.arena_bytes, HEADROOM_BYTES + activation_bytes(net)


NO_ROOM = "GPU 0 has no room for all 3.0 MiB of weights and holds the "


def test_a_plan_is_verified_where_the_model_does_not_fit(
    verified: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "plain_answer", None)  # it would bring all weights
    held, _, beside = bytes_of()
    done = verified(device=CpuDevice(4, memory_bytes=held + beside))
    assert done.code == 0, done.err
    assert "equal to the in-place run (every weight read in place from host memory) launched as" in done.out
    assert "bit for bit" in done.out
    assert (
        f"Not measured: the warm run with every weight in GPU memory, and plain PyTorch's answer; {NO_ROOM}"
        in done.out
    )
    report = done.report
    assert report is not None
    assert (report.reference, report.bit_equal, report.reproducible) == ("in-place", True, True)
    assert (report.eager_bit_equal, report.warm_ns) == (None, ())
    assert report.not_measured.startswith(NO_ROOM)
    assert report.moved_bytes == report.planned_bytes


def test_with_figures_what_was_not_measured_has_none(verified: Verify) -> None:
    held, _, beside = bytes_of()
    done = verified(device=Stopwatch(4, memory_bytes=held + beside))
    assert done.code == 0, done.err
    assert "; warm not measured; set-up " in done.out
    assert done.report is not None
    assert (len(done.report.cold_ns), done.report.warm_ns) == (2, ())
    assert done.report.ops


def test_where_all_fits_the_reference_is_the_resident_run_unless_told_otherwise(verified: Verify) -> None:
    _, whole, beside = bytes_of()
    done = verified(device=CpuDevice(4, memory_bytes=whole + beside))
    assert done.code == 0, done.err
    assert done.report is not None
    assert (done.report.reference, done.report.not_measured) == ("resident", "")
    assert "Not measured" not in done.out
    done = verified("--within-budget", "--force", "--json", device=CpuDevice(4))
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["reference"] == "in-place"
    assert found["not_measured"].startswith("--within-budget: of 3.0 MiB of weights GPU 0 holds the ")


def test_a_wrong_answer_fails_within_a_budget_too(verified: Verify) -> None:
    held, _, beside = bytes_of()
    done = verified(device=Forgetful(4, memory_bytes=held + beside))
    assert done.code == 1
    assert "FAILED: the cold answer is not the in-place one" in done.out
    assert "DIFFERENT from the in-place run" in done.out


def test_what_the_plan_itself_has_no_room_for_is_refused(verified: Verify, tmp_path: Path) -> None:
    held, _, beside = bytes_of()
    for args in ((), ("--within-budget",)):
        done = verified(*args, device=CpuDevice(4, memory_bytes=held + beside - 1))
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert done.err.startswith("hwexec: plan.yaml: GPU 0 (")
        assert f"needs {held + beside} there; " in done.err
        assert "search a plan with a smaller --memory-budget" in done.err
        assert not (tmp_path / "here").exists()
