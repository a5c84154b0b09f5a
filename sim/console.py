"""How commands end: results on stdout, one line per error on stderr, exit codes. Every command line here uses `run_command`.

0 done · 2 bad input or usage, or an output that cannot be written · 130 interrupted · 141 the reader of our output went away ·
143 told to stop (SIGTERM: a job's time limit, a container's end), which is an interruption as well: what was measured is kept.
1 is left to commands: `hwexec verify` says wrong answers by it. So a closed pipe ends with what a shell shows of any program
that one kills, 128 + SIGPIPE, and not with the 1 of click and rich.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import click

from sim.errors import InputError

BROKEN_PIPE = 141


def run_command(command: click.Command, prog: str, args: Sequence[str] | None = None) -> int:
    """Run a click command and return its exit code. Anything but bad input, ours included, keeps its traceback."""
    if not _fill_closed():
        return _complain(prog, "stdout is closed; redirect it to a file or to /dev/null")
    told: list[int] = []
    with _stoppable(told):
        return _run(command, prog, args, told)


def _run(command: click.Command, prog: str, args: Sequence[str] | None, told: list[int]) -> int:
    stdout = sys.stdout
    try:
        code = command.main(args=args, prog_name=prog, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _complain(prog, str(error))
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and later; its message is the whole help
            click.echo(error.format_message(), err=True)
            return 2
        path = error.ctx.command_path if error.ctx is not None else prog
        return _complain(prog, f"{error.format_message().rstrip('.')}; see `{path} --help`")
    except click.ClickException as error:
        return _complain(prog, error.format_message())
    except (KeyboardInterrupt, click.Abort):
        return _complain(prog, "stopped", 143) if told else _complain(prog, "interrupted", 130)
    except SystemExit as error:
        # click and rich make one an exit with code 1: rich while it handles it, click with another stdout in place
        if sys.stdout is stdout and not _broken_pipe(error.__context__):
            raise
        _drop_stdout()
        return BROKEN_PIPE
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_stdout()
        return _complain(
            prog, f"the output cannot be written ({error.strerror}); free some space or redirect it"
        )


@contextlib.contextmanager
def _stoppable(told: list[int]) -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, and is put in `told`."""
    if threading.current_thread() is not threading.main_thread():  # only there signals arrive
        yield
        return

    def stop(number: int, _: object) -> None:
        told.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def note(text: str) -> None:
    """A line of progress, beside the result."""
    click.echo(text, err=True)


def one_line(text: str) -> str:
    """Text without line ends or control characters, so that an error is one line whatever a file or name holds."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _complain(prog: str, text: str, code: int = 2) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"{prog}: {one_line(text)}", err=True)
    return code


def _broken_pipe(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def _fill_closed() -> bool:
    """Whether there is a stdout. A descriptor that was closed would be the next file's, and prints would go into that."""
    stdout = sys.stdout
    for name, mode in (
        ("stdin", "r"),
        ("stdout", "w"),
        ("stderr", "w"),
    ):  # the lowest free number is the closed one's
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    return stdout is not None


def _drop_stdout() -> None:
    """So that the interpreter's last flush finds nothing to fail on."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
