"""What cold starts are held against: the larger of a warm run and the bytes over the links, both as measured here."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from hwexec.arena import HostArena
from hwexec.device import Device
from hwexec.script import do
from hwexec.timing import time_ns
from sim.network import Network

PROBE_BYTES = 256 * 2**20
"""Size of the copies that measure a link."""


@dataclass(frozen=True, slots=True)
class Limit:
    """max(warm graph time, bytes / rate). `copied_bytes` are those the best plan over as many links copies; where it was not
    asked for, the bytes that layers read, of an embedding's table only the rows looked up."""

    links: int
    copied_bytes: int
    bytes_per_s: float
    limit_ns: float


def needed_bytes(network: Network) -> int:
    """Bytes that layers read: of each storage the most that one of its readers touches."""
    touched: dict[int, int] = {}
    for layer in network.layers:
        for read in layer.reads:
            touched[read.storage] = max(touched.get(read.storage, 0), read.touched_bytes)
    return sum(touched.values())


def pinned_rates(device: Device, gpus: tuple[int, ...]) -> tuple[float, ...]:
    """Median rate of large copies from pinned memory to each GPU alone; none where times are no figures."""
    return tuple(_rate(device, (gpu,)) for gpu in gpus) if device.figures else ()


def together_rate(device: Device, gpus: tuple[int, ...]) -> float | None:
    """The same to all GPUs at once, together: lanes may share more than they show alone. None for one GPU, and where times are no
    figures."""
    return _rate(device, gpus) if device.figures and len(gpus) > 1 else None


def _rate(device: Device, gpus: tuple[int, ...]) -> float:
    """Bytes per second that all these GPUs are brought, one large copy each at the same time."""
    with ExitStack() as stack:
        lanes, copies, arenas = [], [], []
        for gpu in gpus:
            host = HostArena(device, PROBE_BYTES, gpu)
            stack.callback(host.close)
            arenas.append(device.allocate(PROBE_BYTES, gpu))
            stream = device.stream("h2d:probe", gpu)
            stack.callback(device.close_stream, stream)
            lanes.append(stream)
            copies.append(device.ready_copy(stream, arenas[-1], host.tensor))
        samples = time_ns(lambda: do(copies), device, lanes)
        copies.clear()
        arenas.clear()
    device.trim()
    return len(gpus) * PROBE_BYTES / samples.median_ns * 1e9
