"""`hwexec verify`, from checked options to print and files, and what other commands need as well. Each returns its exit code."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from hwexec import report as reports
from hwexec import verify as verifying
from hwexec.device import Device
from hwexec.devices import open_device
from hwexec.host_memory import check_model, memory_error
from hwexec.layout import room_for
from sim.catalog import (
    DEFAULT_HOST,
    Request,
    check_plans_model,
    find_host,
    find_profile,
    host_names,
    host_path,
    no_profile,
    obtain_profile,
)
from sim.console import note
from sim.errors import InputError, naming, require
from sim.estimate import estimate
from sim.files import PlanFile, read_plan, write_record
from sim.hints import size_words
from sim.host import Host
from sim.made_for import check_host, check_name, check_network, host_named, other_host
from sim.models import Built, build
from sim.network import Network
from sim.output import check_outputs, make_folder, write_file
from sim.picture import chrome_trace, picture
from sim.plan import Plan
from sim.profile import Profile, Provenance
from sim.program import lower
from sim.provenance import stamp
from sim.tables import show
from sim.trace import Trace, trace_model


@dataclass(frozen=True, slots=True)
class VerifyCall:
    """The options of `hwexec verify`; the tolerance as a share."""

    plan: str
    model: str | None
    device: str
    host: str | None
    profile: str | None
    runs: int
    tolerance: float | None
    anyway: bool
    within_budget: bool
    out: str | None
    force: bool
    as_json: bool


def verify_plan(call: VerifyCall) -> int:
    require(
        call.tolerance is None or call.device != "cpu",
        "--tolerance with --device cpu: threads' times are no figures to hold a prediction against; leave one of them out",
    )
    require(call.out != "", "--out '': names no folder; give one, or leave it out")
    file = read_plan(call.plan)
    check_plans_model(call.plan, file.model, call.model)
    host = host_named(call.plan, file.host, call.host)
    _same_host(call, file, host)
    with opened(call.device, len(host.gpus)) as device, _folder(call, file, host, device) as folder:
        _same_machine(call, file, host, device)
        request = Request(file.model, file.batch, file.dtype, file.seq)
        with naming(call.plan):
            trace = trace_model(file.model, batch=file.batch, dtype=file.dtype, seq=file.seq)
        check_network(call.plan, file, trace.network)
        check_plan(call.plan, file, trace.network, host)
        with naming(call.plan):  # before a module is built that may be as large as the plan
            only_planned = _only_planned(call, file.plan, trace.network, device)
        profile = profile_for(host, request, call.profile, trace)
        made_from = (f"plan:{sha256(call.plan)}", *inputs(host, trace.network, call.profile))
        task = verifying.Task(
            built=built(request, trace.network, device),
            plan=file.plan,
            network=trace.network,
            profile=profile,
            host=host,
            provenance=made(device, host, file.plan.target, made_from),
            runs=call.runs,
            tolerance=call.tolerance,
            only_planned=only_planned,
        )
        done = verifying.verify(task, device)
        report = done.report
        about = reports.verify_title(report)
        write_record(folder / "report.yaml", verifying.VERIFY, report, force=call.force)
        if done.timelines:
            write_file(folder / "trace.json", chrome_trace(done.timelines, about), force=call.force)
            write_file(folder / "timeline.png", picture(done.timelines, about), force=call.force)
    if call.as_json:
        print(reports.verify_json(report))
    else:
        table = reports.difference_table(report)
        show(*reports.verify_words(report), *([] if table is None else [table]))
        note(f"wrote {folder}/{'report.yaml, trace.json, timeline.png' if done.timelines else 'report.yaml'}")
    return 0 if report.passed else 1


# What all need ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(name: str, gpus: int) -> Iterator[Device]:
    """A device by name, closed afterwards. InputError where memory ran out meanwhile, of host or GPU."""
    try:
        device = open_device(name, gpus)
    except InputError as error:
        raise InputError(f"{error} (pass --device cpu)") from None
    try:
        yield device
    except Exception as error:
        if (line := memory_error(error, device)) is not None:
            raise line from None
        raise
    finally:
        device.close()


def profile_for(host: Host, request: Request, path: str | None, trace: Trace) -> Profile:
    """The profile at `path`, else the shipped one if it is of this very network, else one estimated now."""
    digest = trace.network.digest
    if path is not None:
        profile = obtain_profile(host, request, path)
        require(
            profile.network.digest == digest,
            f"{path}: a profile of another network than {request.model} is here (its layers or storages differ); "
            "measure it again with the packages installed here",
        )
        return profile
    shipped = find_profile(host, request)
    if shipped is not None and shipped.network.digest == digest:
        return shipped
    require(host.roofline is not None, no_profile(host, request))
    return estimate(
        trace, host, stamp(host.name, host.gpus[0].name, inputs=inputs(host, trace.network, None))
    )


def made(device: Device, host: Host, gpu: int, inputs: tuple[str, ...]) -> Provenance:
    """This command on this machine."""
    cuda = (torch.version.cuda or "") if device.figures else ""
    driver = _driver() if device.figures else ""
    return stamp(
        host.name, device.describe(gpu), driver=driver, cuda=cuda, torch=torch.__version__, inputs=inputs
    )


def _driver() -> str:
    try:
        import pynvml  # noqa: PLC0415 - asks the driver's own library, which only GPU machines have

        pynvml.nvmlInit()
        try:
            found = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no library, no driver, no rights: the kernel may know, else provenance goes without
        with suppress(OSError):
            words = re.search(r"\b\d{3,}\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
            return words[0] if words else ""
        return ""
    return found.decode() if isinstance(found, bytes) else str(found)


def inputs(host: Host, network: Network, profile: str | None) -> tuple[str, ...]:
    known = (f"host:{host.digest}", f"network:{network.digest}")
    return known if profile is None else (*known, f"profile:{sha256(profile)}")


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def built(request: Request, network: Network, device: Device) -> Built:
    """The model with random weights. InputError where the host has no memory for it."""
    check_model(network, device)
    note(f"{request.model}: building it with random weights")
    return build(request.model, batch=request.samples, dtype=request.dtype, seq=request.seq)


def bare(name: str) -> str:
    """A GPU's name without its maker: drivers differ in whether they say it."""
    words = name.lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in ("nvidia", "tesla"))


