"""`calibrate run`: identity, link cases, networks, fits, files; what is measured is on disk before the next thing starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from calibrate.assemble import Assembled, GpuFacts, assemble
from calibrate.bench import FULL, NO_FIGURES, QUICK, Case, Effort
from calibrate.cases import CASES, Progress, looks_left, lost, measure_cases, unsteady
from calibrate.cold import calls_ns, hook, launch, relay
from calibrate.identity import (
    GpuState,
    HostIdentity,
    Nvml,
    flags,
    load_nvml,
    read_identity,
    read_states,
    session,
    visible,
)
from calibrate.layers import LayersResult, Unwatched, measure
from calibrate.store import Calibration, Session, Store, kept_words
from calibrate.timings import in_place, slowed, start, timings, waits
from calibrate.topology import Topology, Wire, from_identity
from calibrate.unwatched import unwatched
from hwexec.device import Device
from hwexec.host_memory import check_model, memory_error
from hwexec.timing import Mismatch
from sim.catalog import Request
from sim.errors import InputError
from sim.host import Host
from sim.models import build
from sim.network import Network
from sim.profile import Profile, ProfileKind, Provenance
from sim.provenance import stamp
from sim.trace import trace_model

T = TypeVar("T")

NO_FIGURE = "GPUs were played by threads: no number written here means anything"
NETWORK_SECONDS = 12.0
"""A first guess of what one network takes."""
PLAYED_SECONDS = 10.0
"""The same where threads play the GPUs."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What `calibrate run` was asked for."""

    name: str
    models: tuple[Request, ...]
    quick: bool = False
    fresh: bool = False
    keep_bad: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """Paths written, and what a person should know."""

    host: Path
    profiles: tuple[Path, ...]
    samples: Path
    flags: tuple[str, ...]


def choose_gpus(wanted: Sequence[int] | None, environ: dict[str, str] | os._Environ[str]) -> None:
    """Show CUDA only these GPUs, numbered as NVML and `nvidia-smi` number them. Before CUDA is first used."""
    environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if wanted is None:
        return
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else None
    if names is not None and max(wanted) >= len(names):
        raise InputError(
            f"--gpus {max(wanted)}: CUDA_VISIBLE_DEVICES={shown} shows {len(names)}; choose among them"
        )
    environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[g] if names else str(g) for g in wanted)


class Watch:
    """Asks NVML who the GPUs are and how they do; silent for a device that only plays them."""

    def __init__(self, nvml: Nvml | None, shown: str | None = None) -> None:
        self.nvml = nvml
        self.identity: HostIdentity | None = None
        self._order: tuple[int, ...] = ()
        if nvml is not None:
            with session(nvml):
                whole = read_identity(nvml)
                self.identity = visible(whole, shown)
            by_uuid = {g.uuid: g.index for g in whole.gpus}
            self._order = tuple(by_uuid[g.uuid] for g in self.identity.gpus)

    def states(self) -> tuple[GpuState, ...]:
        if self.nvml is None:
            return ()
        with session(self.nvml):
            states = read_states(self.nvml)
        return tuple(states[index] for index in self._order)


def watch_for(device: str) -> Watch:
    """NVML where there are real GPUs."""
    return Watch(load_nvml(), os.environ.get("CUDA_VISIBLE_DEVICES")) if device == "cuda" else Watch(None)


def run(
    ask: Ask,
    device: Device,
    watch: Watch,
    store: Store,
    progress: Progress,
    *,
    cases: Sequence[Case] = CASES,
) -> Outcome:
    """Measure what is not measured yet and write everything.

    Raises InputError, what was measured so far kept, where the GPU is lost, a file cannot be written, or a fit is refused.
    """
    began = time.perf_counter()
    before = watch.states()
    for text in flags(before):
        progress.note(text)
    networks = [(request, _network(request)) for request in ask.models]
    opened = _session(ask, device, watch)
    store.open(opened, fresh=ask.fresh)  # what it had may go now: nothing asked for is unknown
    effort = _effort(ask, device)
    topology = _topology(watch, device)
    had = {case.name: result for case in cases if (result := store.case(case.name)) is not None}
    left = [case for case in cases if case.name not in had]
    missing = [pair for pair in networks if store.layers(ask.name, pair[1]) is None]
    kept = kept_words(len(cases) - len(left), len(networks) - len(missing))
    if kept:
        how = f"effort {opened.effort}" if device.figures else "the one effort that threads have"
        progress.note(
            f"{store.folder}: going on from {kept} before, with {how}; pass --fresh to measure all again"
        )
    pace = 0.1 if not device.figures else 0.3 if ask.quick else 1.0
    looks = sum(c.seconds * pace for c in (*left, *looks_left(cases, had, device, effort)))
    progress.plan(looks + _network_seconds(device) * len(missing))
    results = measure_cases(device, topology, effort, cases, store, progress, pace)
    draft = assemble(ask.name, opened.about, opened.gpus, results, keep_bad=True, figures=device.figures)
    failed = _networks(missing, draft.host, device, store, progress, effort, opened.provenance)
    after = watch.states()
    found = [*flags(before, after), *unsteady(results)] if device.figures else [NO_FIGURE]
    store.keep_calibration(
        Calibration(
            ask.name, opened.provenance, device.figures, watch.identity, before, after, tuple(found),
            draft.refused, results, draft.fits, time.perf_counter() - began,
        )
    )  # fmt: skip
    outcome = finish(store, keep_bad=ask.keep_bad or not device.figures, flags=tuple(found))
    if failed:
        raise InputError(f"all but {len(failed)} of the networks were measured: {'; '.join(failed)}")
    return outcome


