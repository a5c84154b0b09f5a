"""Many plans of many networks, predicted beside measured, in one file that the next call goes on from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hwexec.bench import Entry, Task, entries, run_entry
from hwexec.device import Device
from hwexec.peers import Scene, Snapshot
from hwexec.plan_line import PlanLine
from hwexec.starts import plain_answer
from hwexec.timing import Samples
from sim.baselines import BASELINES
from sim.draft import EVERY, Draft, Range, aligned, plan_of, runs_of
from sim.errors import InputError
from sim.files import FileKind
from sim.host import Host
from sim.network import Network
from sim.plan import Launch, Plan
from sim.profile import ProfileKind, Provenance

SMALLEST_CHUNK_BYTES, LARGEST_CHUNK_BYTES = 2**19, 2**26
MOST_CHUNKS = 200
"""Random plans aim at a quarter fewer at most: capturing more takes long, and no search would propose them."""
IN_PLACE = (0.0, 0.0, 0.02, 0.1, 0.3)
"""Shares of reads that a random plan makes in place."""


@dataclass(frozen=True, slots=True)
class Point:
    """One plan, predicted and measured. `number` tells random plans of a case apart; 0 elsewhere. `plan` is as it ran."""

    model: str
    dtype: str
    batch: int
    seq: int | None
    network_digest: str
    profile_kind: ProfileKind
    links: int
    strategy: str
    number: int
    chunks: int
    copied_bytes: int
    direct_bytes: int
    outputs_match: bool
    predicted_ns: float
    measured_ns: float | None
    """Median of `samples_ns`."""
    note: str
    plan: PlanLine
    samples_ns: tuple[float, ...]
    issued_ns: float | None = None
    """Median over the same starts until the host thread had issued all of one; None where nobody looked."""
    predicted_issued_ns: float | None = None
    """The same, predicted, whether anybody looked or not; None in a file from before that was kept."""
    copies_ns: float | None = None
    """What the plan's copies took by themselves, all lanes at once, just after; None as `issued_ns` is."""
    apart_ns: tuple[float, ...] = ()
    """Further starts, which do not count: others slowed the host's core when they were made."""
    full_pace: bool = True
    """Whether `samples_ns` were made at the core's full pace; false where there were too few of them, and all count."""

    @property
    def launch(self) -> Launch:
        return self.plan.launch

    @property
    def key(self) -> tuple[object, ...]:
        return (
            self.model,
            self.dtype,
            self.batch,
            self.seq,
            self.network_digest,
            self.links,
            self.strategy,
            self.number,
        )

    @property
    def case(self) -> tuple[object, ...]:
        return (self.model, self.dtype, self.batch, self.seq)

    @property
    def off(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_ns / (self.measured_ns or float("nan")) - 1


@dataclass(frozen=True, slots=True)
class SweepRecord:
    """All points so far, on one host. `provenance` is of the call that measured last, `predicted_by` of the one that predicted."""

    host: str
    host_digest: str
    device: str
    figures: bool
    seed: int
    provenance: Provenance
    predicted_by: Provenance
    points: tuple[Point, ...]


SWEEP = FileKind("sweep", 3, SweepRecord, last="figures")


def random_plan(network: Network, host: Host, gpus: tuple[int, ...], seed: str) -> Plan:
    """A valid plan that no search made: reads in place, where chunks end, launch, head and opening are drawn. Same seed, same
    plan."""
    draw = random.Random(seed)
    target, *partners = gpus
    paths = ((target,), *((partner, target) for partner in partners))
    reads = [(i, j) for i, layer in enumerate(network.layers) for j in range(len(layer.reads))]
    share = draw.choice(IN_PLACE)
    direct = frozenset(key for key in reads if draw.random() < share)
    smallest = max(SMALLEST_CHUNK_BYTES, 5 * network.arena_bytes // (4 * MOST_CHUNKS))
    largest = max(smallest, min(LARGEST_CHUNK_BYTES, network.arena_bytes // len(paths)))
    size = round(smallest * (largest / smallest) ** draw.random())
    launches = [launch for launch in Launch if launch is not Launch.EAGER]
    launch = Launch.EAGER if draw.random() < 0.15 else draw.choice(launches)
    draft = Draft(launch, direct, frozenset(), paths)
    cuts: list[Range] = []
    for run in runs_of(draft, network):
        start, stop = run[0][1], run[-1][2]
        while start < stop:
            end = min(stop, aligned(start + round(size * draw.uniform(0.25, 1.75))))
            cuts.append((start, end))
            start = end
    head = draw.choice((0, draw.randint(1, 4 * len(paths)), EVERY))
    # of no account but where all chunks are ahead
    opening = draw.choice((0, draw.randrange(len(network.layers))))
    drawn = replace(draft, cuts=tuple(cuts), head=head, opening=opening)
    return plan_of(drawn, network, host, "random")


def run_case(
    task: Task, device: Device, randoms: int, seed: int, done: frozenset[tuple[object, ...]]
) -> Iterator[tuple[str, int, Point | None]]:
    """Points of one network that `done` has not: published plans, the best and random ones, over each number of links.

    Beside each, what it is in words and how many are left. None for a plan that this machine cannot run.
    """
    built, network = task.built, task.network
    here = (built.name, built.dtype, built.batch, built.seq, network.digest)
    todo: list[tuple[Entry, int]] = []
    for count in range(1, len(task.gpus) + 1):
        for number in range(randoms):
            gpus = task.gpus[:count]
            words = "/".join(map(str, (seed, *here[:4], count, number)))
            todo.append((Entry("random", random_plan(network, task.host, gpus, words), count), number))
    wanted = {(*here, 1, b.name, 0) for b in BASELINES if not b.relays}
    wanted |= {(*here, 2, b.name, 0) for b in BASELINES if b.relays and len(task.gpus) > 1}
    wanted |= {(*here, count, "best", 0) for count in range(1, len(task.gpus) + 1)}
    if not wanted <= done:  # the search takes seconds
        names = (*(b.name for b in BASELINES), "best")
        todo = [(entry, 0) for entry in entries(replace(task, names=names, plans=()))[0]] + todo
    todo = [(entry, number) for entry, number in todo if (*here, entry.links, entry.name, number) not in done]
    if not todo:
        return
    where = device.torch_device(task.gpus[0])
    inputs = built.inputs_on(where)
    plain = plain_answer(Scene(built.module, inputs, where, Snapshot(built.module)), device)
    yield from _points(task, device, todo, here, inputs, plain)


def _points(
    task: Task,
    device: Device,
    todo: list[tuple[Entry, int]],
    here: tuple[str, str, int, int | None, str],
    inputs: tuple[torch.Tensor, ...],
    plain: list[torch.Tensor],
) -> Iterator[tuple[str, int, Point | None]]:
    network = task.network
    for at, (entry, number) in enumerate(todo, 1):
        left = len(todo) - at
        what = f"{entry.name}{number if entry.name == 'random' else ''} over {entry.links}"
        try:
            row = run_entry(task, entry, device, inputs, plain)
        except InputError as error:
            yield f"{what}: {error}", left, None
            continue
        assert row.predicted_ns is not None
        assert row.plan is not None
        yield (
            what,
            left,
            Point(
                *here,
                profile_kind=task.profile.kind,
                links=entry.links,
                strategy=entry.name,
                number=number,
                chunks=len(entry.plan.chunks),
                copied_bytes=entry.plan.copied_bytes,
                direct_bytes=entry.plan.direct_bytes(network),
                outputs_match=row.outputs_match,
                predicted_ns=row.predicted_ns,
                measured_ns=Samples(row.samples_ns).median_ns if row.samples_ns else None,
                note=row.note,
                plan=row.plan,
                samples_ns=row.samples_ns,
                issued_ns=row.issued_ns,
                predicted_issued_ns=row.predicted_issued_ns,
                copies_ns=row.copies_ns,
                apart_ns=row.apart_ns,
                full_pace=row.full_pace,
            ),
        )
