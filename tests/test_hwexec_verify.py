"""`hwexec verify` as a user meets it: what passes, what fails and why, what is refused. Nothing needs a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hwexec import commands, verify
from hwexec.bench_record import BENCH
from hwexec.cli import cli, parse_share
from hwexec.cpu import CpuDevice
from hwexec.device import Ready, Stream
from sim.catalog import find_host
from sim.cli import cli as sim_cli
from sim.console import run_command
from sim.errors import InputError
from sim.files import parse_record, read_plan, read_record, write_host, write_plan
from sim.host import Figure
from sim.timeline import Span, SpanKind, Timeline

torch.set_num_threads(1)  # the same sums in the same order, whenever they are made


class Toy(nn.Module):
    """A table and two layers; small, but with something worth reading in place."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, width)
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.table(tokens)
        result: Tensor = self.second(nn.functional.gelu(self.first(hidden)))
        return result


def toy() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Toy(), (torch.arange(512).view(1, 512),)


def wider() -> tuple[nn.Module, tuple[Tensor, ...]]:
    module, inputs = toy()
    return nn.Sequential(module, nn.Linear(256, 8)), inputs


MODEL = "tests.test_hwexec_verify:toy"


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Hwexec = Callable[..., Run]
Played = Callable[[Callable[[int], CpuDevice]], None]