def finish(store: Store, *, keep_bad: bool, flags: tuple[str, ...] = ()) -> Outcome:
    """Fit what a folder's samples say and write host and profiles. Needs no GPU. Raises InputError for a refused fit."""
    opened = store.session()
    results = [r for case in CASES if (r := store.case(case.name)) is not None]
    made = assemble(
        opened.name, opened.about, opened.gpus, results, keep_bad=keep_bad, figures=opened.figures
    )
    found = [profile_of(result, made, opened) for result in store.all_layers(opened.name)]
    host = store.keep_host(
        made.host
    )  # only now: a sample that cannot be read leaves files of one fit, not of two
    profiles = [store.keep_profile(opened.name, profile) for profile in found]
    told = (*flags, *made.refused) if opened.figures else (NO_FIGURE,)
    return Outcome(host, tuple(profiles), store.samples_path(opened.name), told)


def profile_of(result: LayersResult, made: Assembled, opened: Session) -> Profile:
    """A network's profile on the host that was just assembled."""
    inputs = (f"host:{made.host.digest}", f"network:{result.network.digest}")
    provenance = replace(result.provenance or opened.provenance, inputs=inputs)
    kind: ProfileKind = "measured" if opened.figures else "played"
    costs = made.host.costs
    busy, weight = in_place(result) or (None, None)
    wait, wait_beside = waits(result.waited) or (None, None)
    hooks = hook(result.network, result.hooked, made.host)
    layers = timings(result, calls_ns(result.network, made.host, hooks))
    profile = Profile(
        kind, result.network, made.host.digest, layers, provenance,
        slowed(result), busy, weight, start(result, costs) if opened.figures else None,
        hooks, relay(result.network, result.hooked, made.host),
        wait=wait, wait_beside=wait_beside,
    )  # fmt: skip
    return replace(profile, launch=launch(profile, result.launched, made.host))


def _networks(
    missing: Sequence[tuple[Request, Network]],
    host: Host,
    device: Device,
    store: Store,
    progress: Progress,
    effort: Effort,
    made: Provenance,
) -> list[str]:
    """Those that cannot be measured are told at the end, and cost the others nothing.

    All are first timed without the profiler, then each with it: it would make the others' launches slower.
    """
    failed: list[str] = []
    seconds = _network_seconds(device)
    ready: list[tuple[Request, Network, Unwatched]] = []
    given: dict[str, Any] = {"host": host, "device": device, "repeats": effort.repeats // 2 + 1}

    def attempt(request: Request, network: Network, do: Callable[..., T]) -> T | None:
        what = f"{request.model} {request.precision}"
        progress.begins(what)
        try:
            check_model(network, device)
            built = build(request.model, batch=request.samples, dtype=request.dtype, seq=request.seq)
            return do(built, progress=lambda way: progress.begins(f"{what}: {way}"))
        except Mismatch:
            raise
        except (InputError, MemoryError, RuntimeError) as error:
            line = error if isinstance(error, InputError) else memory_error(error, device)
            if line is None:
                raise lost(what, error, store) from error
            failed.append(f"{what}: {line}")
            progress.ended(what, seconds, f"failed: {line}")
        return None

    for request, network in missing:
        first = store.first_half(network)
        if first is None:
            first = attempt(request, network, partial(unwatched, network=network, **given))
            if first is not None:
                store.keep_first_half(network, first)
        if first is not None:
            ready.append((request, network, first))
    for request, network, first in ready:
        result = attempt(request, network, partial(measure, network=network, first=first, **given))
        if result is not None:
            what = f"{request.model} {request.precision}"
            store.keep_layers(host.name, replace(result, provenance=made))
            for text in result.notes:
                progress.note(f"{what}: {text}")
            progress.ended(what, seconds, f"{result.seconds:.1f} s")
    return failed


def _network_seconds(device: Device) -> float:
    return NETWORK_SECONDS if device.figures else PLAYED_SECONDS


def _network(request: Request) -> Network:
    return trace_model(request.model, batch=request.samples, dtype=request.dtype, seq=request.seq).network


def _effort(ask: Ask, device: Device) -> Effort:
    if not device.figures:
        return NO_FIGURES
    return QUICK if ask.quick else FULL


def _session(ask: Ask, device: Device, watch: Watch) -> Session:
    identity = watch.identity
    gpus = tuple(
        GpuFacts(device.describe(gpu), device.memory(gpu).total_bytes) for gpu in range(device.gpu_count)
    )
    effort = "none" if not device.figures else "quick" if ask.quick else "full"
    return Session(
        ask.name,
        _about(gpus, identity, device.figures),
        effort,
        device.figures,
        gpus,
        tuple(g.uuid for g in identity.gpus) if identity is not None else (),
        stamp(
            ask.name,
            gpus[0].name,
            driver=identity.driver if identity is not None else "",
            cuda=torch.version.cuda or "",
            torch=torch.__version__,
        ),
    )


def _about(gpus: Sequence[GpuFacts], identity: HostIdentity | None, figures: bool) -> str:
    if not figures:
        return f"{len(gpus)} GPUs: {NO_FIGURE}"
    text = f"{len(gpus)} x {gpus[0].name}"
    if identity is None:
        return text
    first = identity.gpus[0]
    if first.pcie_generation_max is not None:
        text += f", PCIe {first.pcie_generation_max}.0 x{first.pcie_width_max}"
    if identity.pairs and identity.pairs[0].nvlinks:
        text += f", NVLink NV{identity.pairs[0].nvlinks} between GPUs 0 and 1"
    return f"{text}, driver {identity.driver}"


def _topology(watch: Watch, device: Device) -> Topology:
    count = device.gpu_count
    if watch.identity is not None and len(watch.identity.gpus) == count:
        return from_identity(watch.identity)
    wires = tuple(Wire(a, b, 0, None) for a in range(count) for b in range(a + 1, count))
    return Topology(count, wires, (None,) * count)
