"""Arenas: exact-size pinned host memory, and which bytes of it a GPU's buffer holds."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch

from hwexec.core import cpus_of
from hwexec.device import Device
from hwexec.host_memory import check_free
from sim.errors import InputError
from sim.memory import pack

_TOUCHERS = 8
"""Threads that touch pages: one alone takes 0.8 s for 4 GiB, six times as long and longer than registering them."""


class _Pages:
    """Anonymous memory, pinned as long as this lives. Never closed by hand: a tensor over it may still be read."""

    def __init__(self, device: Device, size_bytes: int, gpu: int) -> None:
        check_free(size_bytes, "pinned memory")
        try:
            self.memory = _mapped(max(size_bytes, 1))
        except OSError as error:
            raise InputError(
                f"host memory: the system refuses {size_bytes} bytes ({error.strerror}); free some, or take a smaller model"
            ) from None
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        node = device.numa_node(gpu)
        _touch(self.address, size_bytes, set() if node is None else cpus_of(node))
        device.pin(self.address, max(size_bytes, 1))
        weakref.finalize(self, device.unpin, self.address)


def _mapped(size_bytes: int) -> mmap.mmap:
    """Anonymous memory, in huge pages where the system has them: 4 GiB of those were touched and pinned in 0.32 s, of others in
    1.1 s, and lanes carried as much from either (results/h100-pair-3/trials/thp.txt).

    A forked child does not get it: the system would copy every page that is pinned.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size_bytes)
    # private: shared memory has no huge pages
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # a kernel without them
                memory.madvise(getattr(mmap, advice))
    return memory


def _touch(address: int, size_bytes: int, cpus: set[int]) -> None:
    """Make the pages exist, on the node of `cpus`: memory lies where it is first written."""

    def touch(start: int, stop: int) -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)  # of this thread alone, which ends here
        ctypes.memset(address + start, 0, stop - start)

    step = -(-size_bytes // _TOUCHERS // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
    threads = []
    for start in range(0, size_bytes, step):
        stop = min(start + step, size_bytes)
        thread = threading.Thread(target=touch, args=(start, stop))
        try:
            thread.start()
        except RuntimeError:  # no more threads to be had: this one does it, on whatever node it is
            ctypes.memset(address + start, 0, stop - start)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join()


class HostArena:
    """Pinned host memory of exactly `size_bytes`, on the NUMA node of `gpu`. InputError where the system refuses it."""

    def __init__(self, device: Device, size_bytes: int, gpu: int) -> None:
        self.size_bytes = size_bytes
        self.device = device
        self._pages: _Pages | None = _Pages(device, size_bytes, gpu)
        self._tensor: torch.Tensor | None = torch.frombuffer(self._pages.memory, dtype=torch.uint8)[
            :size_bytes
        ]

    @property
    def tensor(self) -> torch.Tensor:
        """uint8, on the CPU, pinned."""
        if self._tensor is None:
            raise InputError("this host arena is closed; make a new one")
        return self._tensor

    def view(self, gpu: int) -> torch.Tensor:
        """The same bytes as a tensor of that GPU, which its kernels read in place over PCIe."""
        return self.device.view(self.tensor, gpu, self._pages)

    def close(self) -> None:
        """Give the memory back, once the last view of it is gone."""
        self._tensor = self._pages = None


@dataclass(frozen=True, slots=True)
class Extents:
    """Which arena bytes a GPU's buffer holds: (start, stop, where in the buffer), sorted. A partner holds only what crosses it."""

    rows: tuple[tuple[int, int, int], ...]
    size_bytes: int

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Extents:
        rows = tuple(pack(ranges))
        return cls(rows, rows[-1][2] + rows[-1][1] - rows[-1][0] if rows else 0)

    def slice(self, buffer: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The bytes [start, stop) of the arena in this GPU's buffer."""
        for low, high, at in self.rows:
            if low <= start and stop <= high:
                return buffer[at + start - low : at + stop - low]
        if start == stop:
            return buffer[:0]
        raise InputError(
            f"bytes {start}..{stop} of the arena are not on this GPU; the plan's chunks skip them"
        )
