"""Strategies run side by side on one machine, beside what a user would run instead, and the limit that none can beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch

from hwexec import late, pace
from hwexec.bench_record import BenchReport, Looked, Row, Waived, labelled
from hwexec.core import steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.host_memory import memory_error
from hwexec.limit import Limit, needed_bytes, pinned_rates, together_rate
from hwexec.peers import PEERS, Peer, Scene, Snapshot, why
from hwexec.plan_line import as_line
from hwexec.preparing import prepare
from hwexec.starts import (
    PAUSED,
    Likeness,
    Reference,
    likeness,
    nothing,
    plain_answer,
    shows_nothing,
    start_cold,
    steadiest_starts,
    take,
    wake,
)
from hwexec.timing import Samples
from hwexec.verify import as_run
from sim.baselines import BASELINES, Setting
from sim.errors import InputError, require
from sim.files import PlanFile
from sim.hints import size_words, unknown
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.options import Options
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import Profile, Provenance
from sim.program import lower
from sim.search import search
from sim.simulate import simulate

DEFAULT_STRATEGIES = ("warm", "demand", "pipeline", "pipeswitch", "dha", "pt", "pt+dha", "best")
STRATEGIES = ("warm", *(b.name for b in BASELINES), "best")
BUDGET_S = 2.0
"""Time that the starts of one row may take; slower ones stop after a few, and the row says so."""
PEER_RUNS, PEER_BUDGET_S = 10, 0.5


@dataclass(frozen=True, slots=True)
class Benched:
    """A report, and what ended it before all had run: to be raised again once the report is kept."""

    report: BenchReport
    stopped: BaseException | None


@dataclass(frozen=True, slots=True)
class Entry:
    """A plan to run, or the warm run with all of it resident."""

    name: str
    plan: Plan
    links: int
    """Links that it may use; the best plan over two may leave one out."""

    @property
    def label(self) -> str:
        return labelled(self.name, self.links)


@dataclass(frozen=True, slots=True)
class Task:
    """What to run on what. `names` are strategies; `plans` come from files and are run as well."""

    built: Built
    network: Network
    profile: Profile
    host: Host
    gpus: tuple[int, ...]
    names: tuple[str, ...]
    plans: tuple[PlanFile, ...]
    peers: bool
    provenance: Provenance
    runs: int = 15
    pauses: bool = True
    """Whether warm runs and best plans are started after pauses as well, which takes half a second each."""
    keep: tuple[int | None, float | None] | None = None
    """What plans called "kept" may keep between starts, as Options.keep_bytes and keep_ratio; None: there are none."""


def check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES, "hwexec bench --help")


def entries(task: Task) -> tuple[list[Entry], list[Waived]]:
    """Plans in the order asked for, and what this choice of GPUs has no plan for. `best` is one plan per number of links, and so
    is `kept`."""
    found: list[Entry] = []
    waived: list[Waived] = []
    target, *partners = task.gpus
    setting = Setting(task.profile, task.host, target, partners[0] if partners else None)
    # a plan's own way may go over more GPUs than one
    if set(task.names) - {"warm"} or task.keep is not None:
        for partner in partners:
            task.host.peer_route(partner, target)
    for name in task.names:
        if name == "warm":
            found.append(Entry(name, warm_plan(task.network, target), 1))
        elif name == "best":
            found += _searched(task, name)
        else:
            baseline = next(b for b in BASELINES if b.name == name)
            if baseline.relays and not partners:
                waived.append(Waived(name, "it needs a second GPU; name two, as -d 0 1"))
            else:
                found.append(Entry(name, plan := baseline.make(setting), lanes(plan)))
    if task.keep is not None:
        found += _searched(task, "kept", task.keep)
    found += [Entry(f.plan.name, f.plan, lanes(f.plan)) for f in task.plans]
    return found, waived


def _searched(task: Task, name: str, keep: tuple[int | None, float | None] = (None, None)) -> Iterator[Entry]:
    """One plan for each number of links."""
    target, *partners = task.gpus
    for count in range(len(task.gpus)):
        options = Options(target, tuple(partners[:count]), None, 1, *keep)
        yield Entry(name, search(task.profile, task.host, options).best.plan, count + 1)


def lanes(plan: Plan) -> int:
    """Links to host memory that a plan copies over, at least the target's."""
    return max(1, len({chunk.path[0] for chunk in plan.chunks}))


def warm_plan(network: Network, target: int) -> Plan:
    """Everything in one copy, as one graph: prepared only to be run with all of it resident."""
    access = tuple(tuple(Access.COPIED for _ in layer.reads) for layer in network.layers)
    chunks = (Chunk(0, network.arena_bytes, (target,)),) if network.arena_bytes else ()
    return Plan("warm", target, Launch.GRAPH, access, chunks)


