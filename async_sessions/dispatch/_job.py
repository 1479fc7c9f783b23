"""`LocalJob`: follows one job, in this process or in another one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

import anyio

from async_sessions.errors import JobCancelledError, JobFailedError, JobNotFoundError, SessionNotFoundError
from async_sessions.jobs import Cancelled, Failed, Succeeded, entry_event, event_order

if TYPE_CHECKING:
    from async_sessions.dispatch._log import JobLog
    from async_sessions.jobs import JobEvent
    from async_sessions.records import JobInfo, OutputRecord
    from async_sessions.session import Session

POLL_INTERVAL = 1.0  # seconds between two looks at a job that another process runs


class LocalJob:
    """A handle to a job of a `LocalDispatcher`; see `Job`."""

    def __init__(
        self,
        session: Session,
        job_id: str,
        *,
        log: Callable[[str], JobLog | None],
        cancel: Callable[[str], Awaitable[JobInfo]],
    ) -> None:
        self.id = job_id
        self._session = session
        self._log = log
        self._cancel = cancel

    def __repr__(self) -> str:
        return f"LocalJob({self.id!r})"

    async def info(self) -> JobInfo:
        """See `Job.info`."""
        try:
            entry = (await self._session.info()).jobs.get(self.id)
        except SessionNotFoundError as error:
            raise JobNotFoundError("There is no such job: its session is gone.") from error
        if entry is None:
            raise JobNotFoundError("There is no such job.")
        return entry

    async def latest(self) -> JobEvent | None:
        """See `Job.latest`."""
        log = self._log(self.id)
        if log is not None and log.last is not None:
            return log.last
        return entry_event(await self.info())

    async def events(self, after: str | None = None) -> AsyncGenerator[JobEvent]:
        """See `Job.events`."""
        seen = event_order(after)
        while (event := await self._next(seen)) is not None:
            seen = event_order(event.id)
            yield event

    async def result(self) -> Mapping[str, OutputRecord]:
        """See `Job.result`."""
        seen = event_order(None)
        while (event := await self._next(seen)) is not None:
            seen = event_order(event.id)
            match event:
                case Succeeded():
                    return event.outputs
                case Failed():
                    raise JobFailedError(event.error.message)
                case Cancelled():
                    raise JobCancelledError("The job was cancelled.")
        raise JobNotFoundError("There is no such job.")

    async def cancel(self) -> JobInfo:
        """See `Job.cancel`."""
        return await self._cancel(self.id)

    async def _next(self, seen: tuple[int, int]) -> JobEvent | None:
        """The first event after `seen`: from the log, or from the entry of a job that another process runs or ran."""
        while True:
            if (log := self._log(self.id)) is not None:
                if (logged := await log.next(seen)) is not None or log.ended:
                    return logged
                continue  # it is not run here any more
            entry = await self.info()
            if (event := entry_event(entry)) is not None and event_order(event.id) > seen:
                return event
            if not entry.unfinished:
                return None
            await anyio.sleep(POLL_INTERVAL)
