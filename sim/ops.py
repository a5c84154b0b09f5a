"""Operations on streams, which a plan is lowered to, and the names of those streams."""

from __future__ import annotations

from dataclasses import dataclass

from sim.plan import Access

HOST = "host"
"""The stream of the issuing host thread: only Wait stands on it."""


def compute_stream(gpu: int) -> str:
    return f"compute:{gpu}"


def h2d_stream(gpu: int) -> str:
    """The stream of the copy engine that brings host memory over `gpu`'s PCIe lane."""
    return f"h2d:{gpu}"


def peer_stream(source: int, destination: int) -> str:
    """The stream of `source` that pushes to `destination`'s memory."""
    return f"p2p:{source}>{destination}"


def landing_stream(target: int, copies: str) -> str:
    """A stream of the target without work of its own, which waits for what stream `copies` of another GPU makes of a head.

    In a graph, a wait for another device's event from outside takes several times as long as one for the own device's,
    however long ago the event was; this stream takes that time while layers run.
    """
    return f"land:{target}:{copies}"


def is_landing(stream: str) -> bool:
    return stream.startswith("land:")


def device_of(stream: str) -> int:
    """The GPU that a stream is issued on; a relay is pushed, so its stream is the source's."""
    return int(stream.split(":")[1].partition(">")[0])


@dataclass(frozen=True, slots=True)
class Copy:
    """Move arena bytes of a chunk. `source` and `destination` are GPU indices, or None for host memory."""

    stream: str
    chunk: int
    start_bytes: int
    stop_bytes: int
    source: int | None
    destination: int
    route: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return self.stop_bytes - self.start_bytes


@dataclass(frozen=True, slots=True)
class Run:
    """Run a layer's kernels; `access` as in the plan."""

    stream: str
    layer: int
    access: tuple[Access, ...]


@dataclass(frozen=True, slots=True)
class Record:
    stream: str
    event: int


@dataclass(frozen=True, slots=True)
class Wait:
    """The stream goes on only after the event. On stream HOST the host thread itself waits."""

    stream: str
    event: int
    cross_device: bool


Op = Copy | Run | Record | Wait
