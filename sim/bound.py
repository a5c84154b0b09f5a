"""Lower bounds: no plan on this host can be faster. Knows no search.

Let run_i be layer i's time with weights resident, x_is >= 0 what reading storage s in place adds to it, f_is bytes
that it keeps the target's lane from carrying (x_is at the lane's rate, or more), b_s the bytes of s, B the highest rate at
which host memory can leave into all allowed GPUs together, and S the time before anything starts.

Fix a layer l. A plan either brings all of s to some GPU before layer l starts (a layer up to l reads it copied or at a
partner), or every reader of s up to l reads it from host memory in place. Call the first set Z. Layers run one after
another on one stream, so before layer l starts, Z's bytes have arrived and the in-place reads of earlier layers are done:

    (1)  T >= S + (sum_{s in Z} b_s + sum_{s not in Z} sum_{i < l} f_is) / B + sum_{i >= l} run_i + sum_{s not in Z} x_ls
    (2)  T >= S + sum_i run_i + sum_{s not in Z} sum_{i <= l} x_is                                the compute stream alone

What stays on the target between starts costs neither bytes nor time. Both hold, so for every a in [0, 1]
a (1) + (1 - a) (2) holds, and its smallest value over all Z is found storage by storage:

    T >= S + a sum_{i >= l} run_i + (1 - a) sum_i run_i
           + sum_s min(a b_s / B, a sum_{i < l} f_is / B + a x_ls + (1 - a) sum_{i <= l} x_is)

summed over storages with a reader up to l. The bound is the maximum over l and a grid of a; any a is valid. Waits, sharing
and relays only add time. Eager plans also pay the host thread for every layer, which bounds them from below by itself. In a
graph plan nothing starts before a copy of its head is issued or the graph's first one launched, whichever is cheaper, and no
layer runs before a launch, of one layer at least.
B: give each GPU's traffic to the link it shares with most others; then no more than sum over those links of
min(capacity, sum of its GPUs' own rates) can flow.
"""

from __future__ import annotations

from collections import Counter

from sim.host import Host
from sim.profile import Profile

_WEIGHTS = tuple(step / 24 for step in range(25))
"""The grid of a."""


def bound_ns(
    profile: Profile, host: Host, gpus: tuple[int, ...], kept: frozenset[int] = frozenset()
) -> float:
    """Lowest conceivable makespan in ns of a cold start on `gpus[0]` with the links of all `gpus`, of plans that have the
    storages `kept` there beforehand."""
    costs = host.costs
    in_place = host.rate(host.h2d_route(gpus[0]))
    work = _work_ns(profile, intake(host, gpus), in_place, kept)
    launch = costs.graph_launch_ns(1)
    first = min(launch, costs.launch_first_ns.value, costs.issue_copy_ns.value)
    graph = costs.start_graph_ns.value + max(first + work, profile.own_launch_ns + launch + profile.warm_ns)
    issue = sum(t.issue.median_ns for t in profile.layers)
    tail = profile.layers[-1].resident.median_ns
    eager = profile.start_ns(costs) + max(work, issue + tail)
    return min(graph, eager)


def warm_ns(profile: Profile, host: Host) -> float:
    """Lowest conceivable time of a run with everything resident."""
    costs = host.costs
    graph = costs.start_graph_ns.value + profile.launch_ns(costs) + profile.warm_ns
    eager = profile.start_ns(costs) + max(profile.warm_ns, sum(t.issue.median_ns for t in profile.layers))
    return min(graph, eager)


def intake(host: Host, gpus: tuple[int, ...]) -> float:
    """Bytes per second that can leave host memory for `gpus[0]` and those of `gpus` that reach it, straight or in hops."""
    able = {gpus[0]}
    while more := {g for g in gpus if g not in able and any(host.reaches(g, other) for other in able)}:
        able |= more
    sharers = Counter(link for g in able for link in host.h2d_route(g))
    behind: dict[str, float] = {}
    for g in sorted(able):
        widest = max(host.h2d_route(g), key=lambda link: sharers[link])
        behind[widest] = behind.get(widest, 0.0) + host.rate(host.h2d_route(g))
    return sum(min(rate, host.bandwidth[link]) for link, rate in behind.items())


def _work_ns(profile: Profile, bytes_per_s: float, direct_bytes_per_s: float, kept: frozenset[int]) -> float:
    """The bound without S."""
    network = profile.network
    per_byte = 1e9 / bytes_per_s
    link_share = direct_bytes_per_s / bytes_per_s
    total = profile.warm_ns
    best = total
    for a in _WEIGHTS[1:]:
        from_here = total
        in_place = [0.0] * len(network.storages)
        share = [0.0] * len(network.storages)
        summed = 0.0
        weight = 1 - a + a * link_share
        for layer, timing in zip(network.layers, profile.layers, strict=True):
            here = summed
            for read, extra in zip(layer.reads, timing.direct, strict=True):
                s = read.storage
                if s in kept:
                    continue
                copied = a * network.storages[s].size_bytes * per_byte
                here += min(copied, in_place[s] * weight + extra.median_ns) - share[s]
                in_place[s] += extra.median_ns
                summed -= share[s]
                share[s] = min(copied, in_place[s] * weight)
                summed += share[s]
            best = max(best, a * from_here + (1 - a) * total + here)
            from_here -= timing.resident.median_ns
    return best
