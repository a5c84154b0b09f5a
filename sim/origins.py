"""Where a host's figures come from, and which of those that nobody measured an answer hangs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from sim.host import LARGEST, Costs, Figure, FigureKind, Host, Roofline
from sim.plan import Plan
from sim.profile import Profile, Timing
from sim.program import lower
from sim.simulate import simulate

FIGURE_KINDS: tuple[FigureKind, ...] = ("measured", "published", "derived", "fitted", "assumed")
LAYER_TIMES = "layer times"
MORE = 0.10
"""By this part each figure is raised to see what hangs on it."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A host's figures of one kind: how many rates of links to host memory and between GPUs, and the constants' names."""

    kind: FigureKind
    pcie: int
    nvlink: int
    constants: tuple[str, ...]

    @property
    def count(self) -> int:
        return self.pcie + self.nvlink + len(self.constants)


def origins(host: Host) -> Iterator[Origin]:
    """Where a host's figures come from, the kinds that it has."""
    lanes = _lanes(host)
    for kind in FIGURE_KINDS:
        links = [link.name for link in host.links if link.bytes_per_s.kind == kind]
        constants = tuple(name for name, figure in figures(host) if figure.kind == kind)
        pcie = sum(name in lanes for name in links)
        if links or constants:
            yield Origin(kind, pcie, len(links) - pcie, constants)


def figures(host: Host) -> Iterator[tuple[str, Figure]]:
    """Costs and roofline of a host, by name."""
    for field in fields(Costs):
        yield field.name, getattr(host.costs, field.name)
    if host.roofline is not None:
        for field in fields(Roofline):
            yield field.name, getattr(host.roofline, field.name)


def _lanes(host: Host) -> set[str]:
    return {link for gpu in host.gpus for link in gpu.h2d}


# What an answer hangs on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lever:
    """What is not measured, by where it enters: rates of one kind of link, what was estimated of the layers, all other costs.

    `part`: by how much of itself a prediction changes, either way, where this is `MORE` of itself more.
    """

    name: str
    part: float


def levers(plan: Plan, profile: Profile, host: Host) -> tuple[Lever, ...]:
    """Of an estimated profile: all that moves the prediction of `plan`, what moves it most first. Five simulations."""

    def makespan_ns(profile: Profile, host: Host) -> float:
        return simulate(lower(plan, profile.network, host), profile, detail=False).makespan_ns

    before = makespan_ns(profile, host)
    if before <= 0:
        return ()
    found = (
        Lever(name, abs(makespan_ns(raised, on) / before - 1)) for name, raised, on in _raised(profile, host)
    )
    return tuple(sorted((lever for lever in found if lever.part > 0), key=lambda lever: -lever.part))


def _raised(profile: Profile, host: Host) -> Iterator[tuple[str, Profile, Host]]:
    """Each lever by name, with profile and host where it is more."""
    lanes = _lanes(host)
    for wire, inside in (("PCIe", True), ("NVLink", False)):
        unknown = {
            link.name
            for link in host.links
            if (link.name in lanes) is inside and link.bytes_per_s.kind != "measured"
        }
        raised = tuple(
            replace(link, bytes_per_s=_more(link.bytes_per_s)) if link.name in unknown else link
            for link in host.links
        )
        if unknown:
            yield f"{wire} rates", profile, replace(host, links=raised)
    layers = tuple(
        replace(
            layer,
            resident=_longer(layer.resident),
            direct=tuple(map(_longer, layer.direct)),
            peer=tuple(map(_longer, layer.peer)),
        )
        for layer in profile.layers
    )
    yield LAYER_TIMES, replace(profile, layers=layers), host
    every = {field.name: getattr(host.costs, field.name) for field in fields(Costs)}
    costs: dict[str, Figure] = {
        name: figure for name, figure in every.items() if figure.kind != "measured" and figure.value
    }
    if costs:
        layers = profile.layers
        if "issue_kernel_ns" in costs:  # what an estimate makes each layer's own from
            layers = tuple(replace(layer, issue=_longer(layer.issue)) for layer in layers)
        dearer = replace(host.costs, **{name: _more(figure) for name, figure in costs.items()})
        yield "all other costs", replace(profile, layers=layers), replace(host, costs=dearer)


def _more(figure: Figure) -> Figure:
    return Figure(min(LARGEST, (1 + MORE) * figure.value), figure.kind, figure.source)


def _longer(timing: Timing) -> Timing:
    return replace(timing, median_ns=min(LARGEST, (1 + MORE) * timing.median_ns))
