"""Modules prepared in a pool: what the tests of pools share."""

from __future__ import annotations

from dataclasses import replace

import torch

import hwexec
from hwexec.cpu import CpuDevice
from hwexec.pool import Pool
from sim.plan import Launch, Plan
from tests import toys
from tests.toys import TWO, Toy, dealt


def text(seed: int, *kinds: str, width: int = 16) -> Toy:
    """Of one size, and unlike each other by their seeds: bytes of another are seen."""
    torch.manual_seed(seed)
    return toys.toy(toys.Text(["linear", *kinds], width, tied=True), torch.randint(0, 29, (2, 5)))


def pool_of(made: Toy, device: CpuDevice, times: float = 1, launch: Launch = Launch.GRAPH) -> Pool:
    """Room for so many of such a module, on both GPUs."""
    sizes = hwexec.arena_bytes(made.network, dealt(made, launch))
    return Pool({gpu: int(times * size) for gpu, size in sizes.items()}, device)


def planned(made: Toy, plan: Plan, pool: Pool, settles: bool = True) -> hwexec.ColdStart:
    return hwexec.prepare(
        made.module, plan, made.inputs, network=made.network, host=TWO, pool=pool, settles=settles
    )


def ahead(plan: Plan) -> Plan:
    """With all chunks in the head, where it is a graph's."""
    return replace(plan, head=len(plan.chunks)) if plan.launch is Launch.GRAPH else plan


def prepared(made: Toy, pool: Pool, launch: Launch = Launch.GRAPH) -> hwexec.ColdStart:
    return planned(made, dealt(made, launch), pool)


class Owner:
    def close(self) -> None: ...
