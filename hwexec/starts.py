"""Starts made many times, timed, and each answer compared with a reference, bit for bit or as near as a dtype allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hwexec.core import at_full_pace, steady
from hwexec.device import Device
from hwexec.executor import ColdStart
from hwexec.peers import Scene, eager_output
from hwexec.timing import PAUSE_S, Samples, steadiest
from sim.errors import InputError
from sim.report import ms

TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Relative difference, norm over norm, at which two answers count as the same where their bits cannot be: fp32 products
may run in TF32, which has 10 bits; the others allow for the depth of a network."""
WAKE_S = 0.1
"""Warm runs ahead of starts."""
PAUSED = 5
"""Starts after a pause, at most as many as others."""
TWICE = 2
"""Starts after a pause for each that is asked for, at most."""
NEAR_S = 5e-4
"""How long ahead of a start that comes after a pause it is announced, where it is."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How like one answer is to another. `error`: the largest |a - b| / |b| of a tensor, None where that is no number."""

    bit_equal: bool
    error: float | None

    def within(self, dtype: str) -> bool:
        return self.bit_equal or (self.error is not None and self.error <= TOLERANCES[dtype])

    def right(self, dtype: str, reproducible: bool) -> bool:
        """Whether an answer counts as the reference's: bit for bit, or within the tolerance where that is not `reproducible`."""
        return self.bit_equal if reproducible else self.within(dtype)

    def worse(self, other: Likeness) -> Likeness:
        none = self.error is None or other.error is None
        error = None if none else max(self.error or 0.0, other.error or 0.0)
        return Likeness(self.bit_equal and other.bit_equal, error)


SAME = Likeness(True, 0.0)


def tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]


def kept(output: Any) -> list[torch.Tensor]:
    """An answer that the next start does not overwrite."""
    return [t.detach().clone() for t in tensors(output)]


def plain_answer(scene: Scene, device: Device) -> list[torch.Tensor]:
    """PyTorch's own, all weights on the GPU. InputError where they do not fit."""
    try:
        return kept(eager_output(scene))
    except device.out_of_memory as error:
        raise InputError(
            f"{type(scene.module).__name__} does not fit on {scene.where} ({str(error).splitlines()[0]}); stop what else "
            "runs there, or take a smaller model"
        ) from None
    finally:
        device.trim()


def shows_nothing(answer: list[torch.Tensor]) -> str:
    """Why any answer would be like this one, in words; empty where it shows something.

    Arenas are filled with 0xFF before a start, and a weight of those is no number.
    """
    if not any(tensor.numel() for tensor in answer):
        return "has no numbers, so there is nothing to compare"
    if all(bool(tensor.isnan().all()) for tensor in answer):
        return "is no number throughout, as it would be without any weight"
    return ""


def likeness(output: Any, reference: list[torch.Tensor]) -> Likeness:
    found = tensors(output)
    if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in reference]:
        return Likeness(False, None)
    worst = SAME
    for a, b in zip(found, reference, strict=True):
        if not torch.equal(_bits(a), _bits(b)):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            worst = worst.worse(Likeness(False, error if error < float("inf") else None))
    return worst


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: NaNs are equal to themselves, and 0 is not -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Reference:
    """The answer of a run that others are held against, and how like it a second such run's is."""

    tensors: list[torch.Tensor]
    again: Likeness

    @classmethod
    def of(cls, run: Callable[[], Any]) -> Reference:
        first = kept(run())
        return cls(first, likeness(run(), first))

    @property
    def reproducible(self) -> bool:
        return self.again.bit_equal


@dataclass(frozen=True, slots=True)
class Starts:
    """One thing started many times: wall-clock times from the request until the answer is there, and the worst answer.

    `issued`: of the same starts, until the host thread had issued all of it and the call returned. `paused`: of further ones,
    after a pause, and `roused` of others that were announced at its end.
    """

    samples: Samples
    worst: Likeness
    issued: Samples
    paused: Samples | None = None
    roused: Samples | None = None
    made: int = 0
    """All starts whose answers were compared, untimed ones and those set apart too."""


