"""The `hwexec` command: options and help. What the commands do is in commands.py, bench_command.py and
sweep_command.py, imported when one runs."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from sim.console import run_command
from sim.errors import InputError, require
from sim.names import DTYPE_NAMES
from sim.sizes import parse_keep

_F = TypeVar("_F", bound=Callable[..., int])


def main(args: Sequence[str] | None = None) -> None:
    sys.exit(run_command(cli, "hwexec", args))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="deepplan")
def cli() -> None:
    """Run cold-start plans for real, and hold them against what was predicted."""


def parse_share(text: str, option: str = "--tolerance") -> float:
    """`10%` or `0.1`. From 1 on the sign is needed: who writes 10 means 10 %, and would have allowed all up to ten times."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%?)", text.strip(), re.ASCII)
    if found is None or not math.isfinite(float(found[1])):
        raise InputError(f"{option} {text!r}: must be a share of 0 or more, as 10% or 0.1")
    share = float(found[1]) / (100 if found[2] else 1)
    require(
        bool(found[2]) or share < 1,
        f"{option} {text!r}: without a % it is a share, which is below 1; write {text.strip()}%, or 0.1 for 10%",
    )
    return share


def parse_gpus(parts: Sequence[str]) -> tuple[int, ...]:
    """`0 1`, `0,1`: the target, then its partners."""
    words = [word.strip() for part in parts for word in part.split(",")]
    for word in words:
        require(
            word.isascii() and word.isdigit() and len(word) < 6,
            f"{word!r}: not a GPU number; bench takes GPUs as -d 0 1 and strategies as -e best -e pt",
        )
    gpus = tuple(int(word) for word in words)
    require(len(set(gpus)) == len(gpus), f"-d {' '.join(words)}: a GPU is named twice; name each once")
    return gpus


def _gpus(default: str) -> Callable[[_F], _F]:
    text = f"GPUs: the target, then its partners. Default: {default}."
    return click.option("-d", "--gpus", "gpus", multiple=True, metavar="0 1", help=text)


