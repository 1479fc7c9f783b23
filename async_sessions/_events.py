"""What happens to a job, as those who follow it are told. Events are JSON by msgspec, told apart by their `event`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final, TypeAlias

import msgspec

from async_sessions.errors import InvalidRequestError
from async_sessions.records import JobError, JobInfo, OutputRecord

END: Final = 999_999_999  # the number of an attempt's terminal event: known without a log, and after every other
WAIT: Final = 500_000_000  # what the numbers of positions start at: a job may wait again after an attempt


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=str.lower):
    """`id` is `<attempt>.<number>`, what `Job.events(after=)` takes; `at` is UTC."""

    id: str
    at: datetime


class Queued(_Event, frozen=True):
    """Waiting; the job at `position` 1 is the next to run, in about `eta` seconds where that can be told."""

    position: int
    eta: float | None = None


class Started(_Event, frozen=True):
    """The device works for the job: the `attempt`-th time that it was tried.

    `elsewhere`: only the entry tells so. Another process has the job, or had it when it ended; its progress is not seen
    here.
    """

    attempt: int
    elsewhere: bool = False


class Progress(_Event, frozen=True):
    """`step` of `total` is done, the rest in about `eta` seconds; `preview` is an image file of at most 64 KiB."""

    step: int
    total: int
    note: str = ""
    preview: bytes | None = None
    eta: float | None = None


class Succeeded(_Event, frozen=True):
    outputs: Mapping[str, OutputRecord]


class Failed(_Event, frozen=True):
    error: JobError


class Cancelled(_Event, frozen=True):
    """Cancelled, or its session was deleted."""


TerminalEvent: TypeAlias = Succeeded | Failed | Cancelled
JobEvent: TypeAlias = Queued | Started | Progress | Succeeded | Failed | Cancelled


def event_order(event_id: str | None) -> tuple[int, int]:
    """What events sort by; `None` comes before all. `InvalidRequestError` for what is no event's id."""
    if event_id is None:
        return -1, -1
    attempt, _, number = event_id.partition(".")
    if len(event_id) > 32 or not (attempt.isdecimal() and number.isdecimal()):
        raise InvalidRequestError("An event's id is two numbers joined by a dot; pass one that an event had.")
    return int(attempt), int(number)


def queued_number(last: int, waited: timedelta) -> int:
    """The number of the next position that is told, after `last`, of a job that was submitted `waited` ago.

    By the time, in hundredths of a second: so it is also after those that a process told before it was restarted,
    however many jobs left the queue in its last seconds.
    """
    return min(max(last + 1, WAIT + int(waited.total_seconds() * 100)), END - 1)


def entry_event(entry: JobInfo) -> JobEvent | None:
    """The latest that a job's entry tells by itself; nothing of one that waits."""
    if entry.status == "running":
        at = entry.started_at or entry.submitted_at
        return Started(id=f"{entry.attempt}.1", at=at, attempt=entry.attempt, elsewhere=True)
    return terminal_event(entry)


def terminal_event(entry: JobInfo) -> TerminalEvent | None:
    """The event that ended a job, as its entry tells it; `None` for an unfinished one."""
    event_id, at = f"{entry.attempt}.{END}", entry.finished_at or entry.submitted_at
    match entry.status:
        case "succeeded":
            return Succeeded(id=event_id, at=at, outputs=entry.outputs)
        case "failed":
            return Failed(id=event_id, at=at, error=entry.error or JobError("unknown", ""))
        case "cancelled":
            return Cancelled(id=event_id, at=at)
        case _:
            return None
