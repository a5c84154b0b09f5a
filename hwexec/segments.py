"""A cold start in segments: copies issued one by one, and between two waits of the compute stream one captured graph.

What a start does is a list of calls without arguments, made once: the host thread only makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hwexec.device import Device, Event, Graph, Ready, Stream
from hwexec.walk import Move
from sim.errors import require
from sim.program import HOST, Copy, Op, Program, Record, Run, Wait


def first_layers(ops: Sequence[Op]) -> tuple[int, ...]:
    """The layers that begin a segment: a segment is a run of layers with nothing else between them."""
    found = []
    for at, op in enumerate(ops):
        if isinstance(op, Run) and (at == 0 or not isinstance(ops[at - 1], Run)):
            found.append(op.layer)
    return tuple(found)


def unwaited(ops: Sequence[Op], compute: str) -> tuple[str, ...]:
    """Streams whose last copy the compute stream has not waited for when all layers have run."""
    clocks: dict[str, dict[str, int]] = {}
    events: dict[int, dict[str, int]] = {}
    last: dict[str, int] = {}
    for at, op in enumerate(ops):
        clock = clocks.setdefault(op.stream, {})
        if isinstance(op, Copy):
            clock[op.stream] = last[op.stream] = at
        elif isinstance(op, Record):
            events[op.event] = dict(clock)
        elif isinstance(op, Wait):
            for stream, seen in events[op.event].items():
                clock[stream] = max(clock.get(stream, -1), seen)
    known = clocks.get(compute, {})
    return tuple(stream for stream, at in last.items() if known.get(stream, -1) < at)


class Script:
    """The calls of one cold start. Every call of it is another start; events are recorded anew each time.

    `fork` holds the copy streams back until the compute stream is there; a start on an idle device needs none of it.
    `lead` has the first copy of each stream, as far as the program begins with them: what a start does ahead of its inputs.
    """

    def __init__(
        self,
        device: Device,
        program: Program,
        streams: Mapping[str, Stream],
        moves: Mapping[int, Move],
        compute: Stream,
        graphs: Sequence[Graph],
    ) -> None:
        ops = program.ops
        first = first_layers(ops)
        require(
            len(graphs) == len(first),
            f"{program.network.model}: {len(graphs)} segments were captured, but the plan has {len(first)}",
        )
        launches = dict(zip(first, graphs, strict=True))
        names = dict.fromkeys(op.stream for op in ops if op.stream not in (HOST, compute.name))
        events: dict[int, Event] = {op.event: device.event() for op in ops if isinstance(op, Record)}
        start = device.event()
        self._kept = (events, start)
        self.fork = [device.ready_record(compute, start)]
        self.fork += [device.ready_wait(streams[name], start) for name in names]
        calls: list[Ready] = []
        lead, started = -1, set[str]()
        for index, op in enumerate(ops):
            if lead < 0 and (op.stream == compute.name or (isinstance(op, Copy) and op.stream in started)):
                lead = len(calls)
            if isinstance(op, Copy):
                started.add(op.stream)
                calls.append(moves[index].issue)
            elif isinstance(op, Record):
                calls.append(device.ready_record(streams[op.stream], events[op.event]))
            elif isinstance(op, Wait):
                calls.append(device.ready_wait(streams[op.stream], events[op.event]))
            elif op.layer in launches and not launches[op.layer].empty:
                calls.append(launches[op.layer].replay)
        lead = len(calls) if lead < 0 else lead
        self.lead, self.rest = calls[:lead], calls[lead:]
        for name in unwaited(ops, compute.name):
            done = device.event()
            self.rest += [device.ready_record(streams[name], done), device.ready_wait(compute, done)]


def do(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
