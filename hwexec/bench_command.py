"""`hwexec bench`: from checked options to print and record. Returns its exit code."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hwexec import bench as benching
from hwexec import commands
from hwexec import report as reports
from hwexec.bench_record import BENCH, Row
from hwexec.timing import Samples
from sim.catalog import Request, host_path
from sim.console import note
from sim.errors import InputError, require
from sim.files import PlanFile, read_plan, write_record
from sim.made_for import check_host, check_network
from sim.output import check_outputs
from sim.report import ms
from sim.tables import show
from sim.trace import trace_model


@dataclass(frozen=True, slots=True)
class BenchCall:
    """The options of `hwexec bench`; strategies split into names and plan files. Without `gpus`, the plan files' or GPU 0."""

    model: str
    batch: int | None
    dtype: str | None
    seq: int | None
    device: str
    host: str | None
    profile: str | None
    gpus: tuple[int, ...] | None
    names: tuple[str, ...]
    files: tuple[str, ...]
    keep: tuple[int | None, float | None] | None
    peers: bool
    runs: int
    out: str | None
    force: bool
    as_json: bool


def run_bench(call: BenchCall) -> int:
    benching.check_names(call.names)
    files = told_apart(call.names, call.files, tuple(read_plan(path) for path in call.files))
    if call.out is not None:
        check_outputs((call.out,), [*call.files, host_path(call.host), call.profile], force=call.force)
    gpus = bench_gpus(call.gpus, call.files, files)
    with commands.opened(call.device, max(gpus) + 1) as device:
        host = commands.host_of(call.host, device, gpus)
        request = Request(call.model, call.batch, call.dtype, call.seq)
        trace = trace_model(call.model, batch=request.samples, dtype=request.dtype, seq=call.seq)
        profile = commands.profile_for(host, request, call.profile, trace)
        for path, file in zip(call.files, files, strict=True):
            check_network(path, file, trace.network)
            check_host(path, file, host)
            commands.check_plan(path, file, trace.network, host)
        inputs = tuple(f"plan:{commands.sha256(path)}" for path in call.files)
        task = benching.Task(
            built=commands.built(request, trace.network, device),
            network=trace.network,
            profile=profile,
            host=host,
            gpus=gpus,
            names=call.names,
            plans=files,
            keep=call.keep,
            peers=call.peers,
            provenance=commands.made(
                device, host, gpus[0], (*inputs, *commands.inputs(host, trace.network, call.profile))
            ),
            runs=call.runs,
        )
        done = benching.bench(task, device, _tell)
    report = done.report
    unwritten: InputError | None = None
    if call.out is not None:
        try:
            write_record(call.out, BENCH, report, force=call.force)
            note(f"wrote {call.out}{', incomplete' if report.stopped else ''}")
        except InputError as error:  # what was measured is shown first
            unwritten = error
    if call.as_json:
        print(reports.bench_json(report))
        for waived in report.waived:
            note(f"waived: {waived.name} ({waived.reason})")
    else:
        show(reports.bench_title(report), reports.bench_table(report), *reports.bench_words(report))
    if (failed := unwritten or done.stopped) is not None:
        raise failed
    return 0 if report.outputs_match else 1


def told_apart(
    names: tuple[str, ...], paths: tuple[str, ...], files: tuple[PlanFile, ...]
) -> tuple[PlanFile, ...]:
    """Plans whose name another row has as well go by their path: most searched ones are called best."""
    taken = ["warm", "kept", *names, *(file.plan.name for file in files)]
    return tuple(
        file
        if taken.count(name := file.plan.name) == 1
        else replace(file, plan=replace(file.plan, name=f"{name} ({path})"))
        for path, file in zip(paths, files, strict=True)
    )


def bench_gpus(
    given: tuple[int, ...] | None, paths: tuple[str, ...], files: tuple[PlanFile, ...]
) -> tuple[int, ...]:
    """The target and its partners: as given, else those of the plan files. InputError where a file's are others."""
    plans = [file.plan for file in files]
    if given is not None:
        for path, plan in zip(paths, plans, strict=True):
            own, named = (" ".join(map(str, gpus)) for gpus in (plan.gpus, given))
            require(
                plan.target == given[0] and set(plan.gpus) <= set(given),
                f"{path}: a plan for -d {own}, not for -d {named}; leave -d out, or search a plan for these GPUs",
            )
        return given
    target = plans[0].target if plans else 0
    for path, plan in zip(paths, plans, strict=True):
        require(
            plan.target == target,
            f"{path}: a plan for GPU {plan.target}, and {paths[0]} is one for GPU {target}; bench them one after the other",
        )
    return (target, *sorted({gpu for plan in plans for gpu in plan.gpus} - {target}))


def _tell(row: Row) -> None:
    time = f"{ms(Samples(row.samples_ns).median_ns)} ms" if row.samples_ns else "done"
    answers = "" if row.outputs_match else ", answers DIFFER"
    links, runs = "" if row.links == 1 else "s", "" if row.runs == 1 else "s"
    note(f"{row.name}, {row.links} link{links}: {time} ({reports.runs_of(row)} run{runs}{answers})")
