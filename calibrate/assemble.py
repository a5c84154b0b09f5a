"""Case results to a Host: which samples each constant is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from calibrate.beside import read_label, together_label
from calibrate.fit import (
    BUSY,
    RAMP,
    WEIGHT,
    Constant,
    Fit,
    InPlace,
    bandwidth,
    fit_blocked,
    fit_in_place,
    fit_launch,
    fit_route,
    fit_step,
    measured,
)
from calibrate.links import direct_label, h2d_label, p2p_label, peer_read_label
from calibrate.ranges import difference, middle, widened
from calibrate.samples import CaseResult, Point
from calibrate.sharing import groups, shared
from calibrate.topology import nvlink, pcie
from sim.errors import InputError, require
from sim.host import Costs, Figure, Gpu, Host, Link, Peer

PEER = "p2p-beside-h2d"
"""The case that peer routes come from: a relay always pushes while its GPU's lane is at work. Where it is waived, IDLE."""
IDLE = "p2p"
Told = tuple[Constant | None, str]
"""A figure and the case that says so."""
COPY_CALL, EVENT_CALL = "a copy more", "an event more"
"""What one more of them adds to a head."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What a Host says of a GPU beside its links."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Assembled:
    """A host made of measurements, the fits behind it, and those that were refused, in words."""

    host: Host
    fits: tuple[Fit, ...]
    refused: tuple[str, ...]


def assemble(
    name: str,
    about: str,
    gpus: Sequence[GpuFacts],
    cases: Sequence[CaseResult],
    *,
    keep_bad: bool = False,
    figures: bool = True,
) -> Assembled:
    """Raises InputError where a case is missing that every host needs, or a fit is refused (unless `keep_bad`).

    Without `figures` (a device that only plays GPUs) everything is marked as assumed. Cases that were looked at twice give their
    constants by the look that was kept; the other one widens their ranges.
    """

    def by(found: Mapping[str, CaseResult], keep_bad: bool) -> Assembled:
        return _Assembly(name, about, tuple(gpus), dict(found), keep_bad, figures).build()

    kept = {c.case: c for c in cases}
    made = by(kept, keep_bad)
    if not any(c.other for c in cases):
        return made
    others = {c.case: replace(c, points=c.other) if c.other else c for c in cases}
    return replace(made, host=widened(made.host, by(others, keep_bad=True).host))


@dataclass(slots=True)
class _Assembly:
    name: str
    about: str
    gpus: tuple[GpuFacts, ...]
    cases: dict[str, CaseResult]
    keep_bad: bool
    figures: bool
    fits: list[Fit] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def build(self) -> Assembled:
        lanes = [self.route(("h2d-graph", "h2d"), h2d_label(g)) for g in range(len(self.gpus))]
        shared = self.shared([self.rate(lane).value for lane in lanes])
        pairs = sorted({*self.pairs(PEER), *self.pairs(IDLE)})
        peers = [self.route((PEER, IDLE), p2p_label(a, b)) for a, b in pairs]
        links = [
            Link(pcie(g), self.figure(self.rate(fit), fit.case, h2d_label(g))) for g, fit in enumerate(lanes)
        ]
        links += [Link(name, figure) for name, _, figure in shared]
        links += [
            Link(nvlink(a, b), self.figure(self.rate(fit), fit.case, p2p_label(a, b)))
            for (a, b), fit in zip(pairs, peers, strict=True)
        ]
        host = Host(
            name=self.name,
            about=self.about,
            gpus=tuple(
                Gpu(
                    g,
                    facts.name,
                    facts.memory_bytes,
                    (pcie(g), *(name for name, members, _ in shared if g in members)),
                )
                for g, facts in enumerate(self.gpus)
            ),
            links=tuple(links),
            peers=tuple(Peer(a, b, (nvlink(a, b),)) for a, b in pairs),
            costs=self.costs(lanes, peers),
        )
        return Assembled(host, tuple(self.fits), tuple(self.refused))

    # Samples

    def points(self, case: str, label: str) -> tuple[Point, ...]:
        result = self.cases.get(case)
        return result.labelled(label) if result is not None else ()

    def point(self, case: str, label: str) -> Point:
        found = self.points(case, label)
        require(
            bool(found),
            f"nothing was measured for {label!r} of case {case!r}; run `calibrate run` again to go on",
        )
        return found[0]

    def pairs(self, case: str) -> list[tuple[int, int]]:
        """Ordered pairs of GPUs that a case has samples for."""
        every = [(a, b) for a in range(len(self.gpus)) for b in range(len(self.gpus)) if a != b]
        return [pair for pair in every if self.points(case, p2p_label(*pair))]

    # Fits

    def keep(self, make: Callable[[], Fit], anyway: Callable[[], Fit]) -> Fit:
        """A fit, or where it is refused and `keep_bad` the fit all the same, with the refusal noted."""
        try:
            fit = make()
        except InputError as error:
            if not self.keep_bad:
                raise
            self.refused.append(str(error))
            fit = anyway()
        self.fits.append(fit)
        return fit

    def route(self, cases: Sequence[str], label: str) -> Fit:
        """Of the first case that has samples."""
        case = next((c for c in cases if self.points(c, label)), cases[0])
        found = self.points(case, label)
        name = f"{case} {label}"
        return self.keep(lambda: fit_route(name, found), lambda: fit_route(name, found, refuse=False))

    def figure(self, constant: Constant, case: str, what: str) -> Figure:
        note = (
            "; its fit was refused"
            if any(r.startswith((f"{case}:", f"{case} ")) for r in self.refused)
            else ""
        )
        source = f"calibrate case {case} ({what}){note}"
        if not self.figures:
            return Figure(constant.value, "assumed", f"no figure, GPUs were played by threads; {source}")
        return constant.figure(source)

    def rate(self, fit: Fit) -> Constant:
        """Bandwidth of a fit; with `keep_bad`, the best rate seen where the fit has none."""
        try:
            return bandwidth(fit)
        except InputError as error:
            if not self.keep_bad:
                raise
            self.refused.append(str(error))
            best = max(r.size_bytes * r.count / r.measured_ns * 1e9 for r in fit.residuals)
            return Constant("bytes_per_s", best, best, best)

    def costs(self, lanes: Sequence[Fit], peers: Sequence[Fit]) -> Costs:
        copy = middle([f.constant("latency_ns") for f in lanes])
        peer = middle([f.constant("latency_ns") for f in peers]) if peers else None
        (copy_call, copy_case), (event_call, event_case) = self.calls()
        same = self.wait("wait-graph", "wait same graph")
        cross = self.wait("wait-cross-graph", "wait cross graph")
        across: Told = (cross if cross is not None else same, "wait-cross-graph")
        blocked = self.blocked("wait-blocked", None, (same, "wait-graph"))
        cross_blocked = self.blocked("wait-cross-blocked", blocked, across)
        bare, launch = self.launch(with_copies=False), self.launch(with_copies=True)
        ahead, inside = (
            measured(self.point("start", label)) for label in ("copy ahead", "copy in the graph")
        )
        first = difference("first copy", inside, ahead)
        gpus = range(len(self.gpus))
        direct = [self.route(("direct",), direct_label(g)) for g in gpus]
        limit = middle([self.rate(f) for f in direct])
        in_place = self.in_place()
        readable = [(a, b) for a in gpus for b in gpus if self.points("peer-read", peer_read_label(a, b))]
        reads = [self.route(("peer-read",), peer_read_label(a, b)) for a, b in readable]

        def figure(constant: Constant | None, case: str) -> Figure:
            if constant is None:
                return Figure(
                    1.0 if "read" in case else 0.0, "assumed", f"no peers here, so never used ({case})"
                )
            return self.figure(constant, case, constant.name)

        return Costs(
            copy_latency_ns=figure(copy, lanes[0].case),
            peer_latency_ns=figure(peer, PEER if self.pairs(PEER) else IDLE),
            issue_copy_ns=figure(copy_call, copy_case),
            issue_event_ns=figure(event_call, event_case),
            issue_kernel_ns=figure(measured(self.point("issue", "issue kernel")), "issue"),
            issue_hook_ns=figure(self.hook(copy_call.value + 2 * event_call.value), "hook"),
            host_sync_ns=figure(self.answer(20), "answer"),
            wait_ns=figure(same, "wait-graph"),
            wait_cross_ns=figure(*across),
            wait_blocked_ns=figure(*blocked),
            wait_cross_blocked_ns=figure(*cross_blocked),
            wait_beside_ns=figure(*self.beside((same, "wait-graph"))),
            wait_land_ns=figure(self.wait("wait-cross-stream", "wait cross stream"), "wait-cross-stream"),
            wait_head_ns=figure(self.wait("wait-head", "wait same head"), "wait-head"),
            start_ns=figure(self.answer(1), "answer"),
            start_graph_ns=figure(ahead, "start"),
            launch_ns=figure(bare.constant("launch_ns"), "launch"),
            launch_node_ns=figure(bare.constant("node_ns"), "launch"),
            launch_first_ns=figure(first, "start"),
            launch_copy_ns=figure(launch.constant("copy_ns"), "launch"),
            launch_wait_ns=figure(launch.constant("wait_ns"), "launch"),
            launch_cross_ns=figure(
                next((c for c in launch.constants if c.name == "cross_ns"), None), "launch"
            ),
            direct_bytes_per_s=figure(limit, "direct"),
            direct_busy_ns=figure(in_place.constant(BUSY), in_place.case),
            direct_ramp_ns=figure(in_place.constant(RAMP), in_place.case),
            direct_weight=figure(in_place.constant(WEIGHT), in_place.case),
            peer_read_bytes_per_s=figure(
                middle([self.rate(f) for f in reads]) if reads else None, "peer-read"
            ),
        )

    def calls(self) -> tuple[tuple[Constant, str], tuple[Constant, str]]:
        """What the host takes to issue a copy, and to record an event or wait for one, each with the case that says so: starts with
        heads of more chunks and fewer, or where those were not made, as in earlier calibrations and without a partner for
        events, loops of one call.
        """
        copy, record, wait = (measured(self.point("issue", f"issue {w}")) for w in ("copy", "record", "wait"))
        found = (copy, "issue"), (middle([record, wait]), "issue")
        if self.points("head", "head own"):
            copy = self.more_chunks("head own", COPY_CALL)
            found = (copy, "head"), found[1]
        if self.points("head", "head relayed"):
            # a chunk has two copies and two events: what comes with a copy more is one of both
            both = self.more_chunks("head relayed", EVENT_CALL)
            found = found[0], (difference(EVENT_CALL, both, copy), "head")
        return found

    def more_chunks(self, label: str, name: str) -> Constant:
        """What a copy more takes, and what comes with it."""
        few, many = sorted(self.points("head", label), key=lambda point: point.copies)
        more = difference(name, measured(many), measured(few))
        return Constant(name, *(x / (many.copies - few.copies) for x in (more.value, more.low, more.high)))

    def hook(self, calls_ns: float) -> Constant:
        """What an eager start takes per layer to issue a chunk ahead of it, beyond the calls for the chunk."""
        hooked, unhooked = (measured(self.point("hook", label)) for label in ("hooked", "unhooked"))
        return difference("hook", hooked, unhooked, calls_ns)

    def wait(self, case: str, label: str) -> Constant | None:
        """None where the case was waived."""
        found = self.points(case, label)
        if not found:
            return None
        fit = self.keep(lambda: fit_step(case, found), lambda: fit_step(case, found, refuse=False))
        return fit.constant("wait_ns")

    def blocked(self, case: str, waived: Told | None, over: Told) -> Told:
        """What a wait that blocks takes, and the case that says so: `waived` where this one was not measured, and never less than
        what one takes that is `over`. Earlier calibrations know of that alone.
        """
        told = waived or over
        if self.points(case, "chain"):
            points = self.cases[case].points
            fit = self.keep(
                lambda: fit_blocked(case, points), lambda: fit_blocked(case, points, refuse=False)
            )
            told = fit.constant("wait_ns"), case
        return _no_less(told, over)

    def beside(self, over: Told) -> Told:
        """What a wait takes beside copies, and the case that says so: never less than one that is `over` without any, and as that
        where nobody measured it, as in earlier calibrations."""
        return _no_less((self.wait("wait-beside", "wait beside"), "wait-beside"), over)

    def launch(self, *, with_copies: bool) -> Fit:
        """Of graphs of kernels alone, or of the others: what a copy adds is told by comparing calls for graphs that have some,
        since those without are launched in another way."""
        found = self.points("launch", "call" if with_copies else "graph")
        require(
            bool(found) or not self.points("launch", "graph"),
            "case 'launch' was measured by an earlier version, in another way; run `calibrate run --fresh`",
        )
        require(bool(found), "nothing was measured for case 'launch'; run `calibrate run` again to go on")
        case = "launch with copies" if with_copies else "launch"
        return self.keep(lambda: fit_launch(case, found), lambda: fit_launch(case, found, refuse=False))

    def answer(self, rounds: int) -> Constant:
        """What `rounds` rounds of kernel, event and host wait take, each, beyond the kernel and its issue."""
        rest = self.point("answer", "kernel").each_ns + self.point("answer", "issue").each_ns
        point = next(p for p in self.points("answer", "rounds") if p.count == rounds)
        raw = measured(point)
        return Constant(f"{rounds} rounds", *(max(0.0, x - rest) for x in (raw.value, raw.low, raw.high)))

    def in_place(self) -> Fit:
        """What reads in place add to the same kernel on resident memory, alone and beside copies."""
        case = "direct-beside-copy"
        seen = []
        for gpu in range(len(self.gpus)):
            ways = [
                {p.size_bytes: p.each_ns for p in self.points(case, read_label(f"{what} {when}", gpu))}
                for when in ("alone", "beside")
                for what in ("in-place", "resident")
            ]
            for size in ways[0]:
                alone, base, beside, base_beside = (way[size] for way in ways)
                seen.append(InPlace(f"read:{gpu}", size, alone - base, beside - base_beside))
        return self.keep(lambda: fit_in_place(case, seen), lambda: fit_in_place(case, seen, refuse=False))

    # What lanes share

    def shared(self, rates: Sequence[float]) -> list[tuple[str, tuple[int, ...], Figure]]:
        """Names, members and capacities of what GPUs share on their way to host memory."""
        every = groups(range(len(self.gpus)))
        counted = {members: total for members in every if (total := self.total(members)) is not None}
        return [
            (name, members, self.figure(constant, "h2d-together", together_label(members)))
            for name, members, constant in shared(counted, rates)
        ]

    def total(self, gpus: tuple[int, ...]) -> Constant | None:
        """Bytes per second as they were counted, copies' latencies included."""
        points = self.points("h2d-together", together_label(gpus))
        if not points:
            return None
        time = measured(points[0])
        size = points[0].size_bytes
        return Constant("bytes_per_s", *(size / x * 1e9 for x in (time.value, time.high, time.low)))


def _no_less(told: Told, over: Told) -> Told:
    """`told`, or `over` where that takes more or nobody measured the first."""
    least = 0.0 if over[0] is None else over[0].value
    return told if told[0] is not None and told[0].value >= least else over
