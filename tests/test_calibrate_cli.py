"""`calibrate` as a user meets it: GPUs chosen, an interruption told, and commands that cannot start, in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from calibrate import run as calibrate_run
from calibrate.cli import main
from calibrate.identity import read_identity, visible
from calibrate.run import Ask, Watch, choose_gpus, run
from calibrate.samples import CaseResult
from calibrate.store import Store
from hwexec.cpu import CpuDevice
from sim.errors import InputError
from sim.files import write_record
from tests.calibrating import Told, ask
from tests.test_calibrate_identity import FakeNvml, pair


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    made = CpuDevice(2, delay_us=0.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (True, "what was measured is kept in cal; run the same command to go on"),
        (False, "nothing was measured yet"),
    ],
)
def test_an_interruption_says_whether_anything_is_kept(
    kept: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_ask: Ask, device: CpuDevice, _watch: Watch, store: Store, *_: object) -> None:
        if kept:
            store.keep_case(CaseResult("h2d", "works"))
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_run, "run", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--device", "cpu", "--name", "x", "--out", "cal"]) == 130
    assert said in capsys.readouterr().err.splitlines()


def test_gpus_are_chosen_and_numbered_as_cuda_shows_them() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "3,1"}
    choose_gpus((1,), environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with pytest.raises(InputError, match=r"--gpus 2: CUDA_VISIBLE_DEVICES=1 shows 1"):
        choose_gpus((2,), environ)
    identity = read_identity(pair())
    turned = visible(identity, "GPU-2222,0")
    assert [(g.index, g.uuid[:8]) for g in turned.gpus] == [(0, "GPU-2222"), (1, "GPU-1111")]
    assert (turned.pairs[0].first, turned.pairs[0].nvlinks) == (0, 18)
    assert visible(identity, "1").pairs == ()


def test_commands_that_cannot_start_say_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "x")
    for words, line in (
        (["run", "--name", "x", "--out", folder, "--gpus", "0,zero"], "is no list of GPU numbers"),
        (["run", "--name", "a/b", "--out", folder], "it becomes a file's name"),
        (
            ["run", "--device", "cpu", "--name", "x", "--out", folder, "--gpus", "0,9"],
            "numbered from 0 without gaps; for 2 of them write --gpus 0,1",
        ),
        (
            ["run", "--device", "cpu", "--name", "x", "--out", folder, "--gpus", "7"],
            "numbered from 0 without gaps; for 1 of them write --gpus 0",
        ),
        (["estimate", "--model", "resnt", "--out", folder], "model 'resnt': not known"),
        (["fit", folder], "nothing was measured here"),
        (["show", str(tmp_path / "none")], "cannot be read"),
        (["show", __file__], "no kind at its top"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
        assert not Path(folder).exists()
    if not torch.cuda.is_available():
        assert main(["run", "--name", "x", "--out", folder]) == 2
        assert "NVIDIA driver" in capsys.readouterr().err


def test_no_permission_and_a_lost_gpu_stop_before_anything_is_written(
    tmp_path: Path, device: CpuDevice
) -> None:
    with pytest.raises(InputError, match="no permission to ask the NVIDIA driver"):
        Watch(pair(nvmlDeviceGetHandleByIndex=4))
    nvml: FakeNvml = pair()
    watch = Watch(nvml)
    nvml.fails["nvmlDeviceGetMemoryInfo"] = 15
    with pytest.raises(InputError, match="fallen off the bus"):
        run(ask(), device, watch, Store(tmp_path, write_record), Told())
    assert list(tmp_path.iterdir()) == []
