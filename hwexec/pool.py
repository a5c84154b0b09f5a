"""GPU memory that prepared modules take turns in.

A module that is prepared has its place for good: the addresses are in its graphs. In a pool the places of several modules
overlap, so that many more can be prepared than fit. A start of one takes its place from those that overlap it, whose next run
must be a cold start; all others stay warm.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Protocol

import torch

from hwexec.device import Device, Event
from hwexec.devices import open_device
from hwexec.host_memory import memory_error
from hwexec.inputs import shown
from sim.draft import aligned
from sim.errors import InputError, require
from sim.hints import first_line
from sim.network import ALIGNMENT_BYTES

Span = tuple[int, int]
"""First byte and the one behind the last."""


class Closes(Protocol):
    """Whoever has a place in a pool."""

    def close(self) -> None: ...


class Tenant:
    """What one prepared module has of a pool. As a context, its turn: nobody else in the pool enqueues anything.

    `holds`: nobody has taken its place since it last did. `end`: behind all its work there that is enqueued, None where that is
    known to be over. `owner` is gone where whoever prepared it let go of it.
    """

    def __init__(self, pool: Pool, name: str, owner: Callable[[], Closes | None]) -> None:
        self.pool, self.name, self.owner = pool, name, owner
        self.spans: dict[int, Span] = {}
        self.neighbours: list[Tenant] = []
        """Whose places overlap its own."""
        self.end: Event | None = None
        self.holds = False
        self._depth = 0

    def __enter__(self) -> None:
        pool = self.pool
        pool.lock.acquire()
        try:
            if pool.turn is not self:
                pool.check_between(self.name)
            pool.turn = self
            self._depth += 1
        except BaseException:
            pool.lock.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                self.pool.turn = None
        finally:
            self.pool.lock.release()

    def allot(self, sizes: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Its arenas, of so many bytes by GPU and none where that is 0, where they overlap least with others'. InputError where the
        pool is too small, or closed."""
        with self.pool.lock:
            self.pool.check_open()
            self.spans = {gpu: self.pool.least_used(gpu, size) for gpu, size in sizes.items() if size}
            self.pool.acquaint()
            return {gpu: self.pool.arenas[gpu][start:stop] for gpu, (start, stop) in self.spans.items()}

    def overlaps(self, other: Tenant) -> bool:
        return any(shared(span, other.spans.get(gpu, (0, 0))) for gpu, span in self.spans.items())


