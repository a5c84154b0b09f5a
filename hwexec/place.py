"""What one prepared module has of GPU memory: whether it is its own now, what is there, and what its next run must come behind."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from hwexec.device import Device, Event, Stream
from hwexec.pool import Tenant


class Place:
    """Its own for good, or, of a `tenant`, others' in turn.

    `hot`: a cold start has brought the weights. `full`: all of them are in the target's arena, or on their way.
    """

    def __init__(self, device: Device, tenant: Tenant | None) -> None:
        self._device, self._tenant = device, tenant
        self.turn: AbstractContextManager[object] = nullcontext() if tenant is None else tenant
        """Held while anything is enqueued."""
        self.hot = self.full = False
        self._behind: list[Event] = []
        """Ends of what is under way there, and not by runs of this module: these are behind each other in any case."""
        self._end = None if tenant is None else device.event()

    @property
    def its_own(self) -> bool:
        """False where another module of the pool may have weights there."""
        return self._tenant is None or self._tenant.holds

    @property
    def known(self) -> bool:
        """Whether a start has filled it, be it another's by now."""
        return self.hot or self.full

    def take(self) -> None:
        """It is its own from now on: what others have there is gone, and what they still do there comes first."""
        if self._tenant is not None and not self._tenant.holds:
            self.forget()
            self._behind += self._tenant.pool.take(self._tenant)

    def take_now(self) -> None:
        """The same, once that is over. Blocks where it is not."""
        self.take()
        if self._behind:
            self.wait()

    def wait(self) -> None:
        """Until nothing is under way."""
        self._device.synchronize()
        self._behind.clear()

    def forget(self) -> None:
        """Nothing there can be relied on."""
        self.hot = self.full = False

    def free(self) -> bool:
        """Whether a run there comes behind nobody. What has happened is looked at no more."""
        if self._behind:
            self._behind = [event for event in self._behind if not self._device.happened(event)]
        return not self._behind

    def follow(self, compute: Stream) -> None:
        """`compute` goes on behind all that comes first."""
        for event in self._behind:
            self._device.wait(compute, event)
        self._behind.clear()

    def filled(self, end: Event, *, beside: bool = False) -> None:
        """All weights will be there with this event; `beside`: no stream of runs is behind it yet."""
        self.full = True
        if beside:
            self._behind.append(end)
        self._over_with(end)

    def ran(self, compute: Stream) -> None:
        """A run is enqueued."""
        if self._end is not None:
            self._device.record(compute, self._end)
            self._over_with(self._end)

    def _over_with(self, end: Event) -> None:
        if self._tenant is not None:
            self._tenant.end = end
