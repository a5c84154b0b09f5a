"""Cases of whole graphs: what a launch costs the host, a start beyond its copies, and a first replay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from calibrate.bench import KIB, UNTRUSTED, Bench, Case, in_turn, pusher
from calibrate.links import Enqueue, h2d_label, p2p_label
from calibrate.overheads import HOOKED_WIDTH, SHORT, SMALL, Chain, bare_host, linears
from calibrate.samples import Point
from calibrate.ways import everything
from hwexec.device import Device, Event, Stream, forked
from hwexec.executor import ColdStart
from hwexec.starts import Starts, kept, take
from hwexec.timing import Mismatch, call_ns, time_ns, wall_ns
from sim.draft import evenly
from sim.plan import Access, Chunk

LAUNCH_COPY_BYTES = 256 * KIB
"""Of each copy in a graph whose launch is measured: as plans have them, if not as large."""
WAITED_NS = 3e6
"""How long the host waits for a GPU ahead of each start that is timed, since it has waited for the last one. A call that it made
longer ago takes longer: 73 plans of two networks took the host 60 us more to issue for each time that their starts were e times as
long, 1.6 to 15 ms (results/h100-pair-3/trials/waited.txt)."""


def launch(bench: Bench) -> tuple[Point, ...]:
    """Graphs of kernels alone ("graph"): from an idle device until all is done, on the host's clock, less what it takes behind
    a gate. Others ("call"): the host thread's call until it returns. Kernels may begin later, and cost it nothing; what copies,
    waits and edges add to it is all that is used.

    `count` is kernels, `copies` both hops of a relay, `edges` waits between devices, `waits` those for a head. Each varies apart
    from the others, between what plans have.
    """
    chain = Chain(bench, SHORT)
    size = min(LAUNCH_COPY_BYTES, bench.effort.largest_bytes // 64)
    partner = pusher(bench)
    _, few, many, most = bench.effort.kernels
    alone, some, several, _ = bench.effort.copies
    shapes = [(kernels, 0, 0, 0) for kernels in bench.effort.kernels]
    shapes += [(many, own, 0, 0) for own in bench.effort.copies]
    shapes += [(many, 0, 0, ahead) for ahead in (some, several)]
    shapes += [(few, some, 0, 0), (few, several, 0, 0), (most, several, 0, some)]
    if partner is not None:
        shapes += [(many, 0, relayed, 0) for relayed in (alone, some, several)]
        shapes += [(few, 0, some, 0), (most, some, several, some)]
    found = []
    for kernels, own, relayed, ahead in shapes:
        if own or relayed:
            bench.poison(0)
        body, bring = _program(bench, chain, kernels, own, relayed, partner, ahead, size)
        with bench.device.capture(chain.stream) as graph:
            body()
        bare = not (own or relayed or ahead)
        repeats = 2 * bench.effort.repeats
        with bench.device.on(chain.stream):
            # as a cold start finds it: arenas just filled, and the host's caches with something else in them
            before = partial(_as_behind_a_start, bench.device, chain.stream, partial(bench.poison, 0))
            if bare:
                idle = wall_ns(graph.replay, bench.device, gpu=0, repeats=repeats, before=before)
            else:
                called = call_ns(graph.replay, bench.device, repeats=repeats, before=before)
        if bare:
            behind = time_ns(graph.replay, bench.device, [chain.stream], repeats=bench.effort.repeats)
        graph.close()
        bench.verify(
            bench.arena(0)[:bring], bench.host.tensor[:bring], f"graph of {own} and {relayed} copies"
        )
        if bare:
            taken = tuple(max(1.0, sample - behind.median_ns) for sample in idle.raw)
            found.append(Point("graph", 0, kernels, taken))
            continue
        copies = own + 2 * relayed
        found.append(Point("call", 0, kernels, called.raw, edges=relayed, copies=copies, waits=ahead))
    return tuple(found)


STARTED_LAYERS, STARTED_WIDTH, START_ROUNDS = 8, 512, 4


def start(bench: Bench) -> tuple[Point, ...]:
    """A start of the executor's own, all of whose time goes into one copy: on the host's clock, less what it takes behind a gate.

    With the copy ahead of the graph that is the way to it and back from the answer; with the copy in the graph, also
    the launch as far as its first copy. Each start is made as `hwexec verify` makes it, arenas filled and the last answer
    compared before: the driver's calls take longest where the host has just done something else.
    """
    built, network = linears(STARTED_LAYERS, STARTED_WIDTH if bench.device.figures else HOOKED_WIDTH)
    plan = everything(network, Access.COPIED)
    plan = replace(plan, chunks=(Chunk(0, network.arena_bytes, (0,)),))
    plans = {"copy ahead": replace(plan, head=1), "copy in the graph": replace(plan, head=0)}
    taken = in_turn(
        built,
        network,
        bare_host(),
        bench.device,
        plans,
        START_ROUNDS,
        lambda cold, given: beyond_a_gate(cold, given, _evicted(bench, cold), bench.effort.repeats),
    )
    return tuple(Point(label, network.arena_bytes, 1, samples) for label, samples in taken.items())


HEAD_CHUNKS = (4, 24)
HEAD_WIDTH = 2048
"""Of one layer of weights, so that the fewest chunks are as large as plans have them."""


def head(bench: Bench) -> tuple[Point, ...]:
    """Starts whose whole arena is a head of few chunks or of many, until the host has issued all: over the own lane ("head own"),
    and relayed ("head relayed"). The one layer waits for the last chunk alone, so that more chunks are more calls of the head
    and nothing else: a copy each, or two copies, a record and a wait.

    Loops of one call (case `issue`) find all that it needs in the core's caches; a start makes each of its calls once.
    """
    built, network = linears(1, HEAD_WIDTH if bench.device.figures else 2 * HOOKED_WIDTH)
    partner = pusher(bench)
    paths = {"head own": (0,)} | ({} if partner is None else {"head relayed": (partner, 0)})
    plan = everything(network, Access.COPIED)
    plans = {}
    for label, path in paths.items():
        for count in HEAD_CHUNKS:
            chunks = tuple(Chunk(a, b, path) for a, b in evenly((0, network.arena_bytes), count))
            plans[label, count] = replace(plan, chunks=chunks, head=count)
    taken = in_turn(
        built,
        network,
        bare_host(partner),
        bench.device,
        plans,
        START_ROUNDS,
        lambda cold, given: cold_starts(cold, given, _evicted(bench, cold), bench.effort.repeats).issued.raw,
    )
    return tuple(
        Point(label, network.arena_bytes // count, 1, samples, copies=count * len(paths[label]))
        for (label, count), samples in taken.items()
    )


def cold_starts(
    cold: ColdStart, inputs: tuple[torch.Tensor, ...], before: Callable[[], None], repeats: int
) -> Starts:
    """As `hwexec verify` makes them. Mismatch where an answer is not the resident run's."""
    reference = kept(cold.resident(*inputs))
    starts = take(partial(cold, *inputs), cold.device, cold.plan.target, reference, before, repeats)
    if not starts.worst.bit_equal:
        raise Mismatch(UNTRUSTED)
    return starts


