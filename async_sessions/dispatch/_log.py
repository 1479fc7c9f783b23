"""`JobLog`: what happened to one job, in memory, for any number of followers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from async_sessions.jobs import Cancelled, Failed, Progress, Queued, Succeeded, event_order

if TYPE_CHECKING:
    from async_sessions.jobs import JobEvent


class JobLog:
    """A handful of events, however long the job: of positions, or progress reports, in a row only the last is kept.

    One that is `closed` without a terminal event is of a job that is not run here any more: its entry tells the rest.
    """

    def __init__(self) -> None:
        self.closed = False
        self._events: list[JobEvent] = []
        self._changed: anyio.Event | None = None  # made by who waits: most jobs are followed by nobody

    @property
    def last(self) -> JobEvent | None:
        return self._events[-1] if self._events else None

    @property
    def ended(self) -> bool:
        return isinstance(self.last, Succeeded | Failed | Cancelled)

    def append(self, event: JobEvent) -> None:
        """Nothing comes after the terminal event: what does is ignored."""
        if self.ended:
            return
        if isinstance(event, Queued | Progress) and type(event) is type(self.last):
            self._events.pop()
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    async def next(self, seen: tuple[int, int]) -> JobEvent | None:
        """The first event after `seen`, waiting for it; `None` where there will be none here."""
        while True:
            for event in self._events:
                if event_order(event.id) > seen:
                    return event
            if self.ended or self.closed:
                return None
            self._changed = self._changed or anyio.Event()
            await self._changed.wait()

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
