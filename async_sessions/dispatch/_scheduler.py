"""`Scheduler`: the jobs of one process, those that wait and those under way, and the lanes that run them."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import anyio

from async_sessions._budget import PixelBudget
from async_sessions._pace import Paces
from async_sessions.dispatch._line import Line
from async_sessions.dispatch._scheduled import Scheduled, kind_of
from async_sessions.jobs import CancelFlag, Lane, Started, run_job

if TYPE_CHECKING:
    from async_sessions._budget import Loan
    from async_sessions.dispatch._log import JobLog
    from async_sessions.jobs import JobEvent, Pipeline
    from async_sessions.records import JobInfo
    from async_sessions.store import SessionStore

KEPT_LOGS: Final = 256  # of jobs that ended; older ones are told from their entry
STOP_TIME: Final = 0.5  # seconds that a pipeline has to stop once the time to drain is over
STORE_TIME: Final = 5.0  # seconds that what became of a job may take to store then

_logger = logging.getLogger("async_sessions")


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
        self._loaded: set[str] = set()  # devices
        self._looking: set[str] = set()  # devices that wait for a job to run, or to make ready
        self._ended: OrderedDict[str, JobLog] = OrderedDict()
        self._paces = Paces()
        self._arrivals = 0
        self._changed = anyio.Event()

    def waiting(self, session_key: str | None = None) -> int:
        """How many jobs, or how many of one session, wait for a device."""
        waiting = (job for job in self._jobs.values() if job.on_device is None)
        return sum(session_key in (None, job.session_key) for job in waiting)

    def holds(self, job_id: str) -> bool:
        """Whether the job is to be left alone: it is looked after, or this process takes no more."""
        return self._draining or job_id in self._jobs

    def log(self, job_id: str) -> JobLog | None:
        job = self._jobs.get(job_id)
        return self._ended.get(job_id) if job is None else job.log

    def draw(self) -> int:
        """A place in the order of arrivals."""
        self._arrivals += 1
        return self._arrivals

    def add(self, entry: JobInfo, arrival: int | None = None) -> None:
        """Take in a job that waits; once jobs are begun no more, its entry is all that is needed of it."""
        if self._draining:
            return
        kind = self._pipelines[entry.pipeline].spec.device
        job = Scheduled(entry, kind, self.draw() if arrival is None else arrival)
        self._jobs[job.id] = job
        self._line.add(job)
        overtaken = [ready for ready in self._under_way if ready.made_ready and self._is_due_before(job, ready)]
        if overtaken and not self._idle_devices(kind):
            min(reversed(overtaken), key=lambda ready: ready.priority).flag.set("overtaken")
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
        """Something has changed: tell positions, and let the lanes look again.

        A few microseconds for each job that waits, on the loop, at every change: see `max_queued`.
        """
        ahead: Counter[str] = Counter()
        now = self._store.clock()
        etas = {kind: self._time_left(kind) for kind in self._lanes}
        paces = {pipeline: self._paces.expected(pipeline) for pipeline in self._pipelines}
        ready = [job for job in self._under_way if job.on_device is None]
        for job in (*ready, *self._line.order()):
            ahead[job.kind] += 1
            eta = etas[job.kind]
            job.move(ahead[job.kind], eta, now)
            expected = paces[job.entry.pipeline]
            etas[job.kind] = None if eta is None or expected is None else eta + expected / self._lanes[job.kind]
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def retry_after(self) -> float | None:
        """Seconds, at least 1, until one of the jobs that wait may be begun, as far as that is known."""
        known = [left for kind in self._lanes if (left := self._time_left(kind)) is not None]
        return max(1.0, min(known)) if known else None

    async def work(self, device: str) -> None:
        """Load what runs on `device`, and run jobs on it until cancelled: one on the device, one that is made ready."""
        kind = kind_of(device)
        models = {name: each for name, each in self._pipelines.items() if each.spec.device == kind}
        async with Lane(device, models) as lane, anyio.create_task_group() as jobs:
            try:
                await lane.load()
            finally:
                self._loaded.add(device)
                self.wake()
            ready = anyio.Semaphore(1)
            while True:
                await ready.acquire()
                jobs.start_soon(self._run, await self._next(device), lane, ready)

    async def drain(self, seconds: float) -> None:
        """Begin nothing more, return what is only being made ready to the queue, and wait for what is on a device."""
        self.paused = self._draining = True
        for job in self._under_way:
            if job.on_device is None:
                job.flag.set("drained")
        self.wake()
        with anyio.move_on_after(seconds):
            while self._under_way:
                await self._changed.wait()

    async def halt(self) -> list[Scheduled]:
        """Stop everything; returns the jobs whose pipelines do not within `STOP_TIME`."""
        self.paused = self._draining = True
        for job in self._under_way:
            job.flag.set("drained")
        self.wake()
        with anyio.move_on_after(STOP_TIME):
            while self.busy:
                await self._changed.wait()
        return [job for job in self._under_way if job.flag.in_pipeline]

    async def settle(self) -> list[Scheduled]:
        """Wait for what is only being stored; returns the jobs of which it is not within `STORE_TIME`."""
        with anyio.move_on_after(STORE_TIME):
            while self._being_stored():
                await self._changed.wait()
        return self._being_stored()

    def _being_stored(self) -> list[Scheduled]:
        return [job for job in self._under_way if not job.flag.in_pipeline]

    @property
    def busy(self) -> bool:
        """Whether a job is under way, or a pipeline is still being loaded."""
        return bool(self._under_way) or len(self._loaded) < self._lanes.total()

    def close(self) -> None:
        """Nothing runs here any more: who follows a job looks at its entry from here on."""
        self.paused = self._draining = True
        for job in list(self._jobs.values()):
            self._retire(job)

    async def _next(self, device: str) -> Scheduled:
        self._looking.add(device)
        try:
            while (job := self._take(device)) is None:
                await self._changed.wait()
        finally:
            self._looking.remove(device)
        job.device = device
        self._under_way.append(job)
        self.wake()
        return job

    def _take(self, device: str) -> Scheduled | None:
        """The next job for `device`. No job is made ready for one that works while another one has nothing to do."""
        kind = kind_of(device)
        idle = self._idle_devices(kind)
        if self.paused or (idle and device not in idle):
            return None
        job = self._line.take(kind, self._under_way)
        if job is None and not any(waiting.alone for waiting in self._line.order()):
            self._fetch_back([each for each in self._under_way if each.kind == kind], len(idle))
        return job

    def _idle_devices(self, kind: str) -> set[str]:
        return {each for each in self._looking if kind_of(each) == kind} - {job.device for job in self._under_way}

    def _fetch_back(self, jobs: Sequence[Scheduled], wanted: int = 1) -> None:
        """Return up to `wanted` of those that were made ready behind another one to the line.

        A device that has nothing to do wants the job, or the memory that it holds.
        """
        coming = sum(job.flag.reason == "overtaken" for job in jobs)
        behind = [job for job in jobs if job.made_ready and self._works(job.device)]
        if yielding := behind[: max(0, wanted - coming)]:
            for job in yielding:
                job.flag.set("overtaken")
            self._notify()

    def _works(self, device: str | None) -> bool:
        return any(job.device == device and job.on_device is not None for job in self._under_way)

    async def _run(self, job: Scheduled, lane: Lane, ready: anyio.Semaphore) -> None:
        entry: JobInfo | None = None
        try:
            async with self._ahead.loan() as loan:

                def emit(event: JobEvent) -> None:
                    if isinstance(event, Started):
                        job.on_device = anyio.current_time()
                        loan.give_back()
                        job.lent = False
                        ready.release()
                    job.log.append(event)

                await self._may_prepare(job, loan)
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
            if job.on_device is None:
                ready.release()
            self._under_way.remove(job)
            self._left(job, entry)
            self.wake()

    async def _may_prepare(self, job: Scheduled, loan: Loan) -> None:
        """Wait until there is memory to prepare `job` in, or it is to stop.

        Where its device has nothing else to do meanwhile, a job that holds memory and waits for another device yields.
        """

        async def until_stopped() -> None:
            while not job.flag.is_set():
                if not self._works(job.device):
                    self._fetch_back([each for each in self._under_way if each.lent])
                await self._changed.wait()
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(until_stopped)
            await loan.ask(job.pixels)
            group.cancel_scope.cancel()
        job.lent = loan.asked and job.pixels > 0

    def _left(self, job: Scheduled, entry: JobInfo | None) -> None:
        if entry is not None and entry.status == "succeeded" and job.on_device is not None:
            self._paces.note(entry.pipeline, anyio.current_time() - job.on_device)
        waits = entry is not None and entry.status == "queued" and entry.owner == self._owner
        if entry is not None and waits and not self._draining and not job.log.ended:
            job.entry, job.flag = entry, CancelFlag()
            job.device, job.lent, job.on_device = None, False, None
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
        """Seconds until the devices of `kind` are done with what they are at, shared by all of them, where known."""
        if self.paused or kind not in map(kind_of, self._loaded):
            return None
        left = 0.0
        for job in self._under_way:
            if job.kind == kind and job.on_device is not None:
                if (rest := job.time_left(self._paces, self._store.clock())) is None:
                    return None
                left += rest
        return left / self._lanes[kind]
