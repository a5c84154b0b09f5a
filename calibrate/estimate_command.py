"""`calibrate estimate`: rerun the fit of a host that nobody can reach, show all residuals, write its files."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from calibrate.estimate_fit import FITTED_COSTS, FITTED_ROOFLINE, Estimation, fit
from calibrate.published import published
from sim.catalog import Request, find_host, profile_name
from sim.console import note
from sim.estimate import estimate
from sim.files import HOST, PROFILE, format_record
from sim.models import build
from sim.output import check_output, make_folder, write_file
from sim.profile import Provenance
from sim.provenance import stamp
from sim.tables import plain, put, say
from sim.trace import Trace, trace

SHIPPED = ("resnet50", "resnet101", "hf:bert-base")
"""Models whose estimated profiles ship, so that a first answer needs no torch."""


@click.command("estimate", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--host", "host_name", default="p3.8xlarge", show_default=True, help="Shipped host or a host file."
)
@click.option(
    "--model", "models", multiple=True, help="Models to write profiles for; default: those that ship."
)
@click.option(
    "--out", type=click.Path(), help="Folder for hosts/ and profiles/; without it nothing is written."
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def estimate_command(host_name: str, models: tuple[str, ...], out: str | None, force: bool) -> None:
    """Fit what published figures cannot give, for a host nobody can reach."""
    host = find_host(host_name)
    facts = published(host.name)

    @cache
    def trace_of(model: str, batch: int, seq: int | None) -> Trace:
        built = build(model, batch=batch, seq=seq, device="meta")  # a name that is wrong is one line
        note(f"tracing {model}, batch {batch}" + (f", {seq} tokens" if seq else ""))
        return trace(built)

    requests = [Request(model) for model in models or SHIPPED]
    traces = [trace_of(request.model, 1, None) for request in requests]  # before the fit, which takes long
    paths: list[Path] = []
    if out is not None:
        paths = [Path(out) / "hosts" / f"{host.name}.yaml"]
        for request, found in zip(requests, traces, strict=True):
            paths.append(Path(out) / "profiles" / host.name / profile_name(request, found.network.seq))
        for path in paths:
            make_folder(path.parent)
            check_output(path, force=force)
    made: Provenance = stamp(host.name, host.gpus[0].name)
    result = fit(host, facts, trace_of, made)
    show(result)
    if not paths:
        return
    files = [format_record(HOST, result.host)]
    for found in traces:
        inputs = (f"host:{result.host.digest}", f"network:{found.network.digest}")
        profile = estimate(found, result.host, stamp(host.name, host.gpus[0].name, inputs=inputs))
        files.append(format_record(PROFILE, profile))
    for path, text in zip(paths, files, strict=True):
        write_file(path, text.encode(), force=force)
        note(f"wrote {path}")


def show(result: Estimation) -> None:
    """Tables on stdout: constants fitted, every published latency beside its estimate, every decision."""
    console = plain(file=sys.stdout, width=150 if not sys.stdout.isatty() else None)
    host = result.host
    constants = Table(
        title=f"{host.name}: constants fitted (all others are published, derived or assumed: `sim hosts {host.name}`)"
    )
    for heading in ("constant", "value", "fitted to"):
        constants.add_column(heading)
    roofline = host.roofline
    for name in FITTED_COSTS:
        figure = getattr(host.costs, name)
        constants.add_row(name, f"{figure.value:g}", figure.source)
    for name in FITTED_ROOFLINE:
        figure = getattr(roofline, name)
        constants.add_row(name, f"{figure.value:g}", figure.source)
    put(console, constants)
    say(
        console,
        f"{result.kernels.kernels} kernels: median error {result.kernels.median_error:.1%}, "
        f"90th percentile {result.kernels.p90_error:.1%}",
    )
    latencies = Table(title="Published latencies beside the estimate (ms)")
    for heading in ("what", "published", "estimated", "error", "role", "source"):
        latencies.add_column(
            heading, justify="right" if heading in ("published", "estimated", "error") else "left"
        )
    for residual in result.residuals:
        row = residual.latency
        what = f"{row.model} {row.strategy}"
        what += f", batch {row.batch}" if row.batch > 1 else ""
        what += f", {row.seq} tokens" if row.seq else ""
        latencies.add_row(
            what,
            f"{row.ms:.2f}",
            f"{residual.estimated_ms:.2f}",
            f"{residual.error:+.1%}",
            "fitted" if row.fitted else "held out",
            row.source,
        )
    put(console, latencies)
    decisions = Table(title="Published decisions beside the static plan")
    for heading in ("model", "layers", "published", "decided alike"):
        decisions.add_column(heading)
    for verdict in result.verdicts:
        decision = verdict.decision
        decisions.add_row(
            decision.model,
            escape(f"{decision.about} ({decision.layers})"),
            "in place" if decision.direct else "copied",
            f"{verdict.agree} of {verdict.layers}",
        )
    put(console, decisions)
