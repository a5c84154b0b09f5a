"""How commands end: exit codes, one line on stderr, and what happens where nobody listens."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from sim.console import run_command
from sim.errors import InputError
from sim.files import read_plan

PROBE = "import sys, resource; sys.argv[0] = 'sim'; from sim.cli import main; main()"


@pytest.mark.parametrize(
    ("raised", "code", "err"),
    [
        (InputError("a\nb \x1b[31m c"), 2, "prog: a b  [31m c\n"),
        (KeyboardInterrupt(), 130, "prog: interrupted\n"),
        (
            OSError(28, "No space left on device"),
            2,
            "prog: the output cannot be written (No space left on device)",
        ),
    ],
)
def test_endings(raised: BaseException, code: int, err: str, capfd: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        raise raised

    saved = os.dup(1)
    try:
        assert run_command(command, "prog", []) == code
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert capfd.readouterr().err.lstrip().startswith(err)  # click ends the line that shows ^C


def test_a_time_limit_interrupts_and_what_ends_a_command_tidies_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tidied = []

    @click.command()
    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            tidied.append("up")

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(command, "prog", []) == 143
    assert capsys.readouterr().err.strip() == "prog: stopped"
    assert tidied == ["up"]
    assert signal.getsignal(signal.SIGTERM) == before
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(run_command(click.Command("none"), "prog", [])))
    other.start()
    other.join()
    assert found == [0], "a thread hears no signals, and needs none to run a command"


def test_our_own_mistakes_keep_their_traceback() -> None:
    @click.command()
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, "prog", [])


@pytest.mark.parametrize(
    "args", [("hosts", "p3.8xlarge"), ("search", "--model", "resnet50", "--json"), ("--help",)]
)
def test_a_reader_that_goes_away_ends_it_as_sigpipe_does(args: tuple[str, ...]) -> None:
    """Rich's, print's and click's ways out; 1 would be `hwexec verify`'s word for wrong answers."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", PROBE, *args]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_exit_of_another_kind_is_passed_on() -> None:
    @click.command()
    def command() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        run_command(command, "prog", [])


def closed(descriptors: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = shlex.join([sys.executable, "-c", PROBE, *args])
    return subprocess.run(
        ["sh", "-c", f"{command} {descriptors}"], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("args", [("hosts",), ("search", "--model", "resnet50"), ("--help",), ("models",)])
def test_a_closed_stdout_is_one_line(args: tuple[str, ...]) -> None:
    done = closed(">&-", *args)
    assert (done.returncode, done.stderr) == (
        2,
        "sim: stdout is closed; redirect it to a file or to /dev/null\n",
    )


def test_closed_others_do_no_harm(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    done = closed("<&- 2>&-", "search", "--model", "resnet50", "--out", str(plan))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Bound: " in done.stdout
    assert read_plan(plan).model == "resnet50"
    assert closed("<&- >&- 2>&-", "hosts").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_a_redirect_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", PROBE, "hosts"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "sim: the output cannot be written (No space left on device); free some space or redirect it\n"
    )
