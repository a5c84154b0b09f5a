"""Host memory that is used up is one line, whoever asked for it, and nothing is left behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hwexec import arena, bench, commands, host_memory
from hwexec.arena import HostArena
from hwexec.bench_record import BENCH
from hwexec.cli import cli
from hwexec.cpu import CpuDevice, OutOfMemory
from hwexec.host_memory import check_free, free_bytes, memory_error
from hwexec.peers import PEERS, Scene, Snapshot
from sim.cli import cli as sim_cli
from sim.console import run_command
from sim.errors import InputError
from sim.files import read_record
from sim.plan import Launch
from sim.trace import trace_model
from tests import toys
from tests.test_arena import fingerprint
from tests.test_hwexec_verify import MODEL
from tests.toys import cold_start, dealt

TORCHS = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes. "
    "Error code 12 (Cannot allocate memory)"
)
LINE = (
    "out of host memory (can't allocate memory: you tried to allocate 96 bytes. Error code 12 (Cannot allocate memory)); "
    "free some, or take a smaller model, batch or dtype"
)


def refuse(*_: object, **__: object) -> Any:
    raise TORCHS


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_is_free_is_the_machines_or_what_a_container_is_allowed(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) is None, "nobody says"
    lay(tmp_path, {"proc/meminfo": "MemTotal: 99 kB\nMemFree: 20 kB\n"})
    assert free_bytes(tmp_path) is None, "what is not said is not nothing"
    lay(tmp_path, {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 20 kB\n"})
    assert free_bytes(tmp_path) == 20 * 1024
    new = tmp_path / "sys/fs/cgroup"
    lay(tmp_path, {"proc/self/cgroup": "0::/pod/task\n"})
    lay(new / "pod/task", {"memory.max": "max", "memory.current": "5"})
    lay(new / "pod", {"memory.max": "9000", "memory.current": "8000"})
    lay(new / "pod", {"memory.stat": "anon 1\ninactive_file 300\nactive_file 40\n"})
    assert free_bytes(tmp_path) == 1340, "what files lie in memory for is given back"
    old = tmp_path / "sys/fs/cgroup/memory"
    lay(tmp_path, {"proc/self/cgroup": "4:memory:/gone\n1:cpu:/\n"})
    lay(
        old,
        {
            "memory.limit_in_bytes": "700",
            "memory.usage_in_bytes": "900",
            "memory.stat": "total_active_file 1",
        },
    )
    assert free_bytes(tmp_path) == 0


def test_errors_of_memory_are_told_from_others() -> None:
    device = CpuDevice(1)
    assert str(memory_error(TORCHS, device)) == LINE
    assert "out of host memory (MemoryError); free some" in str(memory_error(MemoryError(), device))
    assert "(can't start new thread)" in str(memory_error(RuntimeError("can't start new thread"), device))
    assert "out of GPU memory (GPU 0 has no 5 bytes left)" in str(
        memory_error(OutOfMemory("GPU 0 has no 5 bytes left"), device)
    )
    launch = RuntimeError("an event on h2d:0: out of memory (CUDA_ERROR_OUT_OF_MEMORY, 2)")
    assert "out of GPU memory (an event on h2d:0: out of memory" in str(memory_error(launch, device))
    assert memory_error(RuntimeError("an injected copy error"), device) is None
    assert memory_error(KeyboardInterrupt(), device) is None


def test_more_than_is_free_is_not_even_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1000)
    check_free(1000, "it")
    with pytest.raises(
        InputError, match="1001 bytes are needed for pinned memory, and 1000 are free; free some"
    ):
        HostArena(CpuDevice(1), 1001, 0)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: None)
    HostArena(CpuDevice(1), 1001, 0)


def test_pages_are_touched_also_where_no_threads_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> None:
        raise RuntimeError("can't start new thread")

    touched: list[int] = []
    memset = arena.ctypes.memset
    monkeypatch.setattr(threading.Thread, "start", none)
    monkeypatch.setattr(arena.ctypes, "memset", lambda *given: (touched.append(given[2]), memset(*given)))
    assert HostArena(CpuDevice(1), 100_001, 0).tensor.numel() == sum(touched) == 100_001


@pytest.mark.parametrize("launch", Launch)
def test_a_prepare_or_a_start_that_finds_none_leaves_nothing_behind(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device = toys.text(("linear", "norm")), CpuDevice(2)
    before, threads = fingerprint(made.module), threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate", refuse)
        with pytest.raises(InputError, match="out of host memory"):
            cold_start(made, dealt(made, launch), device)
    assert fingerprint(made.module) == before
    assert device.pinned == {}
    assert threading.active_count() == threads
    with cold_start(made, dealt(made, launch), device) as cold:
        with monkeypatch.context() as patch:
            patch.setattr(device, "read", refuse)
            with pytest.raises(InputError, match="out of host memory"):
                cold(*made.inputs)
        assert torch.equal(cold(*made.inputs), made.answer), "the next start is sound"


# The commands


@pytest.fixture
def said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Runs a command that must end with exit code 2, in a folder that holds plan.yaml; lines of stderr."""
    monkeypatch.chdir(tmp_path)
    assert run_command(sim_cli, "sim", ["search", "--model", MODEL, "--gpus", "0", "--out", "plan.yaml"]) == 0

    def run(*args: str) -> list[str]:
        capsys.readouterr()
        assert run_command(cli, "hwexec", [*args, "--model", MODEL, "--device", "cpu"]) == 2
        return capsys.readouterr().err.splitlines()

    return run


