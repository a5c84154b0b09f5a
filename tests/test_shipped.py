"""The measured host that ships is what its samples under results/ say: nothing changed by hand, nothing fitted otherwise since."""

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
SAMPLES = ROOT / "results" / "h200-pair" / "calibration"
NETWORK = "vit_b_16.bf16.b1.yaml"


def figures(record: object) -> dict[str, Figure]:
    return {f.name: found for f in fields(record) if isinstance(found := getattr(record, f.name), Figure)}  # type: ignore[arg-type]


def test_the_h200_pair_is_fitted_again_from_its_samples_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SAMPLES / "state", tmp_path / "state")
    (tmp_path / "samples" / "h200-pair").mkdir(parents=True)
    shutil.copy(SAMPLES / "samples" / "h200-pair" / NETWORK, tmp_path / "samples" / "h200-pair")
    assert main(["fit", str(tmp_path)]) == 0
    host_path, profile_path = (Path(line) for line in capsys.readouterr().out.split())

    shipped, host = find_host("h200-pair"), read_host(host_path)
    assert (host.name, host.about, host.gpus, host.peers) == (
        shipped.name, shipped.about, shipped.gpus, shipped.peers,
    )  # fmt: skip
    assert host.bandwidth == pytest.approx(shipped.bandwidth, rel=1e-6)
    wanted, found = figures(shipped.costs), figures(host.costs)
    assert {n: (f.kind, f.source) for n, f in found.items()} == {
        n: (f.kind, f.source) for n, f in wanted.items()
    }
    # scipy's versions end a fit at slightly different points
    assert {n: f.value for n, f in found.items()} == pytest.approx(
        {n: f.value for n, f in wanted.items()}, rel=1e-3, abs=1
    )

    named = ROOT / "scenarios" / "profiles" / "h200-pair" / NETWORK
    ours, theirs = read_profile(profile_path), read_profile(named)
    assert theirs.host_digest == shipped.digest
    assert ours.network == theirs.network
    assert ours.layers == theirs.layers
    assert ours.provenance.command == theirs.provenance.command