def take(
    call: Callable[[], Any],
    device: Device,
    gpu: int,
    reference: list[torch.Tensor],
    before: Callable[[], None],
    runs: int,
    budget_s: float = float("inf"),
    paused: int = 0,
    rouse: Callable[[], None] | None = None,
) -> Starts:
    """`runs` starts after one untimed (libraries load, graphs are uploaded), fewer where they take longer than `budget_s`.
    A start is over once its answer is on `gpu`, whatever else is still under way.

    `before` makes the next call a cold one. Each follows it at once, as starts do on a busy server: what the host's core has in
    its caches a pause takes away, and that may be a third of a millisecond (results/h100-pair-2/trials). So `paused`
    further ones are made after `PAUSE_S` of nothing, and where there is a `rouse` as many for which that is called then, `NEAR_S`
    ahead. Starts behind which the core is slowed by others are set apart. Every answer is compared, theirs and the untimed
    one's too.
    """
    worst, made = SAME, 0
    elapsed_ns, returned_ns = itemgetter(0), itemgetter(1)

    def start(pause_s: float = 0.0, announce: Callable[[], None] | None = None) -> tuple[float, float]:
        nonlocal worst, made
        before()
        device.synchronize()
        if pause_s:
            time.sleep(pause_s)
        if announce is not None:
            began = time.perf_counter()
            announce()
            while time.perf_counter() - began < NEAR_S:
                pass
        began_ns = time.perf_counter_ns()
        output = call()
        returned = time.perf_counter_ns() - began_ns
        device.wait_for_caller(gpu)
        elapsed = time.perf_counter_ns() - began_ns
        device.synchronize()
        worst, made = worst.worse(likeness(output, reference)), made + 1
        return float(elapsed), float(returned)

    with steady(device), torch.no_grad():
        start()
        found = at_full_pace(start, device, runs, budget_ns=budget_s * 1e9, took_ns=elapsed_ns)
        pauses = min(paused, len(found.kept)) if device.figures else 0

        def after_pauses(announce: Callable[[], None] | None = None) -> Samples | None:
            if not pauses:
                return None
            rested = at_full_pace(partial(start, PAUSE_S, announce), device, pauses, most=TWICE)
            return Samples.of(rested, elapsed_ns)

        paused_starts = after_pauses()
        roused_starts = None if rouse is None else after_pauses(rouse)
    samples, issued = Samples.of(found, elapsed_ns), Samples.of(found, returned_ns)
    return Starts(samples, worst, issued, paused_starts, roused_starts, made)


def steadiest_starts(
    series: Callable[[], Starts], device: Device, *, waived: tuple[type[Exception], ...] = ()
) -> tuple[Starts, str]:
    """The steadiest of a series of starts taken again where it scatters; every answer counts. Beside it, in words, that it was.

    `waived` as for `steadiest`.
    """
    found = steadiest(series, lambda starts: (starts.samples,), device, waived=waived)
    if len(found.made) == 1:
        once = found.kept.samples
        kept_so = f"scattered ({ms(once.median_ns)} ms, spread {once.spread:.0%}) and kept, since taking it again failed"
        return found.kept, f"{kept_so}: {found.failed}" if found.failed else ""
    worst = SAME
    for starts in found.made:
        worst = worst.worse(starts.worst)
    all_of_them = ", ".join(
        f"{ms(s.samples.median_ns)} ms (spread {s.samples.spread:.0%})" for s in found.made
    )
    said = f"taken {len(found.made)} times, the steadiest kept: {all_of_them}"
    said += f"; taking it again failed: {found.failed}" if found.failed else ""
    return replace(found.kept, worst=worst), said


def start_cold(
    cold: ColdStart,
    inputs: tuple[torch.Tensor, ...],
    reference: list[torch.Tensor],
    runs: int,
    budget_s: float = float("inf"),
    paused: int = PAUSED,
) -> Starts:
    """Cold starts with every arena filled with 0xFF before."""
    device, target = cold.device, cold.plan.target
    return take(
        lambda: cold(*inputs), device, target, reference, cold.evict, runs, budget_s, paused, cold.rouse
    )


def wake(cold: ColdStart, inputs: tuple[torch.Tensor, ...]) -> None:
    """A GPU raises its clocks only under load, and a warm time taken before would make the limit too easy."""
    until = time.perf_counter() + (WAKE_S if cold.device.figures else 0.0)
    while time.perf_counter() < until:
        cold.resident(*inputs)
        cold.device.synchronize()


def nothing() -> None:
    """A warm run needs nothing done before."""
