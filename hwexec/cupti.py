"""What GPUs were seen doing, by PyTorch's profiler: inside a replayed graph too, each copy and kernel on every device."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from hwexec.device import Activity


def watched(call: Callable[[], None], synchronize: Callable[[], None]) -> tuple[Activity, ...]:
    """Activities of every GPU during `call`, in order of start; `synchronize` waits until all GPUs are idle."""
    synchronize()
    with warnings.catch_warnings():
        # of cycles, which are not used here; the first use warns
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        _start()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [activity for event in events if (activity := _activity(event)) is not None]
    return tuple(sorted(found, key=lambda a: (a.start_ns, a.stop_ns)))


@cache
def _start() -> None:
    """The first use of the profiler starts CUPTI, which takes long."""
    with profile(activities=[ProfilerActivity.CUDA]):
        pass


def _activity(event: dict[str, Any]) -> Activity | None:
    """One event of a profiler's trace; None for those that are no GPU work."""
    category, name = event.get("cat", ""), event.get("name", "")
    start = float(event.get("ts", 0)) * 1e3
    stop = start + float(event.get("dur", 0)) * 1e3
    about = event.get("args", {})
    if category in ("cuda_runtime", "cuda_driver"):
        if "GraphLaunch" in name:
            return Activity("launch", -1, start, stop, 0, name)
        issues = any(part in name for part in ("EventRecord", "StreamWaitEvent", "Memcpy"))
        return Activity("issue", -1, start, stop, 0, name) if issues else None
    if category not in ("gpu_memcpy", "gpu_memset", "kernel"):
        return None
    # copies between two GPUs name both, and the one whose stream they ran on
    gpu = int(about.get("toDevice", about.get("device", -1)))
    size = int(about.get("bytes", 0))
    if category == "gpu_memcpy" and "HtoD" in name:
        return Activity("h2d", gpu, start, stop, size, name)
    if category == "gpu_memcpy" and ("DtoD" in name or "PtoP" in name):
        return Activity("d2d", gpu, start, stop, size, name)
    return Activity("kernel", gpu, start, stop, size, name)
