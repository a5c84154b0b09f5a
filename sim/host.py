"""A host: GPUs, the links between them and host memory, what each action costs, and where each figure comes from."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Literal

from sim.errors import InputError, require

FigureKind = Literal["measured", "published", "derived", "fitted", "assumed"]
LARGEST = 1e18
"""No figure is larger: sums of such stay finite and printable. As nanoseconds 31 years, as a rate a billion GB/s."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its origin. `low`..`high` is the published range or the measured spread, where there is one."""

    value: float
    kind: FigureKind
    source: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            require(
                number is None or 0 <= number <= LARGEST,
                f"figure {number} ({self.source}): must be from 0 to {LARGEST}",
            )
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        require(
            low <= self.value <= high,
            f"figure {self.value} ({self.source}): is not between its low {self.low} and its high {self.high}; give a range that "
            "has it, or none",
        )


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of one wire, or a capacity that several GPUs share (a switch's uplink)."""

    name: str
    bytes_per_s: Figure

    def __post_init__(self) -> None:
        rate = self.bytes_per_s.value
        require(rate >= 1, f"link {self.name!r}: {rate} bytes/s; a rate is 1 or more")


@dataclass(frozen=True, slots=True)
class Gpu:
    """`h2d` lists the links a host-to-device copy crosses: its own PCIe lane and any uplink it shares."""

    index: int
    name: str
    memory_bytes: int
    h2d: tuple[str, ...]

    def __post_init__(self) -> None:
        size = self.memory_bytes
        require(size >= 0, f"GPU {self.index}: memory_bytes {size}; must be 0 or more")


@dataclass(frozen=True, slots=True)
class Peer:
    """Copies and reads that `source`'s memory can serve to `destination`, over these links."""

    source: int
    destination: int
    links: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Costs:
    """What actions cost beside the bytes they move. Times are nanoseconds."""

    copy_latency_ns: Figure
    """Copy engine, once per host-to-device copy, before bytes flow."""
    peer_latency_ns: Figure
    """The same for a device-to-device copy."""
    issue_copy_ns: Figure
    """Host thread, to enqueue one copy."""
    issue_event_ns: Figure
    """Host thread, to record an event or make a stream wait for one."""
    issue_kernel_ns: Figure
    """Host thread, to enqueue one layer's kernels where a profile has no figure of its own."""
    issue_hook_ns: Figure
    """Host thread, eager: to come between a network's layers, before each layer that something is issued ahead of."""
    host_sync_ns: Figure
    """Host thread, from an event's completion until the thread runs on."""
    wait_ns: Figure
    """Stream, for each wait on an event of the same device that is long over."""
    wait_cross_ns: Figure
    """The same on an event of another device."""
    wait_blocked_ns: Figure
    """Stream that stands still at a wait, from the event on the same device until it goes on; instead of `wait_ns`."""
    wait_cross_blocked_ns: Figure
    """The same from an event of another device; instead of `wait_cross_ns`."""
    wait_beside_ns: Figure
    """Compute stream, for each wait that is over while host memory is still copied to its GPU; no less than `wait_ns`."""
    wait_land_ns: Figure
    """Landing stream, outside of the graph, for each wait on a push of the head that another device makes."""
    wait_head_ns: Figure
    """Compute stream in a graph, for each wait on a copy of the head: such an event is no edge of the graph."""
    start_ns: Figure
    """Eager mode, where a profile has no figure of its own: from the request to the first operation issued, and from the last
    kernel to the answer."""
    start_graph_ns: Figure
    """Graph mode: the same, to the first call of the head or, where there is none, of the launch."""
    launch_ns: Figure
    """Graph mode: launch of a graph on one device until its first layer may run."""
    launch_node_ns: Figure
    """Added to that per layer."""
    launch_first_ns: Figure
    """Graph mode: from the end of the head until the graph's first copy may start. Copies go in first, layers last."""
    launch_copy_ns: Figure
    """Graph mode: added launch time per copy in it."""
    launch_cross_ns: Figure
    """Graph mode: added launch time per dependency between devices."""
    launch_wait_ns: Figure
    """Graph mode: added launch time per wait for a copy of the head."""
    direct_bytes_per_s: Figure
    """Highest rate of one kernel reading host memory in place; its bytes keep the link busy that long, whatever a profile has."""
    direct_busy_ns: Figure
    """Read in place that begins while its link carries copies: waits this long behind what they have under way."""
    direct_ramp_ns: Figure
    """Of such a read, the part (as time alone) that gets only a copy's share of the link, before it has its own."""
    direct_weight: Figure
    """From then on, its share of the link for each share a copy takes (1 = equal)."""
    peer_read_bytes_per_s: Figure
    """The same for another GPU's memory."""

    def graph_launch_ns(self, layers: int) -> float:
        """Launch of a graph without copies until its first layer may run."""
        return self.launch_ns.value + self.launch_node_ns.value * layers


@dataclass(frozen=True, slots=True)
class Roofline:
    """What an estimate needs of a GPU. sim/estimate.py has the formulas these enter."""

    peak_fp32_flops_per_s: Figure
    peak_fp16_flops_per_s: Figure
    """fp16 and bf16, matrix units included."""
    gemm_efficiency: Figure
    """Share of the peak that a large matrix product reaches."""
    gemm_half_outputs: Figure
    """Outputs (rows x columns) at which a matrix product reaches half of that: few outputs leave multiprocessors idle."""
    gemm_half_depth: Figure
    """Depth (the summed dimension) at which it reaches half of that: short sums do not fill the pipeline."""
    gemm_floor_ns: Figure
    """Shortest matrix product or convolution."""
    kernel_floor_ns: Figure
    """Shortest kernel of any other kind."""
    memory_bytes_per_s: Figure
    tile_rows: Figure
    """Rows of the output that one pass over the weights serves; m rows read them ceil(m / tile_rows) times."""
    direct_floor_ns: Figure
    """What reading in place adds to a kernel however few the bytes."""
    direct_stream_bytes_per_s: Figure
    """In-place read rate of a kernel that tiles its weights."""
    direct_aligned_bytes_per_s: Figure
    """In-place read rate of a kernel that reads whole rows once, in order."""
    direct_strided_bytes_per_s: Figure
    """In-place read rate of requests of 32 bytes each, the smallest that cross PCIe."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name.endswith("_per_s")):
            value = getattr(self, name).value
            require(value >= 1, f"roofline: {name} {value:g}; a rate is 1 or more")
        for name in ("gemm_efficiency", "tile_rows"):
            value = getattr(self, name).value
            require(value > 0, f"roofline: {name} {value:g}; must be more than 0")


@dataclass(frozen=True)
class Host:
    """A machine. Raises InputError where a GPU or a peer names a link that is not there."""

    name: str
    about: str
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    peers: tuple[Peer, ...]
    costs: Costs
    roofline: Roofline | None = None

    def __post_init__(self) -> None:
        require(bool(self.gpus), f"host {self.name!r} has no GPU: list at least one")
        require(
            self.costs.direct_weight.value > 0,
            f"host {self.name!r}: direct_weight is 0, and a read in place beside copies would never end; give it more than 0",
        )
        rate = self.costs.direct_bytes_per_s.value
        require(
            rate >= 1,
            f"host {self.name!r}: direct_bytes_per_s is {rate}, and a read in place would never end; a rate is 1 or more",
        )
        names = {link.name for link in self.links}
        require(
            len(names) == len(self.links), f"host {self.name!r}: two links share a name; names must differ"
        )
        indices = [gpu.index for gpu in self.gpus]
        require(
            indices == list(range(len(indices))),
            f"host {self.name!r}: GPUs must be numbered from 0 in order, not {indices}",
        )
        for gpu in self.gpus:
            require(
                bool(gpu.h2d),
                f"host {self.name!r}: GPU {gpu.index} has no link to host memory; list one in h2d",
            )
        for owner, links in [(f"GPU {g.index}", g.h2d) for g in self.gpus] + [
            (f"peer {p.source}>{p.destination}", p.links) for p in self.peers
        ]:
            for link in links:
                require(
                    link in names,
                    f"host {self.name!r}: {owner} names link {link!r}, which is not among its links",
                )
        for peer in self.peers:
            require(
                peer.source != peer.destination and {peer.source, peer.destination} <= set(indices),
                f"host {self.name!r}: peer {peer.source}>{peer.destination} must join two different GPUs of 0..{len(indices) - 1}",
            )

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """Capacity of each link, bytes per second, by name."""
        return {link.name: link.bytes_per_s.value for link in self.links}

    def gpu(self, index: int) -> Gpu:
        """Raises InputError where the host has no such GPU."""
        if not 0 <= index < len(self.gpus):
            raise InputError(
                f"GPU {index}: {self.name} has GPUs 0 to {len(self.gpus) - 1}; choose among them"
            )
        return self.gpus[index]

    @cached_property
    def _peer_links(self) -> dict[tuple[int, int], tuple[str, ...]]:
        return {(p.source, p.destination): p.links for p in self.peers}

    def reaches(self, source: int, destination: int) -> bool:
        """Whether bytes in `source`'s memory can go straight to `destination`."""
        return (source, destination) in self._peer_links

    def peer_route(self, source: int, destination: int) -> tuple[str, ...]:
        """Links from one GPU's memory to another's. Raises InputError where there is no route."""
        links = self._peer_links.get((source, destination))
        if links is None:
            able = sorted(s for s, d in self._peer_links if d == destination)
            raise InputError(
                f"GPU {source} has no route to GPU {destination} on {self.name}; "
                + (
                    f"partners that have one: {', '.join(map(str, able))}"
                    if able
                    else "no GPU has one: use a single link"
                )
            )
        return links

    def h2d_route(self, gpu: int) -> tuple[str, ...]:
        """Links from host memory to a GPU."""
        return self.gpu(gpu).h2d

    def rate(self, route: tuple[str, ...]) -> float:
        """Bytes per second over an idle route."""
        return min(self.bandwidth[link] for link in route)

    def partners(self, target: int) -> tuple[int, ...]:
        """GPUs that can relay to `target`, best first.

        One that shares no link with those before it comes first, then the one with the faster peer route, then the lower index.
        """
        left = [g.index for g in self.gpus if g.index != target and self.reaches(g.index, target)]
        used = set(self.h2d_route(target))
        chosen: list[int] = []
        while left:
            best = min(
                left,
                key=lambda g: (
                    len(used & set(self.h2d_route(g))),
                    -self.rate(self.peer_route(g, target)),
                    g,
                ),
            )
            chosen.append(best)
            left.remove(best)
            used |= set(self.h2d_route(best))
        return tuple(chosen)

    @cached_property
    def digest(self) -> str:
        """sha256 over the values that a profile or a prediction uses; sources and words do not count."""
        values = [
            [(link.name, link.bytes_per_s.value) for link in self.links],
            [astuple(g) for g in self.gpus],
            [astuple(p) for p in self.peers],
            [getattr(self.costs, field.name).value for field in fields(Costs)],
            self.roofline and [getattr(self.roofline, field.name).value for field in fields(Roofline)],
        ]
        return hashlib.sha256(repr(values).encode()).hexdigest()
