"""Small modules with every kind of weight an executor may meet, a strategy that draws them, and cold starts of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import hwexec
from hwexec.cpu import CpuDevice
from sim.host import Host
from sim.models import Built
from sim.network import Network
from sim.plan import Access, Chunk, Launch, Plan
from sim.trace import trace
from tests import builders

torch.set_num_threads(1)  # the same sums in the same order, whenever they are made

BLOCKS = ("linear", "norm", "bare", "twice", "buffers", "views", "inner")


class Block(nn.Module):
    """One residual step of width `width`; `kind` says how it holds and uses its weights."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.dense = nn.Linear(width, width)
        if kind == "norm":
            self.norm = nn.LayerNorm(width)
        if kind == "buffers":
            self.register_buffer("shift", torch.arange(width), persistent=False)
            self.register_buffer("scale", torch.tensor(1.5))
            self.register_buffer("unused", torch.zeros((), dtype=torch.int64))
        if kind == "views":  # two parameters in one storage, the second with strides of its own
            flat = torch.randn(2 * width * width + 3)
            self.first = nn.Parameter(flat[3 : 3 + width * width].view(width, width))
            self.second = nn.Parameter(flat[3 + width * width :].view(width, width).t())
        if kind == "inner":
            self.gain = nn.Parameter(torch.randn(width))
            self.empty = nn.Parameter(torch.empty(0, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "bare":  # the weight is used, the module is never called
            return x + functional.linear(x, self.dense.weight)
        y = self.dense(x)
        if self.kind == "norm":
            y = self.norm(y)
        elif self.kind == "twice":
            y = self.dense(functional.gelu(y))
        elif self.kind == "buffers":
            y = y * self.scale + self.shift
        elif self.kind == "views":
            y = y @ self.first + y @ self.second
        elif self.kind == "inner":
            y = torch.cat([y * self.gain, self.empty.view(0)]) if y.ndim == 1 else y * self.gain
        return x + y


class Text(nn.Module):
    """Tokens to scores over the vocabulary; the table may be tied to the output layer."""

    def __init__(self, kinds: list[str], width: int, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(29, width)
        self.blocks = nn.ModuleList(Block(kind, width) for kind in kinds)
        self.head = nn.Linear(width, 29, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Image(nn.Module):
    """Convolutions with BatchNorm, channels last where asked."""

    def __init__(self, depth: int, width: int, channels_last: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.out = nn.Linear(width, 5)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = functional.relu(norm(conv(x)))
        return self.out(x.mean((2, 3)))


@dataclass(frozen=True, slots=True, eq=False)
class Toy:
    """A module, inputs, its network, and what it answers on its own memory."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    network: Network
    answer: Tensor


def toy(module: nn.Module, *inputs: Tensor, name: str = "toy") -> Toy:
    module.eval()
    network = trace(Built(module, inputs, len(inputs[0]), "fp32", None, name)).network
    with torch.no_grad():
        return Toy(module, inputs, network, module(*inputs))


def text(
    kinds: tuple[str, ...] = BLOCKS, width: int = 16, tied: bool = True, dtype: torch.dtype = torch.float32
) -> Toy:
    torch.manual_seed(len(kinds) + width)
    module = Text(list(kinds), width, tied).to(dtype)
    return toy(module, torch.randint(0, 29, (2, 5)))


def image(depth: int = 2, width: int = 4, channels_last: bool = True) -> Toy:
    torch.manual_seed(depth)
    return toy(Image(depth, width, channels_last), torch.randn(2, 3, 8, 8))


@st.composite
def toys(draw: st.DrawFn) -> Toy:
    if draw(st.integers(0, 3)) == 0:
        return image(draw(st.integers(1, 3)), draw(st.sampled_from((4, 6))), draw(st.booleans()))
    kinds = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    return text(tuple(kinds), draw(st.sampled_from((8, 12, 16))), draw(st.booleans()), dtype)


TWO = builders.host(2)


def dealt(made: Toy, launch: Launch = Launch.GRAPH, links: int = 2, direct: tuple[int, ...] = ()) -> Plan:
    """Chunks of 512 bytes, dealt to the links in turn; layers in `direct` read in place."""
    size = made.network.arena_bytes
    starts = range(0, size, 512)
    chunks = [Chunk(s, min(s + 512, size), ((0,), (1, 0))[i % links]) for i, s in enumerate(starts)]
    access = tuple(
        tuple(Access.DIRECT if index in direct else Access.COPIED for _ in layer.reads)
        for index, layer in enumerate(made.network.layers)
    )
    return Plan("dealt", 0, launch, access, tuple(chunks))


def cold_start(made: Toy, plan: Plan, device: CpuDevice, host: Host = TWO) -> hwexec.ColdStart:
    return hwexec.prepare(made.module, plan, made.inputs, network=made.network, host=host, device=device)


def check_cold_then_again(made: Toy, cold: hwexec.ColdStart) -> None:
    """Four starts as a graph, the second and fourth right behind a cold one: answers bit-equal, and no byte left out."""
    assert (cold.launch, cold.why_eager) == (Launch.GRAPH, "")
    for turn in range(4):
        if turn % 2 == 0:
            cold.evict()
        assert torch.equal(cold(*made.inputs), made.answer)
    assert torch.equal(cold._stage.arena, cold._stage.host.tensor), "no copy is left out"
