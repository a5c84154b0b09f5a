"""What tests of the `sim` command share: a small host and network, and the command run in a folder that has their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sim.cli import cli
from sim.console import run_command
from sim.files import write_host, write_profile
from tests.builders import host, network, profile

NETWORK = network(300_000, 0, (200_000, 5_000), 1_000_000)
MACHINE = host(3, pcie=12.0)


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


Sim = Callable[..., Run]


HERE = ("--model", "test", "--host", "./host.yaml", "--profile", "profile.yaml")


def sim_in(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Sim:
    """Runs `sim` in a folder that holds host.yaml and profile.yaml."""
    monkeypatch.chdir(folder)
    write_host("host.yaml", MACHINE)
    write_profile("profile.yaml", profile(NETWORK, MACHINE, run=20_000, direct=50_000))

    def run(*args: str) -> Run:
        code = run_command(cli, "sim", args)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run
