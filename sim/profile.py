"""A host's timings for one network: measured there, estimated from the host's constants, or played by threads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sim.errors import require
from sim.host import LARGEST, Costs, Figure
from sim.network import Network
from sim.plan import Launch

ProfileKind = Literal["estimated", "measured", "played"]
"""`played`: threads of a processor stood in for GPUs, and no time means anything."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and interquartile range in nanoseconds of `samples` runs; 0 samples where it is an estimate."""

    median_ns: float
    spread_ns: float = 0.0
    samples: int = 0

    def __post_init__(self) -> None:
        for number in (self.median_ns, self.spread_ns):
            require(0 <= number <= LARGEST, f"timing {number} ns: must be from 0 to {LARGEST}")
        require(self.samples >= 0, f"timing of {self.samples} samples: cannot be negative")


@dataclass(frozen=True, slots=True)
class LayerTiming:
    """One layer. `direct[i]` and `peer[i]` are what reading `layer.reads[i]` in place *adds* to `resident`.

    `peer` is empty where no GPU of the host can read another's memory.
    """

    resident: Timing
    """On the GPU, weights in its memory."""
    issue: Timing
    """Host thread, to enqueue the layer's kernels eagerly."""
    direct: tuple[Timing, ...]
    """Added by reading host memory in place, link idle."""
    peer: tuple[Timing, ...] = ()
    """Added by reading another GPU's memory in place, link idle."""
    beside: Timing | None = None
    """Added where the layer begins while host memory is copied to its GPU; None where nobody measured it layer by layer, and
    the profile's `slowed` holds."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where figures come from: enough to run the same thing again."""

    host: str
    gpu: str
    command: str
    date: str
    commit: str
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    inputs: tuple[str, ...] = ()
    """Digests of the files and the host the figures were made from, as `what:sha256`."""


