"""Jobs: the words that pipelines and followers use, and `run_job`, which takes one job from its entry to its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import anyio

from async_sessions._accept import accept_job, repeated
from async_sessions._entry import TIMED_OUT
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
from async_sessions._outputs import job_error
from async_sessions._pipeline import CancelFlag, JobContext, Output, Pipeline, PipelineSpec
from async_sessions._run import OutOfDeviceMemoryError, Run
from async_sessions.errors import AsyncSessionsError, JobCancelledError, SessionNotFoundError

if TYPE_CHECKING:
    from async_sessions.records import JobInfo
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
    "accept_job",
    "cancel_job",
    "entry_event",
    "event_order",
    "give_back_job",
    "repeated",
    "run_job",
    "take_over_job",
    "terminal_event",
]

_logger = logging.getLogger("async_sessions")


async def run_job(
    job_id: str,
    *,
    store: SessionStore,
    pipelines: Iterable[Pipeline],
    emit: Callable[[JobEvent], None],
    lane: Lane | None = None,
    flag: CancelFlag | None = None,
    owner: str | None = None,
) -> JobInfo | None:
    """Run a job that was accepted: begin, prepare, generate, keep the outputs, end. Returns its entry as it is then.

    `emit` is called on the loop and must not block. It gets exactly one terminal event, last, and only once the end is
    stored; none where the entry that is returned is unfinished: the job waits again, because its device ran out of
    memory for the first time, or is somebody else's. What goes wrong in the pipeline is the job's failure and is not
    raised. Where the session is gone the job counts as cancelled, and `None` is returned. A `StorageError` is raised
    where the beginning or the end could not be stored: run the job again later. A cancellation of this call stops the
    pipeline at its next report, waits for it, and returns the job to the queue; that attempt is not counted.

    `lane` is the device's thread with the pipelines loaded; without one a thread is started, and the pipeline loaded,
    for this job alone. Of the jobs that share a lane one is on the device while others prepare, or store what they
    made. Setting `flag` cancels the job. With `owner`, a job that is another's is left alone.

    What a crash leaves, by the write that was the last one, and who mends it. Nothing that was acknowledged is lost:

    ============================== ========================================== ===================================
    last write                     left behind                                mended by
    ============================== ========================================== ===================================
    any                            the lease of a dead owner                  the sweep, after `grace`
    submit: marker                 a marker without an entry                  the sweep, after `grace`
    submit: entry                  an accepted job that waits                 take-over
    begin: entry                   an attempt under way that nobody runs      take-over: tried again, alone; counted
    on the device: entry           the same                                   the same
    finish: some outputs, or all   the same, and blobs that nobody names      take-over; the sweep, after `grace`
    finish: entry                  a job that is over, and its marker         the sweep, after `grace`
    cancel (not on device): entry  a job that is over, and its marker         the sweep, after `grace`
    cancel (on the device): entry  an attempt that nobody wants               take-over ends it as cancelled
    give back: entry               a job that waits                           take-over
    delete: tombstone              a tombstone, its blobs, and markers        the sweep; markers after `grace`
    delete: manifest               markers without an entry                   the sweep, after `grace`
    take-over: entry that waits    a job that waits for another dead owner    the next take-over
    take-over: entry that is over  a job that is over, and its marker         the sweep, after `grace`
    ============================== ========================================== ===================================
    """
    run = Run(job_id, store, emit, flag or CancelFlag(), owner=owner)
    try:
        if (entry := await run.begin()) is None:
            return run.entry
        try:
            outputs = await run.outputs(entry, {each.spec.name: each for each in pipelines}, lane)
        except SessionNotFoundError:
            return await run.end("cancelled")
        except OutOfDeviceMemoryError as error:
            _logger.warning("job %s ran out of device memory; once more, alone", job_id, exc_info=error.__cause__)
            return await run.give_back("out_of_memory")
        except Exception as error:  # noqa: BLE001 - it becomes the job's failure
            return await _stopped(run, job_id, error)
        try:
            return await run.end("succeeded", outputs=outputs)
        except AsyncSessionsError as error:  # the outputs may be more than the session may keep
            _logger.warning("what job %s made could not be kept", job_id, exc_info=error)
            return await run.end("failed", error=job_error(error))
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            await run.give_back()
        raise


async def _stopped(run: Run, job_id: str, error: Exception) -> JobInfo | None:
    if isinstance(error, JobCancelledError):
        match run.flag.reason:
            case "cancelled":
                return await run.end("cancelled")
            case "drained" | "overtaken":
                return await run.give_back()
            case "timeout":
                _logger.warning("job %s took too long", job_id)
                return await run.end("failed", error=TIMED_OUT)
    gone = False
    try:
        entry = await run.end("failed", error=job_error(error))
        gone = entry is None
    finally:
        if gone:  # with its images: whatever was raised, nothing is wrong
            _logger.info("job %s went with its session", job_id)
        else:
            _logger.warning("job %s failed", job_id, exc_info=error)
    return entry


async def give_back_job(job_id: str, *, store: SessionStore, owner: str) -> JobInfo | None:
    """Let a job of `owner`, which does not stop in time, wait again: what it still makes is lost. Returns its entry."""
    return await Run(job_id, store, lambda event: None, CancelFlag(), owner=owner).give_back()


async def cancel_job(job_id: str, *, store: SessionStore, emit: Callable[[JobEvent], None]) -> JobInfo:
    """Ask for a job's end: a queued one ends here, a running one where it runs, a finished one is left alone.

    `JobNotFoundError`, `SessionNotFoundError`, `StorageError`.
    """
    return await Run(job_id, store, emit, CancelFlag()).cancel()


async def take_over_job(
    seen: JobInfo, *, store: SessionStore, emit: Callable[[JobEvent], None], owner: str | None, max_attempts: int
) -> JobInfo | None:
    """Make `seen`, the job of an owner that is gone, that of `owner`, unless it has changed since; returns its entry.

    A job that was under way waits to be tried again alone. It ends here where somebody wanted it cancelled, and as
    failed, `abandoned`, where it was tried `max_attempts` times or nobody takes it.
    """
    run = Run(seen.id, store, emit, CancelFlag())
    return await run.take_over(seen, owner=owner, max_attempts=max_attempts)
