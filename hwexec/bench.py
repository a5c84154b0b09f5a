"""Strategies run side by side on one machine, beside what a user would run instead, and the limit that none can beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from hwexec.arena import HostArena
from hwexec.device import Device, Stream
from hwexec.executor import ColdStart, prepare
from hwexec.pace import Pace, calibrated_ns
from hwexec.peers import PEERS, Peer, Scene, Snapshot, why
from hwexec.timing import Samples, steady, time_ns
from hwexec.verify import Likeness, kept, likeness, nothing, plain_answer, start_cold, steadiest, take
from sim.baselines import BASELINES, Setting
from sim.errors import InputError, require
from sim.files import FileKind, PlanFile
from sim.hints import unknown
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan
from sim.profile import Profile, ProfileKind, Provenance
from sim.search import Options, search

DEFAULT_STRATEGIES = ("warm", "demand", "pipeline", "pipeswitch", "dha", "pt", "pt+dha", "best")
STRATEGIES = ("warm", *(b.name for b in BASELINES), "best")
PROBE_BYTES = 256 * 2**20
"""Size of the copies that measure a link."""
BUDGET_S = 2.0
"""Time that one row may take; slower ones stop after a few starts, and their count is shown."""
WAKE_S = 0.1
"""Warm runs ahead of each row's starts."""
PEER_RUNS, PEER_BUDGET_S = 10, 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy, or one peer. `error`: the largest relative difference to the reference, None where that is no number."""

    name: str
    links: int
    launch: str
    copied_bytes: int
    direct_bytes: int
    predicted_ns: float | None
    set_up_s: float | None
    outputs_match: bool
    bit_equal: bool
    error: float | None
    note: str
    runs: int
    samples_ns: tuple[float, ...]
    """Empty where times are no figures."""
    issue_copy_ns: float | None = None
    """What the host took to issue a copy just before; None for a peer, and where times are no figures."""
    copies_ns: float | None = None
    """What the plan's copies from host memory took by themselves, all lanes at once, just after; None likewise, and where
    nothing was copied."""
    lanes: int = 1
    """Lanes that the plan copies over, of the `links` that it might."""


@dataclass(frozen=True, slots=True)
class Limit:
    """max(warm graph time, bytes / rate). `copied_bytes` are those the best plan over as many links copies; where it was not
    asked for, the bytes that layers read, of an embedding's table only the rows looked up."""

    links: int
    copied_bytes: int
    bytes_per_s: float
    limit_ns: float


@dataclass(frozen=True, slots=True)
class Waived:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `hwexec bench` found. `pinned_bytes_per_s`: 256 MiB copies to each GPU alone, in the order of `gpus`, before all
    else or after it, whichever was faster."""

    model: str
    dtype: str
    batch: int
    seq: int | None
    gpus: tuple[int, ...]
    device: str
    figures: bool
    host: str
    profile_kind: ProfileKind
    provenance: Provenance
    pinned_bytes_per_s: tuple[float, ...]
    warm_graph_ns: float | None
    limits: tuple[Limit, ...]
    waived: tuple[Waived, ...]
    rows: tuple[Row, ...]
    calibrated_issue_copy_ns: float | None = None
    """What that took when the host was calibrated; None where it was estimated."""

    @property
    def outputs_match(self) -> bool:
        return all(row.outputs_match for row in self.rows)

    def limit(self, links: int) -> Limit | None:
        return next((limit for limit in self.limits if limit.links == links), None)


BENCH = FileKind("bench-report", 1, BenchReport)


@dataclass(frozen=True, slots=True)
class Entry:
    """A plan to run, or the warm run with all of it resident."""

    name: str
    plan: Plan
    links: int
    """Links that it may use; the best plan over two may leave one out."""
    predicted_ns: float | None = None


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


def check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES, "hwexec bench --help")


def entries(task: Task) -> tuple[list[Entry], list[Waived]]:
    """Plans in the order asked for, and what this choice of GPUs has no plan for. `best` is one plan per number of links."""
    found: list[Entry] = []
    waived: list[Waived] = []
    target, *partners = task.gpus
    setting = Setting(task.profile, task.host, target, partners[0] if partners else None)
    for partner in partners:
        task.host.peer_route(partner, target)
    for name in task.names:
        if name == "warm":
            found.append(Entry(name, warm_plan(task.network, target), 1))
        elif name == "best":
            for count in range(len(task.gpus)):
                outcome = search(task.profile, task.host, Options(target, tuple(partners[:count])))
                found.append(Entry(name, outcome.best.plan, count + 1, outcome.best.makespan_ns))
        else:
            baseline = next(b for b in BASELINES if b.name == name)
            if baseline.relays and not partners:
                waived.append(Waived(name, "it needs a second GPU; name two, as -d 0 1"))
            else:
                found.append(Entry(name, plan := baseline.make(setting), lanes(plan)))
    found += [Entry(f.plan.name, f.plan, lanes(f.plan), f.predicted_ns) for f in task.plans]
    return found, waived


def lanes(plan: Plan) -> int:
    """Links to host memory that a plan copies over, at least the target's."""
    return max(1, len({chunk.path[0] for chunk in plan.chunks}))