@pytest.fixture
def hwexec(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hwexec:
    """Runs `hwexec` in a folder that holds plan.yaml, the best plan of the toy over GPUs 0 and 2 of p3.8xlarge."""
    monkeypatch.chdir(tmp_path)
    assert (
        run_command(sim_cli, "sim", ["search", "--model", MODEL, "--gpus", "0,2", "--out", "plan.yaml"]) == 0
    )
    capsys.readouterr()

    def run(*args: str, allowed: bool = True) -> Run:
        if args[0] == "verify" and allowed and "--model" not in args:
            args = (*args, "--model", MODEL)
        code = run_command(cli, "hwexec", args)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Puts another device where `hwexec` opens one."""

    def put(make: Callable[[int], CpuDevice]) -> None:
        monkeypatch.setattr(commands, "open_device", lambda name, gpus: make(gpus))

    return put


class Stopwatch(CpuDevice):
    """Threads whose times are taken for figures: the way of a real GPU through the code."""

    figures = True


class Forgetful(CpuDevice):
    """Drops what it should copy from host memory on a copy stream."""

    def copy(self, stream: Any, destination: Tensor, source: Tensor) -> None:
        if not stream.name.startswith("h2d"):
            super().copy(stream, destination, source)


# What passes


def test_a_newcomer_without_a_gpu_verifies_a_plan(hwexec: Hwexec, tmp_path: Path) -> None:
    done = hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "2")
    assert done.code == 0
    assert "bit for bit" in done.out
    assert "as planned" in done.out
    assert "times are no figures" in done.out
    assert " ms" not in done.out
    folder = tmp_path / "results" / "p3.8xlarge" / "verify-tests.test_hwexec_verify-toy-best-cpu"
    assert [p.name for p in folder.iterdir()] == ["report.yaml"]
    report = read_record(folder / "report.yaml", verify.VERIFY)
    assert (report.passed, report.bit_equal, report.figures) == (True, True, False)
    assert (report.cold_ns, report.ops, report.predicted_ns, report.measured_ns) == ((), (), None, None)
    lines = (folder / "report.yaml").read_bytes().splitlines(keepends=True)
    for count in range(len(lines)):  # cut off, it is never taken for a whole one
        with pytest.raises(InputError):
            parse_record(b"".join(lines[:count]), verify.VERIFY)
    again = hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "2")
    assert (again.code, "--force" in again.err) == (2, True)
    assert hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "1", "--force").code == 0


def test_weights_that_stay_are_told_and_not_brought(
    hwexec: Hwexec, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search", "--model", MODEL, "--gpus", "0", "--keep", "1100000", "--out", "kept.yaml"]
    assert run_command(sim_cli, "sim", search) == 0
    capsys.readouterr()
    done = hwexec("verify", "kept.yaml", "--device", "cpu", "--runs", "2")
    assert (done.code, "Passed." in done.out) == (0, True)
    said = " ".join(done.out.split())
    assert "with arenas filled with 0xFF before each, but for 1.0 MiB that stay on the GPU; equal to" in said
    kept = read_plan("kept.yaml").plan
    assert f"Bytes: {kept.copied_bytes} left host memory, as planned." in said
    short = ("--device", "cpu", "--runs", "1")
    report = json.loads(hwexec("verify", "kept.yaml", *short, "--force", "--json").out)
    assert report["kept_bytes"] == 1024 * 1024 + 4096
    small = hwexec("verify", "kept.yaml", *short, "--force", "--within-budget")
    assert "that the plan brings or keeps" in " ".join(small.out.split())


def test_a_bench_of_plans_that_keep_weights_holds_each_against_what_it_copies(hwexec: Hwexec) -> None:
    search = ["search", "--model", MODEL, "--gpus", "0", "--keep", "1100000", "--out", "kept.yaml"]
    assert run_command(sim_cli, "sim", search) == 0
    asked = ("-e", "best,kept.yaml", "--keep", "2x", "-d", "0,1", "--device", "cpu", "--runs", "1")
    assert hwexec("bench", "--model", MODEL, *asked, "--out", "b.yaml").code == 0
    rows = read_record("b.yaml", BENCH).rows
    assert [(row.label, row.kept_bytes > 0) for row in rows] == [
        ("warm", False),
        ("best over 1", False),
        ("best over 2", False),
        ("kept over 1", True),
        ("kept over 2", True),
        ("kept (kept.yaml)", True),
    ]
    assert all(
        ("stay on the GPU between starts; over limit by" in row.note) == (row.kept_bytes > 0) for row in rows
    )
    told = json.loads(hwexec("bench", "--model", MODEL, *asked, "--json").out)["results"]
    assert [row.get("kept_bytes", 0) for row in told] == [row.kept_bytes for row in rows]
    nothing = hwexec("bench", "--model", MODEL, "-e", "best", "--keep", "0", "--device", "cpu", "--runs", "1")
    assert "kept over 1: keeps nothing, which was found to be as good" in nothing.out


def test_with_figures_prediction_and_measurement_stand_side_by_side(
    hwexec: Hwexec, tmp_path: Path, played: Played
) -> None:
    played(Stopwatch)
    done = hwexec("verify", "plan.yaml", "--anyway", "--runs", "2", "--out", "here")
    assert done.code == 0, done.err
    assert "Largest differences" in done.out
    assert "Against the estimated" in done.out
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"report.yaml", "trace.json", "timeline.png"}
    report = read_record("here/report.yaml", verify.VERIFY)
    assert len(report.cold_ns) == 2
    assert [op.label for op in report.ops if op.kind == "run"] != []
    assert [op for op in report.ops if op.kind == "copy"] != []
    trace = json.loads((tmp_path / "here" / "trace.json").read_text())
    assert {e["pid"] for e in trace["traceEvents"]} == {1, 2}


def test_each_lane_of_a_plan_over_two_links_is_told_by_itself(hwexec: Hwexec, played: Played) -> None:
    """Lanes copy at the same time: together their copies took longer than the start they were in."""
    played(Stopwatch)
    done = hwexec("verify", "plan.yaml", "--anyway", "--runs", "1", "--out", "here")
    ops = read_record("here/report.yaml", verify.VERIFY).ops
    told = dict(re.findall(r"(.*) in both timelines: (\d+), together estimated", done.out))
    assert told == {
        "Copies host to GPU 0": f"{sum(op.stream == 'h2d:0' for op in ops)}",
        "Copies host to GPU 2": f"{sum(op.stream == 'h2d:2' for op in ops)}",
        "Copies GPU 2 to GPU 0": f"{sum(op.stream == 'p2p:2>0' for op in ops)}",
        "Layers": f"{sum(op.kind == 'run' for op in ops)}",
    }
    assert sum(map(int, told.values())) == len(ops)


def test_json_is_one_object(hwexec: Hwexec) -> None:
    done = hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "1", "--json", "--out", "here")
    found = json.loads(done.out)
    assert (found["passed"], found["moved_bytes"]) == (True, found["planned_bytes"])
    assert found["relayed_bytes"] == found["planned_relay_bytes"] > 0
    assert (found["predicted_ms"], found["measured_ms"]) == (None, None)


def test_a_plan_for_a_graph_that_cannot_be_captured_says_that_it_ran_eagerly(
    hwexec: Hwexec, played: Played
) -> None:
    played(lambda gpus: CpuDevice(gpus, fail_at="capture"))
    file = read_plan("plan.yaml")
    write_plan("graph.yaml", replace(file, plan=replace(file.plan, launch=file.plan.launch.GRAPH)))
    done = hwexec("verify", "graph.yaml", "--runs", "1", "--out", "here")
    assert done.code == 0, done.err
    assert "but ran eager: " in done.out


def test_a_plan_with_a_head_that_cannot_be_captured_is_predicted_as_it_ran(
    hwexec: Hwexec, played: Played
) -> None:
    """An eager plan has no head: the prediction of what ran was refused, and the verification with it."""
    played(lambda gpus: Stopwatch(gpus, fail_at="capture"))
    file = read_plan("plan.yaml")
    headed = replace(file.plan, launch=file.plan.launch.GRAPH, head=len(file.plan.chunks), opening=1)
    write_plan("head.yaml", replace(file, plan=headed))
    done = hwexec("verify", "head.yaml", "--anyway", "--runs", "1", "--out", "here")
    assert done.code == 0, done.err
    assert read_record("here/report.yaml", verify.VERIFY).launch == "eager"


# What fails


def test_wrong_answers_fail(hwexec: Hwexec, played: Played) -> None:
    played(Forgetful)
    done = hwexec("verify", "plan.yaml", "--runs", "1", "--out", "here")
    assert done.code == 1
    assert "FAILED: the cold answer is not the resident one" in done.out
    assert "DIFFERENT from the resident run launched as graph, not bit for bit" in done.out
    assert not read_record("here/report.yaml", verify.VERIFY).outputs_match


def test_an_answer_that_is_not_pytorchs_own_is_no_fault_of_cold_starts(
    hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold answers that had the resident ones' very bits were called different, bit for bit."""
    plain_answer = verify.plain_answer
    monkeypatch.setattr(verify, "plain_answer", lambda *given: [t + 1 for t in plain_answer(*given)])
    done = hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "1", "--out", "here")
    assert done.code == 1
    assert "equal to the resident run launched as graph, bit for bit" in done.out
    assert "DIFFERENT" not in done.out
    assert "FAILED: the resident answer is not plain PyTorch's" in done.out
    report = read_record("here/report.yaml", verify.VERIFY)
    assert (report.passed, report.cold_match, report.outputs_match) == (False, True, False)