@dataclass(frozen=True)
class Profile:
    """Raises InputError where the timings do not fit the network layer by layer and read by read."""

    kind: ProfileKind
    network: Network
    host_digest: str
    layers: tuple[LayerTiming, ...]
    provenance: Provenance
    slowed: Figure | None = None
    """Part by which layers together take longer while host memory is copied to their GPU; None where nobody measured it."""
    direct_busy: Figure | None = None
    """Nanoseconds that a layer's reads in place wait behind copies under way, no less than the host's costs say; None where nobody
    measured them with this network's kernels."""
    direct_weight: Figure | None = None
    """From then on, their share of the link for each share a copy takes (1 = equal). There with `direct_busy`, or neither."""
    start: Figure | None = None
    """Eager mode, nanoseconds: host thread, of a start beyond its layers and copies, the answer included; None where nobody
    measured it."""
    hook: Figure | None = None
    """Eager mode, nanoseconds: host thread, to come between these layers, before each that something is issued ahead of; None
    where nobody measured it with this network, and the host's costs hold."""
    relay: Figure | None = None
    """Eager mode, nanoseconds: host thread, for each copy between GPUs, beyond what its calls cost it in a head; None where nobody
    measured it with this network."""
    launch: Figure | None = None
    """Graph mode, nanoseconds: host thread, of this network's starts beyond what the host's costs say; None where nobody measured
    it. These are of small graphs, started again within milliseconds."""
    wait: Figure | None = None
    """Graph mode, nanoseconds: by how much one of these layers begins later for a wait ahead of it that is over; None where nobody
    measured it, and the host's costs hold, of small kernels that are all alike."""
    wait_beside: Figure | None = None
    """The same while host memory is copied to their GPU. There with `wait`, or neither."""

    def __post_init__(self) -> None:
        layers = self.network.layers
        require(
            (self.direct_weight is None) == (self.direct_busy is None),
            f"profile of {self.network.model!r}: direct_busy and direct_weight go together; make the profile again",
        )
        require(
            self.direct_weight is None or self.direct_weight.value > 0,
            f"profile of {self.network.model!r}: direct_weight is 0, and a read in place beside copies would never end; "
            "make the profile again",
        )
        require(
            (self.wait is None) == (self.wait_beside is None),
            f"profile of {self.network.model!r}: wait and wait_beside go together; make the profile again",
        )
        require(
            len(self.layers) == len(layers),
            f"profile of {self.network.model!r}: {len(self.layers)} timings for {len(layers)} layers; make the profile again",
        )
        for index, (timing, layer) in enumerate(zip(self.layers, layers, strict=True)):
            for what, reads in (("direct", timing.direct), ("peer", timing.peer)):
                require(
                    len(reads) == len(layer.reads) or (what == "peer" and not reads),
                    f"profile of {self.network.model!r}: layer {index} has {len(reads)} {what} timings "
                    f"for {len(layer.reads)} reads",
                )

    @property
    def warm_ns(self) -> float:
        """Sum of the layers with all weights in GPU memory."""
        return sum(t.resident.median_ns for t in self.layers)

    def launch_ns(self, costs: Costs) -> float:
        """Launch of a graph of all layers, without copies, until the first may run, as the host's costs have it."""
        return costs.graph_launch_ns(len(self.layers))

    @property
    def own_launch_ns(self) -> float:
        """What the first launch of a start takes longer than the host's costs say."""
        return self.launch.value if self.launch is not None else 0.0

    def beside_ns(self, layer: int) -> float:
        """What copies of host memory to the same GPU add to a layer that begins beside them."""
        timing = self.layers[layer]
        if timing.beside is not None:
            return timing.beside.median_ns
        return timing.resident.median_ns * (self.slowed.value if self.slowed is not None else 0.0)

    def start_ns(self, costs: Costs) -> float:
        """What an eager start takes beyond its layers and copies, half of it ahead of them."""
        return self.start.value if self.start is not None else costs.start_ns.value

    def hook_ns(self, costs: Costs) -> float:
        """What it takes the host to come between two layers of an eager start."""
        return self.hook.value if self.hook is not None else costs.issue_hook_ns.value

    @property
    def own_waits_ns(self) -> tuple[float, float] | None:
        """What a layer of a graph loses to a wait ahead of it, alone and beside copies, no less; None: the host's costs hold."""
        if self.wait is None or self.wait_beside is None:
            return None
        return self.wait.value, max(self.wait.value, self.wait_beside.value)

    def direct_busy_ns(self, costs: Costs) -> float:
        """What a layer's reads in place wait behind copies, no less than the host's: a network's own is fitted to whole runs, in
        which its large reads hide what small ones wait, down to nothing."""
        own = self.direct_busy.value if self.direct_busy is not None else 0.0
        return max(own, costs.direct_busy_ns.value)

    def hidden_ns(self, layer: int, places: Collection[int], costs: Costs) -> float:
        """How long these reads in place of a layer keep the wire busy while it computes, which what they add to it does not show:
        their bytes at the rate of kernels that do nothing but read, less what they add, and no longer than it computes."""
        timing, reads = self.layers[layer], self.network.layers[layer].reads
        own = [(reads[place].touched_bytes, timing.direct[place].median_ns) for place in places]
        carried = sum(size for size, _ in own) * 1e9 / costs.direct_bytes_per_s.value
        return min(max(0.0, carried - sum(added for _, added in own)), timing.resident.median_ns)

    def cut_ns(self, costs: Costs, launch: Launch) -> float:
        """What a cut between layers costs them, beside copies as most are, where no layer has to wait for it."""
        if launch is Launch.GRAPH and self.own_waits_ns is not None:
            return self.own_waits_ns[1]
        return max(costs.wait_ns.value, costs.wait_beside_ns.value)

    @property
    def relay_ns(self) -> float:
        """What a copy between GPUs takes the host longer in an eager start than in a head."""
        return self.relay.value if self.relay is not None else 0.0