def warm_plan(network: Network, target: int) -> Plan:
    """Everything in one copy, as one graph: prepared only to be run with all of it resident."""
    access = tuple(tuple(Access.COPIED for _ in layer.reads) for layer in network.layers)
    chunks = (Chunk(0, network.arena_bytes, (target,)),) if network.arena_bytes else ()
    return Plan("warm", target, Launch.GRAPH, access, chunks)


def needed_bytes(network: Network) -> int:
    """Bytes that layers read: of each storage the most that one of its readers touches."""
    touched: dict[int, int] = {}
    for layer in network.layers:
        for read in layer.reads:
            touched[read.storage] = max(touched.get(read.storage, 0), read.touched_bytes)
    return sum(touched.values())


def bench(task: Task, device: Device, tell: Callable[[Row], None] = lambda row: None) -> BenchReport:
    """Run everything asked for, one after another, each with arenas of its own. `tell` hears of each row as it is done."""
    require(task.runs >= 1, f"--runs {task.runs}: at least one start must be made")
    for gpu in task.gpus:
        require(
            gpu < device.gpu_count,
            f"GPU {gpu}: this machine has {device.gpu_count}; name those with -d, as -d 0",
        )
    planned, waived = entries(task)
    where = device.torch_device(task.gpus[0])
    inputs = task.built.inputs_on(where)
    scene = Scene(task.built.module, inputs, where, Snapshot(task.built.module))
    plain = plain_answer(scene, device)
    rates = pinned_rates(device, task.gpus)
    if not any(entry.name == "warm" for entry in planned):
        planned.insert(0, Entry("warm", warm_plan(task.network, task.gpus[0]), 1))
    rows: list[Row] = []
    with Pace(device, task.gpus[0]) as pace:
        for entry in planned:
            try:
                rows.append(run_entry(task, entry, device, inputs, plain, pace))
            except InputError as error:
                # one plan may need what this machine has not; without the warm run nothing is shown
                if entry.name == "warm":
                    raise
                waived.append(Waived(entry.name, str(error)))
                continue
            tell(rows[-1])
    if task.peers:
        for peer in PEERS:
            try:
                rows.append(_run_peer(task, peer, scene, device, plain))
                tell(rows[-1])
            except (
                Exception
            ) as error:  # a peer is others' code on others' terms: whatever it raises waives it alone
                waived.append(Waived(peer.name, why(error)))
            finally:
                scene.snapshot.restore()
                device.trim()
    # a machine's links have slow moments, and a slow one would make the limit too easy
    with suppress(device.out_of_memory, InputError):  # all that was measured is worth more than a second look
        rates = tuple(max(pair) for pair in zip(rates, pinned_rates(device, task.gpus), strict=True))
    warm = next(row for row in rows if row.name == "warm")
    warm_ns = Samples(warm.samples_ns).median_ns if warm.samples_ns else None
    return BenchReport(
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
        limits=tuple(_limits(task, rates, warm_ns, rows)),
        waived=tuple(waived),
        rows=tuple(rows),
        calibrated_issue_copy_ns=calibrated_ns(task.host.costs),
    )


def _limits(task: Task, rates: tuple[float, ...], warm_ns: float | None, rows: list[Row]) -> Iterator[Limit]:
    if warm_ns is None:
        return
    for links in range(1, len(rates) + 1):
        best = next((row for row in rows if row.name == "best" and row.links == links), None)
        size = needed_bytes(task.network) if best is None else best.copied_bytes
        rate = sum(rates[:links])
        yield Limit(links, size, rate, max(warm_ns, size / rate * 1e9))


def pinned_rates(device: Device, gpus: tuple[int, ...]) -> tuple[float, ...]:
    """Median rate of large copies from pinned memory to each GPU alone; none where times are no figures."""
    if not device.figures:
        return ()
    rates = []
    for gpu in gpus:
        host = HostArena(device, PROBE_BYTES, gpu)
        arena = device.allocate(PROBE_BYTES, gpu)
        stream = device.stream("h2d:probe", gpu)
        try:
            samples = time_ns(_copy(device, stream, arena, host.tensor), device, [stream])
            rates.append(PROBE_BYTES / samples.median_ns * 1e9)
        finally:
            device.close_stream(stream)
            del arena
            host.close()
    device.trim()
    return tuple(rates)


