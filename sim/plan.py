"""A plan: how each layer reads each storage, and which byte range of the arena crosses which GPUs in what order."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from sim.errors import InputError, require
from sim.host import Host
from sim.memory import PADDING_BYTES, packed_bytes, room_bytes
from sim.network import Network


class Access(StrEnum):
    """How one layer reads one storage."""

    COPIED = "copied"
    """From the target GPU's memory, after the copy."""
    DIRECT = "direct"
    """In place from host memory, over PCIe, by the kernel itself."""
    PEER = "peer-direct"
    """In place from a partner GPU's memory, after the copy to that partner."""
    RESIDENT = "resident"
    """From the target GPU's memory, where it stays between starts."""


class Launch(StrEnum):
    """EAGER: a host thread issues every operation. GRAPH: one launch of a captured CUDA graph, after the plan's head."""

    EAGER = "eager"
    GRAPH = "graph"


class Sync(StrEnum):
    """Who waits for a copy: the compute stream for its event, or the host thread (before all layers, or before each group)."""

    STREAM = "stream"
    HOST_ALL = "host-all"
    HOST_GROUP = "host-group"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [start_bytes, stop_bytes) of the arena, copied at once.

    `path` names the GPUs whose links it crosses, first to last; the last is where it lands.
    (0,) goes straight to GPU 0; (2, 0) over GPU 2's PCIe lane and on to GPU 0; (2,) in a plan for GPU 0 stays on GPU 2
    and is read there in place.
    """

    start_bytes: int
    stop_bytes: int
    path: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return self.stop_bytes - self.start_bytes


@dataclass(frozen=True)
class Plan:
    """What happens to every weight. `access[i][j]` is how layer i reads its j-th storage; `chunks` are in issue order.

    A plan is only data; `check` says whether it is one for a network and a host, and `program.lower` replays it.
    """

    name: str
    target: int
    launch: Launch
    access: tuple[tuple[Access, ...], ...]
    chunks: tuple[Chunk, ...]
    sync: Sync = Sync.STREAM
    head: int = 0
    """Of a graph plan, how many first chunks the host issues one by one before it launches the graph: they are
    under way sooner. Layers wait for them inside the graph, so a longer head delays the launch only."""
    opening: int = 0
    """Of a graph plan whose head is all chunks, how many first layers are a graph of their own, launched as soon as the
    chunks that they wait for are issued: a small graph is launched sooner, and these layers run while the rest is issued."""

    @property
    def copied_bytes(self) -> int:
        """Bytes that cross from host memory by copies, arena padding included."""
        return sum(c.size_bytes for c in self.chunks)

    @property
    def gpus(self) -> tuple[int, ...]:
        """Target first, then every other GPU whose links are used, by index."""
        others = {gpu for chunk in self.chunks for gpu in chunk.path} - {self.target}
        return (self.target, *sorted(others))

    @cached_property
    def digest(self) -> str:
        """sha256 over all that decides how it runs; its name does not."""
        chunks = [[c.start_bytes, c.stop_bytes, *c.path] for c in self.chunks]
        content = [self.target, self.launch, self.access, chunks, self.sync, self.head]
        content += [self.opening] if self.opening else []
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def crossing(self, gpu: int) -> Iterator[tuple[int, int]]:
        """Arena ranges that come to a GPU, to stay or to go on."""
        return ((c.start_bytes, c.stop_bytes) for c in self.chunks if gpu in c.path)

    def holding(self, gpu: int, network: Network) -> Iterator[tuple[int, int]]:
        """Arena ranges that lie on a GPU as long as the plan does: what crosses it, and on the target what is resident."""
        yield from self.crossing(gpu)
        if gpu == self.target:
            yield from network.ranges(self.kept(network))

    def kept(self, network: Network) -> frozenset[int]:
        """Storages that stay on the target between starts."""
        return frozenset(self._reads(network, Access.RESIDENT))

    def kept_bytes(self, network: Network) -> int:
        return sum(stop - start for start, stop in network.ranges(self.kept(network)))

    def held_bytes(self, network: Network) -> int:
        """The target's memory that `holding` takes, as packed."""
        return packed_bytes(self.holding(self.target, network))

    def overfull(self, network: Network, host: Host) -> str | None:
        """The first GPU whose memory the plan does not fit in, in words; None where it fits."""
        most = network.arena_bytes + PADDING_BYTES * (len(self.chunks) + len(network.storages))
        for gpu in self.gpus:
            room = room_bytes(host, gpu, network if gpu == self.target else None)
            if most <= room:
                continue
            need = packed_bytes(self.holding(gpu, network))
            if need > room:
                return f"needs {need / 2**20:.1f} MiB on GPU {gpu}, which has room for {room / 2**20:.1f}"
        return None

    def direct_bytes(self, network: Network) -> int:
        """Bytes of the storages that at least one layer reads in place from host memory."""
        return sum(network.storages[s].size_bytes for s in self._reads(network, Access.DIRECT))

    def _reads(self, network: Network, how: Access) -> set[int]:
        """Storages that at least one layer reads so."""
        return {
            read.storage
            for layer, accesses in zip(network.layers, self.access, strict=True)
            for read, access in zip(layer.reads, accesses, strict=True)
            if access is how
        }

    def check(self, network: Network, host: Host) -> None:
        """Raise InputError unless every chunk has a route, no byte arrives twice, every copied read is covered, and GPUs have
        room for what comes to them."""
        host.gpu(self.target)
        require(
            self.sync is Sync.STREAM or self.launch is Launch.EAGER,
            f"plan {self.name!r}: {self.sync} waits on the host thread, which a graph cannot; launch it eagerly",
        )
        require(
            0 <= self.head <= (len(self.chunks) if self.launch is Launch.GRAPH else 0),
            f"plan {self.name!r}: a head of {self.head} chunks; it has {len(self.chunks)}, and an eager plan has no head: write "
            f"{f'0 to {len(self.chunks)}' if self.launch is Launch.GRAPH else '0'}",
        )
        require(
            self.opening == 0
            or (
                self.launch is Launch.GRAPH
                and self.head == len(self.chunks)
                and 0 < self.opening < len(network.layers)
            ),
            f"plan {self.name!r}: an opening of {self.opening} layers; only a graph plan with all {len(self.chunks)} chunks in "
            f"its head has one, of 1 to {len(network.layers) - 1} layers: write 0, or put all chunks in the head",
        )
        require(
            len(self.access) == len(network.layers),
            f"plan {self.name!r}: access for {len(self.access)} layers, but {network.model} has {len(network.layers)}",
        )
        for chunk in self.chunks:
            self._check_chunk(chunk, network, host)
        landed: dict[int, list[tuple[int, int]]] = {}
        for chunk in self.chunks:
            landed.setdefault(chunk.path[-1], []).append((chunk.start_bytes, chunk.stop_bytes))
        self._check_once()
        for ranges in landed.values():
            ranges.sort()
        # a search checks many plans, and most keep nothing
        keeps = any(Access.RESIDENT in row for row in self.access)
        if keeps and (both := self.kept(network) & self._reads(network, Access.COPIED)):
            raise InputError(
                f"plan {self.name!r}: {network.storages[min(both)].name} is resident for one layer and copied for another; its "
                "bytes are in one place: make it one or the other"
            )
        here = landed.get(self.target, [])
        for index, (layer, accesses) in enumerate(zip(network.layers, self.access, strict=True)):
            # a search checks many plans: words are made only for what is wrong
            if len(accesses) != len(layer.reads):
                raise InputError(
                    f"plan {self.name!r}: layer {index} ({layer.name}) has {len(accesses)} accesses for {len(layer.reads)} reads"
                )
            for read, access in zip(layer.reads, accesses, strict=True):
                wrong = ""
                if access is Access.COPIED:
                    start = network.offsets[read.storage]
                    stop = start + network.storages[read.storage].size_bytes
                    if not covered(here, start, stop):
                        wrong = f"copied, but no chunks bring all of it to GPU {self.target}; add them or read it in place"
                elif access is Access.PEER and self.holder(network, read.storage) is None:
                    wrong = "peer-direct, but it lands whole on no one partner; add a chunk that stays there"
                if wrong:
                    name = network.storages[read.storage].name
                    raise InputError(f"plan {self.name!r}: layer {index} ({layer.name}) reads {name} {wrong}")
        full = self.overfull(network, host)
        require(
            full is None, f"plan {self.name!r}: {full}; bring less to it, or search a plan for {host.name}"
        )

    @cached_property
    def _stays(self) -> dict[int, list[tuple[int, int]]]:
        """Arena ranges that land on a partner and stay there, sorted, by GPU."""
        found: dict[int, list[tuple[int, int]]] = {}
        for chunk in self.chunks:
            if chunk.path[-1] != self.target:
                found.setdefault(chunk.path[-1], []).append((chunk.start_bytes, chunk.stop_bytes))
        return {gpu: sorted(ranges) for gpu, ranges in sorted(found.items())}

    def holder(self, network: Network, storage: int) -> int | None:
        """The partner GPU on which a storage lands whole and stays, or None."""
        start = network.offsets[storage]
        stop = start + network.storages[storage].size_bytes
        for gpu, ranges in self._stays.items():
            if covered(ranges, start, stop):
                return gpu
        return None

    def _check_chunk(self, chunk: Chunk, network: Network, host: Host) -> None:
        where = f"plan {self.name!r}: chunk {chunk.start_bytes}..{chunk.stop_bytes}"
        require(
            0 <= chunk.start_bytes < chunk.stop_bytes <= network.arena_bytes,
            f"{where} is no range of the arena of {network.arena_bytes} bytes",
        )
        require(
            bool(chunk.path) and len(set(chunk.path)) == len(chunk.path),
            f"{where}: path {list(chunk.path)} must name at least one GPU and none twice",
        )
        for gpu in chunk.path:
            host.gpu(gpu)
        for source, destination in pairwise(chunk.path):
            host.peer_route(source, destination)
        if chunk.path[-1] != self.target:
            host.peer_route(chunk.path[-1], self.target)

    def _check_once(self) -> None:
        ranges = sorted((c.start_bytes, c.stop_bytes) for c in self.chunks)
        for (_, stop), (start, _) in pairwise(ranges):
            require(
                start >= stop,
                f"plan {self.name!r}: byte {start} of the arena arrives twice; chunks must not overlap",
            )


def covered(ranges: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether sorted, disjoint `ranges` together contain [start, stop)."""
    at = max(0, bisect_right(ranges, (start, float("inf"))) - 1)
    while at < len(ranges) and start < stop:
        low, high = ranges[at]
        if low > start:
            return False
        start = max(start, high)
        at += 1
    return start >= stop
