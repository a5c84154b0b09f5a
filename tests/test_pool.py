"""Modules that take turns in one pool of GPU memory: who has it, who has lost it, and answers that are right whoever comes next."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hwexec
from hwexec.cpu import CpuDevice
from hwexec.pool import Pool, shared
from hwexec.rouse import ROUSE_BYTES
from sim.errors import InputError
from sim.plan import Access, Chunk, Launch, Plan
from tests import toys
from tests.toys import TWO, Toy, dealt


def text(seed: int, *kinds: str, width: int = 16) -> Toy:
    """Of one size, and unlike each other by their seeds: bytes of another are seen."""
    torch.manual_seed(seed)
    return toys.toy(toys.Text(["linear", *kinds], width, tied=True), torch.randint(0, 29, (2, 5)))


def pool_of(made: Toy, device: CpuDevice, times: float = 1, launch: Launch = Launch.GRAPH) -> Pool:
    """Room for so many of such a module, on both GPUs."""
    sizes = hwexec.arena_bytes(made.network, dealt(made, launch))
    return Pool({gpu: int(times * size) for gpu, size in sizes.items()}, device)


def planned(made: Toy, plan: Plan, pool: Pool, settles: bool = True) -> hwexec.ColdStart:
    return hwexec.prepare(
        made.module, plan, made.inputs, network=made.network, host=TWO, pool=pool, settles=settles
    )


def ahead(plan: Plan) -> Plan:
    """With all chunks in the head, where it is a graph's."""
    return replace(plan, head=len(plan.chunks)) if plan.launch is Launch.GRAPH else plan


def prepared(made: Toy, pool: Pool, launch: Launch = Launch.GRAPH) -> hwexec.ColdStart:
    return planned(made, dealt(made, launch), pool)


@pytest.mark.parametrize("launch", Launch)
def test_two_modules_take_turns_in_memory_for_one(launch: Launch) -> None:
    one, other = text(1), text(2, "inner")
    device = CpuDevice(2)
    with pool_of(other, device, launch=launch) as pool:
        held = [device.held_bytes(gpu) for gpu in (0, 1)]
        a, b = prepared(one, pool, launch), prepared(other, pool, launch)
        scratch = 2 * ROUSE_BYTES
        assert [device.held_bytes(gpu) - scratch for gpu in (0, 1)] == held, (
            "neither has weights in memory of its own"
        )
        assert (a.hot, b.hot, a.launch) == (False, False, launch)
        assert torch.equal(a(*one.inputs), one.answer)
        assert (a.hot, b.hot) == (True, False)
        assert torch.equal(b(*other.inputs), other.answer)
        assert (a.hot, b.hot) == (False, True)
        with pytest.raises(InputError) as refused:
            a.warm(*one.inputs)
        assert str(refused.value) == (
            "no weights are in GPU memory, since another module of the pool has taken the place of toy: make a cold start before "
            "a warm run"
        )
        for refuses in (a, a.serve, a.resident):
            with pytest.raises(InputError, match=r"a prepared module takes that only"):
                refuses(one.inputs[0][:1])
        assert torch.equal(b.warm(*other.inputs), other.answer), "a refusal takes nothing from anybody"
        assert torch.equal(a.serve(*one.inputs), one.answer)
        assert torch.equal(a.serve(*one.inputs), one.answer)
        assert (a.hot, b.hot) == (True, False)
        assert torch.equal(b.resident(*other.inputs), other.answer)
        assert (a.hot, b.hot) == (False, True)
        a.evict()
        assert torch.equal(b.warm(*other.inputs), other.answer), (
            "what a no longer has, it does not fill with 0xFF"
        )
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in (0, 1)] == [0, 0]