def beyond_a_gate(
    cold: ColdStart, inputs: tuple[torch.Tensor, ...], evict: Callable[[], None], repeats: int
) -> list[float]:
    """Cold starts on the host's clock, nanoseconds each, less what they take where the host has done its part before."""
    device, stream = cold.device, cold.device.stream("calibrate", 0)
    behind: list[float] = []

    def before() -> None:
        # in turn: a GPU raises its clocks under load, and is not the same a moment later
        behind.extend(time_ns(partial(cold, *inputs), device, [stream], repeats=1, warmup=0).raw)
        evict()

    try:
        starts = cold_starts(cold, inputs, before, repeats)
    finally:
        device.close_stream(stream)
    own = statistics.median(behind[1:])  # the first warms up
    return [max(1.0, sample - own) for sample in starts.samples.raw]


def _evicted(bench: Bench, cold: ColdStart) -> Callable[[], None]:
    """What makes the next start cold, and finds the host as it does."""
    return partial(_as_behind_a_start, bench.device, bench.stream("compute:0", 0), cold.evict)


def _as_behind_a_start(device: Device, stream: Stream, prepare_next: Callable[[], None]) -> None:
    """Wait for the GPU as long as for a start, then prepare the next one."""
    if device.figures:
        device.gate(stream, WAITED_NS)
        device.synchronize()
    prepare_next()


