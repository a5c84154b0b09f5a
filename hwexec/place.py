"""What one prepared module has of GPU memory: whether it is its own now, what is there, and what its next run must come behind."""

from __future__ import annotations

from types import TracebackType

from hwexec.device import Device, Event, Stream
from hwexec.pool import Tenant
from sim.errors import InputError


class Place:
    """Its own for good, or, of a `tenant`, others' in turn. As a context, in which all is enqueued: the tenant's turn.

    `brought`: a cold start has brought the weights. `full`: all of them are in the target's arena, or on their way there.
    """

    def __init__(self, device: Device, tenant: Tenant | None) -> None:
        self._device, self._tenant = device, tenant
        self.shared = tenant is not None
        self.brought = self.full = False
        self.behind: list[Event] = []
        """Ends of what is under way there, but for this module's own runs: these are behind each other in any case."""
        self.unsure = False
        """Something broke half way: what is under way there is not known."""
        self._end = None if tenant is None else device.event()

    def __enter__(self) -> Place:
        if self._tenant is not None:
            self._tenant.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None and not issubclass(kind, InputError):
                self.unsure = True
                if self._tenant is not None:
                    self._tenant.pool.unsure = True
        finally:
            if self._tenant is not None:
                self._tenant.__exit__(kind, error, traceback)

    @property
    def its_own(self) -> bool:
        """False where another module of the pool may have weights there."""
        return self._tenant is None or self._tenant.holds

    @property
    def was_filled(self) -> bool:
        """Whether a start has filled it, be it another's by now."""
        return self.brought or self.full

    def take(self) -> None:
        """It is its own from now on: what others have there is gone, and what they still do there comes first. Blocks only where
        that is not known."""
        if self.unsure:
            self.wait()
        if self._tenant is not None and not self._tenant.holds:
            self.forget()
            self.behind += self._tenant.pool.take(self._tenant)
            self._tenant.holds = True

    def take_now(self) -> None:
        """As `take`, and blocks until what others do there is over."""
        self.take()
        if self.behind:
            self.wait()

    def wait(self) -> None:
        """Until nothing is under way."""
        self._device.synchronize()
        self.behind.clear()
        self.unsure = False

    def forget(self) -> None:
        """Nothing there can be relied on."""
        self.brought = self.full = False

    def unobstructed(self) -> bool:
        """Whether a run there need come behind nothing."""
        if self.behind:
            self.behind = [event for event in self.behind if not self._device.happened(event)]
        return not self.behind

    def follow(self, compute: Stream) -> None:
        """`compute` goes on behind all that comes first."""
        for event in self.behind:
            self._device.wait(compute, event)
        self.behind.clear()

    def filling(self, end: Event, *, beside: bool = False) -> None:
        """All weights will be there with this event; `beside`: no run is behind it yet."""
        if beside:
            self.behind.append(end)
        self._over_with(end)
        self.full = True

    def enqueued(self, compute: Stream) -> None:
        """A run that uses it is enqueued."""
        if self._end is not None:
            self._device.record(compute, self._end)
            self._over_with(self._end)

    def _over_with(self, end: Event) -> None:
        if self._tenant is not None:
            self._tenant.end = end
