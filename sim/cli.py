"""The `sim` command: options and help. What the commands do is in sim/commands.py, imported when one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from sim.console import run_command
from sim.errors import require
from sim.names import DTYPE_NAMES
from sim.sizes import parse_keep, parse_size

_F = TypeVar("_F", bound=Callable[..., None])


def main() -> None:
    sys.exit(run_command(cli, "sim"))


def parse_gpus(text: str) -> tuple[int, ...]:
    """`0,2`: the target and its partners."""
    parts = [part.strip() for part in text.split(",")]
    require(
        all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts),
        f"--gpus {text!r}: must be GPU numbers with commas between, the target first, as 0,2",
    )
    gpus = tuple(int(part) for part in parts)
    require(len(set(gpus)) == len(gpus), f"--gpus {text!r}: a GPU is named twice; name each once")
    return gpus


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="deepplan")
def cli() -> None:
    """Find and predict the fastest cold start of a neural network on GPUs."""


def _with(*options: Callable[[Callable[..., None]], Callable[..., None]]) -> Callable[[_F], _F]:
    """Several options at once, in the order of the help."""

    def add(command: _F) -> _F:
        for option in reversed(options):
            option(command)
        return command

    return add


_MODEL = _with(
    click.option(
        "--model",
        required=True,
        metavar="NAME",
        help="A torchvision model, an hf: name, or package.module:callable; `sim models` lists names.",
    ),
    click.option("--batch", type=int, help="Samples per request. Default: 1."),
    click.option("--dtype", type=click.Choice(DTYPE_NAMES), help="Default: fp32."),
    click.option("--seq", type=int, help="Tokens per sample (hf: models). Default: the model's own."),
)
_PROFILE = click.option(
    "--profile", metavar="FILE", help="Timings of this model on this host. Default: shipped, or estimated."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_OUTPUTS = _with(
    _JSON,
    click.option("--trace", metavar="FILE", help="Write the timeline for Perfetto or chrome://tracing."),
    click.option("--plot", metavar="FILE", help="Draw the timeline (.png, .svg or .pdf)."),
    click.option("--force", is_flag=True, help="Overwrite output files that exist."),
)


@cli.command()
@_MODEL
@click.option(
    "--host", default="p3.8xlarge", show_default=True, metavar="NAME|FILE", help="`sim hosts` lists names."
)
@_PROFILE
@click.option(
    "--gpus", metavar="0,2", help="Target GPU, then its partners. Default: 0 and what serves it best."
)
@click.option(
    "--memory-budget",
    metavar="SIZE",
    help="Most bytes of weights to hold on the target, as 200MiB; 0 reads all in place.",
)
@click.option(
    "--runs",
    type=int,
    default=1,
    show_default=True,
    help="Minimise the mean of a cold start and N-1 warm runs.",
)
@click.option(
    "--keep",
    metavar="SIZE|RATIO",
    help="Most bytes of weights to keep on the target between starts, as 16MiB; or 1.05x: the least with which a start takes at "
    "most 1.05 times a warm run.",
)
@click.option("--layers", is_flag=True, help="Print what each plan does with each layer.")
@click.option("--out", metavar="FILE", help="Write the best plan.")
@_OUTPUTS
def search(**options: Any) -> None:
    """Find the best cold-start plan, beside the published strategies.

    In JSON, latency_ms is what was minimised (with --runs the mean), cold_ms the cold start itself, and gap is
    best / bound - 1.
    """
    from sim import commands  # noqa: PLC0415 - `sim --help` answers without tables, YAML or simulator

    if options["memory_budget"] is not None:
        options["memory_budget"] = parse_size(options["memory_budget"])
    if options["gpus"] is not None:
        options["gpus"] = parse_gpus(options["gpus"])
    keep = options.pop("keep")
    options["keep_bytes"], options["keep_ratio"] = (None, None) if keep is None else parse_keep(keep)
    commands.search_plan(commands.SearchCall(**options))


@cli.command()
@click.argument("plan", metavar="PLAN")
@click.option("--model", metavar="NAME", help="Only to allow a plan's package.module:callable to be called.")
@click.option("--host", metavar="NAME|FILE", help="Default: the one the plan names.")
@_PROFILE
@_OUTPUTS
def simulate(**options: Any) -> None:
    """Predict a plan file again, and check that it fits its host and network."""
    from sim import commands  # noqa: PLC0415 - as above

    commands.simulate_plan(commands.SimulateCall(**options))


@cli.command()
@_MODEL
@_JSON
def layers(model: str, batch: int | None, dtype: str | None, seq: int | None, as_json: bool) -> None:
    """List a model's layers, their bytes, FLOPs and storages."""
    from sim import commands  # noqa: PLC0415 - as above

    commands.list_layers(model, batch, dtype, seq, as_json)


@cli.command()
@click.argument("host", metavar="[NAME|FILE]", required=False)
def hosts(host: str | None) -> None:
    """List the hosts that ship, or every figure of one with its source."""
    from sim import commands  # noqa: PLC0415 - as above

    commands.list_hosts(host)


@cli.command()
def models() -> None:
    """List the models known by name."""
    from sim import commands  # noqa: PLC0415 - as above

    commands.list_models()