def _copy(device: Device, stream: Stream, arena: torch.Tensor, host: torch.Tensor) -> Callable[[], None]:
    return lambda: device.copy(stream, arena, host)


def run_entry(
    task: Task,
    entry: Entry,
    device: Device,
    inputs: tuple[torch.Tensor, ...],
    plain: list[torch.Tensor],
    pace: Pace,
) -> Row:
    """One plan prepared, started cold many times, and given back. `plain` is PyTorch's own answer."""
    plan, dtype = entry.plan, task.built.dtype
    is_warm = entry.name == "warm"
    issue_copy_ns = pace.issue_copy_ns()
    began = time.perf_counter()
    with prepare(
        task.built.module, plan, inputs, network=task.network, host=task.host, device=device
    ) as cold:
        device.synchronize()
        set_up_s = time.perf_counter() - began
        reference = kept(cold.resident(*inputs))
        again = likeness(cold.resident(*inputs), reference)
        with steady(device):
            _wake(cold, inputs)
            if is_warm:
                series = partial(
                    take, partial(cold.resident, *inputs), device, reference, nothing, task.runs, BUDGET_S
                )
            else:
                series = partial(start_cold, cold, inputs, reference, task.runs, BUDGET_S)
            starts, scattered = steadiest(series, device)
            alone = None if is_warm or not device.figures else cold.copies_alone()
        match = starts.worst.bit_equal if again.bit_equal else starts.worst.within(dtype)
        bytes_agree = is_warm or cold.moved_bytes == plan.copied_bytes
        eager = likeness(reference, plain)
        note = f"eager: {cold.why_eager}" if cold.why_eager else ""
        launch = cold.launch.value
    if scattered:
        note += f"{'; ' if note else ''}{scattered}"
    if not again.bit_equal:
        note += f"{'; ' if note else ''}not reproducible, compared within the tolerance of {dtype}"
    if not bytes_agree:
        note += f"{'; ' if note else ''}moved {cold.moved_bytes} bytes, {plan.copied_bytes} planned"
    if not eager.within(dtype):
        note += f"{'; ' if note else ''}resident answer differs from plain PyTorch's"
    return Row(
        name=entry.name,
        links=entry.links,
        launch=launch,
        copied_bytes=0 if is_warm else plan.copied_bytes,
        direct_bytes=0 if is_warm else plan.direct_bytes(task.network),
        predicted_ns=entry.predicted_ns,
        set_up_s=set_up_s if device.figures else None,
        outputs_match=match and bytes_agree and eager.within(dtype),
        bit_equal=starts.worst.bit_equal,
        error=starts.worst.error,
        note=note,
        runs=len(starts.samples.raw),
        samples_ns=starts.samples.raw if device.figures else (),
        issue_copy_ns=issue_copy_ns,
        copies_ns=None if alone is None else alone.median_ns,
        lanes=lanes(plan),
    )


def _wake(cold: ColdStart, inputs: tuple[torch.Tensor, ...]) -> None:
    """A GPU raises its clocks only under load, and a warm time taken before would make the limit too easy."""
    until = time.perf_counter() + (WAKE_S if cold.device.figures else 0.0)
    while time.perf_counter() < until:
        cold.resident(*inputs)
        cold.device.synchronize()


def _run_peer(task: Task, peer: Peer, scene: Scene, device: Device, plain: list[torch.Tensor]) -> Row:
    """Against plain PyTorch's answer with all weights on the GPU, within the tolerance: library algorithms may differ."""
    began = time.perf_counter()
    with peer.set_up(scene) as ready:
        set_up_s = time.perf_counter() - began
        series = partial(
            take, ready.call, device, plain, ready.before, min(task.runs, PEER_RUNS), PEER_BUDGET_S
        )
        starts, scattered = steadiest(series, device)
        about = "; ".join(text for text in (ready.about, scattered) if text)
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
        runs=len(starts.samples.raw),
        samples_ns=starts.samples.raw if device.figures else (),
    )


def check_files(files: tuple[PlanFile, ...], network: Network, host: Host) -> None:
    """Each made for this network and this host. InputError names the first that is not."""
    for file in files:
        who = f"plan {file.plan.name!r} of {file.model}"
        require(
            file.network_digest == network.digest,
            f"{who}: made for another network than {network.model} is here; search again",
        )
        require(
            file.host_digest == host.digest,
            f"{who}: made for {file.host} with other constants than {host.name} has; search again, or pass its --host",
        )
