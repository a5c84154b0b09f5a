"""What a host is, as NVML tells it: GPUs, their PCIe lanes and NVLinks, who shares a switch, and how fit they are to measure.

The seam is `Nvml`: pynvml's own names, so that the module itself is the real implementation and tests bring a fake.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from sim.errors import InputError

ANCESTORS = {0: "INT", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
"""NVML's common ancestors in the letters that `nvidia-smi topo -m` prints."""

THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Clock-event bits that make a GPU slower than it could be; idle (1), set clocks (2) and sync boost (16) do not."""

MOST_NVLINKS = 18
BUSY_PERCENT = 10
T = TypeVar("T")


class Nvml(Protocol):
    """The calls of pynvml that an identity needs."""

    NVMLError: type[Exception]
    NVML_CLOCK_SM: int
    NVML_CLOCK_MEM: int
    NVML_TEMPERATURE_GPU: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> Any: ...
    def nvmlSystemGetCudaDriverVersion_v2(self) -> int: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...
    def nvmlDeviceGetName(self, handle: Any) -> Any: ...
    def nvmlDeviceGetUUID(self, handle: Any) -> Any: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any) -> Any: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any: ...
    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: Any) -> int: ...
    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: Any) -> int: ...
    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: Any) -> int: ...
    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: Any) -> int: ...
    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int: ...
    def nvmlDeviceGetNvLinkVersion(self, handle: Any, link: int) -> int: ...
    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: Any, link: int) -> Any: ...
    def nvmlDeviceGetTopologyCommonAncestor(self, first: Any, second: Any) -> int: ...
    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int: ...
    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU at one moment. None where the driver does not tell."""

    sm_clock_mhz: int | None
    sm_clock_max_mhz: int | None
    memory_clock_mhz: int | None
    power_milliwatt: int | None
    temperature_c: int | None
    throttles: tuple[str, ...]
    busy_percent: int | None
    other_processes: int | None
    memory_used_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """One GPU: what does not change while it is measured."""

    index: int
    name: str
    uuid: str
    compute_capability: str
    memory_bytes: int
    pcie_generation: int | None
    pcie_generation_max: int | None
    pcie_width: int | None
    pcie_width_max: int | None
    numa_node: int | None


@dataclass(frozen=True, slots=True)
class PairIdentity:
    """Two GPUs, `first` < `second`. `nvlinks` 0 where they have none; `ancestor` as `nvidia-smi topo -m` names it."""

    first: int
    second: int
    nvlinks: int
    nvlink_version: int | None
    ancestor: str | None


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """The machine, as far as its driver tells."""

    hostname: str
    driver: str
    cuda_driver: str
    gpus: tuple[GpuIdentity, ...]
    pairs: tuple[PairIdentity, ...]


def load_nvml() -> Nvml:
    """The real NVML. pynvml is only the wrapper: the driver's library is looked for at nvmlInit."""
    import pynvml  # noqa: PLC0415  # not at start-up: `calibrate show` needs no NVML

    return cast(Nvml, pynvml)


@contextmanager
def session(nvml: Nvml) -> Iterator[Nvml]:
    """NVML opened and closed; its errors become InputError, one line with the remedy."""
    with clear(nvml):
        nvml.nvmlInit()
    try:
        with clear(nvml):
            yield nvml
    finally:
        with suppress(nvml.NVMLError):  # a lost GPU fails here too: the first error is the one to tell
            nvml.nvmlShutdown()


@contextmanager
def clear(nvml: Nvml) -> Iterator[None]:
    """Turn an NVML error into one line that names the remedy."""
    try:
        yield
    except nvml.NVMLError as error:
        code = int(getattr(error, "value", -1))
        raise InputError(f"{_REMEDIES.get(code, 'NVML failed')} ({error})") from error


_REMEDIES = {
    2: "this GPU or driver cannot tell what was asked of NVML: update the driver",
    4: "no permission to ask the NVIDIA driver: run as a user who may open /dev/nvidia*",
    6: "the NVIDIA driver does not know that GPU: list those there with nvidia-smi -L",
    9: "the NVIDIA driver is not loaded: load it (modprobe nvidia), or use `calibrate estimate`",
    12: "no NVIDIA driver found: install one, use `calibrate estimate`, or --device cpu to see what a run does, without figures",
    15: "a GPU has fallen off the bus: reset it or reboot, then run the same command to go on",
    18: "the NVIDIA library and kernel module differ in version: reboot, or reload the module",
    999: "NVML failed for a reason it does not know: look in dmesg",
}
"""By NVML's error number, the only thing that is the same in every version of pynvml."""


