"""The published strategies as plans. All run eagerly, as their systems did; one tuple at the foot names them.

Sources: DeepPlan (Jeong et al., EuroSys'23) and its public artifact for everything but `pipeswitch` (Bai et al., OSDI'20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from sim.errors import InputError
from sim.host import Host
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan, Sync
from sim.profile import Profile

GROUP_BYTES = 2_000_000
"""PipeSwitch's grouping: below about 2 MB a group no longer fills the link (Torpor, USENIX ATC'25)."""


@dataclass(frozen=True)
class Setting:
    """What a published planner is given: timings, the machine, the GPU to serve from and its partner (None: no route)."""

    profile: Profile
    host: Host
    target: int
    partner: int | None

    @cached_property
    def times(self) -> _Times:
        return _Times(self)

    @cached_property
    def adaptive(self) -> frozenset[int]:
        """Layers that DeepPlan's adaptive plan reads in place."""
        return _adaptive(self.times)


@dataclass(frozen=True, slots=True)
class Baseline:
    name: str
    about: str
    make: Callable[[Setting], Plan]
    relays: bool = False
    """Whether it needs a partner GPU."""


def published_partner(host: Host, target: int) -> int | None:
    """DeepPlan's rule, GPU (i + 2) mod n; the best by topology where that is no partner; None where there is none."""
    partner = (target + 2) % len(host.gpus)
    if partner != target and host.reaches(partner, target):
        return partner
    return next(iter(host.partners(target)), None)


def demand(setting: Setting) -> Plan:
    """Copy every tensor, wait for all, then run."""
    return _copy_all(setting, "demand", Sync.HOST_ALL)


def pipeline(setting: Setting) -> Plan:
    """Copy tensor by tensor in order; each layer waits for its own. What DeepPlan's artifact runs as PipeSwitch."""
    return _copy_all(setting, "pipeline", Sync.STREAM)


def pipeswitch(setting: Setting) -> Plan:
    """Copy groups of layers, each one contiguous buffer; the host waits for a group, then issues its layers."""
    network = setting.profile.network
    bounds, last = [0], 0
    for start, stop, _ in _home_ranges(network):
        if start - bounds[-1] >= GROUP_BYTES:
            bounds.append(start)
        last = stop
    chunks = tuple(Chunk(a, b, (setting.target,)) for a, b in pairwise([*bounds, last]) if b > a)
    return Plan("pipeswitch", setting.target, Launch.EAGER, _access(network, set()), chunks, Sync.HOST_GROUP)


def dha_static(setting: Setting) -> Plan:
    """DeepPlan's first plan: BatchNorm and Embedding in place, any other layer where dha_exec < exec + load."""
    times = setting.times
    direct = {
        layer
        for layer, kind in enumerate(times.kinds)
        if times.load[layer] > 0
        and (
            kind.startswith("BatchNorm")
            or kind == "Embedding"
            or times.direct[layer] < times.run[layer] + times.load[layer]
        )
    }
    return _one_link(setting, "dha-static", direct)


def dha(setting: Setting) -> Plan:
    """DeepPlan's adaptive plan: all copied, then layers before a stall moved in place until the stall is gone."""
    return _one_link(setting, "dha", setting.adaptive)


def pt(setting: Setting) -> Plan:
    """Parallel transmission: the later half of the bytes over a partner's PCIe link and NVLink."""
    return _two_links(setting, "pt", set())


def pt_dha(setting: Setting) -> Plan:
    """Parallel transmission of what the adaptive plan copies."""
    return _two_links(setting, "pt+dha", setting.adaptive)


class _Times:
    """A planner's view of a profile, nanoseconds per layer: load, run with weights resident, run with weights in place."""

    def __init__(self, setting: Setting) -> None:
        profile, host = setting.profile, setting.host
        network = profile.network
        rate = host.rate(host.h2d_route(setting.target)) * 1e-9
        self.kinds = [layer.kind for layer in network.layers]
        self.load = [0.0] * len(network.layers)
        for storage in network.storages:
            if storage.home >= 0 and storage.size_bytes:
                self.load[storage.home] += host.costs.copy_latency_ns.value + storage.size_bytes / rate
        self.run = [timing.resident.median_ns for timing in profile.layers]
        self.direct = [
            timing.resident.median_ns + sum(t.median_ns for t in timing.direct) for timing in profile.layers
        ]
        loaded = [layer for layer, load in enumerate(self.load) if load > 0]
        self.cheapest = sorted(loaded, key=lambda i: (self.direct[i] - self.run[i], -self.load[i]))
        """Layers with weights in the order in which the adaptive planner considers them."""


