"""Bandwidth cases: copies and reads in place, alone and side by side. Each moves what the executor moves, by its own calls."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch

from calibrate.bench import GIB, MIB, Bench, Case, Flow, has_peers, peers, several_gpus
from calibrate.samples import Point
from hwexec.arena import HostArena
from hwexec.device import Stream
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


def together_label(gpus: tuple[int, ...]) -> str:
    return f"together:{'+'.join(map(str, gpus))}"


def copies(
    bench: Bench, stream: Stream, to: torch.Tensor, source: torch.Tensor, size: int, count: int
) -> Enqueue:
    """`count` copies of `size` bytes back to back, over as much of the arenas as there is."""
    room = max(1, min(to.numel(), source.numel()) // size)
    pairs = [
        (to[at * size : (at + 1) * size], source[at * size : (at + 1) * size])
        for at in (i % room for i in range(count))
    ]

    def enqueue() -> None:
        for destination, origin in pairs:
            bench.device.copy(stream, destination, origin)

    return enqueue


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


def h2d_flow(bench: Bench, gpu: int, size: int, label: str) -> Flow:
    chunk = min(16 * MIB, size)
    stream = bench.stream(h2d_label(gpu), gpu)
    enqueue = copies(bench, stream, bench.arena(gpu), bench.host.tensor, chunk, size // chunk)
    return Flow(label, stream, enqueue, size // chunk * chunk)


def h2d_together(bench: Bench) -> tuple[Point, ...]:
    """Each GPU alone, each pair, and all at once: the time until the last has everything, all bytes counted."""
    size = min(bench.effort.largest_bytes, 512 * MIB)
    groups: list[tuple[int, ...]] = [(gpu,) for gpu in bench.gpus]
    groups += list(combinations(bench.gpus, 2))
    if len(bench.gpus) > 2:
        groups.append(tuple(bench.gpus))
    found = []
    for group in groups:
        flows = bench.together([h2d_flow(bench, gpu, size, "") for gpu in group])
        last = tuple(max(times) for times in zip(*(f.samples_ns for f in flows), strict=True))
        found.append(Point(together_label(group), flows[0].size_bytes, len(group), last))
    for gpu in bench.gpus:
        bench.verify(bench.arena(gpu)[:size], bench.host.tensor[:size], f"GPU {gpu}, all at once")
    return tuple(found)


def p2p(bench: Bench, graph: bool) -> tuple[Point, ...]:
    found: list[Point] = []
    for source, destination in peers(bench):
        view = bench.peer_view(source, destination)
        bench.poison(destination)
        label = p2p_label(source, destination)
        stream = bench.stream(label, destination)
        found += by_size(bench, label, stream, bench.arena(destination), view, graph=graph)
    return tuple(found)


def p2p_beside_h2d(bench: Bench) -> tuple[Point, ...]:
    """A peer copy while host memory is copied to its source, to its destination, and to both: whether they disturb each other."""
    found: list[Point] = []
    half = bench.effort.largest_bytes // 2
    for source, destination in peers(bench):
        view = bench.peer_view(source, destination)[half:]
        to = bench.arena(destination)[half:]
        label = p2p_label(source, destination)
        stream = bench.stream(label, destination)
        chunk = min(16 * MIB, half)
        moves = max(1, half // chunk)
        for beside in ((), (destination,), (source,), (source, destination)):
            name = "+".join(map(str, beside)) or "nothing"
            peer = Flow(
                f"{label} beside {name}", stream, copies(bench, stream, to, view, chunk, 4 * moves), half * 4
            )
            flows = [peer, *(h2d_flow(bench, g, half, f"h2d:{g} beside {label}, {name}") for g in beside)]
            found += bench.together(flows)
        bench.verify(to, view, f"{label} beside copies")
    return tuple(found)


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


def direct_beside_copy(bench: Bench) -> tuple[Point, ...]:
    """A kernel reading in place and copies over the same lane; each alone first. Both rates follow from the two times."""
    found: list[Point] = []
    half = bench.effort.largest_bytes // 2
    for gpu in bench.gpus:
        compute, engine = bench.stream(f"compute:{gpu}", gpu), bench.stream(h2d_label(gpu), gpu)
        arena, view = bench.arena(gpu), bench.host.view(gpu)
        for chunk in (c for c in (MIB, 16 * MIB) if c <= half):
            read = Flow(f"read:{gpu}", compute, read_in_place(bench, compute, arena, view[:half]), half)
            count = half // chunk
            copy = Flow(
                f"copy:{gpu}",
                engine,
                copies(bench, engine, arena[half:], bench.host.tensor[half:], chunk, count),
                half,
            )
            alone = bench.together([read])[0], bench.together([copy])[0]
            both = bench.together([read, copy])
            for when, points in (("alone", alone), ("both", both)):
                found += [
                    Point(f"{p.label} {when}, {chunk >> 20} MiB", p.size_bytes, 1, p.samples_ns)
                    for p in points
                ]
        bench.verify(arena, bench.host.tensor, f"GPU {gpu} reading in place beside copies")
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
    Case("h2d-graph", "the same copies in a captured graph", lambda b: h2d(b, True), seconds=4),
    Case("h2d-pageable", "pageable host to device by size", h2d_pageable, seconds=3),
    Case("d2h", "device to pinned host by size", d2h, seconds=5),
    Case("footprint", "copies spread over ever larger pinned arenas", footprint, seconds=8),
    Case("numa", "host memory of each NUMA node to each GPU", numa, one_numa_node, seconds=3),
    Case(
        "h2d-together",
        "all GPUs at once and each pair: shared uplinks",
        h2d_together,
        several_gpus,
        seconds=3,
    ),
    Case(
        "p2p",
        "device to device by size, each way, in a stream",
        lambda b: p2p(b, False),
        has_peers,
        seconds=4,
    ),
    Case("p2p-graph", "the same copies in a captured graph", lambda b: p2p(b, True), has_peers, seconds=4),
    Case("p2p-beside-h2d", "peer copies while host copies land beside", p2p_beside_h2d, has_peers, seconds=4),
    Case("direct", "kernel reading host memory in place by size", direct, seconds=5),
    Case(
        "direct-beside-copy", "the same beside copies: how the link is shared", direct_beside_copy, seconds=3
    ),
    Case(
        "peer-read", "kernel reading another GPU's memory in place by size", peer_read, has_peers, seconds=3
    ),
)
