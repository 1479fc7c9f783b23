"""`Scheduler`: the jobs of one process, those that wait and those under way, and the lanes that run them."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import anyio

from async_sessions import _keys
from async_sessions._budget import PixelBudget
from async_sessions._events import queued_number
from async_sessions._pace import Paces
from async_sessions.dispatch._line import Line
from async_sessions.dispatch._log import JobLog
from async_sessions.jobs import CancelFlag, Lane, Queued, Started, run_job

if TYPE_CHECKING:
    from async_sessions.jobs import JobEvent, Pipeline
    from async_sessions.records import JobInfo
    from async_sessions.store import SessionStore

KEPT_LOGS: Final = 256  # of jobs that ended; older ones are told from their entry
STOP_TIME: Final = 0.5  # seconds that a pipeline has to stop once the time to drain is over

_logger = logging.getLogger("async_sessions")


class Scheduled:
    """A job that this process looks after, from its acceptance, or its take-over, to its end."""

    def __init__(self, entry: JobInfo, kind: str, arrival: int) -> None:
        self.entry = entry
        self.kind = kind
        self.arrival = arrival
        self.session_key = _keys.split_job_id(entry.id)[0]
        self.flag = CancelFlag()
        self.log = JobLog()
        self.on_device: float | None = None  # since when; of the loop's clock
        self._told: tuple[int, int] | None = None  # position and attempt
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

    def move(self, position: int, eta: float | None, store: SessionStore) -> None:
        """Tell the position, unless it is the one that was told last."""
        if self._told == (position, self.entry.attempt):
            return
        self._told = position, self.entry.attempt
        now = store.clock()
        self._number = queued_number(self._number, now - self.entry.submitted_at)
        self.log.append(Queued(id=f"{self.entry.attempt}.{self._number}", at=now, position=position, eta=eta))


class Scheduler:
    """Belongs to one event loop. `owner` is the name that the entries of its jobs have to bear."""

    def __init__(
        self,
        store: SessionStore,
        pipelines: Mapping[str, Pipeline],
        devices: Sequence[str],
        *,
        owner: str,
        max_running: int | None,
        ahead_pixels: int,
        paused: bool,
    ) -> None:
        self.paused = paused
        self._draining = False
        self._store = store
        self._pipelines = pipelines
        self._lanes = Counter(map(kind_of, devices))
        self._owner = owner
        self._ahead = PixelBudget(ahead_pixels)
        self._line: Line[Scheduled] = Line(max_running)
        self._jobs: dict[str, Scheduled] = {}
        self._under_way: list[Scheduled] = []
        self._loading: set[str] = set()  # devices
        self._ended: OrderedDict[str, JobLog] = OrderedDict()
        self._paces = Paces()
        self._arrivals = 0
        self._changed = anyio.Event()

    def waiting(self, session_key: str | None = None) -> int:
        """How many jobs, or how many of one session, wait for a device."""
        waiting = (job for job in self._jobs.values() if job.on_device is None)
        return sum(session_key in (None, job.session_key) for job in waiting)

    def holds(self, job_id: str) -> bool:
        return job_id in self._jobs

    def log(self, job_id: str) -> JobLog | None:
        job = self._jobs.get(job_id)
        return self._ended.get(job_id) if job is None else job.log

    def draw(self) -> int:
        """A place in the order of arrivals."""
        self._arrivals += 1
        return self._arrivals

    def add(self, entry: JobInfo, arrival: int | None = None) -> None:
        kind = self._pipelines[entry.pipeline].spec.device
        job = Scheduled(entry, kind, self.draw() if arrival is None else arrival)
        self._jobs[job.id] = job
        self._line.add(job)
        for ready in self._under_way:
            if ready.on_device is None and not ready.alone and self._is_due_before(job, ready):
                ready.flag.set("overtaken")
                break
        self.wake()

    def _is_due_before(self, job: Scheduled, ready: Scheduled) -> bool:
        """Whether `job`, which has just come, should run before `ready`, which is only being made ready."""
        if job.kind != ready.kind or job.priority != ready.priority:
            return job.kind == ready.kind and job.priority > ready.priority
        sessions = [each.session_key for each in self._under_way]
        return job.session_key not in sessions and sessions.count(ready.session_key) > 1

    def stop(self, job_id: str) -> None:
        """The job is not wanted any more, or has ended already: where it was not begun, nobody else will drop it."""
        if job := self._jobs.get(job_id):
            job.flag.set()
            if job in self._line and job.log.ended:
                self._line.remove(job)
                self._retire(job)
                self.wake()

    def wake(self) -> None:
        """Something has changed: tell positions, and let the lanes look again."""
        ahead: Counter[str] = Counter()
        etas = {kind: self._time_left(kind) for kind in self._lanes}
        ready = [job for job in self._under_way if job.on_device is None]
        for job in (*ready, *self._line.order()):
            ahead[job.kind] += 1
            eta = etas[job.kind]
            job.move(ahead[job.kind], eta, self._store)
            expected = self._paces.expected(job.entry.pipeline)
            etas[job.kind] = None if eta is None or expected is None else eta + expected / self._lanes[job.kind]
        self._changed.set()
        self._changed = anyio.Event()

    def retry_after(self) -> float | None:
        """Seconds until one of the jobs that wait may be begun, as far as that is known."""
        known = [left for kind in self._lanes if (left := self._time_left(kind)) is not None]
        return min(known, default=None)

    async def work(self, device: str) -> None:
        """Load what runs on `device`, and run jobs on it until cancelled: one on the device, one that is made ready."""
        kind = kind_of(device)
        models = {name: each for name, each in self._pipelines.items() if each.spec.device == kind}
        async with Lane(device, models) as lane, anyio.create_task_group() as jobs:
            self._loading.add(device)
            try:
                await lane.load()
            finally:
                self._loading.remove(device)
                self.wake()
            ready = anyio.Semaphore(1)
            while True:
                await ready.acquire()
                jobs.start_soon(self._run, await self._next(kind), lane, ready)

    async def drain(self, seconds: float) -> None:
        """Begin nothing more, return what is only being made ready to the queue, and wait for what is on a device."""
        self.paused = self._draining = True
        for job in self._under_way:
            if job.on_device is None:
                job.flag.set("drained")
        with anyio.move_on_after(seconds):
            while self._under_way:
                await self._changed.wait()

    async def halt(self) -> list[str]:
        """Stop everything; returns the ids of the jobs that do not within `STOP_TIME`."""
        self.paused = self._draining = True
        for job in self._under_way:
            job.flag.set("drained")
        with anyio.move_on_after(STOP_TIME):
            while self.busy:
                await self._changed.wait()
        return [job.id for job in self._under_way]

    @property
    def busy(self) -> bool:
        """Whether a job is under way, or a pipeline is being loaded."""
        return bool(self._under_way or self._loading)

    def close(self) -> None:
        """Nothing is run here any more: who follows a job that waits is told the rest by its entry."""
        for job in tuple(self._jobs.values()):
            self._retire(job)

    async def _next(self, kind: str) -> Scheduled:
        while self.paused or (job := self._line.take(kind, self._under_way)) is None:
            await self._changed.wait()
        self._under_way.append(job)
        self.wake()
        return job

    async def _run(self, job: Scheduled, lane: Lane, ready: anyio.Semaphore) -> None:
        took_device = anyio.Event()
        entry: JobInfo | None = None
        try:
            async with self._ahead.loan() as loan:

                def emit(event: JobEvent) -> None:
                    if isinstance(event, Started):
                        job.on_device = anyio.current_time()
                        took_device.set()
                        loan.give_back()
                        ready.release()
                    job.log.append(event)

                await loan.ask(job.pixels)
                entry = await run_job(
                    job.id,
                    store=self._store,
                    pipelines=self._pipelines.values(),
                    emit=emit,
                    lane=lane,
                    flag=job.flag,
                    owner=self._owner,
                )
        except Exception:
            # Whatever a backend raises, a device goes on.
            _logger.exception("job %s stays as it is stored; it is looked at again soon", job.id)
        finally:
            if not took_device.is_set():
                ready.release()
            self._under_way.remove(job)
            self._left(job, entry)
            self.wake()

    def _left(self, job: Scheduled, entry: JobInfo | None) -> None:
        if entry is not None and entry.status == "succeeded" and job.on_device is not None:
            self._paces.note(entry.pipeline, anyio.current_time() - job.on_device)
        waits = entry is not None and entry.status == "queued" and entry.owner == self._owner
        if entry is not None and waits and not self._draining:
            job.entry, job.on_device, job.flag = entry, None, CancelFlag()
            self._line.add(job)
        else:
            self._retire(job)

    def _retire(self, job: Scheduled) -> None:
        """Its log stays for a while if it tells the end; else the entry tells what becomes of the job."""
        self._jobs.pop(job.id, None)
        job.log.close()
        if job.log.ended:
            self._ended[job.id] = job.log
            while len(self._ended) > KEPT_LOGS:
                self._ended.popitem(last=False)

    def _time_left(self, kind: str) -> float | None:
        """Seconds until the devices of `kind` are done with what they are at, shared by all of them."""
        left = 0.0
        for job in self._under_way:
            if job.kind == kind and job.on_device is not None:
                if (expected := self._paces.expected(job.entry.pipeline)) is None:
                    return None
                left += max(0.0, expected - (anyio.current_time() - job.on_device))
        return left / self._lanes[kind]


def kind_of(device: str) -> str:
    return device.partition(":")[0]
