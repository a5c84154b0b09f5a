"""Calibration files to a person: tables, a plot of bandwidth by size, and what changed between two of them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from calibrate.fit import Constant, Fit
from calibrate.layers import LayersResult
from calibrate.samples import CaseResult, Point
from calibrate.store import CALIBRATION, LAYERS, Calibration
from calibrate.timings import slowed
from sim.errors import InputError, require
from sim.files import HOST, PROFILE, FileKind, read_record
from sim.host import Costs, Figure, Host
from sim.output import write_file
from sim.profile import Profile, Timing
from sim.tables import put

Record = Calibration | Host | Profile | LayersResult
KINDS: tuple[FileKind[Any], ...] = (CALIBRATION, HOST, PROFILE, LAYERS)
LEAST_CHANGE = 0.02
"""A layer's change below this part is none: its spread comes from few runs."""
OF_PROFILE = {
    "slowed": "slowed beside copies, part",
    "direct_busy": "direct_busy, ns",
    "direct_weight": "direct_weight",
    "start": "start, ns",
}
"""Figures of a profile beside its layers', each of which it may lack, and what a comparison calls them."""


def read(path: str) -> Record:
    """Any file that `calibrate run` writes. Raises InputError for another."""
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(4096).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    found = re.search(r"^kind: (\S+)", head, re.MULTILINE)
    kind = next((k for k in KINDS if found is not None and k.kind == found[1]), None)
    if kind is None:
        raise InputError(
            f"{path}: is no file that calibrate writes (kind {found[1] if found else 'missing'!r}); "
            f"it shows {', '.join(k.kind for k in KINDS)} files"
        )
    record: Record = read_record(path, kind)
    return record


def show(record: Record, console: Console) -> None:
    if isinstance(record, Host):
        _host(record, console)
    elif isinstance(record, Profile):
        _profile(record, console)
    elif isinstance(record, Calibration):
        _calibration(record, console)
    else:
        _layers(record, console)


def plottable(record: Record, path: str) -> Calibration:
    """The record, where `plot` can draw it to `path`. Raises InputError."""
    if not isinstance(record, Calibration):
        raise InputError("--plot draws samples files only (samples/NAME.yaml); give one of those")
    ending = Path(path).suffix.lower()
    require(ending in (".png", ".svg", ".pdf"), f"--plot {path}: ends in {ending!r}; use .png, .svg or .pdf")
    return record


def plot(record: Calibration, path: str, *, force: bool = False) -> None:
    """Bandwidth by size, samples as points, the fit as a line. PNG, SVG or PDF by the path's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second to import
    from matplotlib.figure import Figure as Picture  # noqa: PLC0415 - the same

    picture = Picture(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    for result in record.cases:
        for label in result.labels:
            points = [p for p in result.labelled(label) if p.size_bytes]
            if len(points) < 3:
                continue
            fit = next((f for f in record.fits if f.case == f"{result.case} {label}"), None)
            name = f"{result.case} {label}" + (
                "" if fit is None else f", fit off by {fit.median_residual:.1%}"
            )
            x = [p.size_bytes for p in points for _ in p.samples_ns]
            y = [p.size_bytes * p.count / s for p in points for s in p.samples_ns]
            dots = axes.plot(x, y, ".", markersize=3, label=name)[0]
            if fit is not None:
                rows = sorted(fit.residuals, key=lambda r: r.size_bytes)
                fitted = [r.size_bytes * r.count / r.fitted_ns for r in rows]
                axes.plot([r.size_bytes for r in rows], fitted, "-", linewidth=1, color=dots.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("bytes of one copy or read")
    axes.set_ylabel("GB/s")
    title = record.name if record.figures else f"{record.name}: GPUs played by threads, no figures"
    axes.set_title(f"{title}: samples and fits")
    axes.legend(fontsize="x-small")
    drawn = io.BytesIO()
    picture.savefig(drawn, format=Path(path).suffix.lower()[1:], dpi=120)
    write_file(path, drawn.getvalue(), force=force)


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of both files. `beyond`: the two stated spreads do not meet."""

    what: str
    before: float
    after: float
    beyond: bool