def test_bytes_that_did_not_arrive_fail(hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch) -> None:
    ready_copy = CpuDevice.ready_copy

    def lost(device: CpuDevice, stream: Stream, to: Tensor, source: Tensor) -> Ready:
        """The pushes from GPU to GPU are never made."""
        return (lambda: None) if stream.name.startswith("p2p") else ready_copy(device, stream, to, source)

    monkeypatch.setattr(CpuDevice, "ready_copy", lost)
    done = hwexec("verify", "plan.yaml", "--device", "cpu", "--runs", "1", "--out", "here")
    assert done.code == 1
    assert "NOT as planned" in done.out


def test_a_prediction_that_is_too_far_off_fails_where_asked(hwexec: Hwexec, played: Played) -> None:
    played(Stopwatch)
    args = ("verify", "plan.yaml", "--anyway", "--runs", "1", "--out", "here", "--tolerance", "0.0001%")
    done = hwexec(*args)
    assert done.code == 1
    assert "against the prediction, allowed 0.0%" in done.out


# What is refused: one line, code 2, nothing left


def refused(done: Run, *parts: str) -> None:
    assert done.code == 2
    assert done.out == ""
    assert done.err.splitlines()[-1].startswith("hwexec: ")
    for part in parts:
        assert part in done.err


def test_code_that_a_plan_names_runs_only_where_the_user_names_it_too(hwexec: Hwexec) -> None:
    refused(
        hwexec("verify", "plan.yaml", allowed=False),
        f"made for {MODEL}, which would be imported",
        f"--model {MODEL}",
    )
    refused(
        hwexec("verify", "plan.yaml", "--model", "resnet50", allowed=False),
        f"made for model {MODEL}, not resnet50",
    )


def test_a_path_that_a_plan_names_as_its_host_is_not_opened(hwexec: Hwexec) -> None:
    write_plan("odd.yaml", replace(read_plan("plan.yaml"), host="../host.yaml"))
    refused(hwexec("verify", "odd.yaml", "--device", "cpu"), "which does not ship; pass its file with --host")


