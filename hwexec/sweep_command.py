"""`hwexec sweep`: from checked options to the file of points, the picture and the summary, and the same again without a GPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hwexec import commands
from hwexec.ablate import (
    ABLATION,
    MECHANISMS,
    UNCHARGED,
    AblationRecord,
    Model,
    ablation,
    ablation_parts,
    models,
)
from hwexec.bench import Task
from hwexec.claim import claimed
from hwexec.device import Device
from hwexec.host_memory import check_model
from hwexec.report import NO_FIGURES
from hwexec.sweep import SWEEP, Point, SweepRecord, run_case
from hwexec.sweep_report import draw, summarise, summary_parts
from sim.catalog import Request, check_plans_model, host_path, obtain_profile, profile_name
from sim.console import note
from sim.errors import InputError, require
from sim.files import read_record, write_record
from sim.hints import run_words
from sim.host import Host
from sim.made_for import host_named
from sim.models import build
from sim.network import Network
from sim.output import check_output, check_outputs, make_folder, write_file
from sim.profile import Profile
from sim.provenance import stamp
from sim.tables import as_text, show
from sim.trace import trace_model


@dataclass(frozen=True, slots=True)
class SweepCall:
    """The options of `hwexec sweep`. `folder` takes sweep.yaml, sweep.png and summary.txt."""

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


@dataclass(frozen=True, slots=True)
class AgainCall:
    """The options of `hwexec sweep --again`. `folder` has sweep.yaml; ablation.yaml joins it. `models` may be imported."""

    folder: str
    host: str | None
    profiles: str | None
    models: tuple[str, ...]


def run_sweep(call: SweepCall) -> int:
    """Cases one after another; the file is written after each, and a plan that it has is not run again."""
    require(
        call.seq is None or any(model.startswith("hf:") for model in call.models),
        f"--seq {call.seq}: none of the models is an hf: one, which alone take a token sequence; leave it out",
    )
    file = Path(call.folder) / "sweep.yaml"
    with commands.opened(call.device, max(call.gpus) + 1) as device:
        host = commands.host_of(call.host, device, call.gpus)
        cases = []
        asked = itertools.product(call.models, call.dtypes, call.batches)
        for model, dtype, batch in dict.fromkeys(asked):  # who names one twice wants it once
            seq = call.seq if model.startswith("hf:") else None
            traced = trace_model(model, batch=batch, dtype=dtype, seq=seq)
            request = Request(model, batch, dtype, seq)
            check_model(traced.network, device)
            path = _profile(call.profiles, request, traced.network.seq)
            cases.append((request, traced.network, commands.profile_for(host, request, path, traced)))
        make_folder(file.parent)
        with claimed(file.parent):
            outputs = (file, file.with_suffix(".png"), file.with_name("summary.txt"))
            check_outputs(outputs, (host_path(call.host),), force=True)
            try:
                record = _run_cases(call, file, host, device, cases)
            except KeyboardInterrupt:
                note(f"what ran is kept in {file}; the same command goes on from there")
                raise
            return _finish(file, record, host)


def _run_cases(
    call: SweepCall, file: Path, host: Host, device: Device, cases: Sequence[tuple[Request, Network, Profile]]
) -> SweepRecord:
    made = commands.made(device, host, call.gpus[0], (f"host:{host.digest}",))
    before = _before(file, host, device, call) if file.exists() and not call.force else None
    points = [] if before is None else list(before.points)
    # of the call that measured last: a call that finds all done has measured nothing
    record = before or SweepRecord(
        host.name, host.digest, device.kind, device.figures, call.seed, made, made, ()
    )
    for at, (request, network, profile) in enumerate(cases, 1):
        model, dtype, batch, seq = request.model, request.precision, request.samples, request.seq
        built = build(model, batch=batch, dtype=dtype, seq=seq)
        task = Task(built, network, profile, host, call.gpus, (), (), False, made, call.runs, pauses=False)
        done = frozenset(p.key for p in points)
        try:
            with _Bar(f"{at}/{len(cases)} {model} {dtype} batch {batch}") as bar:
                for what, left, point in run_case(task, device, call.randoms, call.seed, done):
                    bar.tell(what + ("" if point is None else _told(point)), left)
                    points += [] if point is None else [point]
        finally:  # an interrupted case keeps what it has
            if len(points) > len(record.points) or not points:
                record = replace(record, provenance=made, predicted_by=made, points=tuple(points))
                write_record(file, SWEEP, record, force=True)
    return record


def predict_again(call: AgainCall) -> int:
    """Every kept plan predicted by the present model, whole and without each mechanism in turn. What was measured stays."""
    file = Path(call.folder) / "sweep.yaml"
    with claimed(file.parent):
        return _predict_again(call, file)


def _predict_again(call: AgainCall, file: Path) -> int:
    record = read_record(file, SWEEP)
    _check_models(call, file, record)
    outputs = (file.with_name("ablation.yaml"), file.with_suffix(".png"), file.with_name("summary.txt"))
    check_output(file, force=True)
    check_outputs(outputs, (file, host_path(call.host)), force=True)
    host = host_named(str(file), record.host, call.host)
    if host.name != record.host:
        note(f"{file}: planned by constants of {record.host}, predicted by those of {host.name}")
    elif host.digest != record.host_digest:
        note(
            f"{file}: planned by other constants of {record.host} than those that it is predicted by now; --host and --profiles "
            "take those of its own calibration"
        )
    predicted, inputs = _predict_all(call, file, record, host)
    made = stamp(host.name, host.gpus[0].name, inputs=inputs)
    whole = tuple(predicted[0])
    record = replace(record, host=host.name, host_digest=host.digest, predicted_by=made, points=whole)
    write_record(file, SWEEP, record, force=True)
    rows = tuple(ablation(predicted))
    if not rows:
        return _finish(file, record, host)
    bought = AblationRecord(host.name, host.digest, record.provenance, made, UNCHARGED, rows)
    write_record(file.with_name("ablation.yaml"), ABLATION, bought, force=True)
    return _finish(file, record, host, *ablation_parts(bought))


def _check_models(call: AgainCall, file: Path, record: SweepRecord) -> None:
    there = tuple(dict.fromkeys(point.model for point in record.points))
    for model in call.models:
        code = [name for name in there if ":" in name and not name.startswith("hf:")]
        remedy = f"name {' and '.join(code)}" if code else "leave it out"
        require(
            model in there,
            f"--model {model}: {file} has plans of {', '.join(there) or 'none'} alone; {remedy}",
        )
    for model in there:
        given = model if model in call.models else None
        profiles = ", or the folder of its profiles with --profiles"
        check_plans_model(str(file), model, given, profile=call.profiles, instead=profiles)


def _predict_all(
    call: AgainCall, file: Path, record: SweepRecord, host: Host
) -> tuple[tuple[list[Point], ...], tuple[str, ...]]:
    """All points as each of `models` predicts them, and digests of what that was made from."""
    predicted: tuple[list[Point], ...] = tuple([] for _ in range(1 + len(MECHANISMS)))
    inputs = [f"host:{host.digest}"]
    with _Bar("predicting") as bar:
        groups = [tuple(group) for _, group in itertools.groupby(record.points, key=lambda p: p.case)]
        for at, points in enumerate(groups, 1):
            first = points[0]
            what = run_words(first.model, first.dtype, first.batch, first.seq)
            request = Request(first.model, first.batch, first.dtype, first.seq)
            path = _profile(call.profiles, request, first.seq)
            profile = obtain_profile(host, request, path)
            _same_network(f"{file}: {what}", points, profile, host)
            if path is not None:
                inputs.append(f"profile:{commands.sha256(path)}")
            for found, model in zip(predicted, models(Model(host, profile)), strict=True):
                try:
                    found += _predicted(model, points)
                except InputError as error:
                    raise InputError(f"{file}: {what} on {host.name}: {error}") from None
            bar.tell(f"{what}: {len(points)} plans, {len(predicted)} times each", len(groups) - at)
    return predicted, tuple(dict.fromkeys(inputs))


def _predicted(model: Model, points: Sequence[Point]) -> list[Point]:
    kind, network = model.profile.kind, model.profile.network
    found = []
    for point in points:
        timeline = model.predict(point.plan.plan(network))
        found.append(
            replace(
                point,
                profile_kind=kind,
                predicted_ns=timeline.makespan_ns,
                predicted_issued_ns=timeline.issued_ns,
            )
        )
    return found


def _same_network(who: str, points: Sequence[Point], profile: Profile, host: Host) -> None:
    for point in points:
        require(
            point.network_digest == profile.network.digest,
            f"{who} is another network in its profile than the one that was measured (sha256 "
            f"{profile.network.digest[:12]}..., measured {point.network_digest[:12]}...); pass the folder of the profiles "
            "it was planned by with --profiles",
        )
        require(
            point.profile_kind != "measured" or profile.kind == "measured",
            f"{who} was predicted from a measured profile, and none ships for {host.name} with the constants its file has "
            "now; pass the folder of measured ones with --profiles",
        )


def _finish(file: Path, record: SweepRecord, host: Host, *more: Table | str) -> int:
    """Print and keep the summary and the picture. 1 where an answer was wrong."""
    points = record.points
    wrong = sum(not p.outputs_match for p in points)
    found = summarise(points)
    if found is None:
        why = "" if record.figures else f" {NO_FIGURES}"
        show(f"{len(points)} plans run, {wrong} with wrong answers.{why}")
        note(f"wrote {file}")
        return 1 if wrong else 0
    about = f"{found.errors.points} plans on {record.host} ({record.provenance.gpu})"
    parts = (*summary_parts(found, about), *more)
    write_file(file.with_suffix(".png"), draw(points, about), force=True)
    write_file(file.with_name("summary.txt"), as_text(*parts).encode(), force=True)
    show(*parts)
    note(f"wrote {file.parent}: {file.name}, sweep.png, summary.txt{', ablation.yaml' if more else ''}")
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


def _before(file: Path, host: Host, device: Device, call: SweepCall) -> SweepRecord:
    record = read_record(file, SWEEP)
    require(
        (record.host_digest, record.device, record.seed) == (host.digest, device.kind, call.seed),
        f"{file}: of another host, device or seed ({record.host}, {record.device}, {record.seed}); start over with --force, "
        "write elsewhere with --out, or take up a host's new constants with --again",
    )
    used = frozenset[int]().union(*(point.plan.gpus for point in record.points))
    require(
        used <= set(call.gpus) and all(p.plan.target == call.gpus[0] for p in record.points),
        f"{file}: has plans on GPUs {', '.join(map(str, sorted(used)))}, and now it is {', '.join(map(str, call.gpus))}; go on "
        "with the same --gpus, start over with --force, or write elsewhere with --out",
    )
    note(f"{file}: going on from {len(record.points)} points")
    most = max((len(p.samples_ns) for p in record.points), default=0)
    if most and most != call.runs:
        note(
            f"{file}: those have {most} starts; --runs {call.runs} holds for the others, or start over with --force"
        )
    return record


def _profile(folder: str | None, request: Request, seq: int | None) -> str | None:
    """A profile in `folder`, by the name that calibrate gives it."""
    if folder is None:
        return None
    require(Path(folder).is_dir(), f"--profiles {folder}: there is no such folder; check the path")
    path = Path(folder) / profile_name(request, seq)
    require(
        path.is_file(),
        f"--profiles {folder}: has no {path.name}; name the folder that has, or leave --profiles out for a shipped one",
    )
    return str(path)


def _told(point: Point) -> str:
    if point.measured_ns is None:
        return ": right" if point.outputs_match else ": WRONG answers"
    times = f": predicted {point.predicted_ns / 1e6:.2f}, measured {point.measured_ns / 1e6:.2f} ms"
    return times + ("" if point.outputs_match else ", WRONG answers")
