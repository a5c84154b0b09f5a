"""The timing core: calls until they return and until all is done, and what scatters made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hwexec.cpu import CpuDevice, OutOfMemory
from hwexec.timing import Mismatch, Samples, call_ns, issue_ns, steadiest, wall_ns
from sim.errors import InputError


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    """As if its times meant something."""
    made = CpuDevice(1, delay_us=0.0)
    made.figures = True
    yield made
    made.close()


def test_a_call_is_timed_until_it_returns_whatever_the_device_still_does(device: CpuDevice) -> None:
    stream, told = device.stream("h2d:0", 0), list[str]()
    held = lambda: (told.append("call"), device.gate(stream, 20e6))  # noqa: E731
    taken = call_ns(held, device, repeats=3, warmup=1, before=lambda: told.append("before"))
    assert told == ["before", "call"] * 4
    assert len(taken.raw) == 3
    assert taken.median_ns < 10e6
    assert wall_ns(held, device, repeats=1, warmup=0).median_ns >= 20e6
    device.close_stream(stream)


def test_calls_are_made_as_often_as_asked() -> None:
    device, told = CpuDevice(1, delay_us=0.0), list[int]()
    streams = [device.stream(name, 0) for name in ("a", "b")]
    assert issue_ns(device, streams, lambda: told.append(1), 7) > 0
    assert len(told) == 7
    device.synchronize()
    device.close()


def test_what_is_left_of_a_difference_does_not_decide_alone_which_take_is_kept(device: CpuDevice) -> None:
    device.figures = True
    calm, wild = Samples((100.0, 101.0, 102.0)), Samples((100.0, 150.0, 200.0))
    near, far = Samples((1.0, 1.0, 1.0, 9_000.0)), Samples((1.0, 1.0, 8_000.0, 9_000.0))
    takes = iter([(wild, near), (calm, far), (wild, near)])
    found = steadiest(lambda: next(takes), lambda take: take, device)
    assert (found.kept, len(found.made), found.failed) == ((calm, far), 3, "")


CALM, WILD, WILDER = (Samples((100.0, 100.0 + by, 100.0 + 2 * by)) for by in (1.0, 50.0, 200.0))


def story(*takes: Samples | BaseException) -> Callable[[], Samples]:
    left = list(takes)

    def take() -> Samples:
        found = left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    return take


@pytest.mark.parametrize("error", [InputError("no room\nfor it"), OutOfMemory("no room")])
def test_a_take_that_scatters_is_better_than_a_second_one_that_fails(
    device: CpuDevice, error: Exception
) -> None:
    device.figures = True
    found = steadiest(story(WILD, error, CALM), lambda take: (take,), device)
    assert (found.kept, found.made) == (WILD, (WILD,)), "and it is not tried for a third time"
    assert found.failed in ("no room", "OutOfMemory: no room")
    found = steadiest(story(WILDER, WILD, error), lambda take: (take,), device)
    assert (found.kept, len(found.made)) == (WILD, 2)


@pytest.mark.parametrize("error", [InputError("none"), OutOfMemory("none")])
def test_a_first_take_that_fails_is_none(device: CpuDevice, error: Exception) -> None:
    device.figures = True
    with pytest.raises(type(error), match="none"):
        steadiest(story(error, CALM), lambda take: (take,), device)


@pytest.mark.parametrize(
    "error", [Mismatch("other bytes arrived"), KeyboardInterrupt(), RuntimeError("the GPU is lost")]
)
def test_wrong_bytes_a_lost_gpu_and_an_interruption_end_what_had_a_take(
    device: CpuDevice, error: BaseException
) -> None:
    device.figures = True
    with pytest.raises(type(error)):
        steadiest(story(WILD, error), lambda take: (take,), device, waived=(InputError,))