def first_replay(bench: Bench) -> tuple[Point, ...]:
    """The first launch of a fresh graph beside the second, on the host's clock: what its upload costs once."""
    chain = Chain(bench)
    found = []
    for own in bench.effort.chains:
        times: list[list[float]] = [[], []]
        for _ in range(bench.effort.repeats):
            body, _ = _program(bench, chain, own, own, 0, None)
            with bench.device.capture(chain.stream) as graph:
                body()
            for which in times:
                bench.device.synchronize()
                with bench.device.on(chain.stream):
                    began = time.perf_counter_ns()
                    graph.replay()
                bench.device.synchronize()
                which.append(float(time.perf_counter_ns() - began))
            graph.close()
        found += [
            Point(label, 0, 4 * own, tuple(t)) for label, t in zip(("first", "second"), times, strict=True)
        ]
    return tuple(found)


def _program(
    bench: Bench,
    chain: Chain,
    kernels: int,
    own: int,
    relayed: int,
    partner: int | None,
    ahead: int = 0,
    size: int = SMALL,
) -> tuple[Enqueue, int]:
    """What a plan's graph is made of, and the bytes of the arena that it brings.

    `own` chunks of `size` bytes over the own lane, `relayed` ones over a partner's and pushed from there, and kernels that wait for
    them and for `ahead` copies of a head, evenly spread.
    """
    device = bench.device
    host, arena = bench.host.tensor, bench.arena(0)
    engine = bench.stream(h2d_label(0), 0)
    outside = [device.event() for _ in range(ahead)]
    for event in outside:
        device.record(engine, event)
    streams = [engine] if own else []
    far = push = engine
    away = there = arena
    if relayed and partner is not None:
        far = bench.stream(h2d_label(partner), partner)
        push = bench.stream(p2p_label(partner, 0), partner)
        away, there = bench.arena(partner), bench.pushed_view(partner, 0)
        streams += [far, push]
    parts = [slice(at * size, (at + 1) * size) for at in range(own + relayed)]

    def record(stream: Stream) -> Event:
        event = device.event()
        device.record(stream, event)
        return event

    def body() -> None:
        ready: list[Event] = []
        with device.on(chain.stream), forked(device, chain.stream, streams):
            for part in parts[:own]:
                device.copy(engine, arena[part], host[part])
                ready.append(record(engine))
            for part in parts[own:]:
                device.copy(far, away[part], host[part])
                device.wait(push, record(far))
                device.copy(push, there[part], away[part])
                ready.append(record(push))
            for kernel in range(kernels):
                for events, wait in ((ready, device.wait), (outside, device.wait_outside)):
                    for event in events[_due(kernel, kernels, events) : _due(kernel + 1, kernels, events)]:
                        wait(chain.stream, event)
                chain.kernel()

    return body, len(parts) * size


def _due(kernel: int, kernels: int, events: Sequence[Event]) -> int:
    """How many of the events are waited for before a kernel."""
    return -(-kernel * len(events) // kernels)


LAUNCH_CASES = (
    Case(
        "launch",
        "graph launch by kernels, copies, waits for a head and edges between devices",
        launch,
        seconds=5,
        second_look="steadier",
    ),
    Case("start", "a whole start by graph beyond its copy", start, seconds=1),
    Case("head", "host thread to issue the chunks of a head, in starts", head, seconds=3),
    Case("first-replay", "first launch of a fresh graph", first_replay, seconds=3),
)
