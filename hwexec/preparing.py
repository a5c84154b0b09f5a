"""The way in: a module made ready for cold starts by a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hwexec.binding import Weights, check_tensors
from hwexec.device import Device
from hwexec.devices import open_device
from hwexec.executor import ColdStart
from hwexec.inputs import check_example, shown
from hwexec.layout import layout_of
from hwexec.pool import Pool
from sim.draft import aligned
from sim.errors import InputError, require
from sim.files import PlanFile
from sim.host import Host
from sim.made_for import check_network, other_host
from sim.models import DTYPES, check_shows_operators
from sim.network import Network, Read, Storage
from sim.plan import Plan
from sim.program import Program, lower
from sim.trace import arguments, trace_module


def prepare(
    module: torch.nn.Module,
    plan: Plan | PlanFile,
    example_inputs: Any,
    *,
    network: Network | None = None,
    host: Host,
    device: Device | str | torch.device | None = None,
    weights: Weights | None = None,
    settles: bool = True,
    pool: Pool | None = None,
) -> ColdStart:
    """Make a module ready for cold starts by a plan.

    A `plan` as its file has it (`sim.files.read_plan`) must have been made for this host and this network; of a plan
    alone nobody knows. `example_inputs` is a tensor, a tuple of positional arguments or a mapping of keyword arguments;
    later inputs must have its shapes and dtypes. `network` is traced from the module where it is None. `weights`: None
    for the module's own, a state_dict, or paths of safetensors files. With `settles` the target GPU has room for all
    weights. Without, it holds what the plan brings there and no more: `settle` and `resident` are refused, `warm` reads
    in place what the plan does. In a `pool` its GPU memory is of that, and others' in turn (hwexec/pool.py).
    Raises InputError, and leaves nothing behind, where something does not fit.
    """
    _check_kinds(module, plan, network, host, weights)
    _check_pool(pool, device)
    args, kwargs = arguments(example_inputs)
    name = type(module).__name__
    require(
        not module.training,
        f"{name} is in training mode, whose results are not the same twice; call eval() first",
    )
    check_shows_operators(module, name)
    check_tensors(module)
    check_example(name, args, kwargs)
    file = plan if isinstance(plan, PlanFile) else None
    plan = plan.plan if isinstance(plan, PlanFile) else plan
    if file is not None:
        _check_host(file, host)
    # what is made in inference mode could be written in no other, and starts may be made in either
    with torch.inference_mode(False), torch.no_grad():
        traced = network is None
        if network is None:
            network = trace_module(module, example_inputs).network
            if file is not None:  # a module says nothing of these
                network = replace(network, model=file.model, seq=file.seq)
        if file is not None:
            _check_network(file, network, f"this {name}" if traced else None)
        program = _lowered(plan, network, host)
        opened = pool.device if pool is not None else open_device(device, len(host.gpus))
        own = pool is None and opened is not device
        return ColdStart(module, program, args, kwargs, opened, weights, own, settles, pool)


def arena_bytes(network: Network, plan: Plan | PlanFile, *, settles: bool = True) -> dict[int, int]:
    """Bytes of each GPU that a module takes of a `Pool` when it is prepared for a plan; those of several have room side by side in
    one of their sum. What the plan keeps between starts is not of the pool. `sim.trace.trace_module(module, inputs).network` is a
    module's network.
    """
    _check(
        "network", isinstance(network, Network), network, "a sim.network.Network, as trace_module gives it"
    )
    _check_plan(plan)
    plan = plan.plan if isinstance(plan, PlanFile) else plan
    require(
        [len(accesses) for accesses in plan.access] == [len(layer.reads) for layer in network.layers],
        f"plan {plan.name!r}: made for another network than {network.model}; search one for it",
    )
    arenas = layout_of(plan, network, settles, pooled=True).arenas
    return {gpu: aligned(held.size_bytes) for gpu, held in arenas.items()}


# What is refused ------------------------------------------------------------------------------------------------------


def _check(what: str, right: bool, value: object, wanted: str) -> None:
    require(right, f"{what} {shown(value)} is a {type(value).__name__}; pass {wanted}")


def _check_plan(plan: object) -> None:
    wanted = "a sim.plan.Plan, or what sim.files.read_plan(path) gives"
    _check("plan", isinstance(plan, Plan | PlanFile), plan, wanted)


def _check_kinds(module: object, plan: object, network: object, host: object, weights: object) -> None:
    _check("module", isinstance(module, torch.nn.Module), module, "a torch.nn.Module")
    _check_plan(plan)
    _check(
        "network",
        network is None or isinstance(network, Network),
        network,
        "a sim.network.Network, or leave it out to have the module traced",
    )
    _check(
        "host",
        isinstance(host, Host),
        host,
        "a sim.host.Host: sim.catalog.find_host(name) gives one that ships, sim.files.read_host(path) one of a file",
    )
    paths = weights if isinstance(weights, Sequence) else [weights]
    _check(
        "weights",
        weights is None or isinstance(weights, Mapping) or all(isinstance(p, str | Path) for p in paths),
        weights,
        "a state_dict, or paths of safetensors files",
    )


def _check_pool(pool: object, device: object) -> None:
    _check("pool", pool is None or isinstance(pool, Pool), pool, "a hwexec.Pool")
    named = device.type if isinstance(device, torch.device) and device.index is None else device
    same = isinstance(pool, Pool) and (named is pool.device or named in (None, pool.device.kind))
    require(
        pool is None or same,
        f"device {shown(device)}: the pool has memory of another; leave device out, it is the pool's",
    )


def _check_host(file: PlanFile, host: Host) -> None:
    differs = other_host(file, host)
    require(
        not differs,
        f"plan {file.plan.name!r}: {differs}; search again for {host.name}, pass as host= the one that it was made for, or "
        "the file's .plan to run it all the same",
    )


def _check_network(file: PlanFile, network: Network, module: str | None) -> None:
    require(
        file.dtype == network.dtype,
        _of_two_dtypes(file.plan, f"made for {file.model}", file.dtype, network.dtype),
    )
    check_network(f"plan {file.plan.name!r}", file, network, module)


def _lowered(plan: Plan, network: Network, host: Host) -> Program:
    """Raises InputError where the plan does not fit; it names both dtypes where the plan would fit in another."""
    try:
        return lower(plan, network, host)
    except InputError:
        fits = [name for name in DTYPES if name != network.dtype and _fits(plan, network, host, name)]
        if not fits:
            raise
        there = " or ".join(fits)
        raise InputError(_of_two_dtypes(plan, f"fits {network.model}", there, network.dtype)) from None


def _fits(plan: Plan, network: Network, host: Host, dtype: str) -> bool:
    """Whether a plan is one for a network whose weights had another dtype."""
    new, old = DTYPES[dtype].itemsize, DTYPES[network.dtype].itemsize

    def scaled(size_bytes: int, storage: Storage) -> int:
        return size_bytes * new // old if storage.dtype == network.dtype else size_bytes

    def read_so(read: Read) -> Read:
        return replace(read, touched_bytes=scaled(read.touched_bytes, network.storages[read.storage]))

    storages = tuple(replace(s, size_bytes=scaled(s.size_bytes, s)) for s in network.storages)
    layers = tuple(replace(ly, reads=tuple(map(read_so, ly.reads))) for ly in network.layers)
    with suppress(InputError):
        plan.check(replace(network, layers=layers, storages=storages), host)
        return True
    return False


def _of_two_dtypes(plan: Plan, made_for: str, there: str, here: str) -> str:
    return (
        f"plan {plan.name!r}: {made_for} in {there}, but the module is in {here}; search again with --dtype {here}, or "
        f"prepare the module in {there}"
    )
