"""What a plan takes of a machine: arenas, streams, ready-made copies, inputs, and a module's tensors pointed into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from hwexec.arena import HostArena
from hwexec.binding import Binding, Weights, load, point, region, slots_of
from hwexec.device import POISON, Device, Event, Graph, Stream
from hwexec.hooks import Finder
from hwexec.layout import layout_of, room_for
from hwexec.pool import Tenant
from hwexec.script import Head, Move, Script
from hwexec.walk import Marks, Pairs, Walk
from sim.errors import InputError
from sim.memory import gaps
from sim.ops import HOST, Copy, Op, Run, device_of
from sim.plan import Access
from sim.program import Program

COMPARED_BYTES = 64 * 2**20
"""Of an arena at once."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the module: which operations, where its tensors point at first, and before which layer that changes."""

    ops: tuple[Op, ...]
    initial: Pairs
    repoint: Mapping[int, Pairs]


class Stage:
    """Everything a program needs to run on a device. What it takes it notes on `stack`, which gives it back.

    `ways`: "cold" is the program, "warm" its layers alone, "in place" its layers with all weights in host memory; where it
    `settles`, "resident" with all of them in the target's arena, which else holds only what the plan brings. Arenas are its own,
    or a `tenant`'s place in a pool; what the plan keeps between starts lies in the target's arena, or apart from such a place.
    Raises InputError, or the device's `out_of_memory`, where something does not fit.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        program: Program,
        device: Device,
        weights: Weights | None,
        stack: ExitStack,
        settles: bool,
        tenant: Tenant | None = None,
    ) -> None:
        self.module, self.program, self.device = module, program, device
        self.plan, self.network = program.plan, program.network
        self.settles = settles
        pooled = tenant is not None
        self._layout = layout_of(self.plan, self.network, settles, pooled=pooled)
        self._kept = sorted(self.plan.kept(self.network))
        self.arenas: dict[int, torch.Tensor] = {}
        if tenant is not None:
            self.arenas.update(
                tenant.allot({gpu: held.size_bytes for gpu, held in self._layout.arenas.items()})
            )
        room_for(self.plan, self.network, device, settles=settles, pooled=pooled)
        self._build(weights, stack)

    @property
    def arena(self) -> torch.Tensor:
        """The target's, as `layout_of` has it."""
        return self.arenas[self.plan.target]

    def _build(self, weights: Weights | None, stack: ExitStack) -> None:
        """Arenas, streams, the binding; each knows how to go again."""
        plan, device, network = self.plan, self.device, self.network
        target = plan.target
        stack.callback(device.trim)
        slots = slots_of(self.module, network)
        self.host = HostArena(device, network.arena_bytes, target)
        stack.callback(self.host.close)
        load(slots, network, self.host.tensor, weights, type(self.module).__name__)
        pairs = {(op.source, op.destination) for op in self.program.ops if isinstance(op, Copy)}
        pairs |= {(c.path[-1], target) for c in plan.chunks if c.path[-1] != target}
        for source, destination in sorted((s, d) for s, d in pairs if s is not None):
            device.connect(source, destination)
        stack.callback(self.arenas.clear)
        for gpu, extents in self._layout.arenas.items():
            if gpu not in self.arenas:
                self.arenas[gpu] = device.allocate(extents.size_bytes, gpu)
        self._apart: list[torch.Tensor] = []
        stack.callback(self._apart.clear)
        if self._layout.apart.size_bytes:
            self._apart.append(device.allocate(self._layout.apart.size_bytes, target))
        self.streams: dict[str, Stream] = {}
        stack.callback(self._close_streams)
        self.compute = self._stream(f"compute:{target}", target)
        self.background = self._stream("settle", target)
        for op in self.program.ops:
            if op.stream != HOST and op.stream not in self.streams:
                self._stream(op.stream, device_of(op.stream))
        for gpu in self._layout.arenas.keys() - {stream.gpu for stream in self.streams.values()}:
            # what is only pushed to has no stream of its own, but is poisoned as well
            self._stream(f"fill:{gpu}", gpu)
        self._moves: dict[int, Move] = {}
        stack.callback(self._moves.clear)
        for index, op in enumerate(self.program.ops):
            if isinstance(op, Copy):
                self._moves[index] = self._move(op)
        self.binding = Binding(slots, network, self.host.tensor)
        stack.callback(self.binding.release)
        self.ways = self._ways()
        stack.callback(self.ways.clear)
        device.synchronize()  # arenas may be memory that another stream still used

    def _stream(self, name: str, gpu: int) -> Stream:
        stream = self.streams[name] = self.device.stream(name, gpu)
        return stream

    def _close_streams(self) -> None:
        # the last given back is the next one's first: roles stay, and what libraries keep for each compute stream stays one
        for stream in reversed(self.streams.values()):
            self.device.close_stream(stream)
        self.streams.clear()

    def _move(self, op: Copy) -> Move:
        """A push between GPUs: its stream is the source's, to which the destination is a view."""
        start, stop = op.start_bytes, op.stop_bytes
        destination = self._held(op.destination, start, stop)
        source = self.host.tensor[start:stop]
        if op.source is not None:
            source = self._held(op.source, start, stop)
            destination = self.device.view(destination, op.source, self.arenas[op.destination])
        return Move(destination, source, self.device.ready_copy(self.streams[op.stream], destination, source))

    def copies(self) -> Iterator[tuple[Copy, Move]]:
        """Every copy of the program, in issue order, as a call made ready."""
        for index, move in self._moves.items():
            op = self.program.ops[index]
            assert isinstance(op, Copy)
            yield op, move

    def _held(self, gpu: int, start: int, stop: int) -> torch.Tensor:
        return self._layout.arenas[gpu].slice(self.arenas[gpu], start, stop)

    def _home(self, storage: int) -> torch.Tensor:
        """Where a storage's bytes are in the target's memory; of -1, none."""
        if storage < 0:
            return self.arena[:0]
        if self._apart and storage in self._kept:
            return self._layout.apart.slice(self._apart[0], *self._span(storage))
        return self._held(self.plan.target, *self._span(storage))

    def _span(self, storage: int) -> tuple[int, int]:
        start = self.network.offsets[storage]
        return start, start + self.network.storages[storage].size_bytes

    def _bring(self, stream: Stream, storages: Iterable[int]) -> None:
        for storage in storages:
            self.device.copy(stream, self._home(storage), region(self.network, self.host.tensor, storage))

    def _peer(self, source: int, start: int, stop: int, gpu: int) -> torch.Tensor:
        return self.device.view(self._held(source, start, stop), gpu, self.arenas[source])

    def _ways(self) -> dict[str, Way]:
        """The program with and without its copies, and the tensors' places in each."""
        network, plan, binding = self.network, self.plan, self.binding
        target = plan.target
        in_place = self.host.view(target)
        pairs: dict[tuple[int, Access], Pairs] = {}

        def at(storage: int, access: Access) -> Pairs:
            access = Access.COPIED if access is Access.RESIDENT else access
            if (storage, access) not in pairs:
                pairs[storage, access] = binding.views(storage, place(storage, access))
            return pairs[storage, access]

        def place(storage: int, access: Access) -> torch.Tensor:
            if access is Access.COPIED:
                return self._home(storage)
            if access is Access.DIRECT:
                return region(network, in_place, storage)
            holder = plan.holder(network, storage)
            if holder is None:
                raise InputError(f"plan {plan.name!r}: {network.storages[storage].name} is on no partner")
            return self._peer(holder, *self._span(storage), target)

        everything = range(-1, len(network.storages))
        # what no layer reads is read in place: right whoever asks
        initial: dict[int, Access] = dict.fromkeys(everything, Access.DIRECT)
        seen: dict[int, Access] = {}
        repoint: dict[int, Pairs] = {}
        for index, (layer, accesses) in enumerate(zip(network.layers, plan.access, strict=True)):
            changed: list[tuple[torch.Tensor, torch.Tensor]] = []
            for read, access in zip(layer.reads, accesses, strict=True):
                access = Access.COPIED if access is Access.RESIDENT else access
                if read.storage not in seen:
                    initial[read.storage] = access
                elif seen[read.storage] is not access:
                    changed.extend(at(read.storage, access))
                seen[read.storage] = access
            if changed:
                repoint[index] = changed
        runs = tuple(op for op in self.program.ops if isinstance(op, Run))
        first = [pair for storage, access in initial.items() for pair in at(storage, access)]
        self.in_place = sorted({s for s, access in pairs if s in seen and access is not Access.COPIED})
        found = {"cold": Way(self.program.ops, first, repoint), "warm": Way(runs, first, repoint)}
        places = {"in place": Access.DIRECT} | ({"resident": Access.COPIED} if self.settles else {})
        for way, access in places.items():
            # what no layer reads no one brings, also here
            where = ((s, access if s in seen else Access.DIRECT) for s in everything)
            found[way] = Way(runs, [pair for s, how in where for pair in at(s, how)], {})
        self.find = Finder((storage, place(storage, access)) for storage, access in pairs)
        return found

    def needed(self) -> frozenset[int]:
        """Layers before which an eager run must issue something or re-point a tensor."""
        needed = set(self.ways["cold"].repoint)
        since = False
        for op in self.program.ops:
            if isinstance(op, Run):
                if since:
                    needed.add(op.layer)
                since = False
            else:
                since = since or op.stream in (HOST, self.compute.name)
        return frozenset(needed)

    @contextmanager
    def pointed(self, way: str) -> Iterator[None]:
        """The module's tensors where `way` wants them at first; at rest again afterwards."""
        try:
            point(self.ways[way].initial)
            with _unfused():
                yield
        finally:
            self.binding.rest()

    def walk(
        self,
        way: str,
        graph: Graph | None = None,
        marks: Marks | None = None,
        head: Head | None = None,
        script: Script | None = None,
    ) -> Walk:
        ops, repoint = self.ways[way].ops, self.ways[way].repoint
        opening, rest = self.program.opening, range(self.program.head_ops, len(ops))
        return Walk(
            self.device,
            self.network,
            ops,
            self.streams,
            self._moves,
            repoint,
            compute=self.compute,
            graph=graph,
            marks=marks,
            head=head,
            order=None if head is None else (*opening, *rest),
            opening=0 if head is None else len(opening),
            script=script,
        )

    def script(self) -> Script:
        """The operations of an eager cold start, as calls made ready."""
        return Script(self.device, self.ways["cold"].ops, self.streams, self._moves, self.compute)

    def head(self) -> Head:
        """The operations that a cold start issues ahead of its graph, as calls made ready."""
        ops, at = self.program.ops, self.program.head_ops
        return Head(
            self.device, ops[:at], self.streams, self._moves, self.compute, ops[at:], self.program.opening
        )

    def fill(self) -> Event:
        """All weights to the target, ahead of what the compute stream does next; the event is its end."""
        done = self._beside(self._bring_all)
        self.device.wait(self.compute, done)
        return done

    def _bring_all(self) -> None:
        target = self.plan.target
        for start, stop, _ in self._layout.arenas[target].rows:
            self.device.copy(self.background, self._held(target, start, stop), self.host.tensor[start:stop])
        if self._apart:
            self._bring(self.background, self._kept)

    def keep(self) -> None:
        """What the plan keeps between starts, ahead of what the compute stream does next."""
        if self._kept:
            self.device.wait(self.compute, self._beside(lambda: self._bring(self.background, self._kept)))

    def settle(self) -> Event:
        """What the plan reads in place into the target's arena, in the background; the event is its end."""
        return self._beside(lambda: self._bring(self.background, self.in_place))

    def _beside(self, bring: Callable[[], None]) -> Event:
        """`bring` on the background stream, behind what the compute stream holds now; the event is its end.

        The compute stream itself never brings host memory: its next wait would stand behind a head's copies.
        """
        last, done = self.device.event(), self.device.event()
        self.device.record(self.compute, last)
        self.device.wait(self.background, last)
        bring()
        self.device.record(self.background, done)
        return done

    def brought(self) -> tuple[int, int]:
        """Bytes of chunks that lie as they are in host memory on the first GPU of their way, and on later ones. Blocks."""
        self.device.synchronize()
        found = [0, 0]
        for chunk in self.plan.chunks:
            for hop, gpu in enumerate(chunk.path):
                for start in range(chunk.start_bytes, chunk.stop_bytes, COMPARED_BYTES):
                    stop = min(start + COMPARED_BYTES, chunk.stop_bytes)
                    held = self._held(gpu, start, stop)
                    if torch.equal(held, self.host.tensor[start:stop].to(held.device)):
                        found[min(hop, 1)] += stop - start
        return found[0], found[1]

    def poison(self) -> None:
        """Fill every arena with 0xFF, but for what the plan keeps between starts. Blocks."""
        device, target = self.device, self.plan.target
        device.synchronize()
        kept = [] if self._apart else list(self.network.ranges(self._kept))
        for gpu, extents in self._layout.arenas.items():
            stream = next(s for s in self.streams.values() if s.gpu == gpu)
            for start, stop, _ in extents.rows:
                for part in gaps(kept if gpu == target else [], start, stop):
                    device.fill(stream, self._held(gpu, *part), POISON)
        device.synchronize()


@contextmanager
def _unfused() -> Iterator[None]:
    """PyTorch's fused transformer kernels off, as when layers were traced: with them, other operators would run."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)
