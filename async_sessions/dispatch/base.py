"""What every dispatcher promises, wherever its jobs run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

    from async_sessions.jobs import JobEvent
    from async_sessions.records import GenerationRequest, JobInfo, OutputRecord
    from async_sessions.session import Session


class Job(Protocol):
    """A handle to one job; any number of them may follow it.

    Any method may raise `JobNotFoundError`, once the session is gone or has forgotten the job, and `StorageError`.
    """

    @property
    def id(self) -> str:
        """`<session key>.<16 hex>`; safe to log and to send to the page."""
        ...

    async def info(self) -> JobInfo:
        """The job's entry as it is stored now."""
        ...

    async def latest(self) -> JobEvent | None:
        """What was told last; `None` where there is nothing but the entry of a job that waits."""
        ...

    def events(self, after: str | None = None) -> AsyncIterator[JobEvent]:
        """What has happened since the event with the id `after`, or since the beginning, then what happens.

        Progress in between may be left out. The terminal event is never: it comes once, and last.
        `InvalidRequestError` for an `after` that is no event's id.
        """
        ...

    async def result(self) -> Mapping[str, OutputRecord]:
        """Wait for the end and return the outputs. `JobFailedError`, `JobCancelledError`."""
        ...

    async def cancel(self) -> JobInfo:
        """Ask for the end of this job, and of no other, and return its entry as it is then.

        A queued job is cancelled at once, a running one at its pipeline's next report; a finished one is left alone.
        """
        ...


class Dispatcher(Protocol):
    """Runs the jobs of sessions. Used inside `async with`; `StoreClosedError` outside. Any method: `StorageError`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> bool | None: ...

    async def submit(self, request: GenerationRequest) -> Job:
        """Accept a job, durably; what it needs is kept until its end. One idempotency key is one job.

        It is run at least once, whatever becomes of this process, and what it makes takes effect once.
        `UnknownPipelineError`, `InvalidRequestError`, `QueueFullError`; `SlotEmptyError` if an image was removed
        meanwhile; `SessionNotFoundError`.
        """
        ...

    async def job(self, session: Session, job_id: str) -> Job:
        """A job of `session`. `JobNotFoundError` where it has none of that id, be it another session's."""
        ...

    async def jobs(self, session: Session) -> list[JobInfo]:
        """The jobs that `session` remembers, oldest first: those that are not over, and the last that are."""
        ...

    async def retry(self, session: Session, job_id: str) -> Job:
        """Submit a job that is over once more: the same images, the same parameters.

        `InvalidRequestError` for one that is not over; else what `job` and `submit` raise.
        """
        ...

    async def cancel_session(self, session: Session) -> list[JobInfo]:
        """Cancel every job of `session` that is not over, and return their entries."""
        ...
