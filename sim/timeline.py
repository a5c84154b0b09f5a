"""What happened when, predicted or measured: spans per stream, stalls with their cause, use of links."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class SpanKind(StrEnum):
    COPY = "copy"
    RUN = "run"
    STALL = "stall"
    ISSUE = "issue"


@dataclass(frozen=True, slots=True)
class Span:
    """One operation, or one stall, on one stream. `op` indexes the program's operations, -1 where there is none.

    `chunk` and `layer` are -1 where they do not apply; `cause` says in words what a stall waited for.
    """

    stream: str
    kind: SpanKind
    start_ns: float
    stop_ns: float
    label: str
    op: int = -1
    chunk: int = -1
    layer: int = -1
    cause: str = ""

    @property
    def duration_ns(self) -> float:
        return self.stop_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class LinkUse:
    """A stretch of time in which a link carried `bytes_per_s` (all flows together)."""

    link: str
    start_ns: float
    stop_ns: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans sorted by stream and start. `makespan_ns` runs from the request until all operations are done, `issued_ns` until the
    host thread has issued all of them (None where nobody looked)."""

    kind: Literal["predicted", "measured"]
    makespan_ns: float
    spans: tuple[Span, ...]
    links: tuple[LinkUse, ...] = ()
    issued_ns: float | None = None

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of streams that have spans: host, then compute, then copies, each by name."""
        rank = {"host": 0, "comp": 1, "h2d:": 2, "p2p:": 3}
        return tuple(sorted({s.stream for s in self.spans}, key=lambda n: (rank.get(n[:4], 9), n)))

    def of(self, kind: SpanKind) -> tuple[Span, ...]:
        return tuple(s for s in self.spans if s.kind is kind)

    def link_bytes(self, link: str) -> float:
        """Bytes that crossed a link."""
        return sum(u.bytes_per_s * (u.stop_ns - u.start_ns) * 1e-9 for u in self.links if u.link == link)