def _adaptive(times: _Times) -> frozenset[int]:
    """The published recurrence. Returns the layers read in place."""
    direct: set[int] = set()
    changed = True
    while changed:
        changed = False
        ready = 0.0
        for layer in range(len(times.load)):
            if layer not in direct:
                ready -= times.load[layer]
            if ready < 0:
                stall, ready = -ready, 0.0
                left, moved = _relieve(times, direct, layer, stall)
                if moved:
                    direct |= moved
                    changed = True
                    if left <= 0:
                        break
            ready += times.direct[layer] if layer in direct else times.run[layer]
    return frozenset(direct)


def _relieve(times: _Times, direct: set[int], stalled: int, stall: float) -> tuple[float, set[int]]:
    """Layers up to the stalled one to move in place, and what is left of the stall."""
    moved: set[int] = set()
    for layer in times.cheapest:
        if layer > stalled or layer in direct:
            continue
        extra = times.direct[layer] - times.run[layer]
        too_slow = times.direct[layer] > times.run[layer] + 1.5 * times.load[layer]
        if stall <= 0 or too_slow or stall < extra:
            break
        moved.add(layer)
        stall -= times.load[layer] + extra
    return stall, moved


def _home_ranges(network: Network) -> Iterator[tuple[int, int, int]]:
    """Arena range and home layer of each storage that some layer's module owns, in arena order."""
    for index, storage in enumerate(network.storages):
        if storage.home >= 0 and storage.size_bytes:
            start = network.offsets[index]
            yield start, start + storage.size_bytes, storage.home


def _access(network: Network, direct: Set[int]) -> tuple[tuple[Access, ...], ...]:
    """A published planner decides per layer; a tied storage goes the way of its home layer."""
    in_place = {index for index, storage in enumerate(network.storages) if storage.home in direct}
    return tuple(
        tuple(Access.DIRECT if read.storage in in_place else Access.COPIED for read in layer.reads)
        for layer in network.layers
    )


def _copy_all(setting: Setting, name: str, sync: Sync) -> Plan:
    network = setting.profile.network
    chunks = tuple(Chunk(a, b, (setting.target,)) for a, b, _ in _home_ranges(network))
    return Plan(name, setting.target, Launch.EAGER, _access(network, set()), chunks, sync)


def _one_link(setting: Setting, name: str, direct: Set[int]) -> Plan:
    network = setting.profile.network
    chunks = tuple(
        Chunk(a, b, (setting.target,)) for a, b, home in _home_ranges(network) if home not in direct
    )
    return Plan(name, setting.target, Launch.EAGER, _access(network, direct), chunks)


def _two_links(setting: Setting, name: str, direct: Set[int]) -> Plan:
    """Cut where the running sum of bytes passes half; both links start at once, so their copies are issued in turn."""
    network, target, partner = setting.profile.network, setting.target, setting.partner
    if partner is None:
        raise InputError(
            f"strategy {name!r} needs a partner GPU with a route to GPU {target} on {setting.host.name}"
        )
    copied = [(a, b) for a, b, home in _home_ranges(network) if home not in direct]
    half, done, cut = sum(b - a for a, b in copied) / 2, 0, len(copied)
    for index, (start, stop) in enumerate(copied):
        done += stop - start
        if done > half:
            cut = index + 1
            break
    own = [Chunk(a, b, (target,)) for a, b in copied[:cut]]
    relayed = [Chunk(a, b, (partner, target)) for a, b in copied[cut:]]
    chunks: list[Chunk] = []
    while own or relayed:
        chunks += own[:1] + relayed[:1]
        own, relayed = own[1:], relayed[1:]
    return Plan(name, target, Launch.EAGER, _access(network, direct), tuple(chunks))


BASELINES: tuple[Baseline, ...] = (
    Baseline("demand", "copy everything, then run", demand),
    Baseline("pipeline", "layer by layer, copies beside the run", pipeline),
    Baseline("pipeswitch", "groups of layers, host waits per group", pipeswitch),
    Baseline("dha-static", "DeepPlan's first plan", dha_static),
    Baseline("dha", "DeepPlan's adaptive plan", dha),
    Baseline("pt", "two links, contiguous halves", pt, relays=True),
    Baseline("pt+dha", "two links and the adaptive plan", pt_dha, relays=True),
)