class Pool:
    """So many bytes of each GPU, taken at once and given back by `close`, which closes what is prepared in it as well.

        with hwexec.Pool({0: 8 * 2**30, 1: 2 * 2**30}) as pool:
            models = [hwexec.prepare(m, plan, inputs, host=host, pool=pool) for m, plan, inputs in ...]
            y = models[0].serve(*x)  # warm where its weights are still there, else a cold start

    `hwexec.arena_bytes(network, plan)` says what a plan takes of each GPU; the pool must have that for the largest. Threads may
    share a pool: their starts are enqueued one after the other, and run on the GPU behind whatever still uses the same bytes.
    Preparing a module takes its place as a start does. Starts of others are held up while one is captured (when it is prepared,
    and when `in_place` is first asked for), and by an eager plan whose host waits for its copies. An answer that is a view of a
    weight is overwritten as the weight is.
    InputError where a GPU has no such room.
    """

    def __init__(self, sizes: Mapping[int, int], device: Device | str | None = None) -> None:
        require(
            isinstance(sizes, Mapping) and bool(sizes),
            f"pool: {shown(sizes)} says no GPU; pass bytes by GPU, as in {{0: 8 * 2**30}}",
        )
        for gpu, size in sizes.items():
            for what, number in (("GPU", gpu), (f"bytes of GPU {gpu}", size)):
                whole = isinstance(number, int) and not isinstance(number, bool)
                require(whole and number >= 0, f"pool: {what} {number!r}: must be a whole number from 0")
        self.device = open_device(device, max(sizes) + 1)
        self._own_device = self.device is not device
        self.lock = threading.RLock()
        """Held while anything is enqueued."""
        self.turn: Tenant | None = None
        """Who enqueues, of the thread that has the lock."""
        self.arenas: dict[int, torch.Tensor] = {}
        self._tenants: list[Tenant] = []
        self.unsure = False
        """Something may be under way that no tenant's `end` is behind."""
        try:
            for gpu, size in sizes.items():
                self.arenas[gpu] = self._allocated(gpu, size)
        except BaseException:
            self.close()
            raise

    def _allocated(self, gpu: int, size: int) -> torch.Tensor:
        device = self.device
        require(gpu < device.gpu_count, f"pool: GPU {gpu} is not there; this machine has {device.gpu_count}")
        try:
            return device.allocate(size, gpu)
        except Exception as error:
            if memory_error(error, device) is None:
                raise
            free = device.memory(gpu).free_bytes
            why = f"has {free} bytes free, not {size}" if free < size else f"gives no {size} bytes"
            raise InputError(
                f"pool: GPU {gpu} {why} ({first_line(error)}); stop what else runs there, or make a smaller pool"
            ) from None

    def join(self, name: str, owner: Closes) -> Tenant:
        """`owner` is closed with the pool, and kept alive by nobody here."""
        with self.lock:
            self.check_open()
            self.check_between(name)
            tenant = Tenant(self, name, weakref.ref(owner))
            self._tenants.append(tenant)
            return tenant

    def check_open(self) -> None:
        require(bool(self.arenas), "this pool is closed; make a new one")

    def check_between(self, name: str) -> None:
        """InputError in the middle of a start: in a forward that it runs, or in a signal's handler."""
        if self.turn is not None:
            raise InputError(
                f"{name}: a start of {self.turn.name} in the same pool is not enqueued yet; make this call before or after it"
            )

    def leave(self, tenant: Tenant) -> None:
        """Its place is nobody's."""
        with self.lock:
            tenant.holds = False
            self._gone(tenant)
            self._tenants = [other for other in self._tenants if other is not tenant]
            self.acquaint()

    def _living(self) -> list[Tenant]:
        dead = [tenant for tenant in self._tenants if tenant.owner() is None]
        for tenant in dead:
            self._gone(tenant)
        self._tenants = [tenant for tenant in self._tenants if tenant not in dead]
        return self._tenants

    def _gone(self, tenant: Tenant) -> None:
        """Nobody asks for its `end` from now on."""
        if tenant.end is not None and not self.device.happened(tenant.end):
            self.unsure = True
        tenant.end = None

    def take(self, tenant: Tenant) -> list[Event]:
        """Its neighbours hold their places no longer. What is returned has not happened yet: ends of their work there, which must
        come first. Blocks only where something broke half way."""
        if self.unsure:
            self.device.synchronize()
            self.unsure = False
        first: list[Event] = []
        for other in tenant.neighbours:
            other.holds = False
            if other.end is not None:
                if self.device.happened(other.end):
                    other.end = None
                else:
                    first.append(other.end)
        return first

    def acquaint(self) -> None:
        """Tell each tenant who overlaps it: takes, which are many, then look at nobody else."""
        tenants = self._living()
        for tenant in tenants:
            tenant.neighbours = [other for other in tenants if other is not tenant and other.overlaps(tenant)]

    def least_used(self, gpu: int, size: int) -> Span:
        """Where `size` bytes overlap with the fewest others' places, by the fewest bytes, the lowest of those."""
        whole = self.arenas[gpu].numel() if gpu in self.arenas else 0
        require(
            size <= whole,
            f"pool: has {whole} bytes of GPU {gpu}, and this plan needs {size} there; make a pool of as much (hwexec.arena_bytes "
            "says what a plan needs of each GPU)",
        )
        taken = [span for tenant in self._living() if (span := tenant.spans.get(gpu))]
        # some best place begins where another ends, ends where another begins, or is at an end of the pool
        behind = [0, *(aligned(stop) for _, stop in taken)]
        before = [
            (start - size) // ALIGNMENT_BYTES * ALIGNMENT_BYTES for start in (whole, *(s for s, _ in taken))
        ]
        starts = sorted({at for at in (*behind, *before) if 0 <= at <= whole - size})

        def used(start: int) -> tuple[int, int]:
            common = [shared((start, start + size), span) for span in taken]
            return sum(map(bool, common)), sum(common)

        start = min(starts, key=used)
        return start, start + size

    def close(self) -> None:
        """Close what is prepared here and give the memory back, also where closing one fails. Safe to call twice.

        InputError in the middle of a start.
        """
        with self.lock, ExitStack() as stack:
            self.check_between("this pool")
            if self._own_device:
                stack.callback(self.device.close)
            self._own_device = False
            stack.callback(self.device.trim)
            stack.callback(self.arenas.clear)
            for owner in [tenant.owner() for tenant in self._living()]:
                if owner is not None:
                    stack.callback(owner.close)

    def __enter__(self) -> Pool:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def shared(one: Span, other: Span) -> int:
    """Bytes that two spans have in common."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
