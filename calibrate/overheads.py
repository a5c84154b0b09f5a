"""Overhead cases: what it costs the host to issue and to know, and a stream to wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch

from calibrate.bench import KIB, MIB, Bench, Case, has_peers, in_turn, never, pusher, several_gpus
from calibrate.links import h2d_label, p2p_label
from calibrate.samples import Point
from calibrate.ways import everything
from hwexec.core import at_full_pace, once_at_full_pace
from hwexec.device import Event, Ready, Stream, forked
from hwexec.executor import ColdStart
from hwexec.timing import issue_ns
from sim.errors import InputError
from sim.host import Costs, Figure, Gpu, Host, Link, Peer
from sim.models import Built
from sim.network import Network
from sim.plan import Access, Chunk, Launch
from sim.trace import trace

SMALL = 4 * KIB
KERNEL_BYTES = 16 * MIB
"""Memory that a chain's kernel adds 1 to: large enough that a 4 KiB copy is always done before the next kernel is."""
SHORT = 64 * KIB
"""The same of kernels as short as can be, where what is left is a difference of two times."""
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

        def sample(call: Ready = call) -> float:
            device.synchronize()
            return issue_ns(device, (compute, engine), call, count)

        sample()
        samples = at_full_pace(sample, device, bench.effort.repeats)
        found.append(Point(label, 0, count, samples.kept))
    device.synchronize()
    return tuple(found)


HOOKED_LAYERS, HOOKED_WIDTH = 64, 32


def hook(bench: Bench) -> tuple[Point, ...]:
    """The executor's own eager calls on small layers: with a chunk issued ahead of each, and with nothing to issue."""
    device, host = bench.device, bare_host()
    built, network = linears(HOOKED_LAYERS, HOOKED_WIDTH)
    chunks = []
    for layer in network.layers:
        spans = [(network.offsets[r.storage], network.storages[r.storage].size_bytes) for r in layer.reads]
        chunks.append(Chunk(min(at for at, _ in spans), max(at + size for at, size in spans), (0,)))
    plans = {
        "hooked": replace(everything(network, Access.COPIED, launch=Launch.EAGER), chunks=tuple(chunks)),
        "unhooked": everything(network, Access.RESIDENT, launch=Launch.EAGER),
    }

    def issued(cold: ColdStart, given: tuple[torch.Tensor, ...]) -> tuple[float]:
        def sample() -> float:
            device.synchronize()
            began = time.perf_counter_ns()
            cold(*given)
            return float(time.perf_counter_ns() - began)

        sample()
        took = once_at_full_pace(sample, device)
        device.synchronize()
        return (took,)

    taken = in_turn(built, network, host, device, plans, 2 * bench.effort.repeats + 2, issued)
    return tuple(Point(label, 0, len(network.layers), samples[2:]) for label, samples in taken.items())


def linears(layers: int, width: int) -> tuple[Built, Network]:
    """A small network of our own."""
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    built = Built(module.eval().requires_grad_(False), (torch.ones(1, width),), 1, "fp32", None, "linears")
    return built, trace(built).network


def bare_host(partner: int | None = None) -> Host:
    """Enough of a host to lower a plan for GPU 0 and, maybe, a partner that pushes to it; nothing is predicted with it."""
    nothing = Figure(1.0, "assumed", "never used")
    costs = Costs(**{field.name: nothing for field in fields(Costs)})
    gpus = tuple(Gpu(index, "GPU", 2**40, ("pcie",)) for index in range(1 + (partner or 0)))
    peers = () if partner is None else (Peer(partner, 0, ("wire",)),)
    return Host("bare", "", gpus, (Link("pcie", nothing), Link("wire", nothing)), peers, costs)


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
        Point("rounds", 0, count, at_full_pace(partial(rounds, count), device, 2 * bench.effort.repeats).kept)
        for count in (1, 20)
    ]
    found.append(bench.timed("kernel", [chain.stream], chain.kernel))

    def issued() -> float:
        device.gate(chain.stream, 1e6)
        with device.on(chain.stream):
            began = time.perf_counter_ns()
            for _ in range(50):
                chain.kernel()
            took = float(time.perf_counter_ns() - began)
        device.synchronize()
        return took

    found.append(Point("issue", 0, 50, at_full_pace(issued, device, bench.effort.repeats).kept))
    return tuple(found)


def waits(bench: Bench, gpu: int, how: str) -> tuple[Point, ...]:
    """Chains of kernels, some of them behind a wait for a 4 KiB copy of `gpu` that is long done by then.

    `how`: in a "stream", in a "graph" that holds the copies too, or in one whose "head" they are. Every chain makes the
    same copies and events; what differs is how many of them its kernels wait for.
    """
    device, chain = bench.device, Chain(bench)
    engine = bench.stream(h2d_label(gpu), gpu)
    small = _Small(bench, engine, gpu)

    def body(kernels: int, waited: int) -> None:
        with forked(device, chain.stream, [] if how == "head" else [engine]):
            if how != "head":
                small.bring()
            small.behind(chain, kernels, waited, device.wait_outside if how == "head" else device.wait)

    def on_stream(kernels: int, waited: int) -> None:
        with device.on(chain.stream):
            body(kernels, waited)

    if how == "head":
        small.bring()
    found = []
    for kernels, waited in small.chains():
        enqueue = partial(on_stream, kernels, waited)
        take = bench.timed if how == "stream" else bench.captured
        label = f"wait {'same' if gpu == 0 else 'cross'} {how}"
        found.append(take(label, [chain.stream], enqueue, count=kernels + LEAD, edges=waited))
    return tuple(found)


