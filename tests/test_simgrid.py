"""Fair sharing against SimGrid as an oracle: its raw network model (CM02 without TCP's factors) is max-min fair too.

SimGrid ignores weights on routes without latency, so a flow of weight w is given to it as w flows of a w-th of the bytes.
Its engine exists once per process, so every case runs in a process of its own; only there does Debian's folder of Python
modules join the path, at the end, so that it shadows nothing.
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import simpy

from sim.fabric import Fabric

pytestmark = pytest.mark.simgrid

DEBIAN = "/usr/lib/python3/dist-packages"
"""Where python3-simgrid puts the binding; it loads into the same minor version of Python as Debian's."""

CONFIG = (
    "network/model:CM02",
    "network/TCP-gamma:0",
    "network/crosstraffic:0",
    "network/bandwidth-factor:1",
    "network/latency-factor:1",
    "network/weight-S:0",
    "surf/precision:1e-15",  # seconds; the default, a nanosecond, is coarser than what is compared
)


@dataclass(frozen=True, slots=True)
class Sent:
    """One flow of a case."""

    start_ns: float
    size_bytes: int
    route: tuple[int, ...]
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """Links by their bandwidth in bytes per second, and what is sent over them."""

    links: tuple[float, ...]
    sent: tuple[Sent, ...]


def case_of(seed: int, heaviest: int) -> Case:
    """Flows that mostly overlap: all start within 2 ms, and the smallest alone on the fastest link takes 48 us."""
    draw = random.Random(seed)
    links = tuple(draw.uniform(1e9, 25e9) for _ in range(draw.randint(2, 6)))
    sent = tuple(
        Sent(
            start_ns=draw.choice((0.0, draw.uniform(0, 2e6))),
            size_bytes=12
            * draw.randint(10**5, 4 * 10**6),  # 12: whole bytes for every share of a weight up to 4
            route=tuple(draw.sample(range(len(links)), draw.randint(1, min(3, len(links))))),
            weight=draw.randint(1, heaviest),
        )
        for _ in range(draw.randint(2, 8))
    )
    return Case(links, sent)


def by_fabric(case: Case) -> list[float]:
    """When each flow ends, in nanoseconds."""
    env = simpy.Environment()
    fabric = Fabric(env, {str(at): rate * 1e-9 for at, rate in enumerate(case.links)})
    ends = [float("nan")] * len(case.sent)

    def send(at: int, sent: Sent) -> Iterator[simpy.Event]:
        yield env.timeout(sent.start_ns)
        yield fabric.transfer(tuple(map(str, sent.route)), sent.size_bytes, sent.weight)
        ends[at] = env.now

    for at, sent in enumerate(case.sent):
        env.process(send(at, sent))
    env.run()
    return ends


def by_simgrid(case: Case) -> list[float] | str:
    """The same by SimGrid, or why it cannot be imported. Runs in a fresh process."""
    sys.path.append(DEBIAN)
    try:
        import simgrid  # noqa: PLC0415
    except ImportError as error:
        return str(error)
    engine = simgrid.Engine(["oracle", "--log=root.thres:warning", *(f"--cfg={item}" for item in CONFIG)])
    zone = simgrid.NetZone.create_full_zone("zone")
    links = [zone.create_link(f"link{at}", rate).set_latency(0).seal() for at, rate in enumerate(case.links)]
    ends = [float("nan")] * len(case.sent)

    def send(at: int, sent: Sent, source: object, target: object) -> None:
        simgrid.this_actor.sleep_until(sent.start_ns * 1e-9)
        assert sent.size_bytes % sent.weight == 0
        share = sent.size_bytes // sent.weight
        for comm in [simgrid.Comm.sendto_async(source, target, share) for _ in range(sent.weight)]:
            comm.wait()
        ends[at] = engine.clock * 1e9

    flows = []
    for at, sent in enumerate(case.sent):
        source, target = (zone.create_host(f"{end}{at}", 1e9) for end in ("source", "target"))
        route = [simgrid.LinkInRoute(links[link]) for link in sent.route]
        zone.add_route(source.netpoint, target.netpoint, None, None, route, False)
        flows.append((at, sent, source, target))
    zone.seal()
    for at, sent, source, target in flows:
        simgrid.Actor.create(f"send{at}", source, send, at, sent, source, target)
    engine.run()
    return ends


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[Case], list[float]]]:
    """SimGrid, or a skip that says why not."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:

        def ask(case: Case) -> list[float]:
            answer = pool.submit(by_simgrid, case).result(timeout=60)
            if isinstance(answer, str):
                pytest.skip(
                    f"SimGrid's Python binding cannot be imported (Debian: python3-simgrid): {answer}"
                )
            return answer

        ask(Case((1e9,), (Sent(0, 1, (0,)),)))
        yield ask


def test_two_flows_on_one_link_by_hand(oracle: Callable[[Case], list[float]]) -> None:
    """The oracle itself: 3 MB alone for 1 ms at 1 GB/s, then half the link each; the later one ends alone."""
    case = Case((1e9,), (Sent(0, 3_000_000, (0,)), Sent(1e6, 3_000_000, (0,))))
    assert oracle(case) == pytest.approx([5e6, 6e6], rel=1e-9)
    assert by_fabric(case) == pytest.approx([5e6, 6e6], rel=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_flows_end_when_simgrid_says(seed: int, oracle: Callable[[Case], list[float]]) -> None:
    case = case_of(seed, heaviest=1)
    assert by_fabric(case) == pytest.approx(oracle(case), rel=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_a_flow_of_weight_w_ends_when_w_flows_do_that_share_its_bytes(
    seed: int, oracle: Callable[[Case], list[float]]
) -> None:
    case = case_of(seed, heaviest=4)
    assert by_fabric(case) == pytest.approx(oracle(case), rel=1e-9)
