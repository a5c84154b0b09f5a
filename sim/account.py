"""Where a cold start's time goes, and what one plan does that another does not: figures from timelines, for words to use."""

from __future__ import annotations

from dataclasses import dataclass

from sim.host import Host
from sim.network import Network
from sim.ops import HOST, compute_stream
from sim.plan import Access, Plan
from sim.timeline import SpanKind, Timeline


@dataclass(frozen=True, slots=True)
class Account:
    """A makespan's three parts, which add up to it, and what explains them. Nanoseconds and bytes."""

    run_ns: float
    """Kernels on the target, reads in place included."""
    copies_ns: float
    """The target stood still for bytes that had not landed."""
    host_ns: float
    """All else: the host thread had not issued the next operation, launch, waits between streams, start and end."""
    issued: int
    """Operations that the host thread issued one by one; 1 for a graph."""
    issue_ns: float
    landed_ns: float
    """When the last copy ended; 0 without copies."""
    latency_ns: float
    """What the copies pay before their bytes flow, all of them together."""
    copied_bytes: int
    copies: int
    lanes: tuple[tuple[int, int], ...]
    """Bytes that left host memory over each GPU's lane, by GPU."""
    together: float
    """Share of the time in which any lane carried copies that all lanes used carried some."""


def account(plan: Plan, host: Host, timeline: Timeline) -> Account:
    compute = compute_stream(plan.target)
    run = waited = 0.0
    for span in timeline.spans:
        if span.stream == compute and span.kind is SpanKind.RUN:
            run += span.duration_ns
        elif span.kind is SpanKind.STALL and (
            span.stream == HOST or (span.stream == compute and span.chunk >= 0)
        ):
            waited += span.duration_ns  # a host that waits for a copy keeps the target from its next kernel
    waited = min(waited, max(0.0, timeline.makespan_ns - run))
    issues = [s for s in timeline.spans if s.stream == HOST and s.kind is SpanKind.ISSUE]
    copies = timeline.of(SpanKind.COPY)
    lanes: dict[int, int] = {}
    latency = 0.0
    for chunk in plan.chunks:
        lanes[chunk.path[0]] = lanes.get(chunk.path[0], 0) + chunk.size_bytes
        latency += host.costs.copy_latency_ns.value + (len(chunk.path) - 1) * host.costs.peer_latency_ns.value
    return Account(
        run_ns=run,
        copies_ns=waited,
        host_ns=timeline.makespan_ns - run - waited,
        issued=len(issues),
        issue_ns=sum(s.duration_ns for s in issues),
        landed_ns=max((s.stop_ns for s in copies), default=0.0),
        latency_ns=latency,
        copied_bytes=plan.copied_bytes,
        copies=len(plan.chunks),
        lanes=tuple(sorted(lanes.items())),
        together=_together(timeline),
    )


def _together(timeline: Timeline) -> float:
    """Over the copies from host memory: time in which all their streams are busy, over time in which any is."""
    edges: list[tuple[float, int, str]] = []
    streams = set()
    for span in timeline.of(SpanKind.COPY):
        if span.stream.startswith("h2d:"):
            streams.add(span.stream)
            edges += [(span.start_ns, 1, span.stream), (span.stop_ns, 0, span.stream)]
    busy: set[str] = set()
    any_ns = all_ns = since = 0.0
    for at, opens, stream in sorted(edges):
        any_ns += (at - since) * bool(busy)
        all_ns += (at - since) * (busy == streams)
        since = at
        (busy.add if opens else busy.discard)(stream)
    return all_ns / any_ns if any_ns > 0 else 0.0


@dataclass(frozen=True, slots=True)
class InPlace:
    """Storages read in place: from host memory, or on a partner."""

    layers: tuple[int, ...]
    size_bytes: int


def in_place(plan: Plan, network: Network, access: Access = Access.DIRECT) -> InPlace:
    layers, storages = [], set()
    for index, (layer, row) in enumerate(zip(network.layers, plan.access, strict=True)):
        found = {read.storage for read, how in zip(layer.reads, row, strict=True) if how is access}
        if found:
            layers.append(index)
            storages |= found
    return InPlace(tuple(layers), sum(network.storages[s].size_bytes for s in storages))
