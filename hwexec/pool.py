"""GPU memory that prepared modules take turns in.

A module that is prepared has its place for good: the addresses are in its graphs. In a pool the places of several modules
overlap, so that many more can be prepared than fit. A start of one takes its place from those that overlap it, whose next run
must be a cold start; all others stay warm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch

from hwexec.device import Device, Stream
from hwexec.devices import open_device
from sim.errors import InputError, require
from sim.hints import first_line
from sim.network import ALIGNMENT_BYTES

Span = tuple[int, int]
"""First byte and the one behind the last."""


class Tenant:
    """What one prepared module has of a pool. `holds`: nobody has taken its place since it last did."""

    def __init__(self, pool: Pool, close: Callable[[], None]) -> None:
        self.pool, self.close = pool, close
        self.spans: dict[int, Span] = {}
        self.streams: Sequence[Stream] = ()
        """All that its work is on."""
        self.holds = False

    def place(self, sizes: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """Its arenas, of so many bytes by GPU and none where that is 0, where they overlap least with others'. InputError where the
        pool is too small."""
        self.spans = {gpu: self.pool.least_used(gpu, size) for gpu, size in sizes.items() if size}
        return {gpu: self.pool.arenas[gpu][start:stop] for gpu, (start, stop) in self.spans.items()}

    def overlaps(self, other: Tenant) -> bool:
        return any(shared(span, other.spans.get(gpu, (0, 0))) for gpu, span in self.spans.items())


class Pool:
    """So many bytes of each GPU, taken at once and given back by `close`, which closes what is prepared in it as well.

        with hwexec.Pool({0: 8 * 2**30, 1: 2 * 2**30}) as pool:
            models = [hwexec.prepare(m, plan, inputs, host=host, pool=pool) for m, plan, inputs in ...]
            y = models[0].serve(*x)  # warm where its weights are still there, else a cold start

    `hwexec.arena_bytes(network, plan)` says what a plan takes of each GPU; the pool must have that for the largest. Threads may
    share a pool: their starts are made one after the other, and on the GPU behind whatever still uses the same bytes.
    InputError where a GPU has no such room.
    """

    def __init__(self, sizes: Mapping[int, int], device: Device | str | None = None) -> None:
        for gpu, size in sizes.items():
            for what, number, least in (("GPU", gpu, 0), (f"bytes of GPU {gpu}", size, 1)):
                whole = isinstance(number, int) and not isinstance(number, bool)
                require(
                    whole and number >= least, f"pool: {what} {number!r}: must be a whole number from {least}"
                )
        require(bool(sizes), "pool: no GPU; pass bytes by GPU, as in {0: 8 * 2**30}")
        self.device = open_device(device, max(sizes) + 1)
        self._own_device = self.device is not device
        self.lock = threading.RLock()
        """Held while a start is enqueued."""
        self.arenas: dict[int, torch.Tensor] = {}
        self._tenants: list[Tenant] = []
        self._under_way: dict[Tenant, None] = {}
        """Whose work may not be over, in the order in which it was enqueued."""
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
        except device.out_of_memory as error:
            raise InputError(
                f"pool: GPU {gpu} has {device.memory(gpu).free_bytes} bytes free, not {size} ({first_line(error)}); "
                "stop what else runs there, or make a smaller pool"
            ) from None

    def join(self, close: Callable[[], None]) -> Tenant:
        require(bool(self.arenas), "this pool is closed; make a new one")
        tenant = Tenant(self, close)
        self._tenants.append(tenant)
        return tenant

    def leave(self, tenant: Tenant) -> None:
        """Its work is over, and its place is nobody's."""
        tenant.holds = False
        self._under_way.pop(tenant, None)
        if tenant in self._tenants:
            self._tenants.remove(tenant)

    def take(self, tenant: Tenant) -> tuple[Stream, ...]:
        """Its place is its own from now on. What is returned still holds work of others there, which must come first."""
        first: list[Stream] = []
        for other in [t for t in self._under_way if t is not tenant]:
            busy = [stream for stream in other.streams if not self.device.idle(stream)]
            if not busy:
                del self._under_way[other]
            elif other.overlaps(tenant):
                first += busy
        for other in self._tenants:
            other.holds = other.holds and (other is tenant or not other.overlaps(tenant))
        tenant.holds = True
        self._under_way[tenant] = None
        return tuple(first)

    def least_used(self, gpu: int, size: int) -> Span:
        """Where `size` bytes overlap least with others' places, the lowest of those."""
        whole = self.arenas[gpu].numel() if gpu in self.arenas else 0
        require(
            size <= whole,
            f"pool: has {whole} bytes of GPU {gpu}, and this plan needs {size} there; make a pool of as much",
        )
        taken = [span for tenant in self._tenants if (span := tenant.spans.get(gpu))]
        starts = {0, *(-(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for _, stop in taken)}

        def used(start: int) -> int:
            return sum(shared((start, start + size), span) for span in taken)

        start = min((s for s in sorted(starts) if s + size <= whole), key=used)
        return start, start + size

    def close(self) -> None:
        """Close what is prepared here and give the memory back. Safe to call twice."""
        with self.lock:
            for tenant in list(self._tenants):
                tenant.close()
            self.arenas.clear()
            self.device.trim()
            if self._own_device:
                self.device.close()
            self._own_device = False

    def __enter__(self) -> Pool:
        require(bool(self.arenas), "this pool is closed; make a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def shared(one: Span, other: Span) -> int:
    """Bytes that two spans have in common."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
