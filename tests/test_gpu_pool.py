"""A pool on real GPUs: starts of modules that overlap, one behind the other with nothing waited for. Run with `pytest -m gpu`.

Each module is called on a stream of its own, so that nothing but the pool puts one start behind another.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import hwexec
from hwexec.cuda import CudaDevice
from sim.keep import keeping
from sim.models import build
from sim.plan import Launch
from sim.trace import trace
from tests import builders
from tests.test_gpu_executor import MIB, dealt, links_here, same, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS = ("resnet18", "vit_b_16", "hf:bert-base")


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("links", [1, 2])
@pytest.mark.parametrize("launch", Launch)
def test_starts_that_overlap_and_are_not_waited_for_answer_right(
    launch: Launch, links: int, keeps: bool
) -> None:
    links_here(links)
    device, host = CudaDevice(), builders.host(max(2, torch.cuda.device_count()))
    built = [build(name, seq=32 if name.startswith("hf") else None) for name in MODELS]
    nets = [trace(b).network for b in built]
    plans = [dealt(net, launch, links, 4 * MIB, direct=(0,)) for net in nets]
    if keeps:
        plans = [keeping(plan, range(1, 9), net) for net, plan in zip(nets, plans, strict=True)]
        assert all(plan.kept_bytes(net) for plan, net in zip(plans, nets, strict=True))
    if launch is Launch.GRAPH:  # what is issued ahead of all else would land first
        plans[1:] = [replace(plan, head=len(plan.chunks)) for plan in plans[1:]]
    needs = [hwexec.arena_bytes(net, plan) for net, plan in zip(nets, plans, strict=True)]
    sizes = {gpu: 5 * max(need[gpu] for need in needs) // 4 for gpu in needs[0]}
    before = device.allocated_bytes(0)
    with hwexec.Pool(sizes, device) as pool:
        cold = [
            hwexec.prepare(b.module, plan, b.inputs, network=net, host=host, pool=pool)
            for b, plan, net in zip(built, plans, nets, strict=True)
        ]
        given = [b.inputs_on(torch.device("cuda", 0)) for b in built]
        want = [tensors(c.resident(*x)) for c, x in zip(cold, given, strict=True)]
        assert sum(c.hot for c in cold) < len(cold)
        torch.cuda.synchronize()
        callers = [torch.cuda.Stream() for _ in cold]
        order = random.Random(0)
        found = []
        for _ in range(60):
            at = order.randrange(len(cold))
            act = order.choice(("serve", "serve", "cold", "settle"))
            with torch.cuda.stream(callers[at]):
                if act == "settle" and cold[at].hot:
                    cold[at].settle()
                start = cold[at] if act == "cold" else cold[at].serve
                found.append((at, tensors(start(*given[at]))))  # cloned behind the start
        torch.cuda.synchronize()
        assert all(same(answer, want[at]) for at, answer in found)
    del cold, given, want, found, callers
    workspaces = len(MODELS) * 40 * MIB  # cuBLAS keeps one for each compute stream
    assert device.allocated_bytes(0) <= before + workspaces
