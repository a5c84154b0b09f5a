"""The way in: a device by name, and a module made ready for cold starts by a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hwexec.arena import Weights
from hwexec.cpu import CpuDevice
from hwexec.cuda import CudaDevice
from hwexec.device import Device
from hwexec.executor import ColdStart
from sim.errors import InputError, require
from sim.host import Host
from sim.network import Network
from sim.plan import Plan
from sim.program import lower
from sim.trace import trace_module


def open_device(device: Device | str | None = None, gpus: int = 4) -> Device:
    """A device by name: "cuda" (also for None) or "cpu", whose times are no figures. InputError where there is no CUDA."""
    if device is None or device == "cuda":
        return CudaDevice()
    if device == "cpu":
        return CpuDevice(gpus)
    if isinstance(device, str):
        raise InputError(f"device {device!r}: there is 'cuda' and 'cpu'; choose one of them")
    return device


def prepare(
    module: torch.nn.Module,
    plan: Plan,
    example_inputs: Any,
    *,
    network: Network | None = None,
    host: Host,
    device: Device | str | None = None,
    weights: Weights | None = None,
    settles: bool = True,
) -> ColdStart:
    """Make a module ready for cold starts by a plan.

    `example_inputs` is a tensor, a tuple of positional arguments or a mapping of keyword arguments; later inputs must have
    its shapes and dtypes. `network` is traced from the module where it is None. `weights`: None for the module's own, a
    state_dict, or paths of safetensors files. With `settles` the target GPU has room for all weights. Without, it holds what
    the plan brings there and no more: `settle` and `resident` are refused, `warm` reads in place what the plan does.
    Raises InputError, and leaves nothing behind, where something does not fit.
    """
    args, kwargs = _arguments(example_inputs)
    require(
        not module.training,
        f"{type(module).__name__} is in training mode, whose results are not the same twice; call eval() first",
    )
    if network is None:
        require(
            not kwargs,
            f"{type(module).__name__}: inputs by keyword cannot be traced here; trace the network first and give network=",
        )
        network = trace_module(module, args).network
    program = lower(plan, network, host)
    own = device is None or isinstance(device, str)
    return ColdStart(
        module, program, args, kwargs, open_device(device, len(host.gpus)), weights, own, settles
    )


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