COMMANDS = (("verify", "plan.yaml"), ("bench", "--out", "b.yaml"), ("sweep", "--out", "swept"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_the_host_cannot_hold_is_told_before_it_is_built(
    said: Callable[..., list[str]], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 1_000_000)
    (line,) = said(*command)
    assert f"bytes are needed for 3 times the weights of {MODEL} in fp32, as built" in line
    assert [path.name for path in Path().iterdir()] == ["plan.yaml"]


def test_peers_that_the_host_cannot_hold_are_waived_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They copy the module once more, and the whole bench was refused for it."""
    monkeypatch.chdir(tmp_path)
    weights = trace_model(MODEL).network.arena_bytes
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 3 * weights)
    ask = ("bench", "--model", MODEL, "--device", "cpu", "-e", "best", "--runs", "1", "--peers", "--json")
    assert run_command(cli, "hwexec", ask) == 0
    assert "peer:cuda" in capsys.readouterr().out
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "diffusers.hooks", SimpleNamespace(apply_group_offloading=refuse))
    module = torch.nn.Linear(5, 5)
    scene = Scene(module, (torch.ones(5),), torch.device("cuda"), Snapshot(module))
    for name, size in (("peer:pinned", 120), ("peer:diffusers", 240)):
        peer = next(p for p in PEERS if p.name == name)
        with pytest.raises(InputError, match=f"{size} bytes are needed for "), peer.set_up(scene):
            pass


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_memory_that_runs_out_anywhere_in_a_command_is_one_line(
    said: Callable[..., list[str]], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "build", refuse)
    assert said(*command)[-1] == f"hwexec: {LINE}"
    assert [path.name for path in Path().iterdir()] == ["plan.yaml"]


def test_rows_that_were_measured_before_memory_ran_out_are_kept(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_entry, seen = bench.run_entry, []

    def once(*given: Any) -> Any:
        seen.append(given)
        return run_entry(*given) if len(seen) == 1 else refuse()

    monkeypatch.setattr(bench, "run_entry", once)
    assert said("bench", "--out", "b.yaml", "--runs", "1")[-1] == f"hwexec: {LINE}"
    kept = read_record("b.yaml", BENCH)
    assert ([row.name for row in kept.rows], kept.stopped) == (["warm"], LINE)
