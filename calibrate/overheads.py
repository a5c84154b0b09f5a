"""Overhead cases: what it costs the host to issue, a stream to wait, and a graph to start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial

import torch

from calibrate.bench import KIB, MIB, Bench, Case, never, peers, several_gpus
from calibrate.layers import idle_and_gated
from calibrate.links import Enqueue, h2d_label, p2p_label
from calibrate.samples import Point
from calibrate.ways import everything
from hwexec.device import Event, Ready, Stream, forked
from hwexec.executor import prepare
from hwexec.pace import issue_ns
from hwexec.timing import at_pace, call_ns, time_ns, wall_ns
from sim.host import Costs, Figure, Gpu, Host, Link
from sim.models import Built
from sim.network import Network
from sim.plan import Access, Chunk, Launch
from sim.trace import trace

SMALL = 4 * KIB
KERNEL_BYTES = 16 * MIB
"""Memory that a chain's kernel adds 1 to: large enough that a 4 KiB copy is always done before the next kernel is."""
LAUNCH_BYTES = 64 * KIB
"""The same where launches are found: as short as a kernel can be, since what is left is a difference of two times."""
LAUNCH_COPY_BYTES = 256 * KIB
"""Of each copy in a graph whose launch is measured: as plans have them, if not as large."""
LEAD = 4
"""Kernels of a chain before its first wait."""


