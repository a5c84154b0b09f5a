"""What changed between two hosts: by part where that says something, by what it adds where it does not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from calibrate.cli import main
from calibrate.compare import Comparison, compare, show_changes
from sim.catalog import find_host
from sim.files import write_host
from sim.host import Figure
from sim.profile import Profile, Timing
from tests.builders import FREE, host, network, profile


def told(value: float, low: float, high: float) -> Figure:
    return Figure(value, "measured", "a test", low, high)


def printed(found: Comparison) -> str:
    out = io.StringIO()
    show_changes(found, Console(file=out, width=120))
    return out.getvalue()


def test_a_host_that_ships_goes_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "h200-pair", "h100-pair"]) == 0
    assert "before: h200-pair: 2 x NVIDIA H200" in capsys.readouterr().out
    assert main(["show", "h200-pair"]) == 0
    assert "launch_cross_ns" in capsys.readouterr().out
    assert main(["show", "h200-pear"]) == 2
    assert "host 'h200-pear' is not known; nearest: h200-pair" in capsys.readouterr().err
    assert main(["show", "h200-pear.yaml"]) == 2
    assert (
        "h200-pear.yaml: cannot be read (No such file or directory); check the path"
        in capsys.readouterr().err
    )


def test_a_change_from_about_nothing_is_told_by_what_it_adds() -> None:
    before = replace(
        FREE, wait_ns=told(1e-24, 0, 1e-24), start_ns=told(3, 0, 10), issue_copy_ns=told(100, 99, 101)
    )
    after = replace(
        FREE, wait_ns=told(530, 520, 540), start_ns=told(60, 50, 70), issue_copy_ns=told(150, 140, 160)
    )
    found = compare(host(costs=before), host(costs=after))
    beyond = {c.what: c for c in found.changes if c.beyond}
    assert set(beyond) == {"wait_ns", "start_ns", "issue_copy_ns"}
    assert [beyond[name].part for name in ("wait_ns", "start_ns", "issue_copy_ns")] == [None, None, 0.5]
    assert (beyond["start_ns"].difference, beyond["start_ns"].spread) == (57, 17)
    text = printed(found)
    assert "e+" not in text
    assert "+57" in text
    assert "+50.0%" in text


def test_a_spread_is_that_between_the_two() -> None:
    before, after = replace(FREE, wait_ns=told(10, 1, 12)), replace(FREE, wait_ns=told(15, 13, 40))
    up = next(c for c in compare(host(costs=before), host(costs=after)).changes if c.what == "wait_ns")
    assert (up.difference, up.spread, up.beyond) == (5, 4, True)
    down = next(c for c in compare(host(costs=after), host(costs=before)).changes if c.what == "wait_ns")
    assert (down.difference, down.spread, down.beyond) == (-5, 4, True)
    same = compare(host(costs=before), host(costs=before))
    assert not any(c.beyond for c in same.changes)


def test_a_rooflines_figures_are_compared_and_shown_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = find_host("p3.8xlarge")
    assert before.roofline is not None
    floor = before.roofline.kernel_floor_ns
    slower = replace(floor, value=3 * floor.value, low=None, high=None)
    after = replace(before, roofline=replace(before.roofline, kernel_floor_ns=slower))
    assert {c.what for c in compare(before, after).changes if c.beyond} == {"kernel_floor_ns"}
    assert "peak_fp32_flops_per_s" in compare(before, replace(before, roofline=None)).gone
    write_host(path := str(tmp_path / "after.yaml"), after)
    assert main(["diff", "p3.8xlarge", path]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "kernel_floor_ns" in line)
    assert "+200.0%" in line
    assert main(["show", path]) == 0
    assert "kernel_floor_ns" in capsys.readouterr().out


def test_both_hosts_are_named_and_links_that_one_has_alone() -> None:
    pair, single = replace(host(2), name="pair"), replace(host(1), name="single", about="one GPU")
    found = compare(pair, single)
    assert found.gone == ("link pcie1, bytes/s", "link nvlink0>1, bytes/s", "link nvlink1>0, bytes/s")
    assert compare(single, pair).new == found.gone
    text = printed(found)
    assert text.startswith("before: pair: by hand\nafter: single: one GPU\n")
    assert "only before: link pcie1, bytes/s; link nvlink0>1" in text


def test_what_copies_beside_a_layer_cost_it_is_compared_as_its_other_times_are() -> None:
    plain = profile(network(1000), host(1))

    def slowed(by: float) -> Profile:
        return replace(plain, layers=(replace(plain.layers[0], beside=Timing(by, 5, 9)),))

    found = compare(slowed(300), slowed(600))
    assert [c.what for c in found.changes if c.beyond] == ["layer 0 layer0 beside copies, ns"]
    assert (found.gone, found.new) == ((), ())
    lost = compare(slowed(300), plain)
    assert (len(lost.changes), lost.gone) == (len(found.changes) - 1, ("layers beside copies",))
