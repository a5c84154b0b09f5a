"""A plan lowered to operations on streams, proved when it is made (sim/proof.py).

One list in the order in which a host thread issues the operations; streams are in order. The simulator and the executors
interpret this very list.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from sim.errors import require
from sim.host import Host
from sim.network import Network
from sim.ops import (
    HOST,
    Copy,
    Op,
    Record,
    Run,
    Wait,
    compute_stream,
    device_of,
    h2d_stream,
    is_landing,
    landing_stream,
    peer_stream,
)
from sim.plan import Access, Launch, Plan, Sync
from sim.proof import merge, prove


@dataclass(frozen=True)
class Program:
    """Operations in issue order. Constructing one replays it: InputError unless it is valid.

    Valid means: an event is recorded once and before anything waits for it; each copied byte arrives once; a relay's
    second copy is ordered after its first; every Run is ordered after the copies of all bytes it reads.
    """

    network: Network
    host: Host
    plan: Plan
    ops: tuple[Op, ...]
    head_ops: int = 0
    """How many first operations the host issues before it launches the graph that holds the rest."""
    events: int = field(init=False)
    opening: range = field(init=False)
    """Those of them that are launched together, as a graph of their own: the plan's opening."""

    def __post_init__(self) -> None:
        compute = compute_stream(self.plan.target)
        together = [at for at, op in enumerate(self.ops[: self.head_ops]) if op.stream == compute]
        opening = range(together[0], together[-1] + 1) if together else range(0)
        require(
            len(opening) == len(together),
            f"program of {self.plan.name!r}: its opening is not one stretch of operations",
        )
        object.__setattr__(self, "opening", opening)
        object.__setattr__(
            self, "events", 1 + max((o.event for o in self.ops if isinstance(o, Record)), default=-1)
        )
        prove(self.ops, self.plan, self.network, self.host)

    @property
    def launch(self) -> Launch:
        return self.plan.launch

    @property
    def streams(self) -> tuple[str, ...]:
        """Names in order of first use."""
        return tuple(dict.fromkeys(op.stream for op in self.ops))

    def copies_behind(self) -> list[Copy | None]:
        """By event, the copy that it stands behind: the last on its stream, or for a landing what that waits for."""
        last: dict[str, Copy | None] = {}
        behind: list[Copy | None] = [None] * self.events
        for op in self.ops:
            if isinstance(op, Copy):
                last[op.stream] = op
            elif isinstance(op, Record):
                behind[op.event] = last.get(op.stream)
            elif isinstance(op, Wait) and is_landing(op.stream):
                last[op.stream] = behind[op.event]
        return behind

    def label(self, op: Copy | Run) -> str:
        """What a timeline calls it."""
        if isinstance(op, Copy):
            return f"chunk {op.chunk} ({op.size_bytes / 2**20:.2f} MiB)"
        layer = self.network.layers[op.layer]
        return f"{op.layer}-{layer.kind} {layer.name}"


def cause_of(copy: Copy | None) -> str:
    """Words for a stall on an event that stands behind `copy`."""
    return "an event" if copy is None else f"chunk {copy.chunk} over {' and '.join(copy.route)}"


def lower(plan: Plan, network: Network, host: Host) -> Program:
    """Turn a plan into operations. Raises InputError where the plan does not fit the network or the host.

    The copies of a graph plan's head come first, and among them its opening, behind the last chunk that it needs. Then the
    others are issued, in the plan's order, then the layers in running order, each behind the fewest waits that order it:
    streams run in order, so of all chunks a layer needs on one stream only the last is waited for, and only if nothing
    earlier on the compute stream has waited for it or a later one. Events nobody waits for are not recorded.
    """
    plan.check(network, host)
    lowering = _Lowering(plan, network, host)
    head = list(lowering.head())
    rest = list(lowering.ops())
    wanted = {op.event for op in (*head, *rest) if isinstance(op, Wait)}
    head = list(_landed(head, wanted))
    ops = [*head, *rest]
    waited = dict.fromkeys(op.event for op in ops if isinstance(op, Wait))
    number = {event: at for at, event in enumerate(waited)}
    kept = [
        replace(op, event=number[op.event]) if isinstance(op, Record | Wait) else op
        for op in ops
        if not isinstance(op, Record) or op.event in waited
    ]
    dropped = sum(1 for op in head if isinstance(op, Record) and op.event not in waited)
    return Program(network, host, plan, tuple(kept), len(head) - dropped)


def _landed(head: list[Op], wanted: set[int]) -> Iterator[Op]:
    """Without the landings that nothing in the graph waits for; each is a Wait and the Record after it."""
    for op, after in zip_longest(head, head[1:]):
        landing = isinstance(op, Wait) and is_landing(op.stream)
        if landing and isinstance(after, Record) and after.event not in wanted:
            continue
        yield op


