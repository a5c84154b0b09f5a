"""What made a figure or a file: command, date, commit."""

from __future__ import annotations

import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sim.profile import Provenance


def stamp(
    host: str,
    gpu: str,
    *,
    driver: str = "",
    cuda: str = "",
    torch: str = "",
    inputs: tuple[str, ...] = (),
) -> Provenance:
    """This process's command, now, at this commit."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Provenance(host, gpu, command, date, commit(), driver, cuda, torch, inputs)


@cache
def commit() -> str:
    """The checkout's commit, `-dirty` where files differ from it; the version where this is an installed package."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return f"deepplan {version('deepplan')}"
    except PackageNotFoundError:
        return "unknown"
