"""Overhead cases: what it costs the host to issue, a stream to wait, and a graph to start."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from calibrate.bench import KIB, MIB, Bench, Case, peers, several_gpus
from calibrate.links import h2d_label, p2p_label
from calibrate.samples import Point
from hwexec.device import Event, Stream, forked
from hwexec.timing import time_ns

SMALL = 4 * KIB
KERNEL_BYTES = 16 * MIB
"""Memory that a chain's kernel adds 1 to: large enough that a 4 KiB copy is always done before the next kernel is."""
LEAD = 4
"""Kernels of a chain before its first wait."""


class Chain:
    """Kernels on GPU 0's compute stream that take a few microseconds each."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.stream = bench.stream("compute:0", 0)
        size = min(KERNEL_BYTES, bench.effort.largest_bytes // 2)
        self.data = bench.arena(0)[-size:].view(torch.int32)

    def kernel(self) -> None:
        """Runs on the current stream."""
        self.data.add_(1)


def issue(bench: Bench) -> tuple[Point, ...]:
    """Host thread, per call, while the GPU is held so that nothing it does can hold up the host."""
    device, count = bench.device, 100
    compute, engine = bench.stream("compute:0", 0), bench.stream(h2d_label(0), 0)
    to, source = bench.arena(0)[:SMALL], bench.host.tensor[:SMALL]
    event = device.event()
    linear = torch.nn.Linear(64, 64).to(device.torch_device(0)).requires_grad_(False)
    row = torch.ones(1, 64, device=device.torch_device(0))

    def layer() -> None:
        linear(row)

    calls: tuple[tuple[str, Callable[[], None]], ...] = (
        ("issue copy", lambda: device.copy(engine, to, source)),
        ("issue record", lambda: device.record(compute, event)),
        ("issue wait", lambda: device.wait(compute, event)),
        ("issue kernel", layer),
    )
    device.record(compute, event)
    found = []
    for label, call in calls:
        samples = []
        for index in range(bench.effort.repeats + 1):
            device.synchronize()
            for stream in (compute, engine):
                device.gate(stream, 3e6)
            with device.on(compute):
                began = time.perf_counter_ns()
                for _ in range(count):
                    call()
                took = time.perf_counter_ns() - began
            if index:
                samples.append(float(took))
        found.append(Point(label, 0, count, tuple(samples)))
    device.synchronize()
    return tuple(found)


def answer(bench: Bench) -> tuple[Point, ...]:
    """A kernel, an event and the host waiting for it: what a round takes beyond the kernel and its issue."""
    device, chain = bench.device, Chain(bench)
    event = device.event()

    def rounds(count: int) -> float:
        """Nanoseconds of `count` rounds, from an idle device."""
        device.synchronize()
        with device.on(chain.stream):
            began = time.perf_counter_ns()
            for _ in range(count):
                chain.kernel()
                device.record(chain.stream, event)
                device.wait_on_host(event)
            return float(time.perf_counter_ns() - began)

    rounds(3)
    found = [
        Point("rounds", 0, count, tuple(rounds(count) for _ in range(2 * bench.effort.repeats)))
        for count in (1, 20)
    ]
    found.append(bench.timed("kernel", [chain.stream], chain.kernel))
    samples = []
    for _ in range(bench.effort.repeats):
        device.gate(chain.stream, 1e6)
        with device.on(chain.stream):
            began = time.perf_counter_ns()
            for _ in range(50):
                chain.kernel()
            samples.append(float(time.perf_counter_ns() - began))
        device.synchronize()
    found.append(Point("issue", 0, 50, tuple(samples)))
    return tuple(found)


def waits(bench: Bench, gpu: int, graph: bool) -> tuple[Point, ...]:
    """Chains of kernels, some of them behind a wait for a 4 KiB copy of `gpu` that is long done by then.

    Every chain makes the same copies and events; what differs is how many of them its kernels wait for.
    """
    device, chain = bench.device, Chain(bench)
    engine = bench.stream(h2d_label(gpu), gpu)
    most = max(bench.effort.chains[:2])
    copies = [
        (bench.arena(gpu)[at * SMALL : (at + 1) * SMALL], bench.host.tensor[at * SMALL : (at + 1) * SMALL])
        for at in range(most)
    ]
    events = [device.event() for _ in copies]

    def body(kernels: int, waited: int) -> None:
        with forked(device, chain.stream, [engine]):
            for (to, source), event in zip(copies, events, strict=True):
                device.copy(engine, to, source)
                device.record(engine, event)
            every = most // waited if waited else kernels + LEAD
            for at in range(-LEAD, kernels):
                if at >= 0 and at < most and waited and at % every == 0:
                    device.wait(chain.stream, events[at])
                chain.kernel()

    def on_stream(kernels: int, waited: int) -> None:
        with device.on(chain.stream):
            body(kernels, waited)

    where = "graph" if graph else "stream"
    found = []
    for kernels, waited in ((most, 0), (2 * most, 0), (most, most // 4), (most, most // 2), (most, most)):
        enqueue = lambda k=kernels, w=waited: on_stream(k, w)  # noqa: E731
        take = bench.captured if graph else bench.timed
        label = f"wait {'same' if gpu == 0 else 'cross'} {where}"
        found.append(take(label, [chain.stream], enqueue, count=kernels + LEAD, edges=waited))
    return tuple(found)


def launch(bench: Bench) -> tuple[Point, ...]:
    """Graphs launched on an idle device less the same graphs launched behind a gate: what comes before their first node.

    `count` is operations as a program counts them (a copy, its record, a wait, a run), `edges` those between devices.
    """
    chain = Chain(bench)
    small, middle, large = bench.effort.chains
    partner = next((s for s, d in peers(bench) if d == 0), None)
    shapes = [(1, 0), (small, 0), (middle, 0), (large, 0)]
    if partner is not None:
        shapes += [(small, small // 2), (0, small), (middle, small), (0, middle)]
    found = []
    for own, relayed in shapes:
        body = _program(bench, chain, own, relayed, partner)
        with bench.device.capture(chain.stream) as graph:
            body()
        behind = time_ns(graph.replay, bench.device, [chain.stream], repeats=bench.effort.repeats)
        idle = time_ns(graph.replay, bench.device, [chain.stream], repeats=bench.effort.repeats, gate=False)
        graph.close()
        taken = tuple(max(1.0, sample - behind.median_ns) for sample in idle.raw)
        found.append(Point("launch", 0, 4 * own + 7 * relayed, taken, edges=relayed))
    return tuple(found)


def first_replay(bench: Bench) -> tuple[Point, ...]:
    """The first launch of a fresh graph beside the second, on the host's clock: what its upload costs once."""
    chain = Chain(bench)
    found = []
    for own in bench.effort.chains:
        times: list[list[float]] = [[], []]
        for _ in range(bench.effort.repeats):
            body = _program(bench, chain, own, 0, None)
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