def test_where_there_is_room_for_both_they_stay_warm_and_a_third_takes_the_place_of_one() -> None:
    made = [text(seed) for seed in (1, 2, 3)]
    device = CpuDevice(2)
    with pool_of(made[0], device, times=2) as pool:
        cold = [prepared(m, pool) for m in made]
        for at, (start, m) in enumerate(zip(cold, made, strict=True)):
            assert torch.equal(start(*m.inputs), m.answer)
            assert sum(c.hot for c in cold) == min(2, at + 1)
        assert [c.hot for c in cold] == [False, True, True]
        assert torch.equal(cold[1].warm(*made[1].inputs), made[1].answer)
        device.gate(cold[2]._stage.background, 0.02e9)
        cold[2].settle()
        neighbour = cold[1]._place._tenant
        assert neighbour is not None
        assert pool.take(neighbour) == [], "who is elsewhere is not waited for"
        cold[2].close()
        assert not cold[2].hot
        assert pool._tenants[0].neighbours == [], "nobody keeps who has gone"
        assert torch.equal(cold[0](*made[0].inputs), made[0].answer)
        assert [c.hot for c in cold[:2]] == [True, True], "nobody is in the place that was given back"


class Owner:
    def close(self) -> None: ...


def test_a_place_is_where_others_are_least() -> None:
    with Pool({0: 1000}, CpuDevice(1)) as pool:
        spans, owners = [], []
        for size in (300, 300, 300, 200, 1000):
            owners.append(Owner())
            tenant = pool.join("one", owners[-1])
            tenant.allot({0: size})
            spans.append(tenant.spans[0])
        assert spans == [(0, 300), (512, 812), (0, 300), (768, 968), (0, 1000)]
        owners.clear()
        assert pool.least_used(0, 1000) == (0, 1000)
        assert pool._tenants == [], "who is let go of has no place"
    with Pool({0: 9 * 256}, CpuDevice(1)) as pool:
        for start, stop in ((0, 1), (1, 2), (2, 9)):
            owners.append(Owner())
            pool.join("one", owners[-1]).spans = {0: (256 * start, 256 * stop)}
        assert pool.least_used(0, 2 * 256) == (2 * 256, 4 * 256), "of one rather than two, by as many bytes"
    assert (shared((0, 5), (3, 9)), shared((0, 3), (3, 9)), shared((4, 6), (0, 9))) == (2, 0, 2)


def settling(pool: Pool, one: Toy) -> hwexec.ColdStart:
    """A module that copies nothing, whose `settle` brings all its weights."""
    plan = replace(dealt(one, direct=tuple(range(len(one.network.layers)))), chunks=())
    return planned(one, plan, pool)


def started_to_settle_late(a: hwexec.ColdStart, one: Toy, device: CpuDevice) -> None:
    assert torch.equal(a(*one.inputs), one.answer)
    device.gate(a._stage.background, 0.05e9)


def holds_its_own(b: hwexec.ColdStart, other: Toy, device: CpuDevice) -> None:
    """Nothing that others left under way lands on its weights."""
    b(*other.inputs)
    device.synchronize()
    assert torch.equal(b.warm(*other.inputs), other.answer)


class Stopped(BaseException):
    """As KeyboardInterrupt, which pytest takes for its own."""


def stopped(*_: object, **__: object) -> None:
    raise Stopped


