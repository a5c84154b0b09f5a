"""A start's inputs on their way to the module: from host memory by a kernel that reads them there, and by no copy engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hwexec.cpu import CpuDevice
from hwexec.cuda import CudaDevice
from hwexec.device import Event, Stream
from hwexec.inputs import Inputs
from sim.plan import Launch
from tests import toys
from tests.toys import cold_start, dealt


class Mixed(nn.Module):
    """Has a use for inputs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.out = nn.Conv2d(3, 4, 3), nn.Embedding(29, 4), nn.Linear(4, 5)

    def forward(
        self, x: Tensor, image: Tensor, tokens: Tensor, mask: Tensor, none: Tensor, by: Tensor
    ) -> Tensor:
        seen = self.conv(image).mean((2, 3)) + self.table(tokens).sum(1)
        return self.out(torch.where(mask, seen, x) * by + none.sum())


def mixed(seed: int) -> tuple[Tensor, ...]:
    """Contiguous, channels last, int64, bool, empty, and without dimensions."""
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2, 4, generator=draw),
        torch.randn(2, 3, 5, 7, generator=draw).contiguous(memory_format=torch.channels_last),
        torch.randint(29, (2, 6), generator=draw),
        torch.randn(2, 4, generator=draw) > 0,
        torch.empty(0, 3),
        torch.randn((), generator=draw),
    )


@pytest.mark.parametrize("launch", Launch)
def test_inputs_in_host_memory_are_read_in_place_and_never_copied(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of theirs would stand behind all weights that are under way."""
    made, device = toys.toy(Mixed(), *mixed(0)), CpuDevice(2)
    plan, read, copied = dealt(made, launch), list[int](), list[str]()
    copy, into = device.copy, device.read

    def refuse(*_: object) -> None:
        raise AssertionError("an input was copied")

    def seen(stream: Stream, destination: Tensor, source: Tensor) -> None:
        copied.append(stream.name)
        copy(stream, destination, source)

    def told(stream: Stream, destination: Tensor, source: Tensor) -> None:
        assert (stream.name, destination.dtype, source.dtype) == ("compute:0", torch.uint8, torch.uint8)
        at = source.data_ptr()
        assert not source.numel() or any(start <= at < start + size for start, size in device.pinned.items())
        read.append(destination.numel())
        into(stream, destination, source)

    monkeypatch.setattr(device, "assign", refuse)
    monkeypatch.setattr(device, "copy", seen)
    monkeypatch.setattr(device, "read", told)
    with cold_start(made, plan, device) as cold:
        for seed in (1, 2, 3):
            inputs = mixed(seed)
            with torch.no_grad():
                want = made.module(*inputs)
            if seed == 3:  # laid out in another way than the example's
                inputs = (inputs[0].t().contiguous().t(), inputs[1].contiguous(), *inputs[2:])
            copied.clear(), read.clear()
            assert torch.equal(cold(*inputs), want)
            assert read == [given.nbytes for given in inputs]
            assert len(copied) == len(plan.chunks) + sum(len(chunk.path) > 1 for chunk in plan.chunks)
            copied.clear()
            assert torch.equal(cold.warm(*inputs), want)
            assert copied == []
    assert device.pinned == {}


class Late(CpuDevice):
    """Its kernels read what is staged only when the host waits for them."""

    def __init__(self) -> None:
        super().__init__(1, delay_us=0.0)
        self.left: list[Callable[[], None]] = []
        self.brought: list[Tensor] = []

    def read(self, stream: Stream, destination: Tensor, source: Tensor) -> None:
        def act() -> None:
            CpuDevice.read(self, stream, destination, source)
            self.brought.append(destination.clone())

        self.left.append(act)

    def wait_on_host(self, event: Event) -> None:
        super().wait_on_host(event)
        while self.left:
            self.left.pop(0)()


def test_a_start_right_behind_another_leaves_it_its_own_input() -> None:
    device = Late()
    inputs = Inputs(device, 0, "toy", (torch.zeros(64, dtype=torch.uint8),), {})
    stream = device.stream("compute:0", 0)
    every = [torch.full((64,), value, dtype=torch.uint8) for value in (1, 2, 3)]
    for given, read in zip(every, (0, 0, 2), strict=True):
        pairs = inputs.given((given,), {})
        inputs.stage(stream, pairs)()
        assert len(device.brought) == read, "only the start before the last one is waited for"
    device.wait_on_host(device.event())
    assert [b.tolist() for b in device.brought] == [given.tolist() for given in every]
    inputs.clear()


@pytest.mark.parametrize("launch", Launch)
def test_inputs_that_want_a_gradient_are_taken_as_they_are(launch: Launch) -> None:
    made = toys.toy(nn.Sequential(nn.Linear(4, 3)), torch.ones(2, 4))
    given = torch.full((2, 4), 2.0, requires_grad=True)
    with torch.no_grad():
        want = made.module(given)
    with cold_start(made, dealt(made, launch), CpuDevice(2)) as cold:
        for _ in range(3):
            found = cold(given)
            assert torch.equal(found, want)
            assert not found.requires_grad


@pytest.mark.parametrize("launch", Launch)
def test_the_first_start_finds_its_kernels_loaded(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind weights that are under way a kernel's first launch would wait for them."""
    made, device = toys.toy(Mixed(), *mixed(0)), CpuDevice(2)
    read, into = list[int](), device.read

    def told(stream: Stream, destination: Tensor, source: Tensor) -> None:
        read.append(destination.numel())
        into(stream, destination, source)

    monkeypatch.setattr(device, "read", told)
    with cold_start(made, dealt(made, launch), device):
        assert set(read) == {given.nbytes for given in mixed(0)}


class Kernels(CpuDevice):
    """Reads as a GPU does."""

    read = CudaDevice.read


@pytest.mark.parametrize("launch", Launch)
@pytest.mark.parametrize("inference", [False, True])
def test_the_kernel_that_reads_takes_bytes_of_any_kind(launch: Launch, inference: bool) -> None:
    """As eight bytes at a time, or one by one where their number is no multiple of eight."""
    made, odd = toys.toy(Mixed(), *mixed(0)), torch.ones(3, dtype=torch.complex64)
    with cold_start(made, dealt(made, launch), Kernels(2)) as cold, torch.inference_mode(inference):
        for seed in (1, 2):
            assert torch.equal(cold(*mixed(seed)), made.module(*mixed(seed)))
    inputs = Inputs(Kernels(1), 0, "toy", (odd,), {})
    for value in (torch.tensor([1 + 2j, 3, 0]), torch.tensor([1, 2 - 1j, 0]).conj()):
        pairs = inputs.given((value.to(torch.complex64),), {})
        inputs.stage(Kernels(1).stream("compute:0", 0), pairs)()
        assert torch.equal(inputs.fixed()[0][0], value.to(torch.complex64))
    inputs.clear()