def read_identity(nvml: Nvml) -> HostIdentity:
    """Raises InputError where the driver cannot be asked."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return HostIdentity(
        hostname=platform.node(),
        driver=_text(nvml.nvmlSystemGetDriverVersion()),
        cuda_driver=f"{cuda // 1000}.{cuda % 1000 // 10}",
        gpus=tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
        pairs=tuple(
            _pair(nvml, first, second, handles)
            for first in range(len(handles))
            for second in range(first + 1, len(handles))
        ),
    )


def visible(identity: HostIdentity, shown: str | None) -> HostIdentity:
    """The identity of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order and numbered from 0."""
    if not shown:
        return identity
    order = []
    for name in shown.split(","):
        found = next(
            (
                g.index
                for g in identity.gpus
                if name.strip() in (str(g.index), g.uuid) or g.uuid.startswith(name.strip())
            ),
            None,
        )
        if found is None:
            break  # as CUDA does: what stands behind a wrong name is not seen
        order.append(found)
    pairs = []
    for first in range(len(order)):
        for second in range(first + 1, len(order)):
            low, high = sorted((order[first], order[second]))
            pair = next(p for p in identity.pairs if (p.first, p.second) == (low, high))
            pairs.append(replace(pair, first=first, second=second))
    gpus = tuple(replace(identity.gpus[old], index=new) for new, old in enumerate(order))
    return replace(identity, gpus=gpus, pairs=tuple(pairs))


def read_states(nvml: Nvml) -> tuple[GpuState, ...]:
    """Clocks, power and what holds them down, now, of every GPU in order."""
    return tuple(_state(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount()))


def flags(before: tuple[GpuState, ...], after: tuple[GpuState, ...] = ()) -> tuple[str, ...]:
    """Reasons to distrust figures: GPUs throttled or busy with something else, in words."""
    found = []
    for when, states in (("before", before), ("after", after)):
        for index, state in enumerate(states):
            if state.throttles:
                found.append(f"GPU {index} throttled {when} measuring: {', '.join(state.throttles)}")
            if when == "before" and (state.busy_percent or 0) > BUSY_PERCENT:
                found.append(
                    f"GPU {index} was {state.busy_percent} % busy before measuring: stop its other users"
                )
            elif when == "before" and state.other_processes:
                found.append(f"GPU {index} holds {state.other_processes} other processes; they may disturb")
    return tuple(found)


def _gpu(nvml: Nvml, index: int, handle: Any) -> GpuIdentity:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    ask = _Ask(nvml)
    return GpuIdentity(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        compute_capability=f"{major}.{minor}",
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        pcie_generation=ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)),
        pcie_generation_max=ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)),
        pcie_width=ask(lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)),
        pcie_width_max=ask(lambda: nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)),
        numa_node=_numa(ask(lambda: _bus(nvml, handle))),
    )


def _state(nvml: Nvml, handle: Any) -> GpuState:
    ask = _Ask(nvml)
    reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    return GpuState(
        sm_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        sm_clock_max_mhz=ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        memory_clock_mhz=ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        power_milliwatt=ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle)),
        temperature_c=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        throttles=tuple(words for bit, words in THROTTLES.items() if reasons & bit),
        busy_percent=ask(lambda: int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)),
        other_processes=ask(lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle))),
        memory_used_bytes=ask(lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used)),
    )


def _pair(nvml: Nvml, first: int, second: int, handles: list[Any]) -> PairIdentity:
    """Links that end at the other GPU, or, where they end at switches, all links that both have up."""
    ask = _Ask(nvml)
    up = [_links(nvml, handle) for handle in (handles[first], handles[second])]
    bus = ask(lambda: _bus(nvml, handles[second]))
    others = {ask(lambda handle=handle: _bus(nvml, handle)) for handle in handles}  # type: ignore[misc]
    straight = [link for link, remote in up[0] if remote is not None and remote == bus]
    through = [link for link, remote in up[0] if remote not in others]
    theirs = [link for link, remote in up[1] if remote not in others]
    links = straight or through[: len(theirs)]
    version = ask(lambda: nvml.nvmlDeviceGetNvLinkVersion(handles[first], links[0])) if links else None
    common = ask(lambda: nvml.nvmlDeviceGetTopologyCommonAncestor(handles[first], handles[second]))
    return PairIdentity(
        first, second, len(links), version, ANCESTORS.get(common) if common is not None else None
    )


def _links(nvml: Nvml, handle: Any) -> list[tuple[int, str | None]]:
    """Active NVLinks of a GPU and the bus id each one ends at."""
    ask = _Ask(nvml)
    found = []
    for link in range(MOST_NVLINKS):
        if ask(lambda link=link: nvml.nvmlDeviceGetNvLinkState(handle, link)) == 1:  # type: ignore[misc]
            remote = ask(
                lambda link=link: _short(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId)  # type: ignore[misc]
            )
            found.append((link, remote))
    return found


class _Ask:
    """Asks NVML what not every GPU can answer: None where it cannot, an error where the GPU itself is gone."""

    CANNOT = (2, 3, 13, 25, 26)
    """Invalid argument, not supported, no such function, structure of another version, gone: no answer, nothing broken."""

    def __init__(self, nvml: Nvml) -> None:
        self.nvml = nvml

    def __call__(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self.nvml.NVMLError as error:
            if int(getattr(error, "value", -1)) in self.CANNOT:
                return None
            raise


def _bus(nvml: Nvml, handle: Any) -> str:
    return _short(nvml.nvmlDeviceGetPciInfo(handle).busId)


def _short(bus: Any) -> str:
    """Bus ids in sysfs's form: four hexadecimal digits of domain, lower case."""
    domain, _, rest = _text(bus).lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _text(value: Any) -> str:
    """Older pynvml answers in bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _numa(bus: str | None, root: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """A virtual machine may say -1: then nobody knows."""
    try:
        node = int((root / (bus or "none") / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
