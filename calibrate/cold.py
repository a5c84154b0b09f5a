"""What a network's own cold starts take the host beyond what loops and small networks say of it.

Small layers of one kind (case `hook`), and runs in a loop, leave all that the host needs in the core's caches. A network's own
layers, PyTorch's code for them and the wait for the start before do not: on two H100 what comes between layers took twice as long
(results/h100-pair-3/trials/issue.txt), and graph starts the longer to issue the longer they take themselves (waited.txt there).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from calibrate.bench import UNTRUSTED, in_turn
from calibrate.samples import Point
from calibrate.ways import in_each, in_one, over_lanes, partner_of
from hwexec.core import once_at_full_pace, steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.starts import Reference, likeness
from hwexec.timing import Mismatch
from sim.host import Figure, Host
from sim.models import Built
from sim.network import Network
from sim.ops import HOST, Copy, Record, Run, Wait
from sim.plan import Plan
from sim.profile import Profile
from sim.program import lower
from sim.simulate import simulate

ROUNDS = 2
"""Preparations of each plan."""
LAUNCHED = "launched behind its head"


def eager_starts(
    built: Built, network: Network, host: Host, device: Device, repeats: int
) -> tuple[Point, ...]:
    """Eager cold starts until the host has issued all: the arena in one chunk, in one for each storage, and these relayed by the
    best partner where there is one."""
    plans = {"in one chunk": in_one(network), "in a chunk each": in_each(network)}
    if partner := partner_of(host):
        plans["each relayed"] = in_each(network, partner)
    return _starts(plans, built, network, host, device, repeats)


def graph_starts(
    built: Built, network: Network, host: Host, device: Device, repeats: int
) -> tuple[Point, ...]:
    """The same of a graph, its arena in a head of one chunk for each of two lanes; none where the network cannot be captured."""
    return _starts({LAUNCHED: over_lanes(network, partner_of(host))}, built, network, host, device, repeats)


def _starts(
    plans: Mapping[str, Plan], built: Built, network: Network, host: Host, device: Device, repeats: int
) -> tuple[Point, ...]:
    def issued(cold: ColdStart, given: tuple[torch.Tensor, ...]) -> Sequence[float]:
        if cold.launch is not cold.plan.launch:
            return ()
        with steady(device), torch.no_grad():
            sample = partial(_issued, cold, given, Reference.of(partial(cold.resident, *given)))
            sample()
            return [once_at_full_pace(sample, device) for _ in range(repeats)]

    taken = in_turn(built, network, host, device, plans, ROUNDS, issued)
    if not all(taken.values()):
        return ()
    return tuple(
        Point(label, network.arena_bytes, 1, samples, copies=len(plans[label].chunks))
        for label, samples in taken.items()
    )


def _issued(cold: ColdStart, given: tuple[torch.Tensor, ...], reference: Reference) -> float:
    """Mismatch where the answer is not the reference's, as nearly as that repeats."""
    cold.evict()
    cold.device.synchronize()
    began = time.perf_counter_ns()
    output = cold(*given)
    took = float(time.perf_counter_ns() - began)
    cold.device.synchronize()
    if not likeness(output, reference.tensors).right(cold.network.dtype, reference.reproducible):
        raise Mismatch(UNTRUSTED)
    return took


def hook(network: Network, points: tuple[Point, ...], host: Host) -> Figure | None:
    """What is left per layer that something is issued ahead of, when the calls themselves are paid for as `host` has them.

    None where nobody measured it, where the two plans come between as many layers, and where nothing is left: then they cannot be
    told from the host's noise.
    """
    if len(points) < 2:
        return None
    few, many = (_calls(plan, network, host) for plan in (in_one(network), in_each(network)))
    return _left(points[1], points[0], host, many[0] - few[0], many[1] - few[1], many[2] - few[2], "layers")


def relay(network: Network, points: tuple[Point, ...], host: Host) -> Figure | None:
    """What is left per chunk that comes over a partner, when its calls are paid for; None as for `hook`, and without a partner."""
    if len(points) < 3:
        return None
    own, over = (
        _calls(plan, network, host) for plan in (in_each(network), in_each(network, partner_of(host)))
    )
    return _left(points[2], points[1], host, over[0] - own[0], over[1] - own[1], points[2].copies, "chunks")


def calls_ns(network: Network, host: Host, hooks: Figure | None) -> float:
    """What the calls of an eager start of one chunk take the host, beyond its layers; `hooks` as a profile has them."""
    copies, events, layers = _calls(in_one(network), network, host)
    costs = host.costs
    hook_ns = costs.issue_hook_ns.value if hooks is None else hooks.value
    return copies * costs.issue_copy_ns.value + events * costs.issue_event_ns.value + layers * hook_ns


def launch(profile: Profile, points: tuple[Point, ...], host: Host) -> Figure | None:
    """What the host takes longer to issue this network's graph starts than `profile`, without such a figure, says of them: median
    and 10th to 90th percentile. None where nobody measured it, and where it takes no longer."""
    if not points:
        return None
    plan = over_lanes(profile.network, partner_of(host))
    said_ns = simulate(lower(plan, profile.network, host), profile, detail=False).issued_ns or 0.0
    low, value, high = (
        max(0.0, float(x) - said_ns) for x in np.percentile(points[0].samples_ns, (10, 50, 90))
    )
    source = (
        f"calibrate layers, {LAUNCHED}, {len(points[0].samples_ns)} starts, less what the host's costs say"
    )
    return Figure(value, "measured", source, low, high) if value > 0 else None


def _left(
    more: Point, less: Point, host: Host, copies: int, events: int, count: int, what: str
) -> Figure | None:
    """What `more` takes beyond `less` and beyond so many calls, for each of `count`: median and 10th to 90th percentile of starts
    paired as they were taken."""
    if count <= 0:
        return None
    costs = host.costs
    calls_ns = copies * costs.issue_copy_ns.value + events * costs.issue_event_ns.value
    left = [(b - a - calls_ns) / count for a, b in zip(less.samples_ns, more.samples_ns, strict=True)]
    low, value, high = (max(0.0, float(x)) for x in np.percentile(left, (10, 50, 90)))
    source = f"calibrate layers, {more.label} less {less.label}, {count} {what} and {len(left)} starts"
    return Figure(value, "measured", source, low, high) if value > 0 else None


def _calls(plan: Plan, network: Network, host: Host) -> tuple[int, int, int]:
    """Copies, records and waits, and layers that wait, as the simulator counts them."""
    ops = lower(plan, network, host).ops
    copies = sum(isinstance(op, Copy) for op in ops)
    events = sum(isinstance(op, Record | Wait) and op.stream != HOST for op in ops)
    hooks = sum(isinstance(op, Run) and isinstance(before, Wait) for before, op in pairwise(ops))
    return copies, events, hooks
