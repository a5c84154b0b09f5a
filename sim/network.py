"""A neural network as cold starts see it: layers in running order and the storages they read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from sim.errors import require

ALIGNMENT_BYTES = 256
"""Storages start at multiples of this in an arena: what cudaMalloc guarantees and vector loads may assume."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes that one or more tensors share; tied weights are one storage.

    `home` is the layer that a layer-by-layer loader would bring it with: its first reader or, where no layer
    reads it (a BatchNorm's batch counter), the layer whose module owns it; -1 where that module never runs.
    """

    name: str
    size_bytes: int
    dtype: str
    home: int

    def __post_init__(self) -> None:
        require(
            self.size_bytes >= 0,
            f"storage {self.name!r}: size_bytes is {self.size_bytes}; it cannot be negative",
        )


@dataclass(frozen=True, slots=True)
class Read:
    """One layer reading one storage. `touched_bytes` <= the storage's size: an embedding touches only the rows it looks up."""

    storage: int
    touched_bytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of a module that runs kernels, with the weightless operators that follow it."""

    name: str
    kind: str
    reads: tuple[Read, ...]
    flops: int
    activation_bytes: int
    """Bytes of activations that the layer's operators read and write, weights not counted."""


@dataclass(frozen=True)
class Network:
    """Layers in running order, storages in arena order, and the input they were traced with.

    `model` is the name the user gave, `seq` the tokens per sample (None for images).
    Raises InputError where a read names no storage or touches more than there is.
    """

    model: str
    dtype: str
    batch: int
    seq: int | None
    layers: tuple[Layer, ...]
    storages: tuple[Storage, ...]

    def __post_init__(self) -> None:
        require(bool(self.layers), f"network {self.model!r} has no layers: a network needs at least one")
        for index, layer in enumerate(self.layers):
            seen: set[int] = set()
            for read in layer.reads:
                where = f"layer {index} ({layer.name!r}) of {self.model!r}"
                require(
                    0 <= read.storage < len(self.storages),
                    f"{where} reads storage {read.storage}, but there are {len(self.storages)}",
                )
                require(
                    read.storage not in seen, f"{where} lists storage {read.storage} twice; list each once"
                )
                seen.add(read.storage)
                size = self.storages[read.storage].size_bytes
                require(
                    0 <= read.touched_bytes <= size,
                    f"{where} touches {read.touched_bytes} bytes of a storage of {size}",
                )
        for storage, readers in zip(self.storages, self.readers, strict=True):
            require(
                not readers or storage.home == readers[0],
                f"storage {storage.name!r}: home is {storage.home}, but layer {readers[:1]} is the first to read it",
            )
            require(
                -1 <= storage.home < len(self.layers),
                f"storage {storage.name!r}: home {storage.home} is no layer of {self.model!r} (-1 for none)",
            )

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each storage starts in the arena, bytes; one more entry than storages, the last is the arena's size."""
        aligned = (-(-s.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for s in self.storages)
        return tuple(accumulate(aligned, initial=0))

    @property
    def arena_bytes(self) -> int:
        return self.offsets[-1]

    @property
    def total_bytes(self) -> int:
        """Bytes of all storages, without the arena's padding."""
        return sum(s.size_bytes for s in self.storages)

    def ranges(self, storages: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Arena ranges of storages that have bytes, in running order."""
        for at in sorted(storages):
            start, size = self.offsets[at], self.storages[at].size_bytes
            if size:
                yield start, start + size

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each storage, the layers that read it, in running order."""
        found: list[list[int]] = [[] for _ in self.storages]
        for index, layer in enumerate(self.layers):
            for read in layer.reads:
                found[read.storage].append(index)
        return tuple(tuple(f) for f in found)

    def layer_bytes(self, layer: int) -> int:
        """Bytes of the storages a layer reads, each whole."""
        return sum(self.storages[r.storage].size_bytes for r in self.layers[layer].reads)

    @cached_property
    def digest(self) -> str:
        """sha256 over all that decides whether a plan or a profile fits: input, layers, storages."""
        content = [
            [self.dtype, self.batch, self.seq],
            [[ly.name, ly.kind, [[r.storage, r.touched_bytes] for r in ly.reads]] for ly in self.layers],
            [[s.name, s.size_bytes, s.dtype, s.home] for s in self.storages],
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
