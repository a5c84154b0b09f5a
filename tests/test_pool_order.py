"""What comes behind what in a pool, also where something is stopped, breaks, or is called in the middle of something else."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest
import torch

import hwexec
from hwexec.cpu import CpuDevice
from hwexec.pool import Pool
from sim.errors import InputError
from sim.plan import Launch
from tests.pooling import Owner, ahead, planned, pool_of, prepared, text
from tests.toys import Toy, dealt


def settling(pool: Pool, one: Toy) -> hwexec.ColdStart:
    """A module that copies nothing, whose `settle` brings all its weights."""
    plan = replace(dealt(one, direct=tuple(range(len(one.network.layers)))), chunks=())
    return planned(one, plan, pool)


def started_to_settle_late(a: hwexec.ColdStart, one: Toy, device: CpuDevice) -> None:
    assert torch.equal(a(*one.inputs), one.answer)
    device.gate(a._stage.background, 0.05e9)


def one_that_settles_late_and_another() -> tuple[Pool, hwexec.ColdStart, hwexec.ColdStart, Toy, CpuDevice]:
    """A pool, two modules whose places overlap, what the second is made of, and the device. The first has made its start."""
    one, other = text(1, "inner", "norm"), text(2, "inner", "bare")
    device = CpuDevice(2, delay_us=0)
    pool = pool_of(one, device, times=1.5)
    a, b = settling(pool, one), planned(other, ahead(dealt(other)), pool)
    started_to_settle_late(a, one, device)
    return pool, a, b, other, device


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
    pool, a, b, other, device = one_that_settles_late_and_another()
    with pool:
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
    pool, a, b, other, device = one_that_settles_late_and_another()
    with pool:
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
    pool, a, b, other, device = one_that_settles_late_and_another()
    with pool:
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
    pool, a, b, other, device = one_that_settles_late_and_another()
    with pool:
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
