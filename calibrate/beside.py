"""Work side by side: cases of lanes at once, of pushes between GPUs and reads in place beside copies of host memory; and any run
of a network beside such copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import torch

from calibrate.bench import (
    BESIDE_BYTES,
    GIB,
    KIB,
    MIB,
    Bench,
    Case,
    Flow,
    Lane,
    has_peers,
    peers,
    several_gpus,
)
from calibrate.links import Enqueue, copies, h2d_label, p2p_label, read_in_place
from calibrate.samples import Point
from calibrate.sharing import groups
from hwexec.arena import HostArena
from hwexec.device import Device, Ready, Stream
from hwexec.script import do
from hwexec.timing import time_ns
from sim.errors import InputError
from sim.hints import first_line

CHUNKS = (64 * KIB, 64 * MIB)
"""Smallest and largest push beside copies: what plans relay."""
READS = tuple(4 * KIB * k for k in (1, 16, 64, 256, 1024, 4096, 16384))
"""Bytes of the kernels that read in place beside copies."""
LONG_NS = 0.05e9
"""Runs are measured beside copies twice, three times ... as large where they take longer than this, twice this ..."""
LARGEST_TIMES = 32
"""So many times as large at most: 128 GiB that are under way at once, 2 s. Where a run outlasts its copies, they are that large.
Swin-V2-B, all of it read in place, took more than 0.65 s on two H200, and 0.24 s beside nothing."""


def together_label(gpus: tuple[int, ...]) -> str:
    return f"together:{'+'.join(map(str, gpus))}"


def read_label(what: str, gpu: int) -> str:
    """`what` is in-place or resident, alone or beside copies."""
    return f"{what}:{gpu}"


def h2d_together(bench: Bench) -> tuple[Point, ...]:
    """Each GPU alone, and groups of them at once (`groups`): the time until the last has everything, all bytes counted.

    Each GPU has bytes of its own, so that host memory is read as often as in a cold start, and so many that the flows' own
    starts and ends are lost among them.
    """
    share = bench.effort.largest_bytes // len(bench.gpus)
    chunk = min(BESIDE_BYTES, share)
    count = min(GIB, 4 * bench.effort.largest_bytes) // chunk
    flows = []
    for gpu in bench.gpus:
        bench.poison(gpu)
        stream = bench.stream(h2d_label(gpu), gpu)
        own = bench.host.tensor[gpu * share : (gpu + 1) * share]
        enqueue = copies(bench, stream, bench.arena(gpu)[:share], own, chunk, count)
        flows.append(Flow(h2d_label(gpu), stream, enqueue, count * chunk))
    found = []
    for group in groups(bench.gpus):
        points = bench.together([flows[gpu] for gpu in group])
        last = tuple(max(times) for times in zip(*(p.samples_ns for p in points), strict=True))
        found.append(Point(together_label(group), count * chunk, len(group), last))
    moved = min(count, share // chunk) * chunk
    for gpu in bench.gpus:
        want = bench.host.tensor[gpu * share : gpu * share + moved]
        bench.verify(bench.arena(gpu)[:moved], want, f"GPU {gpu}, all at once")
    return tuple(found)


def pushes(
    bench: Bench, stream: Stream, to: torch.Tensor, source: torch.Tensor, size: int, count: int
) -> Enqueue:
    """`count` pushes of `size` bytes, an event behind each as the executor has it: none begins before the last is done."""
    room = min(to.numel(), source.numel()) // size
    event = bench.device.event()
    calls: list[Ready] = []
    for at in (i % room for i in range(count)):
        part = slice(at * size, (at + 1) * size)
        calls.append(bench.device.ready_copy(stream, to[part], source[part]))
        calls.append(bench.device.ready_record(stream, event))
    return partial(do, calls)


def p2p(bench: Bench, busy: bool) -> tuple[Point, ...]:
    """Pushes by size, nothing else under way; or (`busy`) while the pushing GPU's own lane brings host memory, as in a relay."""
    found: list[Point] = []
    half = bench.effort.largest_bytes // 2
    low, high = (CHUNKS[0], min(CHUNKS[1], half)) if busy else (0, bench.effort.largest_bytes)
    sizes = [size for size in bench.effort.sizes if low <= size <= high]
    for source, destination in peers(bench):
        label = p2p_label(source, destination)
        stream = bench.stream(label, source)
        origin, to = bench.filled(source), bench.pushed_view(source, destination)
        lane = bench.lane(source)
        if busy:
            origin, to = origin[:half], to[:half]
        bench.poison(destination)
        for size in sizes:
            count = min(bench.effort.burst(size), origin.numel() // size)
            enqueue = pushes(bench, stream, to, origin, size, count)
            if busy:
                found.append(bench.beside(label, stream, enqueue, lane, size_bytes=size, count=count))
            else:
                found.append(bench.timed(label, [stream], enqueue, size_bytes=size, count=count))
            if size in (sizes[0], sizes[-1]):
                moved = bench.arena(destination)[: size * count]
                bench.verify(moved, origin[: size * count], f"{label}, {size} bytes")
    return tuple(found)


def direct_beside_copy(bench: Bench) -> tuple[Point, ...]:
    """Kernels in a chain that read in place, and the same on resident memory; alone, and beside copies over the same lane."""
    found: list[Point] = []
    quarter = bench.effort.largest_bytes // 4
    for gpu in bench.gpus:
        stream, lane = bench.stream(f"compute:{gpu}", gpu), bench.lane(gpu)
        arena, view = bench.filled(gpu), bench.host.view(gpu)
        for size in (s for s in READS if s <= quarter):
            count = max(2, min(16, bench.effort.burst(size)))
            for what, origin in (("resident", arena), ("in-place", view)):
                bench.device.fill(stream, arena[:quarter], 0)
                kernels = [
                    read_in_place(bench, stream, arena[start - quarter :], origin[start : start + size])
                    for start in (quarter + i * size % (quarter // size * size) for i in range(count))
                ]
                enqueue = partial(do, kernels)
                alone, beside = (read_label(f"{what} {when}", gpu) for when in ("alone", "beside"))
                found.append(bench.timed(alone, [stream], enqueue, size_bytes=size, count=count))
                found.append(bench.beside(beside, stream, enqueue, lane, size_bytes=size, count=count))
        moved = min(count, quarter // size) * size
        want = bench.host.tensor[quarter : quarter + moved]
        bench.verify(arena[:moved], want, f"GPU {gpu} reading in place beside copies")
    return tuple(found)


Runs = Mapping[str, Callable[[], object]]
"""What is run, by what it is called."""
Pairs = tuple[tuple[Point, Point], ...]
"""By run, alone and beside copies."""


def runs_beside_copies(runs: Runs, device: Device, rounds: int) -> Pairs:
    """Each run alone, and while host memory is copied to the same GPU all along, all in turn: what copies cost kernels.

    InputError where one outlasts all copies that can be under way at once, or the GPU has no room for these.
    """
    stream = device.stream("calibrate", 0)
    try:
        longest = max(time_ns(run, device, [stream], repeats=1, warmup=0).median_ns for run in runs.values())
        times = min(LARGEST_TIMES, 1 + int(longest / LONG_NS))
        try:
            return _beside(runs, device, stream, rounds, BESIDE_BYTES * times)
        except InputError:
            # what reads in place takes many times as long beside copies as alone, and nobody knows how many
            if not device.figures or times == LARGEST_TIMES:
                raise
            return _beside(runs, device, stream, rounds, BESIDE_BYTES * LARGEST_TIMES)
    finally:
        device.close_stream(stream)


def _beside(runs: Runs, device: Device, stream: Stream, rounds: int, size: int) -> Pairs:
    """The same beside copies of `size` bytes."""
    with ExitStack() as stack:
        engine = device.stream("h2d:0", 0)
        stack.callback(device.close_stream, engine)
        try:
            to = device.allocate(size, 0)
        except device.out_of_memory as error:
            raise InputError(
                f"no room on GPU 0 for copies of {size} bytes beside it ({first_line(error)})"
            ) from None
        arena = HostArena(device, size, 0)
        stack.callback(arena.close)
        stack.callback(device.synchronize)
        lane = Lane(device, engine, device.ready_copy(engine, to, arena.tensor))
        taken: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in runs}
        for _ in range(rounds + 1):
            for label, run in runs.items():
                for busy, samples in zip((False, True), taken[label], strict=True):
                    samples.append(lane.sample(stream, run, busy=busy))
    return tuple(
        (
            Point(f"{label} alone", 0, 1, tuple(alone[1:])),
            Point(f"{label} beside copies", 0, 1, tuple(busy[1:])),
        )
        for label, (alone, busy) in taken.items()  # the first round warms up
    )


BESIDE_CASES = (
    Case(
        "h2d-together",
        "GPUs at once, in pairs and more: what they share",
        h2d_together,
        several_gpus,
        seconds=2,
        second_look="faster",
    ),
    Case(
        "p2p",
        "pushes between GPUs by size, each way, nothing beside",
        lambda b: p2p(b, False),
        has_peers,
        seconds=4,
    ),
    Case(
        "p2p-beside-h2d",
        "the same while host memory is copied to the GPU that pushes",
        lambda b: p2p(b, True),
        has_peers,
        seconds=3,
    ),
    Case(
        "direct-beside-copy",
        "kernels reading in place, beside copies over the same lane",
        direct_beside_copy,
        seconds=3,
    ),
)
