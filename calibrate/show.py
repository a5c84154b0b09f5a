"""Calibration files to a person: tables, and a plot of bandwidth by size."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from calibrate.fit import Fit
from calibrate.layers import LayersResult
from calibrate.samples import CaseResult, Point
from calibrate.store import CALIBRATION, CASE, LAYERS, SESSION, Calibration
from calibrate.timings import slowed, waits
from sim import origins
from sim.catalog import find_host, host_file, host_names
from sim.errors import InputError, require
from sim.files import HOST, PROFILE, FileKind, read_record
from sim.host import Figure, Host
from sim.output import write_file
from sim.profile import Profile, Timing
from sim.tables import put, say

Record = Calibration | Host | Profile | LayersResult
KINDS: tuple[FileKind[Any], ...] = (CALIBRATION, HOST, PROFILE, LAYERS)
OF_PROFILE = {
    "slowed": "slowed beside copies, part",
    "direct_busy": "direct_busy, ns",
    "direct_weight": "direct_weight",
    "start": "start, ns",
    "hook": "hook, ns",
    "relay": "relay, ns",
    "launch": "launch, ns",
    "wait": "wait, ns",
    "wait_beside": "wait_beside, ns",
}
"""Figures of a profile beside its layers', each of which it may lack, and what a comparison calls them."""
PLAYED = "GPUs were played by threads: no figure here means anything"


def read(path: str) -> Record:
    """Any file that `calibrate run` leaves behind, or a shipped host by its name. Raises InputError for another."""
    if not Path(path).exists() and (path in host_names() or host_file(path) is None):
        return find_host(path)  # or the names that are near
    try:
        with Path(path).open("rb") as stream:
            head = stream.read(4096).decode(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    found = re.search(r"^kind: (\S+)", head, re.MULTILINE)
    kind = next((k for k in KINDS if found is not None and k.kind == found[1]), None)
    if kind is None:
        raise InputError(f"{path}: {_not_shown(found[1] if found else None)}")
    record: Record = read_record(path, kind)
    return record


def _not_shown(kind: str | None) -> str:
    shown = f"`calibrate show` takes {', '.join(k.kind for k in KINDS)} files"
    if kind in (SESSION.kind, CASE.kind):
        return (
            f"a {kind} file, which `calibrate run` keeps to go on from; look at samples/NAME.yaml beside its folder, which has "
            "all cases and what came of them"
        )
    return (
        f"kind is {kind!r}; {shown}" if kind else f"no kind at its top, so no file of this project; {shown}"
    )


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


def figures(host: Host) -> Iterator[tuple[str, Figure]]:
    for link in host.links:
        yield f"link {link.name}, bytes/s", link.bytes_per_s
    yield from origins.figures(host)


def _host(host: Host, console: Console) -> None:
    say(console, f"{host.name}: {host.about}", len(host.name))
    table = Table("figure", "value", "low", "high", "kind", "source")
    for name, figure in figures(host):
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
    say(
        console,
        f"{network.model} {network.dtype}, batch {network.batch}, on {profile.provenance.host} ({profile.kind}): "
        f"{len(network.layers)} layers, {network.total_bytes / 2**20:.1f} MiB, warm {profile.warm_ns / 1e6:.3f} ms",
        len(network.model),
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
        say(console, f"beside copies of host memory to the same GPU layers take {_longer(profile.slowed)}")
    others = (
        (words, figure)
        for name, words in OF_PROFILE.items()
        if name != "slowed" and (figure := getattr(profile, name)) is not None
    )
    for words, figure in others:
        say(console, f"{words}: {figure.value:.4g} ({figure.source})")
    for index, (layer, timing) in enumerate(zip(network.layers, profile.layers, strict=True)):
        table.add_row(
            str(index), layer.name, layer.kind, f"{network.layer_bytes(index) / 1024:.0f}", _us(timing.resident),
            _us(timing.issue), " ".join(map(_us, timing.direct)), " ".join(map(_us, timing.peer)),
            _us(timing.beside) if timing.beside is not None else "",
        )  # fmt: skip
    put(console, table)


def _calibration(found: Calibration, console: Console) -> None:
    made = found.provenance
    say(
        console,
        f"{found.name}: {made.gpu}, driver {made.driver or '?'}, CUDA {made.cuda or '?'}, torch {made.torch}, "
        f"{made.date}, commit {made.commit}\n{made.command}",
        len(found.name),
    )
    if not found.figures:
        say(console, PLAYED, len(PLAYED))
    for text in (*found.flags, *found.refused):
        say(console, f"! {text}")
    for result in found.cases:
        if result.waived is not None:
            say(console, f"{result.case}: waived, {result.waived}")
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
    apart = f", {result.apart} samples set apart" if result.apart else ""
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
        title=f"{result.case}: {result.about}{bytes_said}{apart}",
    )
    for point in result.points:
        table.add_row(
            point.label, str(point.size_bytes), str(point.count), str(point.copies), str(point.edges),
            str(point.waits), f"{point.each_ns / 1e3:.2f}",
            f"{point.bytes_per_s / 1e9:.2f}" if point.size_bytes else "", _spread(point),
        )  # fmt: skip
    return table


def _spread(point: Point) -> str:
    return f"{point.spread:.1%}{' !' if point.noisy else ''}" if point.median_ns else "?"


def _layers(result: LayersResult, console: Console) -> None:
    network = result.network
    say(
        console,
        f"{network.model} on {result.host}: raw layer runs, {result.seconds:.1f} s",
        len(network.model),
    )
    table = Table("way", "launch", "watched", "whole run us", "spread", "layers / whole")
    for run in result.runs:
        table.add_row(
            run.way, run.launch, str(len(run.rows)), f"{run.whole.median_ns / 1e3:.1f}", _spread(run.whole), f"{run.ratio:.3f}"
        )  # fmt: skip
    put(console, table)
    slower = slowed(result)
    if slower is not None:
        say(console, f"beside copies to the same GPU the warm run takes {_longer(slower)}")
    for figure in waits(result.waited) or ():
        say(console, f"a wait for a copy that has landed: {figure.value / 1e3:.2f} us ({figure.source})")
    for point in (*result.hooked, *result.launched):
        say(
            console,
            f"cold starts {point.label}: {point.each_ns / 1e3:.1f} us to issue, spread {_spread(point)}",
        )
    for text in result.notes:
        say(console, text)