class Chain:
    """Kernels on GPU 0's compute stream that take a few microseconds each, or less."""

    def __init__(self, bench: Bench, size: int = KERNEL_BYTES) -> None:
        self.bench = bench
        self.stream = bench.stream("compute:0", 0)
        size = min(size, bench.effort.largest_bytes // 2)
        self.data = bench.arena(0)[-size:].view(torch.int32)

    def kernel(self) -> None:
        """Runs on the current stream."""
        self.data.add_(1)


def issue(bench: Bench) -> tuple[Point, ...]:
    """Host thread, per call made ready as heads and eager starts do, while the GPU is held so that it cannot hold up the host."""
    device, count = bench.device, 100
    compute, engine = bench.stream("compute:0", 0), bench.stream(h2d_label(0), 0)
    to, source = bench.arena(0)[:SMALL], bench.host.tensor[:SMALL]
    event = device.event()
    linear = torch.nn.Linear(64, 64).to(device.torch_device(0)).requires_grad_(False)
    row = torch.ones(1, 64, device=device.torch_device(0))

    def layer() -> None:
        linear(row)

    calls: tuple[tuple[str, Ready], ...] = (
        ("issue copy", device.ready_copy(engine, to, source)),
        ("issue record", device.ready_record(compute, event)),
        ("issue wait", device.ready_wait(compute, event)),
        ("issue kernel", layer),
    )
    device.record(compute, event)
    found = []
    for label, call in calls:
        samples = []
        for index in range(bench.effort.repeats + 1):
            device.synchronize()
            at_pace()
            took = issue_ns(device, (compute, engine), call, count)
            if index:
                samples.append(took)
        found.append(Point(label, 0, count, tuple(samples)))
    device.synchronize()
    return tuple(found)


HOOKED_LAYERS, HOOKED_WIDTH = 64, 32


def hook(bench: Bench) -> tuple[Point, ...]:
    """The executor's own eager calls on small layers: with a chunk issued ahead of each, and with nothing to issue."""
    device, host = bench.device, _bare_host()
    built, network = _linears(HOOKED_LAYERS, HOOKED_WIDTH)
    given = built.inputs_on(device.torch_device(0))
    chunks = []
    for layer in network.layers:
        spans = [(network.offsets[r.storage], network.storages[r.storage].size_bytes) for r in layer.reads]
        chunks.append(Chunk(min(at for at, _ in spans), max(at + size for at, size in spans), (0,)))
    plans = {
        "hooked": replace(everything(network, Access.COPIED, launch=Launch.EAGER), chunks=tuple(chunks)),
        "unhooked": everything(network, Access.RESIDENT, launch=Launch.EAGER),
    }
    samples: dict[str, list[float]] = {label: [] for label in plans}
    for index in range(2 * bench.effort.repeats + 2):
        # in turn: a host's pace drifts. A module can be prepared for one plan at a time
        for label, plan in plans.items():
            with prepare(built.module, plan, given, network=network, host=host, device=device) as cold:
                for _ in range(2):
                    device.synchronize()
                    at_pace()
                    began = time.perf_counter_ns()
                    cold(*given)
                    took = time.perf_counter_ns() - began
                device.synchronize()
            if index >= 2:
                samples[label].append(float(took))
    return tuple(Point(label, 0, len(network.layers), tuple(taken)) for label, taken in samples.items())


def _linears(layers: int, width: int) -> tuple[Built, Network]:
    """A small network of our own."""
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    built = Built(module.eval().requires_grad_(False), (torch.ones(1, width),), 1, "fp32", None, "linears")
    return built, trace(built).network


def _bare_host() -> Host:
    """Enough of a host to lower a plan for one GPU; nothing is predicted with it."""
    nothing = Figure(1.0, "assumed", "never used")
    costs = Costs(**{field.name: nothing for field in fields(Costs)})
    return Host("bare", "", (Gpu(0, "GPU", 2**40, ("pcie",)),), (Link("pcie", nothing),), (), costs)


def answer(bench: Bench) -> tuple[Point, ...]:
    """A kernel, an event and the host waiting for it: what a round takes beyond the kernel and its issue."""
    device, chain = bench.device, Chain(bench)
    event = device.event()

    def rounds(count: int) -> float:
        """Nanoseconds of `count` rounds, from an idle device."""
        device.synchronize()
        at_pace()
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
        at_pace()
        device.gate(chain.stream, 1e6)
        with device.on(chain.stream):
            began = time.perf_counter_ns()
            for _ in range(50):
                chain.kernel()
            samples.append(float(time.perf_counter_ns() - began))
        device.synchronize()
    found.append(Point("issue", 0, 50, tuple(samples)))
    return tuple(found)


def waits(bench: Bench, gpu: int, how: str) -> tuple[Point, ...]:
    """Chains of kernels, some of them behind a wait for a 4 KiB copy of `gpu` that is long done by then.

    `how`: in a "stream", in a "graph" that holds the copies too, or in one whose "head" they are. Every chain makes the
    same copies and events; what differs is how many of them its kernels wait for.
    """
    device, chain = bench.device, Chain(bench)
    engine = bench.stream(h2d_label(gpu), gpu)
    most = max(bench.effort.chains[:2])
    copies = [
        (bench.arena(gpu)[at * SMALL : (at + 1) * SMALL], bench.host.tensor[at * SMALL : (at + 1) * SMALL])
        for at in range(most)
    ]
    events = [device.event() for _ in copies]

    wait = device.wait_outside if how == "head" else device.wait

    def bring() -> None:
        for (to, source), event in zip(copies, events, strict=True):
            device.copy(engine, to, source)
            device.record(engine, event)

    def body(kernels: int, waited: int) -> None:
        with forked(device, chain.stream, [] if how == "head" else [engine]):
            if how != "head":
                bring()
            every = most // waited if waited else kernels + LEAD
            for at in range(-LEAD, kernels):
                if at >= 0 and at < most and waited and at % every == 0:
                    wait(chain.stream, events[at])
                chain.kernel()

    def on_stream(kernels: int, waited: int) -> None:
        with device.on(chain.stream):
            body(kernels, waited)

    if how == "head":
        bring()
    found = []
    for kernels, waited in ((most, 0), (2 * most, 0), (most, most // 4), (most, most // 2), (most, most)):
        enqueue = lambda k=kernels, w=waited: on_stream(k, w)  # noqa: E731
        take = bench.timed if how == "stream" else bench.captured
        label = f"wait {'same' if gpu == 0 else 'cross'} {how}"
        found.append(take(label, [chain.stream], enqueue, count=kernels + LEAD, edges=waited))
    return tuple(found)


def launch(bench: Bench) -> tuple[Point, ...]:
    """Graphs of kernels alone ("graph"): from an idle device until all is done, on the host's clock, less what it takes behind
    a gate. Others ("call"): the host thread's call until it returns. Kernels may begin later, and cost it nothing; what copies,
    waits and edges add to it is all that is used.

    `count` is kernels, `copies` both hops of a relay, `edges` waits between devices, `waits` those for a head. Each varies apart
    from the others, between what plans have.
    """
    chain = Chain(bench, LAUNCH_BYTES)
    size = min(LAUNCH_COPY_BYTES, bench.effort.largest_bytes // 64)
    partner = next((s for s, d in peers(bench) if d == 0), None)
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
            before = partial(bench.poison, 0)
            if bare:
                idle = wall_ns(graph.replay, bench.device, repeats=repeats, before=before)
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


STARTED_LAYERS, STARTED_WIDTH, START_ROUNDS = 8, 1024, 4


def start(bench: Bench) -> tuple[Point, ...]:
    """A start of the executor's own, all of whose time goes into one copy: from idle on the host's clock, less behind a gate.

    With the copy ahead of the graph that is the way to it and back from the answer; with the copy in the graph, also
    the launch as far as its first copy.
    """
    device = bench.device
    built, network = _linears(STARTED_LAYERS, STARTED_WIDTH if device.figures else HOOKED_WIDTH)
    given = built.inputs_on(device.torch_device(0))
    plan = everything(network, Access.COPIED)
    plan = replace(plan, chunks=(Chunk(0, network.arena_bytes, (0,)),))
    taken: dict[str, list[float]] = {"copy ahead": [], "copy in the graph": []}
    for _ in range(START_ROUNDS):  # in turn, as for hooks
        for label, head in zip(taken, (1, 0), strict=True):
            started = replace(plan, head=head)
            with prepare(
                built.module, started, given, network=network, host=_bare_host(), device=device
            ) as cold:
                idle, behind = idle_and_gated(partial(cold, *given), device, bench.effort.repeats)
            taken[label] += [max(1.0, sample - behind.median_ns) for sample in idle.samples_ns]
    return tuple(Point(label, network.arena_bytes, 1, tuple(samples)) for label, samples in taken.items())


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


OVERHEAD_CASES = (
    Case("issue", "host thread to issue a copy, an event, a wait, a layer", issue, seconds=1),
    Case("answer", "host thread from a kernel's end until it knows", answer, seconds=1),
    Case("hook", "host thread to come between layers of an eager run", hook, seconds=2),
    *(
        Case(
            f"wait-{where}{how}",
            f"waits on {'the same' if gpu == 0 else 'another'} device, {words}",
            partial(waits, gpu=gpu, how=how),
            never if gpu == 0 else several_gpus,
        )
        for how, words in (
            ("stream", "issued in a stream"),
            ("graph", "in a graph"),
            ("head", "for a head, in a graph"),
        )
        for gpu, where in ((0, ""), (1, "cross-"))
    ),
    Case(
        "launch",
        "graph launch by kernels, copies, waits for a head and edges between devices",
        launch,
        seconds=5,
    ),
    Case("start", "a whole start by graph beyond its copy", start, seconds=1),
    Case("first-replay", "first launch of a fresh graph", first_replay, seconds=3),
)