def test_a_plan_that_does_not_fit_is_told_before_its_module_is_built(
    hwexec: Hwexec, played: Played, tmp_path: Path
) -> None:
    machine = find_host("p3.8xlarge")
    small = replace(machine, gpus=tuple(replace(gpu, memory_bytes=2**28 + 100_000) for gpu in machine.gpus))
    write_host("small.yaml", small)
    file = read_plan("plan.yaml")
    write_plan("small-plan.yaml", replace(file, host="small", host_digest=small.digest))
    done = hwexec("verify", "small-plan.yaml", "--device", "cpu", "--host", "./small.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("hwexec: small-plan.yaml: plan 'best': needs ")
    played(lambda gpus: CpuDevice(gpus, memory_bytes=2**28 + 100_000))
    done = hwexec("verify", "plan.yaml", "--device", "cpu")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith("hwexec: plan.yaml: GPU 0 (")
    assert not (tmp_path / "results").exists()


def test_no_output_replaces_what_is_read_even_by_force(hwexec: Hwexec, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    plan = Path("plan.yaml").rename("here/report.yaml")
    before = plan.read_bytes()
    done = hwexec("verify", str(plan), "--device", "cpu", "--out", "here", "--force")
    assert (done.code, "here/report.yaml: is read by this command" in done.err) == (2, True)
    done = hwexec(
        "bench", "--model", MODEL, "--device", "cpu", "-e", str(plan), "--out", str(plan), "--force"
    )
    assert (done.code, "is read by this command" in done.err) == (2, True)
    host = tmp_path / "here" / "sweep.yaml"
    write_host(host, find_host("p3.8xlarge"))
    done = hwexec(
        "sweep", "--model", MODEL, "--device", "cpu", "--host", str(host), "--out", "here", "--force"
    )
    assert (done.code, "sweep.yaml: is read by this command" in done.err) == (2, True)
    assert plan.read_bytes() == before


def test_what_a_plan_file_gets_wrong_is_told_with_its_name(hwexec: Hwexec) -> None:
    file = read_plan("plan.yaml")
    for wrong, text in (
        (replace(file, seq=5), "seq 5: model"),
        (replace(file, dtype="fp8"), "dtype 'fp8': not known"),
        (replace(file, plan=replace(file.plan, chunks=())), "plan 'best': "),
    ):
        write_plan("odd.yaml", wrong, force=True)
        done = hwexec("verify", "odd.yaml", "--device", "cpu")
        refused(done, f"hwexec: odd.yaml: {text}")
        assert done.err.count("\n") == 1
    bench = ("bench", "--model", MODEL, "--device", "cpu", "--host", "p3.8xlarge", "-e", "odd.yaml")
    refused(hwexec(*bench), "hwexec: odd.yaml: plan 'best': ")


class Blank(Toy):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) / 0 * 0


class Silent(Toy):
    def forward(self, tokens: Tensor) -> Tensor:
        super().forward(tokens)
        return None  # type: ignore[return-value]


def blank() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Blank(), toy()[1]


def silent() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Silent(), toy()[1]


@pytest.mark.parametrize(
    ("factory", "says"), [("blank", "is no number throughout"), ("silent", "has no numbers")]
)
def test_an_answer_that_no_weight_changes_passes_nothing(factory: str, says: str, hwexec: Hwexec) -> None:
    """It was equal, bit for bit, to that of a run whose arenas were never filled."""
    model = f"tests.test_hwexec_verify:{factory}"
    assert run_command(sim_cli, "sim", ["search", "--model", model, "--out", "odd.yaml"]) == 0
    done = hwexec("verify", "odd.yaml", "--device", "cpu", "--runs", "2", "--model", model, "--out", "found")
    assert done.code == 1
    assert f"the resident answer {says}" in " ".join(done.out.split())
    report = read_record("found/report.yaml", verify.VERIFY)
    assert (report.passed, report.outputs_match) == (False, False)
    done = hwexec(
        "bench",
        "--model",
        model,
        "--device",
        "cpu",
        "--host",
        "p3.8xlarge",
        "-e",
        "best",
        "--runs",
        "1",
        "--json",
    )
    assert done.code == 1
    assert all(says in row["note"] and not row["outputs_match"] for row in json.loads(done.out)["results"])


def test_a_plan_for_another_network(hwexec: Hwexec, tmp_path: Path) -> None:
    file = read_plan("plan.yaml")
    write_plan("odd.yaml", replace(file, model="tests.test_hwexec_verify:wider"))
    done = hwexec(
        "verify", "odd.yaml", "--device", "cpu", "--anyway", "--model", "tests.test_hwexec_verify:wider"
    )
    refused(done, "it has 3 layers", "has 4 here")
    write_plan("odd2.yaml", replace(file, network_digest="0" * 64))
    refused(hwexec("verify", "odd2.yaml", "--device", "cpu"), "another network", "000000000000...")
    short = replace(file.plan, chunks=file.plan.chunks[1:], head=0, opening=0)
    write_plan("odd3.yaml", replace(file, plan=short))
    done = hwexec("verify", "odd3.yaml", "--device", "cpu")
    refused(done, "odd3.yaml: plan 'best': layer", "no chunks bring all of it")
    assert "building" not in done.err
    write_plan("odd4.yaml", replace(file, plan=replace(file.plan, name="\x1b[31mred")))
    refused(
        hwexec("verify", "odd4.yaml", "--device", "cpu"), r"the plan's name '\x1b[31mred' cannot be printed"
    )
    assert not (tmp_path / "results").exists()


def test_a_plan_for_another_host_unless_anyway(hwexec: Hwexec) -> None:
    host = find_host("p3.8xlarge")
    costs = replace(host.costs, wait_ns=Figure(123.0, "assumed", "a test"))
    write_host("other.yaml", replace(host, costs=costs))
    args = (
        "verify",
        "plan.yaml",
        "--device",
        "cpu",
        "--host",
        "./other.yaml",
        "--runs",
        "1",
        "--out",
        "here",
    )
    refused(hwexec(*args), "other links, GPUs or costs", "with --host, or --anyway to run it all the same")
    done = hwexec(*args, "--anyway")
    assert done.code == 0
    assert "--anyway: " in done.err
    write_host("named.yaml", replace(host, name="elsewhere", costs=costs))
    refused(
        hwexec("verify", "plan.yaml", "--device", "cpu", "--host", "./named.yaml"),
        "made for host p3.8xlarge, not for elsewhere",
    )


def test_a_machine_with_other_gpus_unless_anyway(hwexec: Hwexec, played: Played) -> None:
    played(Stopwatch)
    refused(hwexec("verify", "plan.yaml"), "GPU 0 is GPU 0 played by threads here and Tesla V100")
    played(lambda gpus: CpuDevice(1))
    refused(hwexec("verify", "plan.yaml"), "uses GPU 2, but this machine has 1")


def test_no_cuda(hwexec: Hwexec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(hwexec("verify", "plan.yaml"), "no CUDA device", "--device cpu")


def test_bad_options(hwexec: Hwexec) -> None:
    refused(hwexec("verify", "none.yaml", "--device", "cpu"), "there is no such file")
    refused(hwexec("verify", "plan.yaml", "--device", "cpu", "--tolerance", "ten"), "as 10% or 0.1")
    refused(hwexec("verify", "plan.yaml", "--device", "cpu", "--out", ""), "names no folder")
    refused(
        hwexec("verify", "plan.yaml", "--device", "cpu", "--out", "a" * 300),
        "cannot be made (File name too long)",
    )
    played = hwexec("verify", "plan.yaml", "--device", "cpu", "--tolerance", "10%")
    refused(played, "times are no figures to hold a prediction against")
    refused(hwexec("verify", "plan.yaml", "--device", "cpu", "--out", "plan.yaml"), "plan.yaml")
    refused(hwexec("verify", "plan.yaml", "--device", "cpu", "--profile", "plan.yaml"), "kind is 'plan'")
    Path("profile.yaml").write_text("kind: host\n")
    odd = hwexec("verify", "plan.yaml", "--device", "cpu", "--profile", "profile.yaml")
    refused(odd, "hwexec: profile.yaml: kind is 'host'")


# Parts


def test_shares() -> None:
    assert [parse_share(text) for text in ("10%", "0.1", "5 %", "0", "150%")] == [0.1, 0.1, 0.05, 0.0, 1.5]
    with pytest.raises(InputError, match="a share of 0 or more"):
        parse_share("-1%")
    for text in ("10", "1", "1.5"):
        with pytest.raises(InputError, match=f"below 1; write {text}%"):
            parse_share(text)


def test_join_takes_copies_and_layers_by_their_operation() -> None:
    def timeline(kind: Any, *spans: tuple[int, SpanKind, float, float]) -> Timeline:
        made = tuple(Span("s", what, start, stop, f"op {op}", op) for op, what, start, stop in spans)
        return Timeline(kind, 100.0, made)

    run, copy, stall = SpanKind.RUN, SpanKind.COPY, SpanKind.STALL
    predicted = timeline("predicted", (2, run, 10, 20), (0, copy, 0, 10), (1, stall, 0, 10), (3, run, 20, 30))
    measured = timeline("measured", (0, copy, 1, 12), (2, run, 14, 16), (2, run, 17, 22), (-1, run, 0, 1))
    rows = verify.join(predicted, measured)
    assert [(r.op, r.predicted_ns, r.measured_start_ns, r.measured_ns) for r in rows] == [
        (0, 10, 1, 11),
        (2, 10, 14, 8),
    ]
