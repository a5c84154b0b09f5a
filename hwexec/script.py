"""What the host thread does in a start, as calls without arguments that are made once: a start only makes them.

`Head`: copies issued one by one ahead of a graph, so that its launch hides behind them. `Script`: an eager start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hwexec.device import Device, Event, Ready, Stream
from sim.ops import HOST, Copy, Op, Record, Run, Wait


@dataclass(frozen=True, slots=True)
class Move:
    """A Copy made ready: bytes of arenas as tensors of the stream's device, and the call that copies them."""

    destination: torch.Tensor
    source: torch.Tensor
    issue: Ready


class Head:
    """The calls of `ops`, a program's first; `graph` has its others. Every call is another start and records events anew.

    `opening` are those of `ops` that are launched together, as the first part of the graph: `copies` are the calls before that,
    `later` those behind it, and where there is no opening all are `copies`.
    `fork` holds the copy streams back until the compute stream is there; a start on an idle device needs none of it.
    `events` are what the graph waits for, by their numbers in the program, and `ends`, by stream, what the copies that the
    graph makes on such a stream stand behind. All have been recorded once, so that a capture finds them. `loose` are
    those of `ends` that stand behind copies which nothing in the graph waits for.
    """

    def __init__(
        self,
        device: Device,
        ops: Sequence[Op],
        streams: Mapping[str, Stream],
        moves: Mapping[int, Move],
        compute: Stream,
        graph: Sequence[Op],
        opening: range = range(0),
    ) -> None:
        self.opened = bool(opening)
        self.events: dict[int, Event] = {op.event: device.event() for op in ops if isinstance(op, Record)}
        last = {op.stream: op for index, op in enumerate(ops) if index not in opening}
        open_ended = {name for name, op in last.items() if isinstance(op, Copy)}
        goes_on = {op.stream for op in graph}
        self.ends = {name: device.event() for name in last if name in open_ended or name in goes_on}
        self.loose = [event for name, event in self.ends.items() if name in open_ended - goes_on]
        self._start = device.event()
        self.fork = [device.ready_record(compute, self._start)]
        self.fork += [device.ready_wait(streams[name], self._start) for name in last]
        self.copies: list[Ready] = []
        self.later: list[Ready] = []
        calls = self.copies
        for index, op in enumerate(ops):
            if index in opening:
                calls = self.later
                continue
            calls.append(_ready(device, op, streams, moves.get(index), self.events))
            if isinstance(op, Record):
                device.record(streams[op.stream], self.events[op.event])
        for name, event in self.ends.items():
            calls.append(device.ready_record(streams[name], event))
            device.record(streams[name], event)


class Script:
    """The calls of an eager program by operation, but for layers and the host's own waits; `events` are for these.

    `fork` puts the copy streams behind the compute stream, `join` it behind them. Every start records the events anew.
    """

    def __init__(
        self,
        device: Device,
        ops: Sequence[Op],
        streams: Mapping[str, Stream],
        moves: Mapping[int, Move],
        compute: Stream,
    ) -> None:
        self.events: dict[int, Event] = {op.event: device.event() for op in ops if isinstance(op, Record)}
        self.calls = {
            index: _ready(device, op, streams, moves.get(index), self.events)
            for index, op in enumerate(ops)
            if not isinstance(op, Run) and op.stream != HOST
        }
        others = [streams[name] for name in dict.fromkeys(op.stream for op in ops if op.stream != HOST)]
        others = [stream for stream in others if stream is not compute]
        start = device.event()
        self.fork = [device.ready_record(compute, start)] if others else []
        self.fork += [device.ready_wait(stream, start) for stream in others]
        self.join: list[Ready] = []
        for stream in others:
            done = device.event()
            self.join += [device.ready_record(stream, done), device.ready_wait(compute, done)]


def _ready(
    device: Device,
    op: Op,
    streams: Mapping[str, Stream],
    move: Move | None,
    events: Mapping[int, Event],
) -> Ready:
    """The call of an operation that is no layer's and not the host's; `move` where it is a copy."""
    if move is not None:
        return move.issue
    assert isinstance(op, Record | Wait)
    ready = device.ready_record if isinstance(op, Record) else device.ready_wait
    return ready(streams[op.stream], events[op.event])


def do(calls: Sequence[Ready]) -> None:
    for call in calls:
        call()
