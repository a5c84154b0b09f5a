"""Measured hosts that ship are what their samples under results/ say: nothing changed by hand, nothing fitted otherwise since."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from calibrate.cli import main
from sim.catalog import find_host
from sim.files import read_host, read_profile
from sim.host import Figure

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "results" / "h200-pair-2" / "calibration"
MEASURED = {"h100-pair": ("h100-pair-6", "h100-pair-7", "h100-pair-8/sweep"), "h200-pair": ("h200-pair-2",)}
"""By host, the folders of its samples: its own and networks', and of networks measured on other machines of the kind."""


def figures(record: object) -> dict[str, Figure]:
    return {f.name: found for f in fields(record) if isinstance(found := getattr(record, f.name), Figure)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MEASURED)
def test_a_host_is_fitted_again_from_its_samples_without_a_gpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, *more = (ROOT / "results" / folder / "calibration" for folder in MEASURED[name])
    shutil.copytree(own / "state", tmp_path / "state")
    for folder in (own, *more):
        shutil.copytree(folder / "samples", tmp_path / "samples", dirs_exist_ok=True)
    assert main(["fit", str(tmp_path)]) == 0
    host_path, *profile_paths = (Path(line) for line in capsys.readouterr().out.split())

    shipped, host = find_host(name), read_host(host_path)
    assert (host.name, host.about, host.gpus, host.peers) == (
        shipped.name, shipped.about, shipped.gpus, shipped.peers,
    )  # fmt: skip
    assert host.bandwidth == pytest.approx(shipped.bandwidth, rel=1e-6)
    alike(shipped.costs, host.costs)

    folder = ROOT / "scenarios" / "profiles" / name
    assert {path.name for path in profile_paths} == {path.name for path in folder.iterdir()}
    for path in profile_paths:
        ours, theirs = read_profile(path), read_profile(folder / path.name)
        assert (theirs.host_digest, ours.host_digest) == (shipped.digest, host.digest)
        assert ours.network == theirs.network
        assert ours.layers == theirs.layers
        alike(ours, theirs)


def test_samples_that_cannot_be_read_leave_the_files_of_the_last_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SAMPLES / "state", tmp_path / "state")
    layers = tmp_path / "samples" / "h200-pair"
    layers.mkdir(parents=True)
    whole = (SAMPLES / "samples" / "h200-pair" / "vit_b_16.fp32.b1.yaml").read_bytes()
    (layers / "vit_b_16.fp32.b1.yaml").write_bytes(whole[: len(whole) // 2])
    assert main(["fit", str(tmp_path)]) == 2
    assert "vit_b_16.fp32.b1.yaml" in capsys.readouterr().err
    assert not (tmp_path / "hosts").exists()


def alike(ours: object, theirs: object) -> None:
    """The same figures from the same sources; scipy's versions end a fit at slightly different points."""
    wanted, found = figures(theirs), figures(ours)
    assert {n: (f.kind, f.source) for n, f in found.items()} == {
        n: (f.kind, f.source) for n, f in wanted.items()
    }
    for name, figure in found.items():
        for what in ("value", "low", "high"):
            assert getattr(figure, what) == pytest.approx(getattr(wanted[name], what), rel=1e-3, abs=1), (
                name,
                what,
            )
