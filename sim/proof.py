"""The proof that a program is valid: a replay that knows what each stream has behind it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sim.errors import InputError, require
from sim.host import Host
from sim.network import Network
from sim.ops import HOST, Copy, Op, Record, Run, Wait
from sim.plan import Access, Plan, covered


def merge(clock: dict[str, int], other: dict[str, int], none: int = 0) -> None:
    """Bring `clock` up to `other`, stream by stream; `none` is what a stream that is not in a clock counts as."""
    for stream, at in other.items():
        if at > clock.get(stream, none):
            clock[stream] = at


class _Landings:
    """Copies of a replayed program on one GPU, sorted by where they start; they cannot overlap."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.rows: list[tuple[int, int, str, int]] = []
        """start, stop, stream, position on that stream."""

    def add(self, start: int, stop: int, stream: str, position: int) -> bool:
        """False where a byte of it has landed before."""
        at = bisect_left(self.starts, start)
        if at > 0 and self.rows[at - 1][1] > start:
            return False
        if at < len(self.rows) and self.rows[at][0] < stop:
            return False
        self.starts.insert(at, start)
        self.rows.insert(at, (start, stop, stream, position))
        return True

    def behind(self, clock: dict[str, int], start: int, stop: int) -> bool:
        """Whether copies that `clock` has behind it cover [start, stop)."""
        at = max(0, bisect_left(self.starts, start + 1) - 1)
        if at < len(self.rows):  # as a rule one copy brings all of it
            low, high, stream, position = self.rows[at]
            if low <= start < stop <= high:
                return clock.get(stream, 0) >= position
        ranges = []
        while at < len(self.rows) and self.starts[at] < stop:
            low, high, stream, position = self.rows[at]
            if clock.get(stream, 0) >= position:
                ranges.append((low, high))
            at += 1
        return covered(ranges, start, stop)


def prove(ops: Sequence[Op], plan: Plan, network: Network, host: Host) -> None:
    """Raises InputError unless `ops` are a valid program of the plan, as `Program` has it.

    Vector clocks: what each stream is known to have behind it, in one pass over the issue order.
    """
    clocks: dict[str, dict[str, int]] = {stream: {} for stream in (HOST, *(op.stream for op in ops))}
    position: dict[str, int] = dict.fromkeys(clocks, 0)
    events: dict[int, dict[str, int]] = {}
    landings: dict[int, _Landings] = {gpu.index: _Landings() for gpu in host.gpus}
    layer = 0
    who = f"program of {plan.name!r}"

    # a search proves many programs: words are made only for what is wrong
    def after(clock: dict[str, int], gpu: int, start: int, stop: int, op: Copy | Run) -> None:
        if not landings[gpu].behind(clock, start, stop):
            if isinstance(op, Copy):
                what = f"copy of chunk {op.chunk} onward"
            else:
                what = f"layer {op.layer} ({network.layers[op.layer].name})"
            raise InputError(
                f"{who}: {what} needs bytes {start}..{stop} on GPU {gpu}, and nothing orders it after their copies; "
                "a Wait is missing"
            )

    for op in ops:
        clock = clocks[op.stream]
        if op.stream != HOST:
            merge(clock, clocks[HOST])
        if isinstance(op, Wait):
            if op.event not in events:
                raise InputError(f"{who}: {op.stream} waits for event {op.event} before it is recorded")
            merge(clock, events[op.event])
            continue
        position[op.stream] += 1
        clock[op.stream] = position[op.stream]
        if isinstance(op, Record):
            require(op.event not in events, f"{who}: event {op.event} is recorded twice")
            events[op.event] = dict(clock)
        elif isinstance(op, Copy):
            if op.source is not None:
                after(clock, op.source, op.start_bytes, op.stop_bytes, op)
            require(
                landings[op.destination].add(op.start_bytes, op.stop_bytes, op.stream, position[op.stream]),
                f"{who}: bytes of chunk {op.chunk} arrive twice on GPU {op.destination}",
            )
        else:
            if op.layer != layer:
                raise InputError(f"{who}: layer {op.layer} runs where layer {layer} should")
            layer += 1
            for read, access in zip(network.layers[op.layer].reads, op.access, strict=True):
                gpu = _reader_gpu(plan, network, read.storage, access)
                if gpu is None:
                    if access is Access.PEER:
                        raise InputError(f"{who}: layer {op.layer} reads a partner that holds nothing")
                    continue
                start = network.offsets[read.storage]
                stop = start + network.storages[read.storage].size_bytes
                after(clock, gpu, start, stop, op)
    require(layer == len(network.layers), f"{who}: {layer} of {len(network.layers)} layers run")


def _reader_gpu(plan: Plan, network: Network, storage: int, access: Access) -> int | None:
    """The GPU in whose memory a read finds its bytes, None where it needs no copy."""
    if access is Access.COPIED:
        return plan.target
    if access is Access.PEER:
        return plan.holder(network, storage)
    return None
