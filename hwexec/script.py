"""The head of a cold start: copies that the host issues one by one ahead of the graph, so that its launch hides behind them.

What a start does is a list of calls without arguments, made once: the host thread only makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hwexec.device import Device, Event, Ready, Stream
from hwexec.walk import Move
from sim.program import Copy, Op, Record, Wait


class Head:
    """The calls of the program's first operations. Every call of them is another start; events are recorded anew each time.

    `fork` holds the copy streams back until the compute stream is there; a start on an idle device needs none of it.
    `copies` is what stands on copy streams; `join`, behind all of it, lets the compute stream wait.
    """

    def __init__(
        self,
        device: Device,
        ops: Sequence[Op],
        streams: Mapping[str, Stream],
        moves: Mapping[int, Move],
        compute: Stream,
    ) -> None:
        events: dict[int, Event] = {op.event: device.event() for op in ops if isinstance(op, Record)}
        start = device.event()
        names = dict.fromkeys(op.stream for op in ops if op.stream != compute.name)
        self.fork = [device.ready_record(compute, start)]
        self.fork += [device.ready_wait(streams[name], start) for name in names]
        self.copies: list[Ready] = []
        self.join: list[Ready] = []
        for index, op in enumerate(ops):
            calls = self.join if op.stream == compute.name else self.copies
            if isinstance(op, Copy):
                calls.append(moves[index].issue)
            elif isinstance(op, Record):
                calls.append(device.ready_record(streams[op.stream], events[op.event]))
            elif isinstance(op, Wait):
                calls.append(device.ready_wait(streams[op.stream], events[op.event]))
        self._kept = (events, start)


def do(calls: Sequence[Ready]) -> None:
    for call in calls:
        call()
