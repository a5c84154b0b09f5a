"""Which bytes of a network's arena a plan has on which GPU, and whether there is room for them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from hwexec.arena import Extents
from hwexec.device import Device
from sim.errors import require
from sim.memory import beside_bytes
from sim.network import Network
from sim.plan import Plan


@dataclass(frozen=True, slots=True)
class Layout:
    """Which arena bytes lie where: `arenas` by GPU, and `apart` what a plan keeps between starts where its arenas are others' in
    turn; else that lies in the target's arena, and nothing apart."""

    arenas: Mapping[int, Extents]
    apart: Extents


def layout_of(plan: Plan, network: Network, settles: bool, *, pooled: bool = False) -> Layout:
    """A GPU's arena has what the plan brings there or keeps there, the target's all where it `settles`."""
    kept = plan.kept(network) if pooled else frozenset()
    found = {
        gpu: Extents.of(plan.crossing(gpu) if pooled else plan.holding(gpu, network)) for gpu in plan.gpus
    }
    if settles:
        slots = pairwise(network.offsets)
        others = [slot for storage, slot in enumerate(slots) if storage not in kept]
        found[plan.target] = Extents.of([*others, *plan.crossing(plan.target)])
    return Layout(found, Extents.of(network.ranges(kept)))


def room_for(
    plan: Plan, network: Network, device: Device, *, settles: bool = True, pooled: bool = False
) -> Layout:
    """What a plan takes of each GPU. InputError where that is not free; of a `pooled` one, what it takes beside its arenas."""
    for gpu in plan.gpus:
        require(
            gpu < device.gpu_count,
            f"plan {plan.name!r} uses GPU {gpu}, but this machine has {device.gpu_count}; search a plan for this host",
        )
    layout, least_of = layout_of(plan, network, settles, pooled=pooled), layout_of(plan, network, False)
    for gpu, extents in layout.arenas.items():
        beside = beside_bytes(network if gpu == plan.target else None)
        if gpu == plan.target:
            beside += layout.apart.size_bytes
        need, least = (
            beside + (0 if pooled else held.size_bytes) for held in (extents, least_of.arenas[gpu])
        )
        memory = device.memory(gpu)
        if need > memory.free_bytes:  # what was let go of may still be held by cycles
            gc.collect()
            device.trim()
            memory = device.memory(gpu)
        require(
            need <= memory.free_bytes,
            f"GPU {gpu} ({device.describe(gpu)}) has {memory.free_bytes} of {memory.total_bytes} bytes free, and "
            f"{network.model} needs {need} there; stop what else runs on it, "
            + (
                f"or make a smaller pool{_or_keep_less(layout)}"
                if pooled
                else f"or prepare it with settles=False, which needs {least} for plan {plan.name!r}"
                if least < need
                else "or search a plan with a smaller --memory-budget"
                if gpu == plan.target and not settles
                else "or take a smaller model"
            ),
        )
    return layout


def _or_keep_less(layout: Layout) -> str:
    kept = layout.apart.size_bytes
    return f", or search a plan that keeps less than its {kept} bytes (--keep)" if kept else ""