@pytest.mark.parametrize("way", ["cold", "resident", "timeline"])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_place_is_taken_behind_what_is_still_brought_there(
    ordered: bool, head: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`settle` goes on in the background: what it brings late must not land on the next module's weights, as it does where
    nobody waits for it."""
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a = settling(pool, one)
        b = planned(other, ahead(dealt(other)) if head else dealt(other), pool)
        if not ordered:
            take = pool.take
            monkeypatch.setattr(pool, "take", lambda tenant: (take(tenant), [])[1])
        for _ in range(6):  # a head is issued ahead of the rest where nothing seems to be under way
            started_to_settle_late(a, one, device)
            a.settle()
            if way == "timeline":
                b.timeline()
            else:
                (b if way == "cold" else b.resident)(*other.inputs)
            device.synchronize()
            assert (b.hot, a.hot) == (True, False)
            # a timeline waits until nothing at all is under way
            assert torch.equal(b.warm(*other.inputs), other.answer) == (ordered or way == "timeline")


@pytest.mark.parametrize("launch", Launch)
def test_what_was_busy_when_a_start_was_refused_is_no_matter_once_it_is_closed(launch: Launch) -> None:
    one, other = text(1), text(2, "inner")
    device = CpuDevice(2, delay_us=0)
    with pool_of(other, device, launch=launch) as pool:
        a, b = prepared(one, pool, launch), prepared(other, pool, launch)
        assert torch.equal(b(*other.inputs), other.answer)
        device.gate(b._stage.background, 0.02e9)
        b.settle()
        a._place.take()
        with pytest.raises(InputError):
            a(one.inputs[0][:1])
        b.close()
        assert torch.equal(a.in_place(*one.inputs), one.answer)
        assert torch.equal(a(*one.inputs), one.answer)


def test_a_settle_that_breaks_half_way_lands_on_nobodys_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a, b = settling(pool, one), planned(other, ahead(dealt(other)), pool)
        started_to_settle_late(a, one, device)
        with monkeypatch.context() as patch:
            patch.setattr(a._place, "filling", stopped)
            with pytest.raises(Stopped):
                a.settle()
        holds_its_own(b, other, device)


def test_copies_alone_that_are_stopped_land_on_nobodys_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a, b = prepared(one, pool), planned(other, ahead(dealt(other)), pool)
        assert torch.equal(a(*one.inputs), one.answer)
        device.gate(a._stage.streams["h2d:0"], 0.05e9)
        with monkeypatch.context() as patch:
            patch.setattr("hwexec.executor.time_ns", lambda enqueue, *_, **__: (enqueue(), stopped()))
            with pytest.raises(Stopped):
                a.copies_alone()
        holds_its_own(b, other, device)


def test_a_close_that_is_interrupted_leaves_a_place_to_be_taken_behind_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a, b = settling(pool, one), planned(other, ahead(dealt(other)), pool)
        started_to_settle_late(a, one, device)
        a.settle()
        stream = a._stage.background
        with monkeypatch.context() as patch:
            patch.setattr(device, "synchronize", stopped)
            patch.setattr(device, "close_stream", lambda stream: None)
            with pytest.raises(Stopped):
                a.close()
        holds_its_own(b, other, device)
        device.close_stream(stream)


def test_one_that_is_let_go_of_while_it_settles_is_waited_for() -> None:
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a, b = settling(pool, one), planned(other, ahead(dealt(other)), pool)
        started_to_settle_late(a, one, device)
        background = a._stage.background  # its thread goes on, as a GPU does
        opened = threading.Event()
        background.raw.queue.put(opened.wait)
        a.settle()
        del a
        gc.collect()
        pool.join("a third", owner := Owner()).allot({0: 1})
        assert len(pool._tenants) == 2
        timer = threading.Timer(0.05, opened.set)
        timer.start()
        holds_its_own(b, other, device)
        timer.join()
        del owner


def test_a_start_comes_behind_the_end_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here all that is computed is over when a start returns; on a GPU nothing need be."""
    one, far, near = text(1), text(2), text(3)
    device = CpuDevice(2)
    with pool_of(one, device, times=2) as pool:
        a, stranger, neighbour = prepared(one, pool), prepared(far, pool), prepared(near, pool)
        waits: list[object] = []
        wait = device.wait
        monkeypatch.setattr(device, "happened", lambda event: False)
        monkeypatch.setattr(device, "wait", lambda s, e: (waits.append(e), wait(s, e))[1])
        assert torch.equal(stranger(*far.inputs), far.answer)
        assert torch.equal(neighbour(*near.inputs), near.answer)
        waits.clear()
        assert torch.equal(a(*one.inputs), one.answer)
        assert neighbour._place._end in waits
        assert stranger._place._end not in waits
        end = neighbour._place._end
        assert end is not None
        recorded = end.raw
        assert torch.equal(neighbour.in_place(*near.inputs), near.answer)
        assert end.raw is recorded
        assert (a.hot, neighbour.hot) == (True, False), "a run that reads all in place takes nothing"
        waits.clear()
        assert torch.equal(a(*one.inputs), one.answer)
        assert neighbour._place._end not in waits
        assert neighbour.brought() == (0, 0)


def test_nothing_is_waited_for_on_the_host_while_others_cannot_enqueue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third start's inputs are staged where the GPU may still read the first's."""
    one, device = text(1), CpuDevice(2)
    with pool_of(one, device) as pool:
        a = prepared(one, pool)
        turns = []
        wait = device.wait_on_host
        monkeypatch.setattr(device, "wait_on_host", lambda e: (turns.append(pool.turn), wait(e))[1])
        for _ in range(4):
            assert torch.equal(a.serve(*one.inputs), one.answer)
        assert turns
        assert set(turns) == {None}


def test_what_is_called_in_the_middle_of_a_start_is_refused_and_leaves_nothing() -> None:
    one, other = text(1), text(2)
    device = CpuDevice(2)
    with pool_of(one, device) as pool:
        a = prepared(one, pool, Launch.EAGER)
        before = len(device._workers), len(device.pinned), len(pool._tenants)
        for act, said in (
            (lambda: prepared(other, pool), "is not enqueued yet; make this call before or after it"),
            (
                a.close,
                "toy: it is being prepared, or in a start that is not enqueued yet; close it after that",
            ),
            (pool.close, "this pool: a start of toy in the same pool is not enqueued yet"),
        ):
            hook = one.module.register_forward_hook(lambda *_, act=act: act())
            with pytest.raises(InputError, match=said):
                a(*one.inputs)
            hook.remove()
            assert (len(device._workers), len(device.pinned), len(pool._tenants)) == before
            assert torch.equal(a(*one.inputs), one.answer)


def test_a_pool_that_is_closed_while_a_module_is_prepared_in_it_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, device = text(1), CpuDevice(2)
    pool = pool_of(one, device)
    connect, refused = device.connect, []

    def closed_meanwhile(source: int, destination: int) -> None:
        connect(source, destination)

        def close() -> None:
            with pytest.raises(InputError, match="it is being prepared"):
                pool.close()

        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        refused.append(True)

    monkeypatch.setattr(device, "connect", closed_meanwhile)
    with pytest.raises(InputError, match="this pool is closed; make a new one"):
        prepared(one, pool)
    assert refused
    assert (device._workers, device.pinned, pool._tenants, pool.arenas) == ([], {}, [], {})


def test_a_timeline_that_is_stopped_leaves_starts_right(monkeypatch: pytest.MonkeyPatch) -> None:
    one = text(1)
    with pool_of(one, CpuDevice(2), launch=Launch.EAGER) as pool:
        a = prepared(one, pool, Launch.EAGER)
        with monkeypatch.context() as patch:
            patch.setattr(a._runs, "eager", stopped)
            with pytest.raises(Stopped):
                a.timeline()
        assert torch.equal(a(*one.inputs), one.answer)
        assert a.timeline().spans
        assert torch.equal(a(*one.inputs), one.answer)


def test_a_start_that_is_stopped_before_it_begins_leaves_the_next_to_come_behind_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    with pool_of(one, device, times=1.5) as pool:
        a, b = settling(pool, one), planned(other, ahead(dealt(other)), pool)
        started_to_settle_late(a, one, device)
        a.settle()
        with monkeypatch.context() as patch:
            patch.setattr(b._inputs, "stage", stopped)
            with pytest.raises(Stopped):
                b(*other.inputs)
        assert (a.hot, b.hot) == (False, False)
        holds_its_own(b, other, device)


def test_a_start_in_the_middle_of_anothers_is_refused() -> None:
    one, other = text(1), text(2, "inner")
    with pool_of(other, CpuDevice(2)) as pool:
        a, b = prepared(one, pool, Launch.EAGER), prepared(other, pool)
        hook = one.module.register_forward_hook(lambda *_: b(*other.inputs))
        with pytest.raises(InputError) as refused:
            a(*one.inputs)
        assert str(refused.value) == (
            "toy: a start of toy in the same pool is not enqueued yet; make this call before or after it"
        )
        hook.remove()
        assert torch.equal(a(*one.inputs), one.answer)
        assert torch.equal(b(*other.inputs), other.answer)


def test_one_that_is_let_go_of_without_being_closed_can_be_prepared_again() -> None:
    one = text(1)
    device = CpuDevice(2)
    with pool_of(one, device) as pool:
        a = prepared(one, pool)
        a(*one.inputs)
        del a
        gc.collect()
        again = prepared(one, pool)
        assert torch.equal(again(*one.inputs), one.answer)
        assert len(pool._tenants) == 1


def test_a_pool_is_given_back_whatever_closing_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = text(1), text(2, "inner")
    device = CpuDevice(2)
    pool = pool_of(other, device)
    a, b = prepared(one, pool), prepared(other, pool)
    monkeypatch.setattr(a._stage.binding, "release", lambda: (_ for _ in ()).throw(InputError("no way back")))

    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(device, "synchronize", stopped)
    with pytest.raises((InputError, KeyboardInterrupt)):
        pool.close()
    with pytest.raises(InputError, match="this cold start is closed"):
        b(*other.inputs)
    assert not a.hot
    assert (pool._tenants, pool.arenas, device.pinned) == ([], {}, {})
    pool.close()


ACTS = ("cold", "warm", "serve", "resident", "in place", "settle", "evict", "timeline", "again", "wrong")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_they_do_in_turn_answers_are_right_and_warm_runs_are_of_their_own_weights(
    data: st.DataObject,
) -> None:
    made = [data.draw(toys.toys()) for _ in range(3)]
    device = CpuDevice(2, seed=data.draw(st.integers(0, 99)), delay_us=40)
    largest = max(m.network.arena_bytes for m in made)
    total = sum(m.network.arena_bytes for m in made)
    size = data.draw(st.integers(largest, total + 1024))
    with Pool({0: size, 1: size}, device) as pool:
        plans = [dealt(m, data.draw(st.sampled_from(Launch))) for m in made]
        plans = [ahead(plan) if data.draw(st.booleans()) else plan for plan in plans]
        cold = [planned(m, plan, pool) for m, plan in zip(made, plans, strict=True)]
        for _ in range(12):
            at = data.draw(st.integers(0, 2))
            c, m = cold[at], made[at]
            act = data.draw(st.sampled_from(ACTS))
            hot = c.hot
            runs: dict[str, Callable[..., torch.Tensor]] = {
                "cold": c, "serve": c.serve, "resident": c.resident, "in place": c.in_place,
            }  # fmt: skip
            if act == "warm" and not hot:
                with pytest.raises(InputError, match="no weights are in GPU memory"):
                    c.warm(*m.inputs)
            elif act == "warm":
                assert torch.equal(c.warm(*m.inputs), m.answer)
            elif act == "settle" and hot:
                c.settle()
            elif act == "evict":
                c.evict()
                assert not c.hot
            elif act == "timeline":
                assert c.timeline().spans
            elif act == "wrong":
                hots = [x.hot for x in cold]
                with pytest.raises(InputError):
                    c(m.inputs[0][:1])
                assert [x.hot for x in cold if x is not c] == [
                    h for x, h in zip(cold, hots, strict=True) if x is not c
                ]
            elif act == "again":  # given back and prepared anew, where others are
                c.close()
                cold[at] = planned(m, plans[at], pool)
            elif act in runs:
                assert torch.equal(runs[act](*m.inputs), m.answer)
                assert c.hot == (act != "in place" or hot)
            tenants = [tenant for c in cold if c.hot and (tenant := c._place._tenant) is not None]
            assert not any(x.overlaps(y) for x in tenants for y in tenants if x is not y)
    assert device.pinned == {}
    assert [device.held_bytes(gpu) for gpu in (0, 1)] == [0, 0]


def test_threads_share_a_pool() -> None:
    made = [text(width, width=width) for width in (8, 12, 16)]
    device = CpuDevice(2, delay_us=200)
    with pool_of(made[2], device, times=1.3) as pool, ThreadPoolExecutor(len(made)) as threads:
        cold = [prepared(m, pool) for m in made]

        def serve(start: hwexec.ColdStart, m: Toy) -> bool:
            return all(torch.equal(start.serve(*m.inputs), m.answer) for _ in range(20))

        assert list(threads.map(serve, cold, made)) == [True, True, True]


def test_a_thousand_starts_in_turn_leave_memory_where_it_was() -> None:
    made = [text(width, width=width) for width in (8, 12)]
    device = CpuDevice(2, delay_us=0)
    with pool_of(made[1], device) as pool:
        cold = [prepared(m, pool) for m in made]
        cold[0](*made[0].inputs)
        before = [device.held_bytes(gpu) for gpu in (0, 1)], dict(device.pinned)
        for turn in range(1000):
            assert torch.equal(cold[turn % 2].serve(*made[turn % 2].inputs), made[turn % 2].answer)
        assert ([device.held_bytes(gpu) for gpu in (0, 1)], device.pinned) == before
        assert [c._place.behind for c in cold] == [[], []]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({}, "pool: {} says no GPU; pass bytes by GPU, as in {0: 8 * 2**30}"),
        (2**30, "pool: 1073741824 says no GPU; pass bytes by GPU, as in {0: 8 * 2**30}"),
        ({0: 0}, "pool: bytes of GPU 0 0: must be a whole number from 1"),
        ({0: 1.5}, "pool: bytes of GPU 0 1.5: must be a whole number from 1"),
        ({-1: 5}, "pool: GPU -1: must be a whole number from 0"),
        ({4: 5}, "pool: GPU 4 is not there; this machine has 2"),
        ({0: 2**20}, "pool: GPU 0 has 1000 bytes free, not 1048576 "),
    ],
)
def test_a_pool_that_cannot_be_is_refused(sizes: dict[int, int], said: str) -> None:
    with pytest.raises(InputError) as refused:
        Pool(sizes, CpuDevice(2, memory_bytes=1000))
    assert str(refused.value).startswith(said)


def test_what_a_pool_cannot_hold_is_refused_and_leaves_nothing() -> None:
    made = toys.text(("linear",))
    need = made.network.arena_bytes
    with pytest.raises(
        InputError, match="plan 'dealt': made for another network than toy; search one for it"
    ):
        hwexec.arena_bytes(toys.image().network, dealt(made))
    with pytest.raises(InputError, match=r"network .* is a Text; pass a sim.network.Network"):
        hwexec.arena_bytes(made.module, dealt(made))  # type: ignore[arg-type]
    device = CpuDevice(2)
    with Pool({0: need - 1, 1: need}, device) as pool:
        with pytest.raises(InputError) as refused:
            prepared(made, pool)
        assert str(refused.value) == (
            f"pool: has {need - 1} bytes of GPU 0, and this plan needs {need} there; make a pool of as much (hwexec.arena_bytes "
            "says what a plan needs of each GPU)"
        )
        with pytest.raises(InputError, match="pool: has 0 bytes of GPU 1"):
            prepared(made, Pool({0: need}, device))
        assert (device.pinned, pool._tenants) == ({}, [])
        kept = tuple(tuple(Access.RESIDENT for _ in layer.reads) for layer in made.network.layers)
        with pytest.raises(
            InputError, match="plan 'kept' holds weights resident, and in a pool others take their place"
        ):
            planned(made, Plan("kept", 0, Launch.GRAPH, kept, ()), pool)
        with pytest.raises(InputError, match="device 'cuda': the pool has memory of another"):
            hwexec.prepare(made.module, dealt(made), made.inputs, host=TWO, pool=pool, device="cuda")
        with pytest.raises(InputError, match=r"pool 3 is a int; pass a hwexec\.Pool"):
            hwexec.prepare(made.module, dealt(made), made.inputs, host=TWO, pool=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="this pool is closed; make a new one"):
        prepared(made, pool)
    with pytest.raises(InputError, match="this pool is closed; make a new one"), pool:
        pass
    pool.close()


def test_a_plan_that_brings_nothing_needs_nothing_of_a_pool() -> None:
    made = toys.text(("linear",))
    everything = tuple(tuple(Access.DIRECT for _ in layer.reads) for layer in made.network.layers)
    plan = Plan("in place", 0, Launch.GRAPH, everything, ())
    assert hwexec.arena_bytes(made.network, plan, settles=False) == {0: 0}
    with Pool({0: 1}, CpuDevice(1)) as pool:
        cold = planned(made, plan, pool, settles=False)
        assert torch.equal(cold(*made.inputs), made.answer)


def test_a_plan_that_brings_half_takes_half_of_a_pool() -> None:
    made = toys.text(("linear", "norm"))
    cut = made.network.offsets[len(made.network.storages) // 2]
    access = tuple(
        tuple(
            Access.COPIED if made.network.offsets[read.storage] < cut else Access.DIRECT
            for read in layer.reads
        )
        for layer in made.network.layers
    )
    plan = Plan("half", 0, Launch.GRAPH, access, (Chunk(0, cut, (0,)),))
    need = hwexec.arena_bytes(made.network, plan, settles=False)
    assert need == {0: -(-cut // 256) * 256}, "such that those of several add up"
    with Pool({0: cut}, CpuDevice(1)) as pool:
        cold = planned(made, plan, pool, settles=False)
        assert torch.equal(cold(*made.inputs), made.answer)
        assert torch.equal(cold.warm(*made.inputs), made.answer)