def _program(bench: Bench, chain: Chain, own: int, relayed: int, partner: int | None) -> Callable[[], None]:
    """What a plan's graph is made of: `own` chunks over the own lane and `relayed` ones over a partner's, a kernel each."""
    device = bench.device
    engine = bench.stream(h2d_label(0), 0)
    streams: list[Stream] = [engine]
    far, landing = engine, engine
    host, arena = bench.host.tensor, bench.arena(0)
    away = there = arena
    if relayed and partner is not None:
        far = bench.stream(h2d_label(partner), partner)
        landing = bench.stream(p2p_label(partner, 0), 0)
        away = bench.arena(partner)
        there = device.view(away, 0, away)
        streams += [far, landing]

    def parts(start: int, count: int) -> list[slice]:
        return [slice(at * SMALL, (at + 1) * SMALL) for at in range(start, start + count)]

    def record(stream: Stream) -> Event:
        event = device.event()
        device.record(stream, event)
        return event

    def body() -> None:
        ready: list[Event] = []
        with device.on(chain.stream), forked(device, chain.stream, streams):
            for part in parts(0, own):
                device.copy(engine, arena[part], host[part])
                ready.append(record(engine))
            for part in parts(own, relayed):
                device.copy(far, away[part], host[part])
                device.wait(landing, record(far))
                device.copy(landing, arena[part], there[part])
                ready.append(record(landing))
            for event in ready:
                device.wait(chain.stream, event)
                chain.kernel()

    return body


OVERHEAD_CASES = (
    Case("issue", "host thread to issue a copy, an event, a wait, a layer", issue, seconds=1),
    Case("answer", "host thread from a kernel's end until it knows", answer, seconds=1),
    Case(
        "wait-stream", "waits on the same device, issued in a stream", lambda b: waits(b, 0, False), seconds=1
    ),
    Case("wait-graph", "waits on the same device, in a graph", lambda b: waits(b, 0, True), seconds=1),
    Case(
        "wait-cross-stream",
        "waits on another device, in a stream",
        lambda b: waits(b, 1, False),
        several_gpus,
        seconds=1,
    ),
    Case(
        "wait-cross-graph",
        "waits on another device, in a graph",
        lambda b: waits(b, 1, True),
        several_gpus,
        seconds=1,
    ),
    Case("launch", "graph launch by operations and by edges between devices", launch, seconds=3),
    Case("first-replay", "first launch of a fresh graph", first_replay, seconds=3),
)
