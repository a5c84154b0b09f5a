"""The SimPy interpreter: a program and a profile to a predicted timeline.

Rules
- Streams run their operations in order; an operation starts when it is issued and the one before it is done.
- A stream goes on from a wait no sooner than what a wait costs after it came there, and no sooner than what one that blocks
  costs after the event: one that stands still learns of the event late, and one that comes a moment after it as late. While the
  target's own lane carries copies, a wait of its layers costs more, however long ago the event was. In a graph a wait of its
  layers costs what the profile says, where it does: a layer that waits is not made ready while the one before it runs.
- A copy pays its latency, then is a flow over every link of its route. A kernel that reads in place is a flow, then
  runs for its resident time, so that alone on an idle link it takes what the profile says. Bytes that it cannot have read
  in the first of these it reads in the second, and ends no sooner than they have come. Where its link carries copies,
  it first waits behind what they have under way, and gets no more than a copy's share for its first stretch.
- Layers that begin while host memory is copied to their GPU take longer by the profile's measured part.
- Flows share links (sim/fabric.py). A read in place alone keeps its link busy however few bytes it makes of it (its requests
  are small), so its flow is as many bytes as the link could have carried in its time.
- Eager: the host thread pays for each operation before it may start. Graph: the host thread issues the head, then launches,
  which submits copies one after the other and layers last: a copy may start when it is submitted, a layer after all that. An
  opening is a launch of its own, in its place in the head.
"""

from __future__ import annotations

from collections.abc import Generator

import simpy

from sim.errors import require
from sim.fabric import Fabric
from sim.host import Costs, Host
from sim.ops import HOST, Copy, Op, Record, Run, Wait, compute_stream, is_landing
from sim.plan import Access, Launch
from sim.profile import LayerTiming, Profile
from sim.program import Program, cause_of
from sim.timeline import Span, SpanKind, Timeline

Process = Generator[simpy.Event, None, None]


def simulate(program: Program, profile: Profile, *, detail: bool = True, share: bool = True) -> Timeline:
    """Predict a program. Without `detail` no spans and no use of links are kept, which is several times faster.

    Without `share` every flow has its links to itself: wrong, and what an ablation wants to know.
    """
    run = _Simulation(program, profile, detail, share)
    return run.timeline()


