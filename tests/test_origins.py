"""Where a host's figures come from: all are listed with kind and source, and what an answer hangs on is told by how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sim.catalog import find_host, host_names
from sim.host import Figure, Host
from sim.listing import host_table
from sim.origins import MORE, figures, levers, origins
from sim.plan import Chunk
from tests.builders import FREE, copied, figure, host, network, profile

NETWORK = network(1_000_000)
PLAN = copied(NETWORK, Chunk(0, 1_000_000, (0,)))


def measured(found: Figure) -> Figure:
    return replace(found, kind="measured")


@pytest.mark.parametrize("name", host_names())
def test_every_constant_of_a_host_is_listed_with_its_kind_and_source(name: str) -> None:
    machine = find_host(name)
    every = [link.bytes_per_s for link in machine.links] + [found for _, found in figures(machine)]
    table = host_table(machine)
    kinds, sources = (list(map(str, table.columns[at].cells)) for at in (3, 4))
    assert kinds == [found.kind for found in every]
    assert sources == [found.source for found in every]
    assert all(sources)
    assert sum(origin.count for origin in origins(machine)) == len(every)


def parts(machine: Host, run: float = 0.0) -> dict[str, float]:
    found = levers(PLAN, profile(NETWORK, machine, run=run), machine)
    assert list(found) == sorted(found, key=lambda lever: -lever.part)
    return {lever.name: lever.part for lever in found}


def test_what_all_of_an_answer_is_made_of_changes_it_as_much_as_itself() -> None:
    assert parts(host()) == {"PCIe rates": pytest.approx(1 - 1 / (1 + MORE))}


def test_each_lever_has_the_share_that_it_adds() -> None:
    costs = replace(FREE, launch_ns=figure(100_000), copy_latency_ns=figure(200_000), start_ns=figure(1e6))
    found = parts(host(costs=costs), run=700_000)
    whole = 200_000 + 1_000_000 + 700_000
    assert found == {
        "PCIe rates": pytest.approx((1 - 1 / (1 + MORE)) * 1_000_000 / whole),
        "layer times": pytest.approx(MORE * 700_000 / whole),
        "all other costs": pytest.approx(MORE * 200_000 / whole),
    }, "the launch is over while the bytes are on their way, and a graph has no eager start"


def test_what_was_measured_is_not_among_them() -> None:
    machine = host(costs=replace(FREE, copy_latency_ns=measured(figure(1e6))))
    links = tuple(replace(link, bytes_per_s=measured(link.bytes_per_s)) for link in machine.links)
    assert parts(replace(machine, links=links)) == {}


def test_figures_as_large_as_may_be_are_raised_no_further() -> None:
    assert parts(host(pcie=1e9), run=1e18) == {}