def unlike(host: Host, device: Device, gpus: tuple[int, ...]) -> str:
    """How this machine's GPUs differ from those of a host; empty where they do not, or where threads play them."""
    if not device.figures:
        return ""
    for gpu in gpus:
        here, there = device.describe(gpu), host.gpu(gpu).name
        if bare(here) != bare(there):
            return f"GPU {gpu} is {here} here and {there} on {host.name}"
    return ""


def host_of(name: str | None, device: Device, gpus: tuple[int, ...]) -> Host:
    """The host asked for, else the shipped one that has this machine's GPUs. InputError where either has not all of `gpus`."""
    for gpu in gpus:
        require(
            gpu < device.gpu_count,
            f"GPU {gpu}: this machine has {device.gpu_count}; name those with -d, as -d 0",
        )
    host = _this_host(device) if name is None else find_host(name)
    for gpu in gpus:
        host.gpu(gpu)
    differs = unlike(host, device, gpus)
    if differs:
        note(f"plans are made from constants of {host.name}, not of this machine: {differs}")
    return host


def _this_host(device: Device) -> Host:
    if not device.figures:
        return find_host(DEFAULT_HOST)
    for name in host_names():
        host = find_host(name)
        if len(host.gpus) == device.gpu_count and not unlike(host, device, tuple(range(device.gpu_count))):
            return host
    raise InputError(
        f"no shipped host has this machine's {device.gpu_count} x {device.describe(0)}; measure it with `calibrate run` and "
        f"pass its file with --host, or pass --host {DEFAULT_HOST} to plan by that host's constants"
    )


# What verify refuses --------------------------------------------------------------------------------------------------


def _same_host(call: VerifyCall, file: PlanFile, host: Host) -> None:
    if call.anyway:
        if differs := other_host(file, host):
            note(f"--anyway: {differs}")
        return
    check_host(call.plan, file, host, instead=", or --anyway to run it all the same")


def _same_machine(call: VerifyCall, file: PlanFile, host: Host, device: Device) -> None:
    for gpu in file.plan.gpus:
        require(
            gpu < device.gpu_count,
            f"{call.plan}: uses GPU {gpu}, but this machine has {device.gpu_count}; search a plan for this host",
        )
    gpus = tuple(gpu for gpu in file.plan.gpus if gpu < len(host.gpus))
    differs = unlike(host, device, gpus)
    if differs:
        require(
            call.anyway,
            f"{call.plan}: this machine is not {host.name}: {differs}; verify it there, or pass --anyway",
        )
        note(f"--anyway: {differs}")


def check_plan(path: str, file: PlanFile, network: Network, host: Host) -> None:
    """Before anything is built for it. InputError where the plan in a file is none for this network and host."""
    check_name(path, file.plan)
    with naming(path):
        lower(file.plan, network, host)


def _only_planned(call: VerifyCall, plan: Plan, network: Network, device: Device) -> str:
    """Why the target is to hold what the plan brings there and no more; empty where it has room for all weights.

    InputError where it has no room for what the plan brings.
    """
    if not call.within_budget:
        with suppress(InputError):  # what the plan brings may be less, and fit
            room_for(plan, network, device)
            return ""
    room_for(plan, network, device, settles=False)
    held, whole = size_words(plan.held_bytes(network)), size_words(network.arena_bytes)
    holds = f"holds the {held} that the plan brings{' or keeps' if plan.kept(network) else ''}"
    if call.within_budget:
        return f"--within-budget: of {whole} of weights GPU {plan.target} {holds}"
    return f"GPU {plan.target} has no room for all {whole} of weights and {holds}"


# Where verify writes --------------------------------------------------------------------------------------------------


@contextmanager
def _folder(call: VerifyCall, file: PlanFile, host: Host, device: Device) -> Iterator[Path]:
    """The folder for what is written, made if need be; one that was made goes again where nothing came of it."""
    played = "" if device.figures else "-cpu"
    default = Path("results", _word(host.name), f"verify-{_word(file.model)}-{_word(file.plan.name)}{played}")
    folder = Path(call.out) if call.out is not None else default
    # os.path's is False as well for a name that none can have, where a Path's raises
    fresh = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    try:
        make_folder(folder)
        outputs = (folder / name for name in ("report.yaml", "trace.json", "timeline.png"))
        check_outputs(outputs, (call.plan, host_path(call.host), call.profile), force=call.force)
        yield folder
    except BaseException:
        for path in fresh:
            with suppress(OSError):
                path.rmdir()
        raise


def _word(name: str) -> str:
    """A name that a folder can have."""
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", name).strip(".") or "-"
