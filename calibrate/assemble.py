"""Case results to a Host: which samples each constant is fitted to, and which GPUs share a way to host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibrate.fit import (
    Constant,
    Contention,
    Fit,
    bandwidth,
    fit_launch,
    fit_route,
    fit_sharing,
    fit_step,
    measured,
)
from calibrate.links import direct_label, h2d_label, p2p_label, peer_read_label, together_label
from calibrate.samples import CaseResult, Point
from calibrate.topology import nvlink, pcie, uplink
from sim.errors import InputError, require
from sim.host import Costs, Figure, Gpu, Host, Link, Peer

SHARED_BELOW = 0.90
"""Two GPUs that together get less than this part of what each gets alone share a link."""


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

    Without `figures` (a device that only plays GPUs) everything is marked as assumed.
    """
    return _Assembly(name, about, tuple(gpus), {c.case: c for c in cases}, keep_bad, figures).build()


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
        pairs = self.pairs("p2p")
        peers = [self.route(("p2p-graph", "p2p"), p2p_label(a, b)) for a, b in pairs]
        links = [
            Link(pcie(g), self.figure(self.rate(fit), fit.case, h2d_label(g))) for g, fit in enumerate(lanes)
        ]
        links += [Link(uplink(group), figure) for group, figure in shared]
        links += [
            Link(nvlink(a, b), self.figure(self.rate(fit), fit.case, p2p_label(a, b)))
            for (a, b), fit in zip(pairs, peers, strict=True)
        ]
        host = Host(
            name=self.name,
            about=self.about,
            gpus=tuple(
                Gpu(g, facts.name, facts.memory_bytes, (pcie(g), *(uplink(m) for m, _ in shared if g in m)))
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
        note = "; its fit was refused" if any(r.startswith(case) for r in self.refused) else ""
        source = f"calibrate case {case} ({what}){note}"
        if not self.figures:
            return Figure(constant.value, "assumed", f"no figure, GPUs were played by threads; {source}")
        return Figure(constant.value, "measured", source, constant.low, constant.high)

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
        copy = _middle([f.constant("latency_ns") for f in lanes])
        peer = _middle([f.constant("latency_ns") for f in peers]) if peers else None
        issue = {w: measured(self.point("issue", f"issue {w}")) for w in ("copy", "record", "wait", "kernel")}
        same = self.wait("wait-graph", "wait same graph")
        cross = self.wait("wait-cross-graph", "wait cross graph")
        launch = self.launch()
        gpus = range(len(self.gpus))
        direct = [self.route(("direct",), direct_label(g)) for g in gpus]
        limit = _middle([self.rate(f) for f in direct])
        sharing = self.sharing(_middle([self.rate(f) for f in lanes]).value, limit.value)
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
            peer_latency_ns=figure(peer, "p2p"),
            issue_copy_ns=figure(issue["copy"], "issue"),
            issue_event_ns=figure(_middle([issue["record"], issue["wait"]]), "issue"),
            issue_kernel_ns=figure(issue["kernel"], "issue"),
            host_sync_ns=figure(self.answer(20), "answer"),
            wait_ns=figure(same, "wait-graph"),
            wait_cross_ns=figure(cross if cross is not None else same, "wait-cross-graph"),
            start_ns=figure(self.answer(1), "answer"),
            launch_ns=figure(launch.constant("launch_ns"), "launch"),
            launch_node_ns=figure(launch.constant("node_ns"), "launch"),
            launch_cross_ns=figure(
                next((c for c in launch.constants if c.name == "cross_ns"), None), "launch"
            ),
            direct_bytes_per_s=figure(limit, "direct"),
            direct_weight=figure(sharing.constant("weight"), "direct-beside-copy"),
            peer_read_bytes_per_s=figure(
                _middle([self.rate(f) for f in reads]) if reads else None, "peer-read"
            ),
        )

    def wait(self, case: str, label: str) -> Constant | None:
        """None where the case was waived."""
        found = self.points(case, label)
        if not found:
            return None
        fit = self.keep(lambda: fit_step(case, found), lambda: fit_step(case, found, refuse=False))
        return fit.constant("wait_ns")

    def launch(self) -> Fit:
        found = self.points("launch", "launch")
        require(bool(found), "nothing was measured for case 'launch'; run `calibrate run` again to go on")
        return self.keep(
            lambda: fit_launch("launch", found), lambda: fit_launch("launch", found, refuse=False)
        )

    def answer(self, rounds: int) -> Constant:
        """What `rounds` rounds of kernel, event and host wait take, each, beyond the kernel and its issue."""
        rest = self.point("answer", "kernel").each_ns + self.point("answer", "issue").each_ns
        point = next(p for p in self.points("answer", "rounds") if p.count == rounds)
        raw = measured(point)
        return Constant(f"{rounds} rounds", *(max(0.0, x - rest) for x in (raw.value, raw.low, raw.high)))

    def sharing(self, capacity: float, limit: float) -> Fit:
        seen = []
        result = self.cases.get("direct-beside-copy")
        for point in result.points if result is not None else ():
            what, _, chunk = point.label.partition(" both, ")
            if chunk and what.startswith("read:"):
                gpu = what.partition(":")[2]
                alone, both = (
                    {
                        w: self.point("direct-beside-copy", f"{w}:{gpu} {when}, {chunk}")
                        for w in ("read", "copy")
                    }
                    for when in ("alone", "both")
                )
                seen.append(
                    contention(
                        f"GPU {gpu}, {chunk}", alone["read"], alone["copy"], both["read"], both["copy"]
                    )
                )
        case = "direct-beside-copy"
        return self.keep(
            lambda: fit_sharing(case, seen, capacity, limit),
            lambda: fit_sharing(case, seen, capacity, limit, refuse=False),
        )

    # Shared uplinks

    def shared(self, alone: Sequence[float]) -> list[tuple[tuple[int, ...], Figure]]:
        """Groups of GPUs that share a way to host memory, by what they got at once; then what all share, if anything."""
        gpus = range(len(self.gpus))
        group = list(gpus)
        totals: dict[tuple[int, ...], Constant] = {}
        for a in gpus:
            for b in range(a + 1, len(self.gpus)):
                total = self.total((a, b))
                if total is not None and total.value < SHARED_BELOW * (alone[a] + alone[b]):
                    totals[a, b] = total
                    group = [group[a] if g == group[b] else g for g in group]
        found = []
        for lead in dict.fromkeys(group):
            members = tuple(g for g in gpus if group[g] == lead)
            if len(members) > 1:
                best = max(
                    (t for pair, t in totals.items() if set(pair) <= set(members)), key=lambda t: t.value
                )
                at_once = self.total(members)
                found.append((members, self.figure(at_once or best, "h2d-together", together_label(members))))
        everyone = tuple(gpus)
        total = self.total(everyone)
        if len(everyone) > 2 and total is not None and all(members != everyone for members, _ in found):
            grouped = {g for members, _ in found for g in members}
            expected = sum(min(f.value, sum(alone[g] for g in m)) for m, f in found)
            expected += sum(alone[g] for g in gpus if g not in grouped)
            if total.value < SHARED_BELOW * expected:
                found.append((everyone, self.figure(total, "h2d-together", together_label(everyone))))
        return found

    def total(self, gpus: tuple[int, ...]) -> Constant | None:
        """Bytes per second of several GPUs at once, None where that was not measured."""
        points = self.points("h2d-together", together_label(gpus))
        if not points:
            return None
        time = measured(points[0])
        size = points[0].size_bytes
        return Constant("bytes_per_s", *(size / x * 1e9 for x in (time.value, time.high, time.low)))


def contention(label: str, read_alone: Point, copy_alone: Point, read: Point, copy: Point) -> Contention:
    """Rates while both ran: whoever ended later did the rest alone, at the rate it has alone."""
    first, last, last_alone = (
        (read, copy, copy_alone) if read.median_ns <= copy.median_ns else (copy, read, read_alone)
    )
    shared_ns = first.median_ns
    tail_bytes = last_alone.bytes_per_s * (last.median_ns - shared_ns) * 1e-9
    first_rate = first.bytes_per_s
    last_rate = max(last.size_bytes - tail_bytes, 0.001 * last.size_bytes) / shared_ns * 1e9
    rates = (first_rate, last_rate) if first is read else (last_rate, first_rate)
    return Contention(label, *rates)


def _middle(constants: Sequence[Constant]) -> Constant:
    """The median of several GPUs or pairs, with the range that all of theirs span."""
    return Constant(
        constants[0].name,
        float(np.median([c.value for c in constants])),
        min(c.low for c in constants),
        max(c.high for c in constants),
    )
