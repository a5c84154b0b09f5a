"""What tests of `calibrate` share: a network of four layers, a progress that listens, cases that work or break."""

from __future__ import annotations

from dataclasses import replace

import torch

from calibrate.bench import NO_FIGURES, Bench, Case
from calibrate.cases import CASES
from calibrate.run import Ask
from calibrate.samples import Point
from calibrate.topology import Topology, Wire
from sim.catalog import Request

PAIR = Topology(2, (Wire(0, 1, 18, "SYS"),), (None, None))


def tiny() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A network of four layers for `--model`."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32)
    )
    return layers, (torch.ones(1, 64),)


MODEL = "tests.calibrating:tiny"


class Told:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.notes: list[str] = []
        self.planned = 0.0

    def plan(self, seconds: float) -> None:
        self.planned = seconds

    def begins(self, what: str) -> None:
        self.begun.append(what)

    def ended(self, what: str, seconds: float, said: str) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def ask(*models: str, fresh: bool = False, name: str = "fake") -> Ask:
    return Ask(name, tuple(Request(m) for m in models), fresh=fresh)


def broken(name: str, error: BaseException) -> Case:
    def measure(_: Bench) -> tuple[Point, ...]:
        raise error

    return Case(name, "breaks", measure)


def good(name: str, counts: list[str]) -> Case:
    def measure(_: Bench) -> tuple[Point, ...]:
        counts.append(name)
        return (Point(name, 0, 1, (1.0, 2.0)),)

    return Case(name, "works", measure)


def small_cases() -> list[Case]:
    """Every case, cut down to what the device of threads can do quickly, whatever it is told of its figures."""

    def cut(case: Case) -> Case:
        def measure(bench: Bench) -> tuple[Point, ...]:
            bench.effort = NO_FIGURES
            return case.measure(bench)

        return replace(case, measure=measure)

    return [cut(case) for case in CASES]
