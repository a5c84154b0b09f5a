"""What a user would run instead: each peer gives the right answer, and the module comes back as it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from hwexec import peers
from hwexec.peers import PEERS, Peer, Scene, Snapshot
from sim.errors import InputError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.norm = nn.BatchNorm1d(8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.full((), 1.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden = self.norm(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.rnn(hidden)[0]) * self.scale


def scene() -> Scene:
    module = Tied().eval().requires_grad_(False)
    inputs = (torch.arange(6).view(1, 6),)
    return Scene(module, inputs, torch.device("cpu"), Snapshot(module))


def state(module: nn.Module) -> list[tuple[str, int, int]]:
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return [(name, id(t), t.data_ptr()) for name, t in tensors]


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.name)
def test_every_peer_gives_the_answer_and_the_module_back(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_pin", torch.clone)  # without a driver nothing can be pinned
    here = scene()
    before, forward = state(here.module), {m: "forward" in m.__dict__ for m in here.module.modules()}
    with torch.no_grad():
        wanted = here.module(*here.inputs)
        try:
            with peer.set_up(here) as ready:
                for _ in range(3):
                    ready.before()
                    assert torch.equal(ready.call(), wanted)
        except InputError as error:
            pytest.skip(str(error))
        assert torch.equal(here.module(*here.inputs), wanted)
    assert state(here.module) == before
    assert {m: "forward" in m.__dict__ for m in here.module.modules()} == forward
    assert all(not m._forward_pre_hooks for m in here.module.modules())


def test_a_snapshot_undoes_replaced_buffers_and_moved_parameters() -> None:
    here = scene()
    before = state(here.module)
    here.snapshot.mapped(torch.clone)()
    here.module.register_buffer("scale", torch.zeros(()), persistent=False)
    assert state(here.module) != before
    here.snapshot.restore()
    assert state(here.module) == before
    assert peers.eager_output(here) is not None
    assert state(here.module) == before
    tied = sum(p.numel() * 4 for p in here.module.parameters())
    buffers = sum(b.nbytes for b in here.module.buffers())
    assert here.snapshot.total_bytes == tied + buffers


def test_a_package_that_is_not_there_waives_its_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    accelerate = next(p for p in PEERS if p.name == "peer:accelerate")
    with pytest.raises(InputError, match="accelerate is not installed"), accelerate.set_up(scene()):
        pass
