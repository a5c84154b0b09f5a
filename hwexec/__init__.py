"""Plans run for real: the second interpreter of a program, on CUDA streams and graphs, or on threads that play them.

    import hwexec

    with hwexec.prepare(module, plan, example_inputs, host=host) as cold:
        y = cold(*inputs)           # one cold start: every copy of the plan, every layer behind its waits
        y = cold.warm(*inputs)      # weights as the cold start left them: layers read in place still are
        cold.settle()               # bring what is read in place into GPU memory, in the background
        cold.keep()                 # bring once more what the plan keeps in GPU memory between starts: after a change of weights
        cold.rouse()                # a start is near: host and wires are made ready for it
        cold.evict()                # fill the GPUs' arenas with 0xFF; what follows is cold or wrong
        cold.timeline()             # one more cold start, watched: a measured sim.timeline.Timeline
        cold.resident(*inputs)      # the reference: everything in GPU memory, launched the same way
        cold.in_place(*inputs)      # another: everything read in place from host memory
        cold.launch, cold.why_eager, cold.brought(), cold.hot

    with hwexec.Pool({0: 8 * 2**30}) as pool:   # GPU memory that many modules take turns in
        a, b = (hwexec.prepare(m, plan, inputs, host=host, pool=pool) for m, plan, inputs in ...)
        y = a.serve(*x)             # warm where its weights are still there (a.hot), else a cold start

`prepare(module, plan, example_inputs, *, host, network=None, device=None, weights=None, settles=True, pool=None)`: `module` is in
`eval()`; `plan` is what `sim.files.read_plan(path)` gives, held against host and module, or a `sim.plan.Plan`; `host` is the
host it was made for (`read_host(path)`);
`example_inputs` is a tensor, a tuple of positional arguments, or a mapping of keyword arguments; `network` is traced from the
module if None; `device` is "cuda", "cpu" or a `Device`; `weights` is None (the module's own), a state_dict, or paths of
safetensors files. With `settles=False` the target GPU holds what the plan brings there and no more, as for a plan made under a
memory budget, and `settle` and `resident` are refused. With a `pool` its place is there, and others' in turn;
`arena_bytes(network, plan)` says how much it needs of each GPU. What the plan keeps between starts is nobody else's.
Outputs belong to the ColdStart: in graph mode its next start, of whatever kind, overwrites them.

For those who measure (`calibrate`): `CudaDevice` and `CpuDevice` implement `Device` (hwexec/device.py documents every
method: stream, event, record, wait, copy, view, pin, allocate, capture, trace), `HostArena` is exact-size pinned host
memory (hwexec/arena.py), and `time_ns`, `wall_ns`, `Samples` are the timing core (hwexec/timing.py):

    device = hwexec.open_device("cuda")
    host = HostArena(device, size_bytes, gpu=0)           # host.tensor: uint8, pinned; host.close()
    arena = device.allocate(size_bytes, gpu=0)
    stream = device.stream("h2d:0", 0)
    samples = time_ns(lambda: device.copy(stream, arena, host.tensor), device, [stream])
    in_place = host.view(0)                               # a cuda:0 tensor that kernels read over PCIe
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwexec.arena import HostArena
    from hwexec.device import Activity, CaptureError, Device, Event, Graph, Memory, Stream, forked
    from hwexec.devices import open_device
    from hwexec.executor import ColdStart
    from hwexec.pool import Pool
    from hwexec.preparing import arena_bytes, prepare
    from hwexec.timing import Samples, time_ns, wall_ns

_HOME = {
    "HostArena": "arena",
    **dict.fromkeys(
        ("Activity", "CaptureError", "Device", "Event", "Graph", "Memory", "Stream", "forked"), "device"
    ),
    "ColdStart": "executor",
    "open_device": "devices",
    "Pool": "pool",
    **dict.fromkeys(("arena_bytes", "prepare"), "preparing"),
    **dict.fromkeys(("Samples", "time_ns", "wall_ns"), "timing"),
}


def __getattr__(name: str) -> Any:
    """Names are looked up when first used: importing torch takes seconds, and `hwexec --help` needs none of it."""
    if name not in _HOME:
        raise AttributeError(f"module 'hwexec' has no attribute {name!r}")
    return getattr(import_module(f"hwexec.{_HOME[name]}"), name)


__all__ = [
    "Activity",
    "CaptureError",
    "ColdStart",
    "Device",
    "Event",
    "Graph",
    "HostArena",
    "Memory",
    "Pool",
    "Samples",
    "Stream",
    "arena_bytes",
    "forked",
    "open_device",
    "prepare",
    "time_ns",
    "wall_ns",
]
