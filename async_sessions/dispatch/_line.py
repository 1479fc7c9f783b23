"""`Line`: the jobs that wait, and which of them is the next. Decides; does no I/O and knows no clock."""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heapreplace
from itertools import groupby
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

    The session that was served longest ago is the next: one with twenty jobs does not keep another waiting. One that
    comes anew is served before the one that was served last, and after all others, so that many of them do not keep
    the one with twenty jobs waiting either. At most `max_running` jobs of a session are under way at a time.
    """

    def __init__(self, max_running: int | None = None) -> None:
        self._jobs: list[J] = []  # by priority and arrival
        self._max_running = max_running
        self._served: dict[str, float] = {}  # the last turn by session key; of those that have a job here, or had
        self._turn = 0

    def __contains__(self, job: J) -> bool:
        return job in self._jobs

    def add(self, job: J) -> None:
        insort(self._jobs, job, key=lambda job: (-job.priority, job.arrival))
        self._served.setdefault(job.session_key, self._turn - 0.5)

    def remove(self, job: J) -> None:
        self._jobs.remove(job)

    def order(self) -> Iterator[J]:
        """All jobs in the order in which they would run if no other came."""
        served, turn = self._served.copy(), self._turn
        for _, level in groupby(self._jobs, key=lambda job: job.priority):
            waiting: dict[str, deque[J]] = {}
            for job in level:
                waiting.setdefault(job.session_key, deque()).append(job)
            heads = [(served[key], jobs[0].arrival, key) for key, jobs in waiting.items()]
            heapify(heads)
            while heads:
                key = heads[0][2]
                jobs = waiting[key]
                yield jobs.popleft()
                turn += 1
                served[key] = turn
                if jobs:
                    heapreplace(heads, (turn, jobs[0].arrival, key))
                else:
                    heappop(heads)

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
        self._turn += 1
        here = {other.session_key for other in self._jobs} | set(running)
        self._served = {key: turn for key, turn in self._served.items() if key in here}
        self._served[job.session_key] = self._turn
        return job