def bench(task: Task, device: Device, tell: Callable[[Row], None] = lambda row: None) -> Benched:
    """Run everything asked for, one after another, each with arenas of its own. `tell` hears of each row as it is done.

    Whatever ends it early, an interruption included, is in the report where there is a row to keep, and raised where not.
    """
    require(task.runs >= 1, f"--runs {task.runs}: at least one start must be made")
    for gpu in task.gpus:
        require(
            gpu < device.gpu_count,
            f"GPU {gpu}: this machine has {device.gpu_count}; name those with -d, as -d 0",
        )
    planned, waived = entries(task)
    if not any(entry.name == "warm" for entry in planned):
        planned.insert(0, Entry("warm", warm_plan(task.network, task.gpus[0]), 1))
    where = device.torch_device(task.gpus[0])
    inputs = task.built.inputs_on(where)
    scene = Scene(task.built.module, inputs, where, Snapshot(task.built.module))
    plain = plain_answer(scene, device)
    rates, together = pinned_rates(device, task.gpus), together_rate(device, task.gpus)
    peers = PEERS if task.peers else ()
    left = [*(entry.label for entry in planned), *(peer.name for peer in peers)]
    rows: list[Row] = []
    looked: list[Looked] = []
    stopped: BaseException | None = None

    def done(found: Row | Waived) -> None:
        del left[0]
        if isinstance(found, Waived):
            waived.append(found)
        else:
            rows.append(found)
            tell(found)

    try:
        for entry in planned:
            try:
                found = run_entry(task, entry, device, inputs, plain)
            except InputError as error:
                # one plan may need what this machine has not; without the warm run nothing is shown
                if entry.name == "warm":
                    raise
                done(Waived(entry.label, str(error)))
            else:
                done(found)
        for peer in peers:
            try:
                row = _run_peer(task, peer, scene, device, plain)
            # a peer is others' code on others' terms: whatever it raises waives it alone
            except Exception as error:
                done(Waived(peer.name, why(error)))
            else:
                done(row)
            finally:
                scene.snapshot.restore()
                device.trim()
        # a machine's links have slow moments, and a slow one would make the limit too easy; all that was measured is worth more
        # than this second look
        with suppress(device.out_of_memory, InputError):
            rates = tuple(max(pair) for pair in zip(rates, pinned_rates(device, task.gpus), strict=True))
            together = max(filter(None, (together, together_rate(device, task.gpus))), default=None)
        slow = [row for row in rows if late.is_late(row, rates, task.profile.kind)]
        left += [f"a look into {row.label}" for row in slow]
        plans = {(entry.name, entry.links): entry.plan for entry in planned}
        again = [(row, partial(_prepared, task, plans[row.name, row.links], device, inputs)) for row in slow]
        for look in late.looks(again, inputs, task.profile, device, task.runs, BUDGET_S):
            looked.append(look)
            del left[0]
    except BaseException as error:
        if not rows:
            raise
        stopped = memory_error(error, device) or error
    warm = next((row for row in rows if row.name == "warm"), None)
    warm_ns = None if warm is None or not warm.samples_ns else Samples(warm.samples_ns).median_ns
    report = BenchReport(
        model=task.built.name,
        dtype=task.built.dtype,
        batch=task.built.batch,
        seq=task.built.seq,
        gpus=task.gpus,
        device=device.kind,
        figures=device.figures,
        host=task.host.name,
        profile_kind=task.profile.kind,
        provenance=task.provenance,
        pinned_bytes_per_s=rates,
        warm_graph_ns=warm_ns,
        limits=tuple(limits(task.network, rates, warm_ns, rows)),
        waived=tuple(waived),
        rows=tuple(rows if device.figures else map(_untimed, rows)),
        together_bytes_per_s=together,
        stopped=_why_stopped(stopped),
        not_run=tuple(left) if stopped is not None else (),
        looked=tuple(looked),
    )
    return Benched(report, stopped)


def _why_stopped(error: BaseException | None) -> str:
    if error is None:
        return ""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else why(error)


def limits(
    network: Network, rates: tuple[float, ...], warm_ns: float | None, rows: Sequence[Row]
) -> Iterator[Limit]:
    """One for each number of links, by the rates of the links alone; none where nobody knows what a warm run takes."""
    if warm_ns is None:
        return
    for links in range(1, len(rates) + 1):
        best = next((row for row in rows if row.name == "best" and row.links == links), None)
        size = needed_bytes(network) if best is None else best.copied_bytes
        rate = sum(rates[:links])
        yield Limit(links, size, rate, max(warm_ns, size / rate * 1e9))


def _untimed(row: Row) -> Row:
    """Of GPUs that threads played nothing is told that could be taken for a time."""
    return replace(row, predicted_ns=None, predicted_issued_ns=None)


def _prepared(task: Task, plan: Plan, device: Device, inputs: tuple[torch.Tensor, ...]) -> ColdStart:
    return prepare(task.built.module, plan, inputs, network=task.network, host=task.host, device=device)