def compare(before: Record, after: Record) -> tuple[Change, ...]:
    """Every figure that both files have. Raises InputError where the two are not of one kind or network."""
    if isinstance(before, Host) and isinstance(after, Host):
        old, new = dict(_figures(before)), dict(_figures(after))
        return tuple(_figure_change(what, old[what], new[what]) for what in old if what in new)
    if isinstance(before, Profile) and isinstance(after, Profile):
        a, b = before.network, after.network
        require(
            a.digest == b.digest,
            f"{a.model} ({a.dtype}, batch {a.batch}) and {b.model} ({b.dtype}, batch {b.batch}) are not the same network; "
            "give two profiles of one",
        )
        return tuple(_profile_changes(before, after))
    if isinstance(before, Calibration) and isinstance(after, Calibration):
        mine = {(f.case, c.name): c for f in before.fits for c in f.constants}
        theirs = {(f.case, c.name): c for f in after.fits for c in f.constants}
        return tuple(
            _constant_change(f"{case} {name}", mine[case, name], c)
            for (case, name), c in theirs.items()
            if (case, name) in mine
        )
    raise InputError(
        "the two files are not of one kind that can be compared: give two hosts, two profiles or two samples files"
    )


def show_changes(changes: tuple[Change, ...], console: Console) -> None:
    beyond = [c for c in changes if c.beyond]
    if beyond:
        table = Table("figure", "before", "after", "change", title="changed beyond the stated spread")
        for change in beyond:
            ratio = f"{change.after / change.before - 1:+.1%}" if change.before else "new"
            table.add_row(change.what, f"{change.before:.4g}", f"{change.after:.4g}", ratio)
        put(console, table)
    within = (len(changes) - len(beyond)) / len(changes) if changes else 1.0
    console.print(
        f"{len(changes) - len(beyond)} of {len(changes)} figures ({within:.1%}) agree within their spread"
    )


def _apart(low: float, high: float, other_low: float, other_high: float) -> bool:
    return high < other_low or other_high < low


def _constant_change(what: str, a: Constant, b: Constant) -> Change:
    return Change(what, a.value, b.value, _apart(a.low, a.high, b.low, b.high))


def _figure_change(what: str, a: Figure, b: Figure) -> Change:
    def edges(figure: Figure) -> tuple[float, float]:
        return (
            figure.value if figure.low is None else figure.low,
            figure.value if figure.high is None else figure.high,
        )

    return Change(what, a.value, b.value, _apart(*edges(a), *edges(b)))


def _profile_changes(before: Profile, after: Profile) -> Iterator[Change]:
    for name, what in OF_PROFILE.items():
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            yield _figure_change(what, old, new)
    for index, (a, b) in enumerate(zip(before.layers, after.layers, strict=True)):
        name = before.network.layers[index].name
        pairs = [("resident", a.resident, b.resident), ("issue", a.issue, b.issue)]
        pairs += [(f"direct {i}", x, y) for i, (x, y) in enumerate(zip(a.direct, b.direct, strict=True))]
        pairs += [(f"peer {i}", x, y) for i, (x, y) in enumerate(zip(a.peer, b.peer, strict=False))]
        for what, x, y in pairs:
            yield _timing_change(f"layer {index} {name} {what}, ns", x, y, a.resident.median_ns)


def _timing_change(what: str, a: Timing, b: Timing, resident_ns: float) -> Change:
    """What is added to a layer is a difference of two runs: a part of the layer's own time is within its noise."""
    room = a.spread_ns + b.spread_ns + LEAST_CHANGE * max(a.median_ns, b.median_ns, resident_ns)
    return Change(what, a.median_ns, b.median_ns, abs(a.median_ns - b.median_ns) > room)


def _figures(host: Host) -> Iterator[tuple[str, Figure]]:
    for link in host.links:
        yield f"link {link.name}, bytes/s", link.bytes_per_s
    for name in Costs.__dataclass_fields__:
        yield name, getattr(host.costs, name)


def _host(host: Host, console: Console) -> None:
    console.print(f"[bold]{host.name}[/]: {host.about}", highlight=False)
    table = Table("figure", "value", "low", "high", "kind", "source")
    for name, figure in _figures(host):
        low, high = (("" if x is None else _number(name, x)) for x in (figure.low, figure.high))
        table.add_row(
            name.partition(",")[0], _number(name, figure.value), low, high, figure.kind, figure.source
        )
    put(console, table)


def _number(name: str, value: float) -> str:
    if "bytes_per_s" in name or "bytes/s" in name:
        return f"{value / 1e9:.2f} GB/s"
    return f"{value / 1e3:.2f} us" if name.endswith("_ns") else f"{value:.3g}"


def _longer(slowed: Figure) -> str:
    spread = "" if slowed.low is None or slowed.high is None else f" ({slowed.low:.1%}..{slowed.high:.1%})"
    return f"{slowed.value:.1%}{spread} longer"