class _Lowering:
    def __init__(self, plan: Plan, network: Network, host: Host) -> None:
        self.plan, self.network, self.host = plan, network, host
        self.compute = compute_stream(plan.target)
        self.copies: list[list[Op]] = []
        """Per chunk, the operations that bring it, its final Record last."""
        self.last: list[str] = []
        """Per chunk, the stream of its last copy."""
        self.behind: list[dict[str, int]] = []
        """Per chunk, by stream, the highest chunk that has passed there once it has landed."""
        self.waited: dict[str, dict[str, int]] = {}
        """The same of what each waiting stream has waited for."""
        passed: dict[str, dict[str, int]] = {}
        event = 0
        for index in range(len(plan.chunks)):
            ops, event = self._copies(index, event)
            self.last.append(ops[-1].stream)
            if index < plan.head and device_of(ops[-1].stream) != plan.target:
                land = landing_stream(plan.target, ops[-1].stream)
                ops += [Wait(land, event - 1, cross_device=True), Record(land, event)]
                event += 1
            self.copies.append(ops)
            self.behind.append(_passed(ops, index, passed))
        self.by_start = sorted(range(len(plan.chunks)), key=lambda i: plan.chunks[i].start_bytes)
        self.starts = [plan.chunks[i].start_bytes for i in self.by_start]

    def head(self) -> Iterator[Op]:
        """Copies issued ahead of the graph, and the opening. A layer waits for one inside its graph, where it needs it."""
        opening = range(self.plan.opening)
        first = 1 + max((chunk for layer in opening for chunk in self._needs(layer)), default=-1)
        for ops in self.copies[:first]:
            yield from ops
        for layer in opening:
            yield from self._layer(layer)
        for ops in self.copies[first : self.plan.head]:
            yield from ops

    def ops(self) -> Iterator[Op]:
        if self.plan.sync is Sync.HOST_GROUP:
            yield from self._grouped()
            return
        for ops in self.copies[self.plan.head :]:
            yield from ops
        if self.plan.sync is Sync.HOST_ALL:
            yield from self._waits(HOST, range(len(self.plan.chunks)))
        for layer in range(self.plan.opening, len(self.network.layers)):
            yield from self._layer(layer)

    def _layer(self, layer: int) -> Iterator[Op]:
        if self.plan.sync is Sync.STREAM:
            yield from self._waits(self.compute, self._needs(layer))
        yield self._run(layer)

    def _grouped(self) -> Iterator[Op]:
        """PipeSwitch: the host waits for a group's copy, then issues the group's layers."""
        for ops in self.copies:
            yield from ops
        for layer in range(len(self.network.layers)):
            yield from self._waits(HOST, self._needs(layer))
            yield self._run(layer)

    def _run(self, layer: int) -> Run:
        return Run(self.compute, layer, self.plan.access[layer])

    def _copies(self, index: int, event: int) -> tuple[list[Op], int]:
        chunk = self.plan.chunks[index]
        first, *rest = chunk.path
        ops: list[Op] = []
        stream = h2d_stream(first)
        ops.append(
            Copy(stream, index, chunk.start_bytes, chunk.stop_bytes, None, first, self.host.h2d_route(first))
        )
        ops.append(Record(stream, event))
        for source, destination in zip(chunk.path, rest, strict=False):
            stream = peer_stream(source, destination)
            ops.append(Wait(stream, event, cross_device=device_of(ops[-1].stream) != source))
            route = self.host.peer_route(source, destination)
            ops.append(Copy(stream, index, chunk.start_bytes, chunk.stop_bytes, source, destination, route))
            event += 1
            ops.append(Record(stream, event))
        return ops, event + 1

    def _needs(self, layer: int) -> Iterator[int]:
        """Chunks that hold bytes a layer reads from a GPU's memory."""
        for read, access in zip(self.network.layers[layer].reads, self.plan.access[layer], strict=True):
            if access not in (Access.COPIED, Access.PEER):
                continue
            start = self.network.offsets[read.storage]
            stop = start + self.network.storages[read.storage].size_bytes
            if start == stop:
                continue
            at = max(0, bisect_left(self.starts, start + 1) - 1)
            while at < len(self.starts) and self.starts[at] < stop:
                index = self.by_start[at]
                if self.plan.chunks[index].stop_bytes > start:
                    yield index
                at += 1

    def _waits(self, waiter: str, chunks: Iterator[int] | range) -> Iterator[Op]:
        waited = self.waited.setdefault(waiter, {})
        last: dict[str, int] = {}
        for chunk in chunks:
            stream = self.last[chunk]
            if chunk > waited.get(stream, -1):
                last[stream] = max(chunk, last.get(stream, -1))
        rows = sorted(last.items(), key=lambda row: (-len(self.plan.chunks[row[1]].path), row[0]))
        for stream, chunk in rows:
            if any(self.behind[other].get(stream, -1) >= chunk for _, other in rows if other != chunk):
                continue
            merge(waited, self.behind[chunk], none=-1)
            record = self.copies[chunk][-1]
            assert isinstance(record, Record)
            far = waiter != HOST and device_of(record.stream) != self.plan.target
            yield Wait(waiter, record.event, cross_device=far)


def _passed(ops: list[Op], chunk: int, passed: dict[str, dict[str, int]]) -> dict[str, int]:
    """What is behind a chunk that has landed, by stream; brings `passed`, the same of each stream, up to its operations."""
    recorded: dict[int, dict[str, int]] = {}
    here: dict[str, int] = {}
    for op in ops:
        here = passed.setdefault(op.stream, {})
        if isinstance(op, Wait):
            merge(here, recorded[op.event], none=-1)
        elif isinstance(op, Record):
            recorded[op.event] = dict(here)
        here[op.stream] = chunk
    return dict(here)


def calls_of(path: tuple[int, ...]) -> tuple[int, int]:
    """Copies, and records and waits together, that the host issues for a chunk of a head over these GPUs; as `lower` has it.

    A copy and its record each; between two of them a wait, and behind a relay the landing's wait and record.
    """
    hops = len(path) - 1
    return 1 + hops, 1 + 2 * hops + 2 * (hops > 0)