def run_entry(
    task: Task,
    entry: Entry,
    device: Device,
    inputs: tuple[torch.Tensor, ...],
    plain: list[torch.Tensor],
) -> Row:
    """One plan prepared, started cold many times, and given back. `plain` is PyTorch's own answer."""
    plan, dtype = entry.plan, task.built.dtype
    is_warm = entry.name == "warm"
    paused = PAUSED if task.pauses and entry.name in ("warm", "best") else 0
    began = time.perf_counter()
    with _prepared(task, plan, device, inputs) as cold:
        device.synchronize()
        set_up_s = time.perf_counter() - began
        reference = Reference.of(partial(cold.resident, *inputs))
        with steady(device):
            wake(cold, inputs)
            if is_warm:
                series = partial(
                    take,
                    partial(cold.resident, *inputs),
                    device,
                    plan.target,
                    reference.tensors,
                    nothing,
                    task.runs,
                    BUDGET_S,
                    paused,
                )
            else:
                series = partial(start_cold, cold, inputs, reference.tensors, task.runs, BUDGET_S, paused)
            starts, scattered = steadiest_starts(series, device)
            moved = 0 if is_warm else cold.brought()[0]
            alone = None if is_warm or not device.figures else cold.copies_alone()
        match = starts.worst.right(dtype, reference.reproducible)
        bytes_agree = is_warm or moved == plan.copied_bytes
        eager, blank = likeness(reference.tensors, plain), shows_nothing(reference.tensors)
        why_eager = f"eager: {cold.why_eager}" if cold.why_eager else ""
        launch = cold.launch
    ran = as_run(plan, launch)
    predicted = None if is_warm else simulate(lower(ran, task.network, task.host), task.profile, detail=False)
    made, apart = len(starts.samples.raw), len(starts.samples.apart)
    fewer = f"those of a row may take {BUDGET_S:g} s together"
    kept, repeats = plan.kept_bytes(task.network), reference.reproducible
    stays = (
        f"{size_words(kept)} stay on the GPU between starts; over limit by the bytes that it copies itself"
    )
    said = (
        why_eager,
        stays if kept else "keeps nothing, which was found to be as good" if entry.name == "kept" else "",
        pace.fewer_words(made, task.runs, apart, task.runs, fewer),
        scattered,
        pace.apart_words(starts.samples.apart, starts.samples.full_pace),
        "" if repeats else f"not reproducible, compared within the tolerance of {dtype}",
        "" if bytes_agree else f"moved {moved} bytes, {plan.copied_bytes} planned",
        "" if eager.within(dtype) else "resident answer differs from plain PyTorch's",
        f"the answer {blank}" if blank else "",
    )
    return Row(
        name=entry.name,
        links=entry.links,
        launch=launch.value,
        copied_bytes=0 if is_warm else plan.copied_bytes,
        direct_bytes=0 if is_warm else plan.direct_bytes(task.network),
        predicted_ns=None if predicted is None else predicted.makespan_ns,
        set_up_s=set_up_s if device.figures else None,
        outputs_match=match and bytes_agree and eager.within(dtype) and not blank,
        bit_equal=starts.worst.bit_equal,
        error=starts.worst.error,
        note="; ".join(filter(None, said)),
        runs=made,
        asked=task.runs,
        samples_ns=starts.samples.raw if device.figures else (),
        issued_ns=starts.issued.median_ns if device.figures and not is_warm else None,
        predicted_issued_ns=None if predicted is None else predicted.issued_ns,
        copies_ns=None if alone is None else alone.median_ns,
        paused_ns=None if starts.paused is None else starts.paused.median_ns,
        roused_ns=None if starts.roused is None else starts.roused.median_ns,
        lanes=lanes(plan),
        apart_ns=starts.samples.apart,
        full_pace=starts.samples.full_pace,
        kept_bytes=0 if is_warm else kept,
        plan=None if is_warm else as_line(ran),
    )


def _run_peer(task: Task, peer: Peer, scene: Scene, device: Device, plain: list[torch.Tensor]) -> Row:
    """Against plain PyTorch's answer with all weights on the GPU, within the tolerance: library algorithms may differ."""
    began = time.perf_counter()
    with peer.set_up(scene) as ready:
        set_up_s = time.perf_counter() - began
        series = partial(
            take,
            ready.call,
            device,
            scene.where.index or 0,
            plain,
            ready.before,
            min(task.runs, PEER_RUNS),
            PEER_BUDGET_S,
        )
        # whatever others' code raises waives no take that it made before
        starts, scattered = steadiest_starts(series, device, waived=(Exception,))
        made = len(starts.samples.raw)
        fewer = pace.fewer_words(
            made,
            task.runs,
            len(starts.samples.apart),
            min(task.runs, PEER_RUNS),
            f"a peer gets {PEER_RUNS} at most and {PEER_BUDGET_S:g} s for them",
        )
        apart = pace.apart_words(starts.samples.apart, starts.samples.full_pace)
        about = "; ".join(text for text in (ready.about, fewer, scattered, apart) if text)
    worst: Likeness = starts.worst
    return Row(
        name=peer.name,
        links=1,
        launch=Launch.EAGER.value,
        copied_bytes=scene.snapshot.total_bytes,
        direct_bytes=0,
        predicted_ns=None,
        set_up_s=set_up_s if device.figures else None,
        outputs_match=worst.within(task.built.dtype),
        bit_equal=worst.bit_equal,
        error=worst.error,
        note=about,
        runs=made,
        asked=task.runs,
        samples_ns=starts.samples.raw if device.figures else (),
        apart_ns=starts.samples.apart,
        full_pace=starts.samples.full_pace,
    )