def _us(timing: Timing) -> str:
    return f"{timing.median_ns / 1e3:.1f}"


def _profile(profile: Profile, console: Console) -> None:
    network = profile.network
    console.print(
        f"[bold]{network.model}[/] {network.dtype}, batch {network.batch}, on {profile.provenance.host} ({profile.kind}): "
        f"{len(network.layers)} layers, {network.total_bytes / 2**20:.1f} MiB, warm {profile.warm_ns / 1e6:.3f} ms",
        highlight=False,
    )
    table = Table(
        "",
        "layer",
        "kind",
        "KiB",
        "resident us",
        "issue us",
        "+ in place us",
        "+ from a peer us",
        "+ beside copies us",
    )
    if profile.slowed is not None:
        console.print(f"beside copies of host memory to the same GPU layers take {_longer(profile.slowed)}")
    others = (
        (words, figure)
        for name, words in OF_PROFILE.items()
        if name != "slowed" and (figure := getattr(profile, name)) is not None
    )
    for words, figure in others:
        console.print(f"{words}: {figure.value:.4g} ({figure.source})", highlight=False)
    for index, (layer, timing) in enumerate(zip(network.layers, profile.layers, strict=True)):
        table.add_row(
            str(index), layer.name, layer.kind, f"{network.layer_bytes(index) / 1024:.0f}", _us(timing.resident),
            _us(timing.issue), " ".join(map(_us, timing.direct)), " ".join(map(_us, timing.peer)),
            _us(timing.beside) if timing.beside is not None else "",
        )  # fmt: skip
    put(console, table)


def _calibration(found: Calibration, console: Console) -> None:
    made = found.provenance
    console.print(
        f"[bold]{found.name}[/]: {made.gpu}, driver {made.driver or '?'}, CUDA {made.cuda or '?'}, torch {made.torch}, "
        f"{made.date}, commit {made.commit}\n{made.command}",
        highlight=False,
    )
    if not found.figures:
        console.print("[bold]GPUs were played by threads: no figure here means anything[/]")
    for text in (*found.flags, *found.refused):
        console.print(f"! {text}", highlight=False, markup=False)
    for result in found.cases:
        if result.waived is not None:
            console.print(f"{result.case}: waived, {result.waived}")
        else:
            put(console, _case(result))
    fits = Table("fit", "model", "constants", "median residual", "worst", title="fits")
    for fit in found.fits:
        worst = max(fit.residuals, key=lambda r: abs(r.relative))
        fits.add_row(
            fit.case,
            fit.model,
            _constants(fit),
            f"{fit.median_residual:.1%}",
            f"{worst.label} {worst.size_bytes}: {worst.relative:+.0%}",
        )
    put(console, fits)


def _constants(fit: Fit) -> str:
    return ", ".join(f"{c.name} {c.value:.4g} ({c.low:.4g}..{c.high:.4g})" for c in fit.constants)


def _case(result: CaseResult) -> Table:
    bytes_said = {True: ", bytes verified", None: "", False: ""}[result.verified]
    table = Table(
        "what",
        "bytes",
        "count",
        "copies",
        "edges",
        "waits",
        "us each",
        "GB/s",
        "spread",
        title=f"{result.case}: {result.about}{bytes_said}",
    )
    for point in result.points:
        table.add_row(
            point.label, str(point.size_bytes), str(point.count), str(point.copies), str(point.edges),
            str(point.waits), f"{point.each_ns / 1e3:.2f}",
            f"{point.bytes_per_s / 1e9:.2f}" if point.size_bytes else "", _spread(point),
        )  # fmt: skip
    return table


def _spread(point: Point) -> str:
    return f"{point.iqr_ns / point.median_ns:.1%}{' !' if point.unsteady else ''}" if point.median_ns else "?"


def _layers(result: LayersResult, console: Console) -> None:
    network = result.network
    console.print(
        f"[bold]{network.model}[/] on {result.host}: raw layer runs, {result.seconds:.1f} s", highlight=False
    )
    table = Table("way", "launch", "watched", "whole run us", "spread", "layers / whole")
    for run in result.runs:
        table.add_row(
            run.way, run.launch, str(len(run.rows)), f"{run.whole.median_ns / 1e3:.1f}", _spread(run.whole), f"{run.ratio:.3f}"
        )  # fmt: skip
    put(console, table)
    slower = slowed(result)
    if slower is not None:
        console.print(f"beside copies to the same GPU the warm run takes {_longer(slower)}")
    for text in result.notes:
        console.print(text, highlight=False, markup=False)
