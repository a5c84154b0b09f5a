"""Links that flows share, in SimPy's time.

Each link is shared max-min fairly by weight; rates are computed anew when a flow starts or ends (Bertsekas & Gallager, Data
Networks, section 6.5.2: progressive filling).
"""

from __future__ import annotations

from dataclasses import dataclass

import simpy

from sim.timeline import LinkUse


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes under way. `rate` is the present one, bytes per nanosecond."""

    route: tuple[str, ...]
    left_bytes: float
    weight: float
    done: simpy.Event
    rate: float = 0.0


class Fabric:
    """Links that flows share. `capacity` is bytes per nanosecond by link name."""

    def __init__(
        self, env: simpy.Environment, capacity: dict[str, float], keep_use: bool = True, share: bool = True
    ) -> None:
        self.env = env
        self.capacity = capacity
        self.share = share
        self.flows: list[Flow] = []
        self.use: list[LinkUse] = []
        self.keep_use = keep_use
        self._since = env.now
        self._generation = 0

    def transfer(self, route: tuple[str, ...], size_bytes: float, weight: float = 1.0) -> simpy.Event:
        """An event that happens when `size_bytes` have crossed every link of `route`."""
        flow = Flow(route, size_bytes, weight, self.env.event())
        self._advance()
        self.flows.append(flow)
        self._share()
        return flow.done

    def _advance(self) -> None:
        """Book what flowed since the last change."""
        now, since = self.env.now, self._since
        if now > since:
            carried: dict[str, float] = {}
            for flow in self.flows:
                flow.left_bytes -= flow.rate * (now - since)
                if self.keep_use:
                    for link in flow.route:
                        carried[link] = carried.get(link, 0.0) + flow.rate
            self.use.extend(
                LinkUse(link, since, now, rate * 1e9) for link, rate in carried.items() if rate > 0
            )
        self._since = now

    def _share(self) -> None:
        """Give every flow its fair rate and set one timer for the first that ends (SimPy events cannot be cancelled)."""
        self._generation += 1
        if not self.flows:
            return
        if self.share:
            fair_rates(self.flows, self.capacity)
        else:
            for flow in self.flows:
                fair_rates([flow], self.capacity)
        first = min(self.flows, key=lambda f: f.left_bytes / f.rate)
        delay = max(0.0, first.left_bytes / first.rate)
        generation = self._generation
        timer = self.env.timeout(delay)

        def ring(_: simpy.Event) -> None:
            if generation == self._generation:
                self._finish(first)

        assert timer.callbacks is not None
        timer.callbacks.append(ring)

    def _finish(self, first: Flow) -> None:
        """End `first` by its event, whatever floating point left of it, and all that end at the same instant."""
        self._advance()
        ended = [f for f in self.flows if f is first or f.left_bytes <= f.rate * 1e-6]
        self.flows = [f for f in self.flows if f not in ended]
        for flow in ended:
            flow.done.succeed()
        self._share()


def fair_rates(flows: list[Flow], capacity: dict[str, float]) -> None:
    """Set each flow's rate: weighted max-min by progressive filling."""
    if len(flows) == 1:
        only = flows[0]
        only.rate = min(capacity[link] for link in only.route)
        return
    left = {link: capacity[link] for flow in flows for link in flow.route}
    open_flows = list(flows)
    while open_flows:
        weights: dict[str, float] = {}
        for flow in open_flows:
            for link in flow.route:
                weights[link] = weights.get(link, 0.0) + flow.weight
        level = min(left[link] / weight for link, weight in weights.items())
        full = {link for link, weight in weights.items() if left[link] / weight <= level * (1 + 1e-12)}
        fixed = [f for f in open_flows if not full.isdisjoint(f.route)]
        for flow in fixed:
            flow.rate = level * flow.weight
            for link in flow.route:
                left[link] = max(0.0, left[link] - flow.rate)
        open_flows = [f for f in open_flows if f not in fixed]
