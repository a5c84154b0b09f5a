"""The `calibrate` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sim.catalog import Request
from sim.console import note, run_command
from sim.errors import InputError, require
from sim.names import DTYPE_NAMES
from sim.output import check_file_name, check_outputs

if TYPE_CHECKING:  # it imports torch
    from hwexec.device import Device


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="deepplan")
def calibrate() -> None:
    """Measure a host: its links, what each action costs, and the layers of networks."""


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of GPU numbers; write 0,1") from None
    if len(set(found)) != len(found) or min(found) < 0:
        raise click.BadParameter(f"{text!r}: name each GPU once, from 0")
    return found


_OUT = click.Path(file_okay=False, path_type=Path)


@calibrate.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="A network to time by layers: resnet50, hf:bert-base, ... Repeatable.",
)
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), help="Of every --model.  [default: fp32]")
@click.option(
    "--batch", type=click.IntRange(min=1), help="Samples per request, of every --model.  [default: 1]"
)
@click.option(
    "--seq", type=click.IntRange(min=1), help="Tokens per sample, for hf: models.  [default: the model's own]"
)
@click.option("--name", required=True, metavar="NAME", help="What to call this host.")
@click.option(
    "--out",
    type=_OUT,
    required=True,
    help="Folder for everything written; one that has a run's state goes on from it.",
)
@click.option(
    "--gpus",
    callback=_numbers,
    metavar="0,1",
    help="Measure these only, of those that are visible, in the order of nvidia-smi: 0,1.  [default: all]",
)
@click.option(
    "--quick", is_flag=True, help="Fewer repeats and smaller copies. Changes nothing with --device cpu."
)
@click.option("--fresh", is_flag=True, help="Start over instead of going on.")
@click.option(
    "--keep-bad-fits",
    is_flag=True,
    help="Write the host even where a fit explains its samples badly; its figures say so.",
)
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="cpu: GPUs played by threads. The whole procedure runs; no number means anything.",
)  # fmt: skip
def run(
    models: tuple[str, ...],
    dtype: str | None,
    batch: int | None,
    seq: int | None,
    name: str,
    out: Path,
    gpus: tuple[int, ...] | None,
    quick: bool,
    fresh: bool,
    keep_bad_fits: bool,
    device: str,
) -> None:
    """Measure this host and write its host file, a profile per --model, and all raw samples."""
    check_file_name(name, "--name")
    for option, given in (("--dtype", dtype), ("--batch", batch), ("--seq", seq)):
        require(
            bool(models) or given is None,
            f"{option} {given}: it is of every --model, and none is named; name one, or leave it out",
        )
    if device == "cpu" and gpus is not None and sorted(gpus) != list(range(len(gpus))):
        raise InputError(
            f"--gpus {','.join(map(str, gpus))}: GPUs that threads play are numbered from 0 without gaps; "
            f"for {len(gpus)} of them write --gpus {','.join(map(str, range(len(gpus))))}"
        )
    # not at start-up: torch and scipy take seconds
    from calibrate.run import Ask, Watch, choose_gpus, watch_for  # noqa: PLC0415
    from calibrate.run import run as measure  # noqa: PLC0415
    from calibrate.store import Store  # noqa: PLC0415
    from hwexec.cpu import CpuDevice  # noqa: PLC0415
    from hwexec.devices import open_device  # noqa: PLC0415

    if device == "cuda":
        import os  # noqa: PLC0415 - only a real device is chosen by the environment

        choose_gpus(gpus, os.environ)
    opened: Device = CpuDevice(len(gpus or (0, 1)), delay_us=0.0)
    try:
        watch = watch_for(device)
        if device == "cuda":
            opened = open_device("cuda")
    except InputError as unknown:
        try:
            opened = open_device("cuda")
        except InputError:
            raise unknown from None  # NVML's line says more than that there is no CUDA
        note(f"{unknown}; going on without the host's identity")
        watch = Watch(None)
    ask = Ask(
        name,
        tuple(Request(m, batch=batch, dtype=dtype, seq=seq) for m in models),
        quick=quick,
        fresh=fresh,
        keep_bad=keep_bad_fits,
    )
    try:
        with _Bar() as bar:
            outcome = measure(ask, opened, watch, Store(out), bar)
    except KeyboardInterrupt:
        kept = any((out / "state").glob("case-*.yaml"))
        note(
            f"what was measured is kept in {out}; run the same command to go on"
            if kept
            else "nothing was measured yet"
        )
        raise
    _tell(outcome)


@calibrate.command()
@click.argument("folder", type=_OUT)
@click.option("--keep-bad-fits", is_flag=True, help="As for run.")
def fit(folder: Path, keep_bad_fits: bool) -> None:
    """Fit the samples in FOLDER again and write host and profiles. Needs no GPU."""
    from calibrate.run import finish  # noqa: PLC0415 - imports torch and scipy
    from calibrate.store import Store  # noqa: PLC0415

    store = Store(folder)
    _tell(finish(store, keep_bad=keep_bad_fits or not store.session().figures))


@calibrate.command()
@click.argument("file", type=click.Path(), metavar="NAME|FILE")
@click.option(
    "--plot", type=click.Path(dir_okay=False), help="Also draw bandwidth by size, samples and fits."
)
@click.option("--force", is_flag=True, help="Overwrite a picture that exists.")
def show(file: str, plot: str | None, force: bool) -> None:
    """Print a shipped host by NAME, or FILE (a host, a profile, or samples), as tables."""
    from calibrate import show as shown  # noqa: PLC0415 - what only this command needs
    from sim.tables import plain  # noqa: PLC0415

    record = shown.read(file)
    drawn = None if plot is None else shown.plottable(record, plot)
    check_outputs((plot,), (file,), force=force)
    shown.show(record, plain(width=None if sys.stdout.isatty() else 160))
    if plot is not None and drawn is not None:
        shown.plot(drawn, plot, force=force)
        note(f"wrote {plot}")


@calibrate.command()
@click.argument("before", type=click.Path())
@click.argument("after", type=click.Path())
def diff(before: str, after: str) -> None:
    """Say what changed from BEFORE to AFTER beyond their stated spread, and what only one of them has.

    Files of one kind; a host may be a shipped one's name.
    """
    from calibrate.compare import compare, show_changes  # noqa: PLC0415 - with the next two, what only this command needs
    from calibrate.show import read  # noqa: PLC0415
    from sim.tables import plain  # noqa: PLC0415

    show_changes(compare(read(before), read(after)), plain(width=None if sys.stdout.isatty() else 160))


@calibrate.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def estimate(words: tuple[str, ...]) -> None:
    """Fit a host that nobody can reach to published figures."""
    from calibrate.estimate_command import estimate_command  # noqa: PLC0415 - imports scipy and torch

    estimate_command.main(args=list(words), prog_name="calibrate estimate", standalone_mode=False)


def _tell(outcome: Any) -> None:
    for text in outcome.flags:
        note(f"! {text}")
    for path in (outcome.host, *outcome.profiles, outcome.samples):
        if path.exists():  # an interrupted run that is fitted has its samples case by case only
            click.echo(path)


class _Bar:
    """A progress bar on stderr with an estimate of the time left; plain lines where stderr is no terminal."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415

            self._bar = self._stack.enter_context(
                Progress(
                    TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
                    TimeRemainingColumn(), console=Console(stderr=True),
                )
            )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def plan(self, seconds: float) -> None:
        if self._bar is None:
            note(f"about {seconds:.0f} s to measure")
        else:
            self._task = self._bar.add_task("starting", total=seconds)

    def begins(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def ended(self, what: str, seconds: float, said: str) -> None:
        if self._bar is None:
            note(f"{what}: {said}")
        else:
            self._bar.advance(self._task, seconds)

    def note(self, text: str) -> None:
        if self._bar is None:
            note(text)
        else:
            self._bar.console.print(text, highlight=False, markup=False)


def main(args: Sequence[str] | None = None) -> int:
    return run_command(calibrate, "calibrate", args)


if __name__ == "__main__":
    sys.exit(main())