_HOST = click.option(
    "--host", metavar="NAME|FILE", help="Constants to plan by. Default: the shipped host with these GPUs."
)
_DEVICE = click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    show_default=True,
    help="cpu: GPUs played by threads. Answers and bytes are checked; times are no figures.",
)
_PROFILE = click.option(
    "--profile", metavar="FILE", help="Timings of this model on the host. Default: shipped, or estimated."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
_FORCE = click.option("--force", is_flag=True, help="Overwrite output files that exist.")


@cli.command()
@click.argument("plan", metavar="PLAN")
@click.option(
    "--model",
    metavar="NAME",
    help="The plan's, where that is package.module:callable: it is imported and called.",
)
@_DEVICE
@click.option("--host", metavar="NAME|FILE", help="Default: the one the plan names.")
@_PROFILE
@click.option("--runs", type=click.IntRange(1, 100_000), default=20, show_default=True, help="Cold starts.")
@click.option(
    "--tolerance",
    metavar="10%",
    help="Fail as well where the prediction is farther off. Not with --device cpu.",
)
@click.option("--anyway", is_flag=True, help="Run a plan that was made for another host.")
@click.option(
    "--within-budget",
    is_flag=True,
    help="Hold on the target GPU what the plan brings and no more, as is done where that has no room for all weights. Answers "
    "are then held against a run that reads every weight in place.",
)
@click.option("--out", metavar="DIR", help="Default: results/<host>/verify-<model>-<plan>.")
@_FORCE
@_JSON
def verify(**options: Any) -> int:
    """Run a plan file cold many times: are the answers right, the bytes as planned, the time as predicted?

    Exit code 0 only when answers and bytes are right; 1 when not, 2 for bad input.
    """
    if options["tolerance"] is not None:
        options["tolerance"] = parse_share(options["tolerance"])
    # `hwexec --help` answers without torch
    from hwexec import commands  # noqa: PLC0415

    return commands.verify_plan(commands.VerifyCall(**options))


@cli.command()
@click.option("--model", required=True, metavar="NAME", help="As for sim; `sim models` lists names.")
@click.option("--batch", type=int, help="Samples per request. Default: 1.")
@click.option("--dtype", type=click.Choice(DTYPE_NAMES), help="Default: fp32.")
@click.option("--seq", type=int, help="Tokens per sample (hf: models). Default: the model's own.")
@click.option(
    "-e",
    "--execute",
    "strategies",
    multiple=True,
    metavar="NAME",
    help="demand, pipeline, pipeswitch, dha-static, dha, pt, pt+dha, best, warm, or a plan file; repeatable, or with "
    "commas. Default: all but dha-static. best is run once per number of links.",
)
@_gpus("those of the plan files, else 0")
@click.argument("more", nargs=-1, metavar="")
@_DEVICE
@_HOST
@_PROFILE
@click.option(
    "--keep",
    metavar="SIZE|RATIO",
    help="Also run the best plans that keep so many bytes of weights on the target between starts, as 16MiB; or 1.05x: as few as "
    "make a start take at most 1.05 times a warm run.",
)
@click.option("--peers", is_flag=True, help="Also run what a user would run instead.")
@click.option(
    "--runs",
    type=click.IntRange(1, 100_000),
    default=15,
    show_default=True,
    help="Starts each; fewer where they take long, which is told.",
)
@click.option("--out", metavar="FILE", help="Write a record with all samples.")
@_FORCE
@_JSON
def bench(**options: Any) -> int:
    """Run strategies side by side, and show the limit: the larger of a warm run and the bytes over the links.

    Times are wall-clock, from the request (its input on the GPU) until the answer is there. Exit code 1 where an answer
    differs. An interruption (Ctrl-C, SIGTERM) leaves what had run, marked as incomplete.
    """
    gpus = (*options["gpus"], *options.pop("more"))
    options["gpus"] = parse_gpus(gpus) if gpus else None
    parts = options.pop("strategies")
    given = [word.strip() for part in parts for word in part.split(",") if word.strip()]
    require(bool(given) or not parts, f"-e {','.join(parts)!r}: names no strategy; leave -e out for all")
    files = (word for word in given if word.endswith((".yaml", ".yml")) or "/" in word)
    options["files"] = tuple(dict.fromkeys(files))
    options["names"] = tuple(dict.fromkeys(word for word in given if word not in options["files"]))
    keep = options.pop("keep")
    options["keep"] = None if keep is None else parse_keep(keep)
    # `hwexec --help` answers without torch
    from hwexec import bench_command  # noqa: PLC0415
    from hwexec.bench import DEFAULT_STRATEGIES  # noqa: PLC0415

    if not given:
        options["names"] = DEFAULT_STRATEGIES
    return bench_command.run_bench(bench_command.BenchCall(**options))


@cli.command()
@click.option("--model", "models", multiple=True, metavar="NAME", help="Repeatable.")
@click.option(
    "--dtype", "dtypes", multiple=True, default=("fp32",), type=click.Choice(DTYPE_NAMES),
    help="Repeatable. Default: fp32.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, default=(1,), type=click.IntRange(1), help="Repeatable. Default: 1."
)
@click.option("--seq", type=int, help="Tokens per sample, of every hf: model. Default: the model's own.")
@_gpus("0")
@click.argument("more", nargs=-1, metavar="")
@_DEVICE
@_HOST
@click.option(
    "--profiles", metavar="DIR", help="Profiles as calibrate names them. Default: shipped, or estimated."
)
@click.option(
    "--random", "randoms", type=click.IntRange(0, 10_000), default=20, show_default=True,
    help="Random valid plans per network and number of links.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the random plans.")
@click.option("--runs", type=click.IntRange(1, 100_000), default=7, show_default=True, help="Starts each.")
@click.option(
    "--out",
    "folder",
    metavar="DIR",
    help="For sweep.yaml, and where times are figures sweep.png and summary.txt.",
)
@click.option("--force", is_flag=True, help="Start over instead of going on from what DIR has.")
@click.option(
    "--again",
    metavar="DIR",
    help="Run nothing: predict again what DIR has, with --host, --profiles and --model alone.",
)
@click.pass_context
def sweep(context: click.Context, /, again: str | None, **options: Any) -> int:
    """Run every strategy, the best plan and random plans of many networks; set prediction beside measurement.

    Every model in every dtype at every batch size, over each number of links. The same command goes on where it stopped.

    --again DIR needs no GPU: it predicts every plan that DIR has by the model and the constants as they are now, renews
    predictions, picture and summary, and adds what each mechanism of the model buys (ablation.yaml). Samples stay. A
    package.module:callable that DIR has plans of is imported only where --model names it too; --profiles needs none.
    """
    if again is not None:
        return _again(context, again)
    for name, flag in (("models", "--model"), ("folder", "--out")):
        if not options[name]:
            raise click.UsageError(f"Missing option '{flag}'.", context)
    options["gpus"] = parse_gpus((*options["gpus"], *options.pop("more")) or ("0",))
    # `hwexec --help` answers without torch
    from hwexec import sweep_command  # noqa: PLC0415

    return sweep_command.run_sweep(sweep_command.SweepCall(**options))


def _again(context: click.Context, folder: str) -> int:
    given = [
        max(param.opts, key=len) if isinstance(param, click.Option) else "GPUs"
        for param in context.command.params
        if context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
    ]
    odd = [name for name in given if name not in ("--again", "--host", "--profiles", "--model")]
    require(not odd, f"--again takes --host, --profiles and --model alone; leave out {', '.join(odd)}")
    # `hwexec --help` answers without torch
    from hwexec import sweep_command  # noqa: PLC0415

    asked = context.params
    return sweep_command.predict_again(
        sweep_command.AgainCall(folder, asked["host"], asked["profiles"], asked["models"])
    )


if __name__ == "__main__":
    main()
