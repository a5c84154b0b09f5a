"""How starts are taken and compared: right after their preparation, again where they scatter, and every answer counts."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hwexec import pace, starts
from hwexec.cpu import CpuDevice
from hwexec.starts import SAME, Likeness, Starts, shows_nothing, steadiest_starts, take
from hwexec.timing import Samples
from sim.errors import InputError


def series(*takes: tuple[float, ...], wrong: int = -1) -> Callable[[], Starts]:
    """One take after another; the answer of one of them is wrong."""
    made = iter(
        Starts(Samples(t), Likeness(at != wrong, 0.0 if at != wrong else 0.5), Samples((t[0] / 2,)))
        for at, t in enumerate(takes)
    )
    return lambda: next(made)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([], "has no numbers"),
        ([torch.ones(0)], "has no numbers"),
        ([torch.full((2, 3), torch.nan)], "is no number throughout"),
        (
            [torch.full((3,), torch.nan, dtype=torch.bfloat16), torch.full((1,), torch.nan)],
            "is no number throughout",
        ),
        ([torch.tensor([torch.nan, 1.0])], ""),
        ([torch.full((2,), torch.nan), torch.zeros(1)], ""),
        ([torch.tensor([3])], ""),
    ],
)
def test_an_answer_that_any_weights_give_shows_nothing(answer: list[Tensor], says: str) -> None:
    found = shows_nothing(answer)
    assert found.startswith(says)
    assert bool(found) is bool(says)


CALM, WILD, WILDER = (100e6, 101e6, 102e6), (100e6, 130e6, 160e6), (10e6, 100e6, 190e6)


def test_starts_that_scatter_are_taken_again_and_the_steadiest_kept() -> None:
    device = CpuDevice(1)
    assert steadiest_starts(series(WILDER), device)[1] == "", "times that are no figures always scatter"
    device.figures = True
    assert steadiest_starts(series(CALM), device) == (
        Starts(Samples(CALM), SAME, Samples((CALM[0] / 2,))),
        "",
    )
    found, said = steadiest_starts(series(WILD, CALM), device)
    assert found.samples.raw == CALM
    assert said == "taken 2 times, the steadiest kept: 130.00 ms (spread 23%), 101.00 ms (spread 1%)"
    # not the fastest, and no more than three in all
    found, said = steadiest_starts(series(WILDER, WILD, WILDER, CALM), device)
    assert found.samples.raw == WILD
    assert said.startswith("taken 3 times")
    found, _ = steadiest_starts(series(WILD, CALM, wrong=0), device)
    assert (found.samples.raw, found.worst.bit_equal) == (CALM, False), (
        "a wrong answer counts wherever it was"
    )

    def failing() -> Starts:
        raise InputError("no room")

    takes = iter([series(WILD), failing])
    found, said = steadiest_starts(lambda: next(takes)(), device)
    assert (found.samples.raw, said) == (
        WILD,
        "scattered (130.00 ms, spread 23%) and kept, since taking it again failed: no room",
    )
    takes = iter([series(WILDER), series(WILD), failing])
    found, said = steadiest_starts(lambda: next(takes)(), device)
    assert (found.samples.raw, said.endswith("; taking it again failed: no room")) == (WILD, True)
    device.close()


def test_likeness_tells_bits_from_closeness_and_numbers_from_none() -> None:
    a = torch.tensor([1.0, -0.0])
    assert starts.likeness((a,), [a.clone()]) == SAME
    assert not starts.likeness(a, [torch.tensor([1.0, 0.0])]).bit_equal
    near = starts.likeness(a, [torch.tensor([1.0 + 2**-20, 0.0])])
    assert near.within("fp32")
    assert not near.bit_equal
    assert not starts.likeness(torch.tensor([1.1, 0.0]), [a]).within("bf16")
    lost = starts.likeness(torch.tensor([float("nan"), 0.0]), [a])
    assert (lost.error, lost.within("fp32")) == (None, False)
    assert starts.likeness(a[:1], [a]).error is None
    assert near.worse(lost).error is None


def test_starts_follow_their_preparation_at_once_and_further_ones_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, told = CpuDevice(1, delay_us=0.0), list[str]()
    monkeypatch.setattr(starts.time, "sleep", lambda seconds: told.append(f"pause {seconds:g}"))
    answers = iter([1.0] * 8 + [2.0])

    def start() -> Tensor:
        told.append("start")
        return torch.tensor([next(answers)])

    def taken(paused: int) -> Starts:
        told.clear()
        return take(start, device, 0, [torch.ones(1)], lambda: told.append("evict"), 3, paused=paused)

    assert taken(2).paused is None, "times are no figures here"
    device.figures = True
    found = taken(1)
    assert told == ["evict", "start"] * 4 + ["evict", "pause 0.1", "start"]
    assert len(found.samples.raw) == len(found.issued.raw) == 3
    assert found.paused is not None
    assert len(found.paused.raw) == 1
    assert not found.worst.bit_equal, "the answer of a start after a pause counts as well"
    device.close()


def test_a_start_is_over_once_its_answer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device, told = CpuDevice(1, delay_us=0.0), list[str]()
    clock = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(starts.time, "perf_counter_ns", lambda: told.append("clock") or next(clock))
    monkeypatch.setattr(device, "wait_for_caller", lambda gpu: told.append(f"answer on {gpu}"))
    monkeypatch.setattr(device, "synchronize", lambda: told.append("idle"))

    def start() -> Tensor:
        told.append("start")
        return torch.ones(1)

    take(start, device, 3, [torch.ones(1)], lambda: told.append("evict"), 1)
    assert told[:8] == ["evict", "idle", "clock", "start", "clock", "answer on 3", "clock", "idle"]


def test_a_start_after_a_pause_may_be_announced_half_a_millisecond_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, told = CpuDevice(1, delay_us=0.0), list[str]()
    device.figures = True
    monkeypatch.setattr(starts.time, "sleep", lambda seconds: told.append(f"pause {seconds:g}"))
    monkeypatch.setattr(starts, "NEAR_S", 0.003)
    at: dict[str, float] = {}

    def now(what: str) -> torch.Tensor:
        told.append(what)
        at[what] = time.perf_counter()
        return torch.ones(1)

    found = take(
        lambda: now("start"),
        device,
        0,
        [torch.ones(1)],
        lambda: None,
        3,
        paused=2,
        rouse=lambda: now("rouse"),
    )
    assert told == ["start"] * 4 + ["pause 0.1", "start"] * 2 + ["pause 0.1", "rouse", "start"] * 2
    assert at["start"] - at["rouse"] >= 0.003
    assert found.paused is not None
    assert found.roused is not None
    assert len(found.paused.raw) == len(found.roused.raw) == 2
    device.close()


def test_a_row_of_fewer_starts_says_what_made_them_few() -> None:
    assert pace.fewer_words(15, 15, 40, 15, "a limit") == ""
    assert pace.fewer_words(5, 15, 3, 15, "a limit") == "5 of 15 runs, since a limit"
    slowed = "5 of 15 runs, since others slowed the processor's core in most"
    assert pace.fewer_words(5, 15, 55, 15, "a limit") == slowed
    # as many as a peer gets at all
    assert pace.fewer_words(10, 15, 30, 10, "a limit") == "10 of 15 runs, since a limit"
