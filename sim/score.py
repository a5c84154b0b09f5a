"""What plans cost a search: each simulated once, over the runs that are asked for, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sim.host import Host
from sim.plan import Access, Launch, Plan
from sim.profile import Profile
from sim.program import lower
from sim.simulate import simulate
from sim.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Score:
    """`value_ns` is the mean of all runs; `settles` as in Candidate."""

    value_ns: float
    makespan_ns: float
    settles: bool


class Scores:
    """Of plans for one target, under a memory budget in bytes, over so many runs."""

    def __init__(
        self, profile: Profile, host: Host, target: int, budget_bytes: int | None, runs: int
    ) -> None:
        self.profile, self.host, self.network = profile, host, profile.network
        self.target, self.budget, self.runs = target, budget_bytes, runs
        self.evaluated = 0
        self.timelines: dict[Plan, Timeline] = {}
        """Of published plans, as they will be shown; of the many others only the makespan is kept."""
        self._known: dict[tuple[object, ...], Score] = {}

    def of(self, plan: Plan) -> Score:
        key = (plan.launch, plan.sync, plan.access, plan.chunks, plan.head, plan.opening)
        known = self._known.get(key)
        if known is None:
            self.evaluated += 1
            program = lower(plan, self.network, self.host)
            shown = plan.name != "best"
            timeline = simulate(program, self.profile, detail=shown)
            if shown:
                self.timelines[plan] = timeline
            known = self._known[key] = self._mean(plan, timeline.makespan_ns)
        return known

    def holds(self, plan: Plan) -> bool:
        """On the target, within the memory budget."""
        return self.budget is None or plan.held_bytes(self.network) <= self.budget

    def fits(self, plan: Plan) -> bool:
        return self.holds(plan) and plan.overfull(self.network, self.host) is None

    def _mean(self, plan: Plan, makespan: float) -> Score:
        runs = self.runs
        if runs == 1:
            return Score(makespan, makespan, False)
        stay = makespan + (runs - 1) * self.warm_ns(plan.launch, plan.access)
        whole = self.budget is None or self.network.arena_bytes <= self.budget
        in_place = self._in_place_bytes(plan) if whole else 0  # settled, all weights lie there
        if in_place:
            rate = self.host.rate(self.host.h2d_route(self.target)) * 1e-9
            settle = makespan + in_place / rate + (runs - 1) * self.warm_ns(plan.launch, ())
            if settle < stay:
                return Score(settle / runs, makespan, True)
        return Score(stay / runs, makespan, False)

    def warm_ns(self, launch: Launch, access: Sequence[Sequence[Access]]) -> float:
        """A warm run that is launched so, by the rules of the simulator: with all weights resident, or read as `access` says."""
        profile, costs = self.profile, self.host.costs
        run = [timing.resident.median_ns for timing in profile.layers]
        for at, accesses in enumerate(access):
            timing = profile.layers[at]
            for j, how in enumerate(accesses):
                if how in (Access.DIRECT, Access.PEER):
                    run[at] += (timing.direct[j] if how is Access.DIRECT else timing.peer[j]).median_ns
        if launch is Launch.GRAPH:
            launched = profile.own_launch_ns + profile.launch_ns(costs)
            return costs.start_graph_ns.value + launched + sum(run)
        issued = ran = 0.0
        for timing, took in zip(profile.layers, run, strict=True):
            issued += timing.issue.median_ns
            ran = max(ran, issued) + took
        return profile.start_ns(costs) + max(issued, ran)

    def _in_place_bytes(self, plan: Plan) -> int:
        storages = {
            read.storage
            for layer, accesses in zip(self.network.layers, plan.access, strict=True)
            for read, access in zip(layer.reads, accesses, strict=True)
            if access in (Access.DIRECT, Access.PEER)
        }
        return sum(self.network.storages[s].size_bytes for s in storages)
