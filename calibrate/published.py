"""Published figures that an estimate is fitted to and held against: latencies, planner decisions, DeepBench's kernel times."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

from sim.errors import InputError
from sim.files import FileKind, parse_record


@dataclass(frozen=True, slots=True)
class Latency:
    """One published time. `strategy` is a baseline's name, `warm` (one eager request, weights resident) or `kernels`.

    `fitted`: constants are fitted to it; otherwise it is only held against the estimate.
    """

    model: str
    batch: int
    seq: int | None
    strategy: str
    ms: float
    fitted: bool
    source: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What all published plan tables of a model agree on: layers (a glob on their names) in place or copied."""

    model: str
    layers: str
    direct: bool
    about: str


@dataclass(frozen=True, slots=True)
class Published:
    latencies: tuple[Latency, ...]
    decisions: tuple[Decision, ...]
    host: str


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One measured matrix product, or convolution as an implicit one: m rows, n columns, depth k, filter taps, seconds."""

    m: int
    n: int
    k: int
    window: int
    seconds: float


PUBLISHED = FileKind("published", 1, Published)


def published(host: str) -> Published:
    """Figures shipped for a host. Raises InputError where there are none."""
    path = files("scenarios") / "published" / f"{host}.yaml"
    if not path.is_file():
        raise InputError(
            f"host {host!r} has no published figures to fit to; `calibrate run` measures a host you can reach"
        )
    return parse_record(path.read_bytes(), PUBLISHED)


def deepbench_v100() -> tuple[KernelTime, ...]:
    """DeepBench's published V100 fp32 inference kernels: matrix products and forward convolutions (batch 4 to 16)."""
    folder = files("scenarios") / "published"
    rows: list[KernelTime] = []
    with (folder / "v100_deepbench_fp32_gemm.csv").open() as lines:
        for row in csv.DictReader(lines):
            # column-major: DeepBench's N is the batch, our rows
            rows.append(
                KernelTime(int(row["N"]), int(row["M"]), int(row["K"]), 1, float(row["time_ms"]) * 1e-3)
            )
    with (folder / "v100_deepbench_fp32_conv.csv").open() as lines:
        for row in csv.DictReader(lines):
            window = int(row["S_filter_w"]) * int(row["R_filter_h"])
            pixels = int(row["N"]) * int(row["P"]) * int(row["Q"])
            seconds = float(row["fwd_ms"]) * 1e-3
            rows.append(KernelTime(pixels, int(row["K"]), int(row["C"]) * window, window, seconds))
    return tuple(rows)
