"""What a network's own cold starts take the host: between its layers, for a relay, and to launch its graph."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import ANY

import pytest
import torch

from calibrate.cold import calls_ns, eager_starts, graph_starts, hook, launch, relay
from calibrate.samples import Point
from calibrate.ways import over_lanes
from hwexec.cpu import CpuDevice
from hwexec.starts import SAME, Reference
from hwexec.timing import Mismatch
from sim.models import Built
from sim.trace import trace
from tests.builders import FREE, figure, host, network, profile

COSTS = replace(FREE, issue_copy_ns=figure(2_000), issue_event_ns=figure(500))


def points(one_ns: float, each_ns: float, noise: float = 0.0) -> tuple[Point, Point]:
    draw = random.Random(1)
    first, second = (tuple(mean + draw.gauss(0, noise) for _ in range(41)) for mean in (one_ns, each_ns))
    return Point("in one chunk", 0, 1, first), Point("in a chunk each", 0, 1, second)


@pytest.mark.parametrize("noise", [0.0, 3_000.0])
def test_what_is_left_per_layer_when_the_calls_are_paid_for(noise: float) -> None:
    # four layers read weights, one of them two tensors: ahead of the others is a wait that one chunk does not need
    net, machine = network(1000, 0, (600, 600), 1000, 1000), host(costs=COSTS)
    copies, events, hooks, own_ns = 4, 2 * 3, 3, 9_000
    each_ns = 1e6 + copies * 2_000 + events * 500 + hooks * own_ns
    found = hook(net, points(1e6, each_ns, noise), machine)
    assert found is not None
    assert found.kind == "measured"
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(own_ns, abs=noise / 3)
    assert (found.low == found.high) == (noise == 0)


def test_what_is_left_per_relayed_chunk_when_its_calls_are_paid_for() -> None:
    net, machine = network(1000, 0, 1000), host(2, costs=COSTS)
    relayed = Point("each relayed", 0, 1, (2e6 + 2 * (2_000 + 2 * 500 + 4_000),) * 41, copies=2)
    found = relay(net, (*points(1e6, 2e6), relayed), machine)
    assert found is not None
    assert (found.value, found.kind) == (pytest.approx(4_000), "measured")
    assert relay(net, points(1e6, 2e6), machine) is None, "no partner"


def test_the_calls_of_one_chunk_are_a_copy_its_events_and_coming_ahead_of_one_layer() -> None:
    net, machine = network(1000, 0, 1000), host(costs=replace(COSTS, issue_hook_ns=figure(7_000)))
    assert calls_ns(net, machine, None) == 2_000 + 2 * 500 + 7_000
    assert calls_ns(net, machine, figure(9_000)) == 2_000 + 2 * 500 + 9_000
    assert calls_ns(network(0), machine, None) == 0


def test_a_network_whose_hooks_cannot_be_told_has_the_hosts() -> None:
    net, machine = network(1000, 0, 1000), host(costs=COSTS)
    assert hook(net, (), machine) is None, "nobody measured it"
    assert hook(net, points(1e6, 1e6), machine) is None, "less than the calls alone take"
    assert hook(network(1000, 0), points(1e6, 2e6), machine) is None, "both come between as many layers"


def test_starts_are_cold_ones_in_one_chunk_and_in_one_for_each_storage() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)).eval()
    built = Built(module, (torch.ones(1, 8),), 1, "fp32", None, "toy")
    device = CpuDevice(2, delay_us=0.0)
    for gpus, relayed in ((1, []), (2, [("each relayed", 4, 6)])):
        found = eager_starts(built, trace(built).network, host(gpus), device, repeats=3)
        assert [(p.label, p.copies, len(p.samples_ns)) for p in found] == [
            ("in one chunk", 1, 6),
            ("in a chunk each", 4, 6),
            *relayed,
        ]
        assert all(sample > 0 for point in found for sample in point.samples_ns)
    assert device.pinned == {}
    device.close()


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_a_launch_takes_longer_than_the_hosts_costs_say(gpus: int) -> None:
    costs = replace(
        COSTS, start_graph_ns=figure(20_000), launch_ns=figure(30_000), launch_node_ns=figure(100)
    )
    net, machine = network(1000, 1000), host(gpus, costs=costs)
    own = profile(net, machine)
    # a chunk's copy alone, or two lanes' with a relay: two copies, three events and the landing's two
    calls_ns = 2_000 if gpus == 1 else 3 * 2_000 + 4 * 500
    said_ns = 10_000 + calls_ns + 30_000 + 2 * 100
    taken = Point("launched", 0, 1, tuple(said_ns + float(x) for x in range(40_000, 51_000, 1_000)))
    found = launch(own, (taken,), machine)
    assert found is not None
    assert (found.value, found.low, found.high) == (pytest.approx(45_000, abs=2_000), ANY, ANY)
    assert launch(own, (), machine) is None, "nobody measured it"
    assert launch(own, (Point("launched", 0, 1, (1.0,)),), machine) is None, "no longer than the costs say"


def test_a_wrong_answer_of_a_cold_start_is_nobodys_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    built = Built(module, (torch.ones(1, 8),), 1, "fp32", None, "toy")
    device, net = CpuDevice(1, delay_us=0.0), trace(built).network
    monkeypatch.setattr(Reference, "of", classmethod(lambda cls, *_: cls([], SAME)))
    with pytest.raises(Mismatch, match="not that of a resident run"):
        eager_starts(built, net, host(), device, repeats=1)
    assert device.pinned == {}
    device.close()


def test_starts_by_graph_have_their_bytes_ahead_over_two_lanes() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval()
    built = Built(module, (torch.ones(1, 8),), 1, "fp32", None, "toy")
    device = CpuDevice(2, delay_us=0.0)
    net = trace(built).network
    for gpus in (1, 2):
        (point,) = graph_starts(built, net, host(gpus), device, repeats=3)
        assert (point.copies, len(point.samples_ns)) == (gpus, 6)
        plan = over_lanes(net, None if gpus == 1 else 1)
        assert plan.head == gpus
        assert sum(chunk.size_bytes for chunk in plan.chunks) == net.arena_bytes
    assert device.pinned == {}
    device.close()
