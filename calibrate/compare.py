"""What changed between two files of a kind: figures that both have, and those that one has alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from calibrate.fit import Constant
from calibrate.show import OF_PROFILE, Record, figures
from calibrate.store import Calibration
from sim.errors import InputError, require
from sim.host import Figure, Host
from sim.profile import Profile, Provenance, Timing
from sim.tables import put, say

LEAST_CHANGE = 0.02
"""A layer's change below this part is none: its spread comes from few runs."""
LARGEST_PART = 100.0
"""A change of so many times the figure before is told by what it adds: that figure was about nothing."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of both files. `spread`: what they may differ by where the two stated ones meet; `beyond`: they do not."""

    what: str
    before: float
    after: float
    spread: float
    beyond: bool

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def part(self) -> float | None:
        """The change by the figure before; None where that is no measure: within its spread of nothing, or as good as nothing."""
        base = abs(self.before)
        if base <= self.spread or abs(self.difference) > LARGEST_PART * base:
            return None
        return self.difference / base


@dataclass(frozen=True, slots=True)
class Comparison:
    """`before` and `after` say whose figures they are; `gone` and `new` name those that one file has alone."""

    before: str
    after: str
    changes: tuple[Change, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]


def compare(before: Record, after: Record) -> Comparison:
    """Raises InputError where the two are not of one kind or network."""
    if isinstance(before, Host) and isinstance(after, Host):
        old, new = dict(figures(before)), dict(figures(after))
        changes = [_figure_change(what, old[what], new[what]) for what in old if what in new]
        whose = (f"{before.name}: {before.about}", f"{after.name}: {after.about}")
        return _comparison(whose, changes, list(old), list(new))
    if isinstance(before, Profile) and isinstance(after, Profile):
        a, b = before.network, after.network
        require(
            a.digest == b.digest,
            f"{a.model} ({a.dtype}, batch {a.batch}) and {b.model} ({b.dtype}, batch {b.batch}) are not the same network; "
            "give two profiles of one",
        )
        mine, theirs = dict(_own(before)), dict(_own(after))
        changes = [_figure_change(what, mine[what], theirs[what]) for what in mine if what in theirs]
        changes += _layer_changes(before, after)
        whose = (f"{_whose(before.provenance)} ({before.kind})", f"{_whose(after.provenance)} ({after.kind})")
        return _comparison(whose, changes, [*mine, *_optional(before)], [*theirs, *_optional(after)])
    if isinstance(before, Calibration) and isinstance(after, Calibration):
        fits, others = dict(_constants(before)), dict(_constants(after))
        changes = [_constant_change(what, fits[what], others[what]) for what in fits if what in others]
        return _comparison(
            (_whose(before.provenance), _whose(after.provenance)), changes, list(fits), list(others)
        )
    raise InputError(
        "the two files are not of one kind that can be compared: give two hosts, two profiles or two samples files"
    )


def _comparison(
    whose: tuple[str, str], changes: Sequence[Change], old: Sequence[str], new: Sequence[str]
) -> Comparison:
    gone, come = (what for what in old if what not in new), (what for what in new if what not in old)
    return Comparison(*whose, tuple(changes), tuple(gone), tuple(come))


def show_changes(found: Comparison, console: Console) -> None:
    for word, whose in (("before", found.before), ("after", found.after)):
        say(console, f"{word}: {whose}")
    changes = found.changes
    beyond = [c for c in changes if c.beyond]
    if beyond:
        table = Table(title="changed beyond the stated spread")
        for name in ("figure", "before", "after", "change", "spread", "part"):
            table.add_column(name, justify="left" if name == "figure" else "right")
        for change in beyond:
            numbers = (f"{number:.4g}" for number in (change.before, change.after))
            part = "" if change.part is None else f"{change.part:+.1%}"
            table.add_row(change.what, *numbers, f"{change.difference:+.4g}", f"{change.spread:.2g}", part)
        put(console, table)
    within = (len(changes) - len(beyond)) / len(changes) if changes else 1.0
    say(
        console,
        f"{len(changes) - len(beyond)} of {len(changes)} figures ({within:.1%}) agree within their spread",
    )
    for word, names in (("before", found.gone), ("after", found.new)):
        if names:
            say(console, f"only {word}: {'; '.join(names)}")


def _whose(made: Provenance) -> str:
    return ", ".join(text for text in (made.host, made.gpu, made.date) if text)


def _own(profile: Profile) -> Iterator[tuple[str, Figure]]:
    """A profile's figures beside its layers', by what a comparison calls them."""
    for name, what in OF_PROFILE.items():
        figure = getattr(profile, name)
        if figure is not None:
            yield what, figure


def _optional(profile: Profile) -> Iterator[str]:
    """What of its layers a profile may lack."""
    if any(layer.peer for layer in profile.layers):
        yield "layers that read a peer"
    if any(layer.beside is not None for layer in profile.layers):
        yield "layers beside copies"


def _constants(found: Calibration) -> Iterator[tuple[str, Constant]]:
    return ((f"{fit.case} {constant.name}", constant) for fit in found.fits for constant in fit.constants)


def _constant_change(what: str, a: Constant, b: Constant) -> Change:
    return _change(what, a.value, (a.low, a.high), b.value, (b.low, b.high))


def _figure_change(what: str, a: Figure, b: Figure) -> Change:
    def edges(figure: Figure) -> tuple[float, float]:
        return (
            figure.value if figure.low is None else figure.low,
            figure.value if figure.high is None else figure.high,
        )

    return _change(what, a.value, edges(a), b.value, edges(b))


def _change(
    what: str, before: float, stated: tuple[float, float], after: float, other: tuple[float, float]
) -> Change:
    """The spread is that on the sides which the two turn to each other."""
    (low, high), (other_low, other_high) = stated, other
    spread = high - before + after - other_low if after >= before else before - low + other_high - after
    return Change(what, before, after, max(0.0, spread), high < other_low or other_high < low)


def _layer_changes(before: Profile, after: Profile) -> Iterator[Change]:
    for index, (a, b) in enumerate(zip(before.layers, after.layers, strict=True)):
        name = before.network.layers[index].name
        pairs = [("resident", a.resident, b.resident), ("issue", a.issue, b.issue)]
        pairs += [(f"direct {i}", x, y) for i, (x, y) in enumerate(zip(a.direct, b.direct, strict=True))]
        pairs += [(f"peer {i}", x, y) for i, (x, y) in enumerate(zip(a.peer, b.peer, strict=False))]
        if a.beside is not None and b.beside is not None:
            pairs.append(("beside copies", a.beside, b.beside))
        for what, x, y in pairs:
            yield _timing_change(f"layer {index} {name} {what}, ns", x, y, a.resident.median_ns)


def _timing_change(what: str, a: Timing, b: Timing, resident_ns: float) -> Change:
    """What is added to a layer is a difference of two runs: a part of the layer's own time is within its noise."""
    room = a.spread_ns + b.spread_ns + LEAST_CHANGE * max(a.median_ns, b.median_ns, resident_ns)
    return Change(what, a.median_ns, b.median_ns, room, abs(a.median_ns - b.median_ns) > room)