def waits_beside(bench: Bench) -> tuple[Point, ...]:
    """The same on GPU 0, as graphs behind a head, while its lane goes on behind the copies that they wait for."""
    device, chain, lane = bench.device, Chain(bench), bench.lane(0)
    small = _Small(bench, lane.stream, 0)
    lane.ahead = small.bring
    small.bring()  # a capture finds events that have been recorded
    found = []
    for kernels, waited in small.chains():
        with device.capture(chain.stream) as graph:
            small.behind(chain, kernels, waited, device.wait_outside)
        try:
            found.append(
                bench.beside(
                    "wait beside", chain.stream, graph.replay, lane, count=kernels + LEAD, edges=waited
                )
            )
        finally:
            graph.close()
    return tuple(found)


class _Small:
    """4 KiB copies to a GPU with an event behind each, and chains of kernels that wait for some of them."""

    def __init__(self, bench: Bench, engine: Stream, gpu: int) -> None:
        self.device, self.engine = bench.device, engine
        self.most = max(bench.effort.chains[:2])
        parts = [slice(at * SMALL, (at + 1) * SMALL) for at in range(self.most)]
        self.copies = [(bench.arena(gpu)[part], bench.host.tensor[part]) for part in parts]
        self.events = [bench.device.event() for _ in parts]

    def bring(self) -> None:
        for (to, source), event in zip(self.copies, self.events, strict=True):
            self.device.copy(self.engine, to, source)
            self.device.record(self.engine, event)

    def chains(self) -> tuple[tuple[int, int], ...]:
        """Kernels behind the lead, and how many of them wait."""
        most = self.most
        return (most, 0), (2 * most, 0), (most, most // 4), (most, most // 2), (most, most)

    def behind(self, chain: Chain, kernels: int, waited: int, wait: Callable[[Stream, Event], None]) -> None:
        every = self.most // waited if waited else kernels + LEAD
        for at in range(-LEAD, kernels):
            if 0 <= at < self.most and waited and at % every == 0:
                wait(chain.stream, self.events[at])
            chain.kernel()


BLOCKED_BYTES = 256 * KIB
"""Of each copy that a kernel stands still for: long enough that the kernel's stream is at its wait before."""


def blocked(bench: Bench, pushed: bool) -> tuple[Point, ...]:
    """Graphs of copies and kernels of GPU 0 in turn, each waiting for the one before ("chain"); and of the same alone, back to back
    ("copies", "kernels"). What the waits of a chain take is what it takes beyond its parts.

    Copies of host memory to GPU 0, or where `pushed` of a partner's memory, on the partner's own stream.
    """
    device, chain = bench.device, Chain(bench, SHORT)
    size = min(BLOCKED_BYTES, bench.effort.largest_bytes // 128)
    engine, to, source = bench.stream(h2d_label(0), 0), bench.arena(0), bench.host.tensor
    if pushed:
        partner = pusher(bench)
        if partner is None:
            raise InputError("no GPU can push to GPU 0 (no peer access)")
        engine = bench.stream(p2p_label(partner, 0), partner)
        to, source = bench.pushed_view(partner, 0), bench.filled(partner)

    def copies(count: int, first: int = 0) -> None:
        for at in range(first, first + count):
            part = slice(at * size, (at + 1) * size)
            device.copy(engine, to[part], source[part])

    def kernels(count: int) -> None:
        with device.on(chain.stream):
            for _ in range(count):
                chain.kernel()

    def hand_over(before: Stream, after: Stream) -> None:
        event = device.event()
        device.record(before, event)
        device.wait(after, event)

    def both(count: int) -> None:
        with forked(device, chain.stream, [engine]):
            copies(1)
            for at in range(count):
                hand_over(engine, chain.stream)
                kernels(1)
                hand_over(chain.stream, engine)
                copies(1, at + 1)

    found = []
    for count in bench.effort.chains[:2]:
        alone = bench.captured("copies", [engine], partial(copies, count), size_bytes=size, count=count)
        found.append(replace(alone, copies=count))
        found.append(bench.captured("kernels", [chain.stream], partial(kernels, count), count=count))
        bench.poison(0)
        chained = bench.captured(
            "chain", [chain.stream], partial(both, count), count=2 * count + 1, edges=2 * count
        )
        found.append(replace(chained, copies=count + 1))
        brought = (count + 1) * size
        bench.verify(bench.arena(0)[:brought], bench.host.tensor[:brought], f"chain of {count + 1} copies")
    return tuple(found)


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
    Case("wait-beside", "waits for a head that is there, in a graph, while its lane goes on", waits_beside),
    *(
        Case(
            f"wait-{where}blocked",
            f"waits on {device} device at which a stream stands still, in a graph",
            partial(blocked, pushed=pushed),
            has_peers if pushed else never,
        )
        for where, device, pushed in (("", "the same", False), ("cross-", "another", True))
    ),
)
