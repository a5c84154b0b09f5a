"""Bandwidth cases of one flow: copies and reads in place. Each moves what the executor moves, by its own calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from calibrate.bench import GIB, MIB, Bench, Case, has_peers, peers
from calibrate.samples import Point
from hwexec.arena import HostArena
from hwexec.device import Stream
from hwexec.script import do
from hwexec.timing import wall_ns

Enqueue = Callable[[], None]


def h2d_label(gpu: int) -> str:
    return f"h2d:{gpu}"


def p2p_label(source: int, destination: int) -> str:
    return f"p2p:{source}>{destination}"


def direct_label(gpu: int) -> str:
    return f"direct:{gpu}"


def peer_read_label(source: int, destination: int) -> str:
    return f"peer-read:{source}>{destination}"


def copies(
    bench: Bench, stream: Stream, to: torch.Tensor, source: torch.Tensor, size: int, count: int
) -> Enqueue:
    """`count` copies of `size` bytes back to back, over as much of the arenas as there is."""
    room = max(1, min(to.numel(), source.numel()) // size)
    calls = [
        bench.device.ready_copy(stream, to[at * size : (at + 1) * size], source[at * size : (at + 1) * size])
        for at in (i % room for i in range(count))
    ]
    return partial(do, calls)


def read_in_place(bench: Bench, stream: Stream, to: torch.Tensor, view: torch.Tensor) -> Enqueue:
    """One elementwise kernel that reads `view` where it lies, once and in order."""
    source, destination = view.view(torch.int64), to[: view.numel()].view(torch.int64)

    def enqueue() -> None:
        with bench.device.on(stream):
            torch.bitwise_or(source, 0, out=destination)

    return enqueue


def by_size(
    bench: Bench, label: str, stream: Stream, to: torch.Tensor, source: torch.Tensor, *, graph: bool
) -> list[Point]:
    """Copies of every size, as one captured graph or issued in the stream; the last size's bytes are compared."""
    found, size, moved = [], 0, 0
    for size in bench.effort.sizes:
        count = bench.effort.burst(size)
        moved = min(size * count, to.numel() // size * size)
        enqueue = copies(bench, stream, to, source, size, count)
        take = bench.captured if graph else bench.timed
        found.append(take(label, [stream], enqueue, size_bytes=size, count=count))
        if size == bench.effort.sizes[0]:
            bench.verify(to[:moved], source[:moved], f"{label}, {size} bytes")
    bench.verify(to[:moved], source[:moved], f"{label}, {size} bytes")
    return found


def h2d(bench: Bench, graph: bool) -> tuple[Point, ...]:
    found: list[Point] = []
    for gpu in bench.gpus:
        bench.poison(gpu)
        stream = bench.stream(h2d_label(gpu), gpu)
        found += by_size(bench, h2d_label(gpu), stream, bench.arena(gpu), bench.host.tensor, graph=graph)
    return tuple(found)


def h2d_pageable(bench: Bench) -> tuple[Point, ...]:
    """From memory that is not pinned; such a copy blocks the host, so the host's clock times it."""
    source = torch.ones(min(bench.effort.largest_bytes, 256 * MIB), dtype=torch.uint8)
    found = []
    bench.poison(0)
    for size in (s for s in bench.effort.sizes if s <= source.numel()):
        to, origin = bench.arena(0)[:size], source[:size]

        def copy(to: torch.Tensor = to, origin: torch.Tensor = origin) -> None:
            to.copy_(origin)

        samples = wall_ns(copy, bench.device, repeats=bench.effort.repeats)
        found.append(Point("h2d-pageable:0", size, 1, samples.raw))
    bench.verify(bench.arena(0)[: source.numel()], source, "pageable copies")
    return tuple(found)


def d2h(bench: Bench) -> tuple[Point, ...]:
    found = []
    with_pattern = bench.host
    back = HostArena(bench.device, bench.effort.largest_bytes, 0)
    try:
        for gpu in bench.gpus:
            stream = bench.stream(h2d_label(gpu), gpu)
            bench.device.copy(stream, bench.arena(gpu), with_pattern.tensor)
            bench.device.synchronize()
            for size in bench.effort.sizes:
                count = bench.effort.burst(size)
                to, source = back.tensor[:size], bench.arena(gpu)[:size]

                def enqueue(to: torch.Tensor = to, source: torch.Tensor = source, count: int = count) -> None:
                    for _ in range(count):
                        to.copy_(source, non_blocking=True)

                found.append(bench.timed(f"d2h:{gpu}", [stream], enqueue, size_bytes=size, count=count))
            bench.verify(back.tensor, with_pattern.tensor, f"GPU {gpu} to host")
    finally:
        bench.device.synchronize()
        back.close()
    return tuple(found)


def footprint(bench: Bench) -> tuple[Point, ...]:
    """Copies spread over pinned arenas of 1 GiB and more: whether a large one costs its reader anything."""
    found = []
    size = bench.effort.footprint_bytes
    window = min(64 * MIB, size // 8)
    arena = HostArena(bench.device, size, 0)
    stream = bench.stream(h2d_label(0), 0)
    to = bench.arena(0)[:window]
    used = size
    while used >= min(size, GIB):
        step = used // 8
        spread = [arena.tensor[at * step : at * step + window] for at in range(8)]

        def enqueue(spread: list[torch.Tensor] = spread) -> None:
            for source in spread:
                bench.device.copy(stream, to, source)

        found.append(
            bench.timed(f"footprint:{used >> 20} MiB", [stream], enqueue, size_bytes=window, count=8)
        )
        used //= 2
    bench.device.synchronize()
    arena.close()
    return tuple(found)


def numa(bench: Bench) -> tuple[Point, ...]:
    """Host memory near each GPU in turn, copied to every GPU."""
    found = []
    size = min(bench.effort.largest_bytes, 256 * MIB)
    homes = {bench.device.numa_node(gpu): gpu for gpu in bench.gpus}
    for node, home in homes.items():
        arena = HostArena(bench.device, size, home)
        for gpu in bench.gpus:
            stream = bench.stream(h2d_label(gpu), gpu)
            enqueue = copies(bench, stream, bench.arena(gpu), arena.tensor, size, 1)
            found.append(bench.timed(f"numa:{node}>gpu{gpu}", [stream], enqueue, size_bytes=size))
        bench.device.synchronize()
        arena.close()
    return tuple(found)


def one_numa_node(bench: Bench) -> str | None:
    nodes = {bench.device.numa_node(gpu) for gpu in bench.gpus} - {None}
    return None if len(nodes) > 1 else "one NUMA node, or the system does not say"


def direct(bench: Bench) -> tuple[Point, ...]:
    found = []
    for gpu in bench.gpus:
        bench.poison(gpu)
        stream = bench.stream(f"compute:{gpu}", gpu)
        view = bench.host.view(gpu)
        for size in bench.effort.sizes:
            enqueue = read_in_place(bench, stream, bench.arena(gpu), view[:size])
            found.append(bench.timed(direct_label(gpu), [stream], enqueue, size_bytes=size))
        size = bench.effort.sizes[-1]
        bench.verify(bench.arena(gpu)[:size], bench.host.tensor[:size], f"GPU {gpu} reading in place")
    return tuple(found)


def peer_read(bench: Bench) -> tuple[Point, ...]:
    found = []
    for source, destination in peers(bench):
        view = bench.peer_view(source, destination)
        bench.poison(destination)
        stream = bench.stream(f"compute:{destination}", destination)
        label = peer_read_label(source, destination)
        for size in bench.effort.sizes:
            enqueue = read_in_place(bench, stream, bench.arena(destination), view[:size])
            found.append(bench.timed(label, [stream], enqueue, size_bytes=size))
        size = bench.effort.sizes[-1]
        bench.verify(bench.arena(destination)[:size], view[:size], label)
    return tuple(found)


LINK_CASES = (
    Case("h2d", "pinned host to device by size, issued in a stream", lambda b: h2d(b, False), seconds=4),
    Case(
        "h2d-graph",
        "the same copies in a captured graph",
        lambda b: h2d(b, True),
        seconds=4,
        second_look="faster",
    ),
    Case("h2d-pageable", "pageable host to device by size", h2d_pageable, seconds=3),
    Case("d2h", "device to pinned host by size", d2h, seconds=5),
    Case("footprint", "copies spread over ever larger pinned arenas", footprint, seconds=8),
    Case("numa", "host memory of each NUMA node to each GPU", numa, one_numa_node, seconds=3),
    Case("direct", "kernel reading host memory in place by size", direct, seconds=5),
    Case(
        "peer-read", "kernel reading another GPU's memory in place by size", peer_read, has_peers, seconds=3
    ),
)
