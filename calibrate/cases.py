"""Cases measured one after another, each on disk before the next begins, and some looked at again when all are done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from calibrate.bench import QUICK, Bench, Case, Effort
from calibrate.beside import BESIDE_CASES
from calibrate.launches import LAUNCH_CASES
from calibrate.links import LINK_CASES
from calibrate.overheads import OVERHEAD_CASES
from calibrate.samples import CaseResult, Point
from calibrate.store import Store
from calibrate.topology import Topology
from hwexec.core import steady, tally
from hwexec.device import Device
from hwexec.timing import Mismatch, steadiest
from sim.errors import InputError
from sim.hints import error_line

CASES: tuple[Case, ...] = LINK_CASES + BESIDE_CASES + OVERHEAD_CASES + LAUNCH_CASES


class Progress(Protocol):
    """What a run tells while it goes. The command line shows a bar; tests listen."""

    def plan(self, seconds: float) -> None:
        """How long everything that is left will take, at a guess."""
        ...

    def begins(self, what: str) -> None: ...

    def ended(self, what: str, seconds: float, said: str) -> None:
        """`seconds` as planned, not as they were."""
        ...

    def note(self, text: str) -> None: ...


def measure_cases(
    device: Device,
    topology: Topology,
    effort: Effort,
    cases: Sequence[Case],
    store: Store,
    progress: Progress,
    pace: float,
) -> tuple[CaseResult, ...]:
    """Results in the order of `cases`, what the store has already among them. `pace` multiplies first guesses of time.

    Raises InputError, what was measured so far kept, where the GPU is lost.
    """
    bench = Bench(device, topology, effort)
    results: dict[str, CaseResult] = {}
    try:
        for case in cases:
            result = store.case(case.name)
            if result is None:
                progress.begins(case.name)
                result = _measured(case, bench, store)
                store.keep_case(result)
                said = f"waived: {result.waived}" if result.waived else f"{result.seconds:.1f} s"
                progress.ended(case.name, case.seconds * pace, said)
            results[case.name] = result
        for case in looks_left(cases, results, device, effort):
            progress.begins(f"{case.name} again")
            again = _measured(case, bench, store)
            results[case.name] = better(results[case.name], again, case.second_look)
            store.keep_case(results[case.name])
            progress.ended(f"{case.name} again", case.seconds * pace, f"the {case.second_look} look kept")
    finally:
        _close(bench)
    return tuple(results.values())


LOOKS = 2
"""Looks at a case that has a second one."""


def looks_left(
    cases: Sequence[Case], results: Mapping[str, CaseResult], device: Device, effort: Effort
) -> list[Case]:
    """Cases whose second look is still to be made, beside `results` and those of an interrupted run among them. None in a quick
    calibration, which has one minute in all, nor of threads, which have no figures."""
    if not device.figures or effort is QUICK:
        return []

    def left(found: CaseResult | None) -> bool:
        return found is None or (found.looks < LOOKS and not found.waived)

    return [case for case in cases if case.second_look and left(results.get(case.name))]


def better(first: CaseResult, second: CaseResult, how: str) -> CaseResult:
    """Of two looks the "faster", whose points take less, all together, or the "steadier", whose points scatter less, with the other
    one beside it; the first alone where the second came to nothing.
    """
    if second.waived:
        return replace(first, looks=LOOKS)

    def worth(result: CaseResult) -> float:
        return sum(p.each_ns if how == "faster" else min(1.0, p.spread) for p in result.points)

    kept, other = (second, first) if worth(second) < worth(first) else (first, second)
    return replace(kept, looks=LOOKS, other=other.points)


def _close(bench: Bench) -> None:
    try:
        bench.close()
    except RuntimeError:  # a lost GPU cannot give anything back: the error that told of it is the one to show
        return


def _measured(case: Case, bench: Bench, store: Store) -> CaseResult:
    began = time.perf_counter()
    bench.verified = None
    points: tuple[Point, ...] = ()
    takes, failed = 1, ""
    apart, never = tally()
    try:
        reason = case.waived(bench)
        with steady(bench.device):
            if not reason:
                found = steadiest(lambda: case.measure(bench), lambda points: points, bench.device)
                points, takes, failed = found.kept, len(found.made), found.failed
    except Mismatch:
        raise
    except InputError as error:
        points, reason = (), str(error)
    except bench.device.out_of_memory as error:
        points, reason = (), f"not enough GPU memory ({error_line(error)})"
    except RuntimeError as error:
        raise lost(case.name, error, store) from error
    seconds = time.perf_counter() - began
    since = tally()
    return CaseResult(
        case.name, case.about, points, reason, bench.verified, seconds, takes, failed=failed,
        apart=since[0] - apart, slowed=since[1] - never,
    )  # fmt: skip


def lost(what: str, error: Exception, store: Store) -> InputError:
    """The one line for an error that only a lost GPU explains; where it came from is kept beside what was measured."""
    store.keep_failure(error)
    return InputError(
        f"{what}: the GPU failed ({error_line(error)}); what was measured before is kept in {store.folder}: "
        "look at nvidia-smi and dmesg, then run the same command to go on"
    )


def unsteady(results: Sequence[CaseResult]) -> list[str]:
    """One line per case whose samples scatter by more than 10 % of their median, and one where samples of a slow core count."""
    found = []
    for result in results:
        if result.slowed:
            found.append(
                f"case {result.case}: others slowed the processor too often ({result.slowed} times), so samples made then count too"
            )
        points = [p for p in result.points if p.noisy]
        if points:
            taken = f"; the steadiest of {result.takes} takes" if result.takes > 1 else ""
            taken += f"; taking it again failed: {result.failed}" if result.failed else ""
            worst = max(points, key=lambda p: p.spread)
            found.append(
                f"case {result.case}: {len(points)} of {len(result.points)} points scatter by more than 10 %, "
                f"most {worst.label} ({worst.size_bytes} bytes): {worst.spread:.0%}{taken}"
            )
    return found
