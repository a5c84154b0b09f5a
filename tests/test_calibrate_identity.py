"""NVML behind a seam: what it answers becomes an identity, what it refuses becomes one clear line."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from calibrate.identity import flags, load_nvml, read_identity, read_states, session
from calibrate.topology import from_identity
from sim.errors import InputError

FIXTURES = Path(__file__).parent / "fixtures" / "topo"


class FakeNvml:
    """pynvml's calls over a text of facts; `fails` names calls and the error number they answer with."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, text: str, fails: dict[str, int] | None = None) -> None:
        self.facts: dict[str, list[str]] = {}
        self.ancestors: dict[tuple[int, int], int] = {}
        for line in text.splitlines():
            words = line.split()
            if not words or words[0] == "#":
                continue
            if words[0] == "ancestor":
                self.ancestors[int(words[1]), int(words[2])] = int(words[3])
            elif words[0] == "gpu":
                self.facts[" ".join(words[1:3])] = words[3:]
            else:
                self.facts[words[0]] = words[1:]
        self.fails = fails or {}
        self.throttle: dict[int, int] = defaultdict(int)
        self.busy: dict[int, int] = defaultdict(int)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "fails"):
            code = object.__getattribute__(self, "fails")[name]

            def fail(*_: Any) -> Any:
                raise pynvml.NVMLError(code)

            return fail
        return object.__getattribute__(self, name)

    def fact(self, gpu: int, what: str) -> list[str]:
        return self.facts[f"{gpu} {what}"]

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> bytes:
        return self.facts["driver"][0].encode()

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return int(self.facts["cuda"][0])

    def nvmlDeviceGetCount(self) -> int:
        return sum(1 for key in self.facts if key.endswith(" uuid"))

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return " ".join(self.fact(gpu, "name"))

    def nvmlDeviceGetUUID(self, gpu: int) -> str:
        return self.fact(gpu, "uuid")[0]

    def nvmlDeviceGetCudaComputeCapability(self, gpu: int) -> tuple[int, int]:
        major, minor = self.fact(gpu, "capability")
        return int(major), int(minor)

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(total=int(self.fact(gpu, "memory")[0]), used=0)

    def nvmlDeviceGetPciInfo(self, gpu: int) -> Any:
        return SimpleNamespace(busId=self.fact(gpu, "bus")[0])

    def nvmlDeviceGetCurrPcieLinkGeneration(self, gpu: int) -> int:
        return int(self.fact(gpu, "pcie")[0])

    def nvmlDeviceGetMaxPcieLinkGeneration(self, gpu: int) -> int:
        return int(self.fact(gpu, "pcie")[1])

    def nvmlDeviceGetCurrPcieLinkWidth(self, gpu: int) -> int:
        return int(self.fact(gpu, "pcie")[2])

    def nvmlDeviceGetMaxPcieLinkWidth(self, gpu: int) -> int:
        return int(self.fact(gpu, "pcie")[3])

    def nvmlDeviceGetNvLinkState(self, gpu: int, link: int) -> int:
        return int(link < int(self.fact(gpu, "nvlinks")[0]))

    def nvmlDeviceGetNvLinkVersion(self, gpu: int, link: int) -> int:
        return int(self.fact(gpu, "nvlinks")[1])

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: int, link: int) -> Any:
        ends = self.fact(gpu, "nvlinks")[2:]
        end = ends[link % len(ends)]
        return SimpleNamespace(busId="00000000:c1:00.0" if end == "switch" else self.fact(int(end), "bus")[0])

    def nvmlDeviceGetTopologyCommonAncestor(self, first: int, second: int) -> int:
        return self.ancestors[first, second]

    def nvmlDeviceGetClockInfo(self, gpu: int, kind: int) -> int:
        return int(self.fact(gpu, "clocks")[0 if kind == 1 else 2])

    def nvmlDeviceGetMaxClockInfo(self, gpu: int, kind: int) -> int:
        return int(self.fact(gpu, "clocks")[1])

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return 120_000

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:
        return 40

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return self.throttle[gpu]

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return SimpleNamespace(gpu=self.busy[gpu])

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[int]:
        return []


def pair(**fails: int) -> FakeNvml:
    return FakeNvml((FIXTURES / "h200-pair.nvml.txt").read_text(), fails)


def test_a_pair_behind_an_nvswitch() -> None:
    identity = read_identity(pair())
    assert (identity.driver, identity.cuda_driver) == ("580.95.05", "13.0")
    assert [(g.name, g.compute_capability, g.pcie_generation, g.pcie_width) for g in identity.gpus] == [
        ("NVIDIA H200", "9.0", 5, 16)
    ] * 2
    (wire,) = identity.pairs
    assert (wire.nvlinks, wire.nvlink_version, wire.ancestor) == (18, 4, "SYS")
    peers = from_identity(identity).nvlink_peers
    assert [(p.source, p.destination, p.links) for p in peers] == [
        (0, 1, ("nvlink0>1",)),
        (1, 0, ("nvlink1>0",)),
    ]


def test_links_that_end_at_the_other_gpu_are_counted_for_that_pair_alone() -> None:
    text = (FIXTURES / "h200-pair.nvml.txt").read_text().replace("18 4 switch", "6 2 1 0")
    text = text.replace("gpu 0 nvlinks 6 2 1 0", "gpu 0 nvlinks 2 2 1").replace(
        "gpu 1 nvlinks 6 2 1 0", "gpu 1 nvlinks 2 2 0"
    )
    assert read_identity(FakeNvml(text)).pairs[0].nvlinks == 2


def test_what_a_gpu_cannot_tell_is_left_open() -> None:
    nvml = pair(nvmlDeviceGetNvLinkState=3, nvmlDeviceGetTopologyCommonAncestor=3, nvmlDeviceGetPowerUsage=3)
    identity = read_identity(nvml)
    assert (identity.pairs[0].nvlinks, identity.pairs[0].ancestor) == (0, None)
    assert read_states(nvml)[0].power_milliwatt is None


def test_throttled_and_busy_gpus_are_flagged() -> None:
    nvml = pair()
    assert flags(read_states(nvml)) == ()
    nvml.busy[1] = 97
    before = read_states(nvml)
    nvml.throttle[0] = 0x40 | 0x1
    assert flags(before, read_states(nvml)) == (
        "GPU 1 was 97 % busy before measuring: stop its other users",
        "GPU 0 throttled after measuring: hardware thermal slowdown",
    )


@pytest.mark.parametrize(
    ("call", "code", "line"),
    [
        ("nvmlInit", 12, "no NVIDIA driver found: install one, use `calibrate estimate`, or --device cpu"),
        ("nvmlInit", 9, "the NVIDIA driver is not loaded"),
        ("nvmlDeviceGetHandleByIndex", 4, "no permission to ask the NVIDIA driver"),
        ("nvmlDeviceGetPowerUsage", 15, "a GPU has fallen off the bus: .* run the same command to go on"),
    ],
)
def test_a_driver_that_refuses_is_one_line_with_its_remedy(call: str, code: int, line: str) -> None:
    def ask(nvml: FakeNvml) -> None:
        with session(nvml):
            read_identity(nvml)
            read_states(nvml)

    with pytest.raises(InputError, match=line):
        ask(pair(**{call: code}))


def test_the_real_library_without_a_driver_says_so() -> None:
    nvml = load_nvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        with pytest.raises(InputError, match="NVIDIA driver"), session(nvml):
            pass
    else:
        pytest.skip("this machine has a driver")
