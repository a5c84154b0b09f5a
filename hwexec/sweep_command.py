"""`hwexec sweep`: from checked options to the file of points, the picture and the summary."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hwexec import commands
from hwexec.bench import Task
from hwexec.device import Device
from hwexec.report import NO_FIGURES
from hwexec.sweep import SWEEP, Point, SweepRecord, run_case
from hwexec.sweep_report import draw, summarise, summary_words
from sim.catalog import Request, profile_name
from sim.console import note
from sim.errors import InputError, require
from sim.files import read_record, write_record
from sim.host import Host
from sim.models import build
from sim.output import check_output, write_file
from sim.report import show
from sim.trace import trace_model


@dataclass(frozen=True, slots=True)
class SweepCall:
    """The options of `hwexec sweep`. `folder` takes sweep.yaml and sweep.png."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    seq: int | None
    device: str
    host: str | None
    profiles: str | None
    gpus: tuple[int, ...]
    randoms: int
    seed: int
    runs: int
    folder: str
    force: bool


def run_sweep(call: SweepCall) -> int:
    """Cases one after another; the file is written after each, and a plan that it has is not run again."""
    file = Path(call.folder) / "sweep.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{call.folder}: cannot be made ({error.strerror}); choose another --out") from None
    check_output(file, force=True)
    cases = list(itertools.product(call.models, call.dtypes, call.batches))
    points: list[Point] = []
    with commands.opened(call.device, max(call.gpus) + 1) as device:
        host = commands.host_of(call.host, device, call.gpus)
        made = commands.made(device, host, call.gpus[0], (f"host:{host.digest}",))
        if file.exists() and not call.force:
            points += _before(file, host, device, call.seed)
        for at, (model, dtype, batch) in enumerate(cases, 1):
            seq = call.seq if model.startswith("hf:") else None
            request = Request(model, batch, dtype, seq)
            trace = trace_model(model, batch=batch, dtype=dtype, seq=seq)
            profile = commands.profile_for(
                host, request, _profile(call.profiles, request, trace.network.seq), trace
            )
            built = build(model, batch=batch, dtype=dtype, seq=seq)
            task = Task(built, trace.network, profile, host, call.gpus, (), (), False, made, call.runs)
            done = frozenset(p.key for p in points)
            try:
                with _Bar(f"{at}/{len(cases)} {model} {dtype} batch {batch}") as bar:
                    for what, left, point in run_case(task, device, call.randoms, call.seed, done):
                        bar.tell(what + ("" if point is None else _told(point)), left)
                        points += [] if point is None else [point]
            finally:  # an interrupted case keeps what it has
                record = SweepRecord(
                    host.name, host.digest, device.kind, device.figures, call.seed, made, tuple(points)
                )
                write_record(file, SWEEP, record, force=True)
    found = summarise(tuple(points))
    wrong = sum(not p.outputs_match for p in points)
    if found is None:
        show(f"{len(points)} plans run, {wrong} with wrong answers. {NO_FIGURES}")
        return 1 if wrong else 0
    about = f"{found.points} plans on {host.name} ({made.gpu})"
    write_file(file.with_suffix(".png"), draw(tuple(points), about), force=True)
    show(*summary_words(found, about))
    note(f"wrote {file}, {file.with_suffix('.png')}")
    return 1 if wrong else 0


class _Bar:
    """One case's progress on stderr; a line per plan where that is no terminal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(name, total=None)

    def __enter__(self) -> _Bar:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tell(self, text: str, left: int) -> None:
        if self.bar is None:
            note(f"{self.name}, {text}")
            return
        self.bar.console.print(text, highlight=False, markup=False)
        self.bar.advance(self.task)
        self.bar.update(self.task, total=self.bar.tasks[0].completed + left)


def _before(file: Path, host: Host, device: Device, seed: int) -> tuple[Point, ...]:
    record = read_record(file, SWEEP)
    require(
        (record.host_digest, record.device, record.seed) == (host.digest, device.kind, seed),
        f"{file}: of another host, device or seed ({record.host}, {record.device}, {record.seed}); start over with --force, "
        "or write elsewhere with --out",
    )
    note(f"{file}: going on from {len(record.points)} points")
    return record.points


def _profile(folder: str | None, request: Request, seq: int | None) -> str | None:
    """A profile in `folder`, by the name that calibrate gives it."""
    if folder is None:
        return None
    path = Path(folder) / profile_name(request, seq)
    return str(path) if path.is_file() else None


def _told(point: Point) -> str:
    if point.measured_ns is None:
        return ": right" if point.outputs_match else ": WRONG answers"
    times = f": predicted {point.predicted_ns / 1e6:.2f}, measured {point.measured_ns / 1e6:.2f} ms"
    return times + ("" if point.outputs_match else ", WRONG answers")
