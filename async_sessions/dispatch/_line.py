"""`Line`: the jobs that wait, and which of them is the next. Decides; does no I/O and knows no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What the line knows of a job. `kind` is that of its device; one that is `alone` runs with nothing beside it."""

    @property
    def session_key(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> int: ...
    @property
    def alone(self) -> bool: ...


J = TypeVar("J", bound=Waiting)


class Line(Generic[J]):
    """Jobs by priority, the higher first; within one the sessions take turns, each with its oldest job.

    The session that was served longest ago is the next: one with twenty jobs does not keep another waiting. At most
    `max_running` jobs of a session are under way at a time.
    """

    def __init__(self, max_running: int | None = None) -> None:
        self._jobs: list[J] = []
        self._max_running = max_running
        self._served: dict[str, int] = {}  # by session key; of those that have a job here
        self._turns = 0

    def __contains__(self, job: J) -> bool:
        return job in self._jobs

    def add(self, job: J) -> None:
        self._jobs.append(job)

    def remove(self, job: J) -> None:
        self._jobs.remove(job)

    def order(self) -> list[J]:
        """All jobs in the order in which they would run if no other came."""
        ahead: Counter[tuple[str, int]] = Counter()
        turns: list[tuple[tuple[int, int, int, int], J]] = []
        for job in sorted(self._jobs, key=lambda job: job.arrival):
            own = job.session_key, job.priority
            turns.append(((-job.priority, ahead[own], self._served.get(job.session_key, 0), job.arrival), job))
            ahead[own] += 1
        return [job for _, job in sorted(turns, key=lambda turn: turn[0])]

    def take(self, kind: str, under_way: Collection[J]) -> J | None:
        """The next job for a device of `kind`, which leaves the line; `None` while there is none that may run.

        An alone job that is the next one of all keeps every device waiting until nothing is under way any more.
        """
        if any(job.alone for job in under_way):
            return None
        running = Counter(job.session_key for job in under_way)
        for job in self.order():
            if job.alone and under_way:
                return None
            if self._max_running is not None and running[job.session_key] >= self._max_running:
                continue
            if job.kind == kind:
                return self._serve(job, running)
            if job.alone:
                return None
        return None

    def _serve(self, job: J, running: Counter[str]) -> J:
        self._jobs.remove(job)
        self._turns += 1
        here = {other.session_key for other in self._jobs} | set(running) | {job.session_key}
        self._served = {key: turn for key, turn in self._served.items() if key in here}
        self._served[job.session_key] = self._turns
        return job
