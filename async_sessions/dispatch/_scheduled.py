"""`Scheduled`: what the scheduler knows of one job."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import anyio

from async_sessions import _keys
from async_sessions._events import queued_number
from async_sessions.dispatch._log import JobLog
from async_sessions.jobs import CancelFlag, Progress, Queued

if TYPE_CHECKING:
    from async_sessions._pace import Paces
    from async_sessions.records import JobInfo


class Scheduled:
    """A job that this process looks after, from its acceptance, or its take-over, to its end."""

    def __init__(self, entry: JobInfo, kind: str, arrival: int) -> None:
        self.entry = entry
        self.kind = kind
        self.arrival = arrival
        self.session_key = _keys.split_job_id(entry.id)[0]
        self.flag = CancelFlag()
        self.log = JobLog()
        self.device: str | None = None  # that whose lane has it
        self.lent = False  # whether memory is, to prepare it in
        self.on_device: float | None = None  # since when; of the loop's clock
        self._told: tuple[int, int, bool] | None = None  # position, attempt and whether an `eta` was known
        self._number = 0

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def priority(self) -> int:
        return self.entry.priority

    @property
    def alone(self) -> bool:
        return self.entry.retry is not None

    @property
    def pixels(self) -> int:
        return sum(record.pixel_count for record in self.entry.inputs.values())

    @property
    def made_ready(self) -> bool:
        """Whether it can still wait for its turn again: it was taken, is not on the device, and goes on."""
        return self.device is not None and self.on_device is None and not self.alone and not self.flag.is_set()

    def time_left(self, paces: Paces, now: datetime) -> float | None:
        """Seconds until the device has done it: by its own steps, else as long as runs of its pipeline take."""
        if isinstance(told := self.log.last, Progress) and told.eta is not None:
            return max(0.0, told.eta - (now - told.at).total_seconds())
        if self.on_device is None or (expected := paces.expected(self.entry.pipeline)) is None:
            return None
        return max(0.0, expected - (anyio.current_time() - self.on_device))

    def move(self, position: int, eta: float | None, now: datetime) -> None:
        """Tell the position, unless it is the one that was told last."""
        if self._told == (telling := (position, self.entry.attempt, eta is not None)):
            return
        self._told = telling
        self._number = queued_number(self._number, now - self.entry.submitted_at)
        self.log.append(Queued(id=f"{self.entry.attempt}.{self._number}", at=now, position=position, eta=eta))


def kind_of(device: str) -> str:
    return device.partition(":")[0]
