"""What may become of a job's entry: the pure edits that `Session.edit_job` commits.

Each takes the entry as it is stored and returns the one to write, or `None` for nothing to write. The number of an
attempt is its fence: what an attempt wants to write counts only while the entry is still at that number, under way and
its owner's. So however many processes believe that a job is theirs, one of them gives it its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from msgspec.structs import replace

from async_sessions.records import JobError, JobInfo, JobStatus, OutputRecord, RetryReason

UNCLAIMED: Final = JobError("abandoned", "No server has this pipeline any more; choose another one.")
TIMED_OUT: Final = JobError("timeout", "The run took too long and was stopped. Ask for less: fewer steps or frames.")


def begun(entry: JobInfo | None, *, owner: str | None, now: datetime) -> JobInfo | None:
    """The next attempt begins; not that of a job that is over or, where an owner is given, another's."""
    if entry is None or not entry.unfinished or owner not in (None, entry.owner):
        return None
    if entry.cancel_requested:
        return _over(entry, "cancelled", now)
    return replace(entry, status="preparing", attempt=entry.attempt + 1, started_at=now)


def taken_by_device(entry: JobInfo | None, attempt: int, now: datetime) -> JobInfo | None:
    if entry is None or not _at(entry, attempt) or entry.status == "running":
        return None
    return replace(entry, status="running", started_at=now)


def wanted(entry: JobInfo | None, attempt: int) -> bool:
    """Whether `attempt` should go on."""
    return entry is not None and _at(entry, attempt) and not entry.cancel_requested


def ended(
    entry: JobInfo | None,
    attempt: int | None,
    status: JobStatus,
    now: datetime,
    outputs: Mapping[str, OutputRecord] | None = None,
    error: JobError | None = None,
) -> JobInfo | None:
    """The end of `attempt`; where that is `None`, of a job that waits."""
    if entry is None or not (entry.status == "queued" if attempt is None else _at(entry, attempt)):
        return None
    return _over(entry, status, now, outputs, error)


def given_back(
    entry: JobInfo | None, *, attempt: int | None, owner: str | None, now: datetime, retry: RetryReason | None
) -> JobInfo | None:
    """An attempt was stopped and the job waits again: for a `retry`, or because of its process, which costs nothing.

    It is `attempt`; where that is `None`, whichever is under way of `owner`'s.
    """
    if entry is None or not _at(entry, entry.attempt if attempt is None else attempt):
        return None
    if attempt is None and entry.owner != owner:
        return None
    if entry.cancel_requested:
        return _over(entry, "cancelled", now)
    if retry is None:
        return replace(entry, status="queued", started_at=None, excused=entry.excused + 1)
    return replace(entry, status="queued", started_at=None, retry=retry)


def cancelled(entry: JobInfo | None, now: datetime) -> JobInfo | None:
    """The wish, which is the end of a job that no device works for yet."""
    if entry is None or not entry.unfinished or entry.cancel_requested:
        return None
    if entry.status != "running":
        return replace(_over(entry, "cancelled", now), cancel_requested=True)
    return replace(entry, cancel_requested=True)


def taken_over(
    entry: JobInfo | None, seen: JobInfo, *, owner: str | None, max_attempts: int, now: datetime
) -> JobInfo | None:
    """The job of an owner that is gone, unless it has changed since it was `seen`.

    One that was under way waits for a retry on its own; past `max_attempts`, and where no `owner` takes it, it has
    failed, `abandoned`.
    """
    if entry is None or (entry.owner, entry.attempt, entry.status) != (seen.owner, seen.attempt, seen.status):
        return None
    if not entry.unfinished:
        return None
    if entry.cancel_requested:
        return _over(entry, "cancelled", now)
    if owner is None:
        return _over(entry, "failed", now, error=UNCLAIMED)
    if not entry.under_way:
        return None if entry.owner == owner else replace(entry, owner=owner)
    if (times := entry.attempt - entry.excused) >= max_attempts:
        message = f"The server stopped {times} times while it was at this job; it is not tried again."
        return _over(entry, "failed", now, error=JobError("abandoned", message))
    return replace(entry, owner=owner, status="queued", started_at=None, retry="interrupted")


def _over(
    entry: JobInfo,
    status: JobStatus,
    now: datetime,
    outputs: Mapping[str, OutputRecord] | None = None,
    error: JobError | None = None,
) -> JobInfo:
    return replace(entry, status=status, finished_at=now, outputs=dict(outputs or {}), error=error, retry=None)


def _at(entry: JobInfo, attempt: int) -> bool:
    return entry.under_way and entry.attempt == attempt
