"""Prints of `nvidia-smi topo -m` and who can reach whom by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from calibrate.topology import Topology, from_topo_text, uplink
from sim.errors import InputError

FIXTURES = Path(__file__).parent / "fixtures" / "topo"


def read(name: str) -> Topology:
    return from_topo_text((FIXTURES / f"{name}.txt").read_text())


def links(topology: Topology) -> list[str]:
    return [f"{w.first}-{w.second} NV{w.nvlinks}" for w in topology.wires if w.nvlinks]


def test_p3_8xlarge_is_four_gpus_all_joined() -> None:
    host = read("p3.8xlarge")
    assert links(host) == ["0-1 NV1", "0-2 NV1", "0-3 NV2", "1-2 NV2", "1-3 NV1", "2-3 NV2"]
    assert len(host.nvlink_peers) == 12
    assert host.switch_groups == ()
    assert host.numa_nodes == (None,) * 4


def test_dgx_1_is_a_cube_mesh_with_a_switch_under_each_two_gpus() -> None:
    host = read("dgx-1")
    assert host.gpus == 8
    assert [sum(w.nvlinks for w in host.wires if g in (w.first, w.second)) for g in range(8)] == [6] * 8
    assert (host.wire(4, 0).nvlinks, host.wire(0, 5).nvlinks, host.wire(0, 5).ancestor) == (2, 0, "SYS")
    assert len(host.nvlink_peers) == 32
    assert host.switch_groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert [uplink(g) for g in host.switch_groups][:2] == ["uplink0+1", "uplink2+3"]


def test_dgx_h100_joins_all_with_18_links_and_shares_no_switch() -> None:
    host = read("dgx-h100")
    assert {w.nvlinks for w in host.wires} == {18}
    assert len(host.nvlink_peers) == 56
    assert host.switch_groups == ()
    assert host.numa_nodes == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_host_without_nvlink_has_no_peers_but_may_share_an_uplink() -> None:
    host = read("no-nvlink")
    assert host.nvlink_peers == ()
    assert host.switch_groups == ((0, 1),)
    assert host.wire(0, 3).ancestor == "SYS"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("nothing to see", "no matrix found"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV1\n", "the row of GPU1 is missing"),
        ("\tGPU0\tGPU1\nGPU0\t X \tFOO\nGPU1\tFOO\t X \n", "GPU0 to GPU1 says 'FOO'"),
    ],
)
def test_what_is_no_matrix_is_refused(text: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        from_topo_text(text)