class _Simulation:
    def __init__(self, program: Program, profile: Profile, detail: bool, share: bool = True) -> None:
        self.program = program
        self.profile = profile
        self.detail = detail
        self.host: Host = program.host
        self.costs: Costs = program.host.costs
        self.env = simpy.Environment()
        capacity = {link: rate * 1e-9 for link, rate in self.host.bandwidth.items()}
        self.fabric = Fabric(self.env, capacity, detail, share)
        self.events = [self.env.event() for _ in range(program.events)]
        self.happened = [0.0] * program.events
        """When each event happened, on its stream's clock."""
        self.behind = program.copies_behind() if detail else []
        """By event, a copy, for the words of a stall."""
        self.ready: list[float] = [float("inf")] * len(program.ops)
        """When each operation has been issued; infinity until the host thread came to it."""
        self.frontier = self.env.event()
        self.by_stream: dict[str, list[tuple[int, Op]]] = {stream: [] for stream in program.streams}
        for index, op in enumerate(program.ops):
            self.by_stream[op.stream].append((index, op))
        self.spans: list[Span] = []
        self.end = self.issued = 0.0
        target = program.plan.target
        self.lane = self.host.h2d_route(target)[0]
        self.compute = compute_stream(target)
        self.of_head = {op.event for op in program.ops[: program.head_ops] if isinstance(op, Record)}
        self.carried: dict[str, int] = dict.fromkeys(capacity, 0)
        """Copies under way on each link, latency included."""
        self.beside = [profile.beside_ns(layer) for layer in range(len(profile.layers))]
        self.slows = any(self.beside)
        inbound = (op for op in program.ops if isinstance(op, Copy) and op.source is None)
        self.inbound_left = sum(op.destination == target for op in inbound)
        """Copies of host memory to the target that have not landed."""
        eager = program.launch is Launch.EAGER
        self.start_ns = (profile.start_ns(self.costs) if eager else self.costs.start_graph_ns.value) / 2
        """Half before the first operation, half after the last."""
        self.own_launch_ns = profile.own_launch_ns
        """Of the first launch; later ones find what it brought to the caches."""
        self.own_waits = None if eager else profile.own_waits_ns
        """Of a graph's layers."""

    def timeline(self) -> Timeline:
        self.env.process(self.issue())
        for stream in self.program.streams:
            if stream != HOST:
                self.env.process(self.stream(stream))
        self.env.run()
        self.end += self.start_ns
        order = {name: at for at, name in enumerate((HOST, *self.program.streams))}
        spans = sorted(self.spans, key=lambda s: (order[s.stream], s.start_ns, s.stop_ns))
        return Timeline("predicted", self.end, tuple(spans), tuple(self.fabric.use), self.issued)

    def issue(self) -> Process:
        """The host thread: pays for each operation in turn, and stands still at its own waits."""
        costs, now = self.costs, self.start_ns
        issue = {
            Copy: costs.issue_copy_ns.value,
            Record: costs.issue_event_ns.value,
            Wait: costs.issue_event_ns.value,
        }
        hook_ns, relay_ns = self.profile.hook_ns(costs), self.profile.relay_ns
        eager = self.program.launch is Launch.EAGER
        head, opening = self.program.head_ops, self.program.opening
        for index, op in enumerate(self.program.ops if eager else self.program.ops[:head]):
            if index in opening:
                if index == opening.start:
                    now = self.launch(now, opening)
                continue
            if op.stream == HOST:
                assert isinstance(op, Wait)
                self.announce()
                event = self.events[op.event]
                if not event.processed:
                    yield event
                happened = self.happened[op.event]
                if self.detail and happened > now:
                    cause = cause_of(self.behind[op.event])
                    self.span(HOST, SpanKind.STALL, now, happened, "wait", index, cause=cause)
                now = max(now, happened) + costs.host_sync_ns.value
                continue
            begin = now
            if isinstance(op, Run):
                now += self.profile.layers[op.layer].issue.median_ns
                if index and isinstance(self.program.ops[index - 1], Wait):
                    now += hook_ns
            else:
                now += issue[type(op)]
                if eager and isinstance(op, Copy) and op.source is not None:
                    now += relay_ns
            self.ready[index] = now
            self.span(HOST, SpanKind.ISSUE, begin, now, "issue", index)
        self.announce()
        if eager:
            self.end = max(self.end, now)
            # what comes behind the last operation is the host's own as well
            self.issued = now + self.start_ns
            return
        self.issued = self.launch(now, range(head, len(self.program.ops)))

    def launch(self, begin: float, graph: range) -> float:
        """When a launch that begins then has submitted all of `graph`; marks these operations ready."""
        costs, called = self.costs, begin
        begin, self.own_launch_ns = begin + self.own_launch_ns, 0.0
        first, least, added, layers = begin + costs.launch_first_ns.value, begin, 0.0, 0
        for index in graph:
            op = self.program.ops[index]
            if isinstance(op, Run):
                layers += 1
            elif isinstance(op, Copy):
                self.ready[index], least = first + added, first
                added += costs.launch_copy_ns.value
            elif isinstance(op, Wait) and op.event in self.of_head:
                added += costs.launch_wait_ns.value
            elif isinstance(op, Wait) and op.cross_device:
                added += costs.launch_cross_ns.value
        now = max(least, begin + costs.graph_launch_ns(layers)) + added
        for index in graph:
            op = self.program.ops[index]
            if not isinstance(op, Copy):
                self.ready[index] = now if op.stream == self.compute else begin
        self.span(HOST, SpanKind.ISSUE, called, now, "launch graph")
        self.announce()
        return now

    def announce(self) -> None:
        frontier, self.frontier = self.frontier, self.env.event()
        frontier.succeed()

    def stream(self, name: str) -> Process:
        """One stream. `now` is its own clock and may run ahead of the environment's while nothing else can notice."""
        env, now = self.env, 0.0
        for index, op in self.by_stream[name]:
            while self.ready[index] == float("inf"):
                yield self.frontier
            ready = self.ready[index]
            if isinstance(op, Run):
                if ready > now:
                    cause = "the host to issue it"
                    self.span(name, SpanKind.STALL, now, ready, "stall", index, layer=op.layer, cause=cause)
                    now = ready
                timing = self.profile.layers[op.layer]
                begin = now
                in_place = any(a in (Access.DIRECT, Access.PEER) for a in op.access)
                beside = self.slows and self.inbound_left > 0
                if (in_place or beside) and now > env.now:
                    yield env.timeout(now - env.now)
                hidden = None
                if in_place:
                    hidden = yield from self.read_in_place(op, timing)
                    now = env.now
                now += timing.resident.median_ns
                if self.inbound_left > 0 and self.carried[self.lane]:
                    now += self.beside[op.layer]
                if hidden is not None:
                    yield hidden
                    now = max(now, env.now)
                self.span(name, SpanKind.RUN, begin, now, self.label(op), index, layer=op.layer)
            elif isinstance(op, Copy):
                now = max(now, ready)
                begin = now
                latency = self.costs.copy_latency_ns if op.source is None else self.costs.peer_latency_ns
                if now > env.now:
                    yield env.timeout(now - env.now)
                for link in op.route:
                    self.carried[link] += 1
                yield env.timeout(latency.value)
                yield self.fabric.transfer(op.route, op.size_bytes)
                for link in op.route:
                    self.carried[link] -= 1
                self.inbound_left -= op.source is None and op.destination == self.program.plan.target
                now = env.now
                self.span(name, SpanKind.COPY, begin, now, self.label(op), index, chunk=op.chunk)
            elif isinstance(op, Record):
                now = max(now, ready)
                if now > env.now:
                    yield env.timeout(now - env.now)
                self.happened[op.event] = now
                self.events[op.event].succeed()
            else:
                now = max(now, ready)
                event = self.events[op.event]
                if not event.triggered:
                    yield event
                over, busy, blocked = self.wait_ns(op)
                least = over
                if self.inbound_left > 0 and name == self.compute:
                    if now > env.now:
                        yield env.timeout(now - env.now)
                    if self.carried[self.lane]:
                        least = max(over, busy)
                goes_on = max(
                    now + least, self.happened[op.event] + max(least, blocked)
                )  # one that blocks costs no less
                held = goes_on - least  # what a wait costs in any case is no stall
                if self.detail and held > now and not is_landing(name):  # nothing else runs there
                    copy = self.behind[op.event]
                    chunk, cause = -1 if copy is None else copy.chunk, cause_of(copy)
                    self.span(name, SpanKind.STALL, now, held, "stall", index, chunk=chunk, cause=cause)
                now = goes_on
        self.end = max(self.end, now)

    def wait_ns(self, op: Wait) -> tuple[float, float, float]:
        """What a wait costs that is over, from when its stream came there; the same of layers beside copies over their GPU's lane;
        and one that blocks, from its event."""
        costs = self.costs
        over, blocked = costs.wait_ns, costs.wait_blocked_ns
        if op.cross_device:
            over, blocked = costs.wait_cross_ns, costs.wait_cross_blocked_ns
        if op.event in self.of_head:
            if is_landing(op.stream):
                over = costs.wait_land_ns
            elif op.stream == self.compute:
                over = costs.wait_head_ns
        over_ns, beside_ns = over.value, costs.wait_beside_ns.value
        if self.own_waits is not None and op.stream == self.compute:
            # timed with waits for events of the own device; one of another's costs no less than what the host's figure says
            least = over_ns if op.cross_device else 0.0
            over_ns, beside_ns = (max(own_ns, least) for own_ns in self.own_waits)
        return over_ns, beside_ns, blocked.value

    def read_in_place(self, op: Run, timing: LayerTiming) -> Generator[simpy.Event, None, simpy.Event | None]:
        """One flow per place a layer reads from: host memory over its own PCIe lane, a partner over the peer route. The event is
        the end of what it reads of host memory while it computes; None where that is nothing."""
        places = [j for j, access in enumerate(op.access) if access is Access.DIRECT]
        route = self.host.h2d_route(self.program.plan.target)
        rate = self.host.rate(route) * 1e-9
        own = self.profile.direct_weight
        weight = own or self.costs.direct_weight
        if places:
            direct = sum(timing.direct[j].median_ns for j in places)
            ramp = 0.0
            if self.carried[self.lane]:
                yield self.env.timeout(self.profile.direct_busy_ns(self.costs))
                ramp = 0.0 if own is not None else min(direct, self.costs.direct_ramp_ns.value)
                if ramp > 0:
                    yield self.fabric.transfer(route, ramp * rate)
            if direct > ramp:
                yield self.fabric.transfer(route, (direct - ramp) * rate, weight.value)
        if Access.PEER in op.access:
            yield from self.read_at_partners(op, timing)
        hidden_ns = self.profile.hidden_ns(op.layer, places, self.costs)
        return self.fabric.transfer(route, hidden_ns * rate, weight.value) if hidden_ns > 0 else None

    def read_at_partners(self, op: Run, timing: LayerTiming) -> Process:
        require(
            len(timing.peer) == len(op.access),
            f"layer {op.layer} reads a partner's memory in place, and the profile has no timing for that; measure one with it",
        )
        reads = self.program.network.layers[op.layer].reads
        for read, access, extra in zip(reads, op.access, timing.peer, strict=True):
            if access is Access.PEER and extra.median_ns > 0:
                holder = self.program.plan.holder(self.program.network, read.storage)
                assert holder is not None
                route = self.host.peer_route(holder, self.program.plan.target)
                yield self.fabric.transfer(route, extra.median_ns * self.host.rate(route) * 1e-9)

    def span(
        self,
        stream: str,
        kind: SpanKind,
        start: float,
        stop: float,
        label: str,
        op: int = -1,
        *,
        chunk: int = -1,
        layer: int = -1,
        cause: str = "",
    ) -> None:
        if self.detail and stop > start:
            self.spans.append(Span(stream, kind, start, stop, label, op, chunk, layer, cause))

    def label(self, op: Copy | Run) -> str:
        return self.program.label(op) if self.detail else ""
