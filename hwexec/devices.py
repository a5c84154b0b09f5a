"""A device by name."""

from __future__ import annotations

import torch

from hwexec.cpu import CpuDevice
from hwexec.cuda import CudaDevice
from hwexec.device import Device
from hwexec.inputs import shown
from sim.errors import InputError, require


def open_device(device: Device | str | torch.device | None = None, gpus: int = 4) -> Device:
    """A device by name: "cuda" (also for None) or "cpu", whose times are no figures. InputError where there is no CUDA."""
    if isinstance(device, torch.device):
        require(
            device.type != "cuda" or device.index is None,
            f"device {device}: the plan says which GPUs it uses; pass 'cuda'",
        )
        device = device.type
    if device is None or device == "cuda":
        return CudaDevice()
    if device == "cpu":
        return CpuDevice(gpus)
    if isinstance(device, str):
        raise InputError(f"device {device!r}: there is 'cuda' and 'cpu'; choose one of them")
    require(
        hasattr(device, "torch_device"),
        f"device {shown(device)} is a {type(device).__name__}; pass 'cuda', 'cpu' or a hwexec.Device",
    )
    return device
