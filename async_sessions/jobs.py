"""Jobs: the words that pipelines and followers use, and `run_job`, which takes one job from its entry to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import anyio

from async_sessions._events import (
    Cancelled,
    Failed,
    JobEvent,
    Progress,
    Queued,
    Started,
    Succeeded,
    TerminalEvent,
    entry_event,
    event_order,
    terminal_event,
)
from async_sessions._lane import Lane
from async_sessions._pipeline import CancelFlag, JobContext, Output, Pipeline, PipelineSpec
from async_sessions._run import Run, job_error
from async_sessions.errors import JobCancelledError, SessionNotFoundError
from async_sessions.records import JobError, JobInfo

if TYPE_CHECKING:
    from async_sessions.store import SessionStore

__all__ = [
    "CancelFlag",
    "Cancelled",
    "Failed",
    "JobContext",
    "JobEvent",
    "Lane",
    "Output",
    "Pipeline",
    "PipelineSpec",
    "Progress",
    "Queued",
    "Started",
    "Succeeded",
    "TerminalEvent",
    "abandon_job",
    "cancel_job",
    "entry_event",
    "event_order",
    "run_job",
    "terminal_event",
]

ABANDONED: Final = JobError("abandoned", "The server stopped before the job was done; submit it again.")

_logger = logging.getLogger("async_sessions")


async def run_job(
    job_id: str,
    *,
    store: SessionStore,
    pipelines: Iterable[Pipeline],
    emit: Callable[[JobEvent], None],
    lane: Lane | None = None,
    flag: CancelFlag | None = None,
) -> JobInfo | None:
    """Run a job that was accepted: start, prepare, generate, keep the outputs, end. Returns its entry as it is then.

    `emit` is called on the loop and must not block. It gets exactly one terminal event, last, whatever happens; none
    only where a newer attempt has taken the job over, which then tells its end. What goes wrong in the pipeline or in
    the storage is the job's failure and is not raised. Where the session is gone the job counts as cancelled, and
    `None` is returned. A cancellation of this call stops the pipeline at its next report, waits for it, and ends the
    job as `abandoned`.

    `lane` is the device's thread with the pipelines loaded; without one a thread is started, and the pipeline loaded,
    for this job alone. Setting `flag` cancels the job.
    """
    run = Run(job_id, store, emit, flag or CancelFlag())
    try:
        try:
            outputs = await run.outputs({each.spec.name: each for each in pipelines}, lane)
        except SessionNotFoundError:
            return await run.end("cancelled")
        except Exception as error:
            if isinstance(error, JobCancelledError) and run.flag.is_set():
                return await run.end("cancelled")
            _logger.warning("job %s failed", job_id, exc_info=error)
            return await run.end("failed", error=job_error(error))
        return await run.end("succeeded", outputs=outputs)
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            await run.end("failed", error=ABANDONED)
        raise


async def abandon_job(
    job_id: str, *, store: SessionStore, emit: Callable[[JobEvent], None], attempt: int | None = None
) -> None:
    """End a job that waits, or whose attempt number `attempt` died, and that nobody will run."""
    await Run(job_id, store, emit, CancelFlag(), attempt=attempt).end("failed", error=ABANDONED)


async def cancel_job(job_id: str, *, store: SessionStore, emit: Callable[[JobEvent], None]) -> JobInfo:
    """Ask for a job's end: a queued one ends here, a running one where it runs, a finished one is left alone.

    `JobNotFoundError`, `SessionNotFoundError`, `StorageError`.
    """
    return await Run(job_id, store, emit, CancelFlag()).cancel()
