"""Host memory that is not there: told before it is asked for where that can be known, else when it is refused.

Linux hands out more than it has and later kills who uses it, so what is about to be written is held against what is free.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from hwexec.device import Device
from sim.errors import InputError, require
from sim.hints import first_line
from sim.network import Network

_SAID = ("DefaultCPUAllocator", "can't start new thread")
"""What PyTorch and Python say in a RuntimeError where memory, or that of a thread, cannot be had."""
_DRIVERS = re.compile("CUDA_ERROR_OUT_OF_MEMORY|CUDA error: out of memory")
"""What a call of the driver's says, and a call of PyTorch's that is no allocation."""
_REMEDY = "free some, or take a smaller model, batch or dtype"


def check_free(size_bytes: int, what: str) -> None:
    """InputError where the system has not `size_bytes` for `what`, as far as it says."""
    free = free_bytes()
    require(
        free is None or size_bytes <= free,
        f"host memory: {size_bytes} bytes are needed for {what}, and {free} are free; {_REMEDY}",
    )


def check_model(network: Network, device: Device) -> None:
    """Before it is built: it is there as built and as pinned, and once more where a GPU's memory is the host's."""
    copies, there = (
        (2, "as built and as pinned") if device.figures else (3, "as built, as pinned and as copied")
    )
    what = f"{copies} times the weights of {network.model} in {network.dtype}, {there}"
    check_free(copies * network.arena_bytes, what)


def memory_error(error: BaseException, device: Device) -> InputError | None:
    """The one line for an error that says that host or GPU memory is used up; None for any other."""
    text = str(error)
    if isinstance(error, device.out_of_memory) or (isinstance(error, RuntimeError) and _DRIVERS.search(text)):
        return InputError(
            f"out of GPU memory ({first_line(error)}); stop what else runs there, or take a smaller model"
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _SAID)
    ):
        reason = first_line(error).partition("DefaultCPUAllocator: ")
        return InputError(f"out of host memory ({reason[2] or reason[0]}); {_REMEDY}")
    return None


def free_bytes(root: Path = Path("/")) -> int | None:
    """What can still be written without swapping: the machine's, or what is left of a container's limit. None if nobody says."""
    found = [_level(folder, names) for folder, names in _groups(root)]
    with suppress(OSError, ValueError):
        available = _field(root / "proc/meminfo", "MemAvailable:")
        found.append(None if available is None else 1024 * available)
    return min((free for free in found if free is not None), default=None)


_V2 = ("memory.max", "memory.current", "")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_Names = tuple[str, str, str]
"""Files of a control group: its limit and its use; and how names in its memory.stat begin."""


def _groups(root: Path) -> list[tuple[Path, _Names]]:
    """The control group of this process and all above it: each may have a limit."""
    found: list[tuple[Path, _Names]] = []
    with suppress(OSError, UnicodeError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top, names = (root / "sys/fs/cgroup/memory", _V1) if kinds else (root / "sys/fs/cgroup", _V2)
            here = top / path.strip("/")
            found += [(folder, names) for folder in (here, *here.parents) if folder.is_relative_to(top)]
    return found


def _level(folder: Path, names: _Names) -> int | None:
    """Limit less use; what files lie in memory for is given back when it is needed."""
    limit, used, prefix = names
    with suppress(OSError, ValueError):
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        kinds = (_field(folder / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
        return max(0, most - now + sum(files or 0 for files in kinds))
    return None  # no such group here, or without a limit ("max")


def _field(file: Path, name: str) -> int | None:
    """None where the file has no such line: Linux before 3.14, and what imitates it, say less."""
    words = (line.split() for line in file.read_text().splitlines())
    return next((int(row[1]) for row in words if row[:1] == [name]), None)
