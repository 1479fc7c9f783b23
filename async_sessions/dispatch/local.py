"""`LocalDispatcher`: jobs run in this process, one thread per device."""

from __future__ import annotations

import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Self

import anyio
import msgspec
from anyio import AsyncContextManagerMixin

from async_sessions import _keys
from async_sessions._life import NOT_WRITTEN
from async_sessions._tasks import Commits
from async_sessions.dispatch._job import LocalJob
from async_sessions.dispatch._lease import Owner
from async_sessions.dispatch._log import JobLog
from async_sessions.errors import (
    JobNotFoundError,
    QueueFullError,
    SessionNotFoundError,
    StorageError,
    StoreClosedError,
    UnknownPipelineError,
)
from async_sessions.jobs import CancelFlag, Lane, Queued, abandon_job, cancel_job, run_job

if TYPE_CHECKING:
    from async_sessions.jobs import Pipeline
    from async_sessions.records import GenerationRequest, JobInfo
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

KEPT_LOGS = 256  # of jobs that ended; older ones are told from their entry

_logger = logging.getLogger("async_sessions")


class _Accepted:
    """A job that this dispatcher took and has not ended."""

    def __init__(self, entry: JobInfo, device: str, arrival: int) -> None:
        self.id = entry.id
        self.arrival = arrival
        self.priority = entry.priority
        self.device = device
        self.flag = CancelFlag()
        self.log = JobLog()
        self._moves = 0

    def move(self, position: int, now: datetime) -> None:
        self._moves += 1
        self.log.append(Queued(id=f"0.{self._moves}", at=now, position=position))


class LocalDispatcher(AsyncContextManagerMixin):
    """Runs jobs in this process; each of `devices` has a thread of its own, where pipelines are loaded, run, released.

    Enter it inside its store, and leave it in the task that entered it. A pipeline is loaded on every device of its
    kind (`PipelineSpec.device`), in the background: jobs may be submitted meanwhile. One that can't be loaded fails its
    jobs, with the reason. Jobs run by priority, the higher first, then in the order of their arrival; at most
    `max_queued` wait. A job that another process accepted can be followed and cancelled here too.

    Leaving stops the running jobs at their next report and waits for them; they, and those still queued, end as failed,
    `abandoned`. So do the jobs of a process that was killed, once its lease (15 s) has lapsed and another dispatcher
    looks after the same store.
    """

    def __init__(
        self,
        store: SessionStore,
        pipelines: Iterable[Pipeline],
        *,
        devices: Sequence[str] = ("cpu",),
        max_queued: int = 64,
    ) -> None:
        pipelines = list(pipelines)
        self._pipelines = {each.spec.name: each for each in pipelines}
        if len(self._pipelines) < len(pipelines):
            raise ValueError("Two pipelines have the same name; give each its own.")
        if len(set(devices)) < len(devices):
            raise ValueError("A device is named twice; it has one thread.")
        for spec in (each.spec for each in pipelines):
            if spec.device not in map(_kind, devices):
                raise ValueError(f"Pipeline {spec.name!r} runs on {spec.device!r}; `devices` has none of that kind.")
        if max_queued < 1:
            raise ValueError("`max_queued` must be at least 1.")
        self._store = store
        self._devices = tuple(devices)
        self._max_queued = max_queued
        self._owner = Owner(store, secrets.token_hex(8), self._holds)
        self._open = False

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        self._queue: list[_Accepted] = []
        self._jobs: dict[str, _Accepted] = {}
        self._accepting: Counter[str] = Counter()
        self._arrivals = 0
        self._ended: OrderedDict[str, JobLog] = OrderedDict()
        self._submitting = 0
        self._arrival = anyio.Event()
        failure: Exception | None = None
        await self._owner.renew()
        async with anyio.create_task_group() as group:
            self._commits = Commits(group)
            try:
                async with anyio.create_task_group() as lanes:
                    lanes.start_soon(self._owner.live)
                    for device in self._devices:
                        lanes.start_soon(self._work, device)
                    self._open = True
                    try:
                        yield self
                    except Exception as error:  # noqa: BLE001 - the caller's own, which a group would wrap in another
                        failure = error
                    finally:
                        self._open = False
                        lanes.cancel_scope.cancel()
            finally:
                await self._commits.uninterrupted(self._leave)
        if failure is not None:
            raise failure

    async def submit(self, request: GenerationRequest) -> LocalJob:
        """See `Dispatcher.submit`. A cancelled submit has been accepted whole, or not at all."""
        self._check_open()
        if (pipeline := self._pipelines.get(request.pipeline)) is None:
            known = ", ".join(self._pipelines)
            raise UnknownPipelineError(f"There is no pipeline {request.pipeline!r} here; there are: {known}.")
        session = await self._store.open_by_key(request.session_key)
        job_id = _keys.job_id(request.session_key, _keys.job_hex(request.idempotency_key))
        now = self._store.clock()
        self._arrivals += 1
        arrival = self._arrivals
        entry = await anyio.to_thread.run_sync(partial(pipeline.spec.entry, request, job_id, self._owner.name, now))
        job = self._handle(session, job_id)
        if request.idempotency_key is not None and job_id in (await session.info()).jobs:
            return job
        self._check_open()
        if len(self._queue) + self._submitting >= self._max_queued:
            raise QueueFullError(f"{self._max_queued} jobs are waiting already; try again in a while.")
        self._submitting += 1
        self._accepting[job_id] += 1
        try:
            await self._commits.uninterrupted(partial(self._accept, session, entry, pipeline.spec.device, arrival))
        finally:
            self._submitting -= 1
            self._accepting[job_id] -= 1
            self._accepting += Counter()  # keeps the positive counts only
        return job

    async def job(self, session: Session, job_id: str) -> LocalJob:
        """See `Dispatcher.job`."""
        if _keys.split_job_id(job_id)[0] != session.key:
            raise JobNotFoundError("There is no such job.")
        job = self._handle(session, job_id)
        await job.info()
        return job

    async def jobs(self, session: Session) -> list[JobInfo]:
        """See `Dispatcher.jobs`."""
        return sorted((await session.info()).jobs.values(), key=lambda entry: entry.submitted_at)

    def _holds(self, job_id: str) -> bool:
        return job_id in self._jobs or job_id in self._accepting

    def _check_open(self) -> None:
        if not self._open:
            raise StoreClosedError("The dispatcher is not open; use it inside `async with dispatcher`.")

    async def _accept(self, session: Session, entry: JobInfo, device: str, arrival: int) -> None:
        """Marker, then entry, then queue. Not to be interrupted: an entry that is not in the queue is never run."""
        marker = _keys.queue_marker(entry.id)
        hint = {"owner": self._owner.name, "submitted_at": entry.submitted_at}
        version = await self._store.blobs.put(marker, msgspec.json.encode(hint))
        added = False

        def add(current: JobInfo | None) -> JobInfo | None:
            nonlocal added
            added = current is None
            return entry if added else None

        try:
            current = await session.edit_job(entry.id, add)
        except Exception as error:
            # after another storage error the entry may be there: then the marker leads to it, and it ends as abandoned
            if not isinstance(error, StorageError) or isinstance(error, NOT_WRITTEN):
                await self._drop_marker(marker, version)
            raise
        if not added:  # the same request twice at once; the other one runs it
            if current is not None and not current.unfinished:
                await self._drop_marker(marker, version)
            return
        accepted = self._jobs[entry.id] = _Accepted(entry, device, arrival)
        self._queue.append(accepted)
        self._queue.sort(key=lambda each: (-each.priority, each.arrival))
        self._tell_positions()
        self._arrival.set()
        self._arrival = anyio.Event()
        if not self._open:
            await self._abandon_queued()

    async def _drop_marker(self, marker: str, version: str) -> None:
        try:
            await self._store.blobs.delete(marker, expect=version)
        except StorageError as error:  # it is only a hint; and somebody else may submit the same job just now
            _logger.info("left the marker %s: %s", marker, error)

    async def _work(self, device: str) -> None:
        models = {name: each for name, each in self._pipelines.items() if each.spec.device == _kind(device)}
        async with Lane(device, models) as lane:
            await lane.load()
            while True:
                if (job := self._take(device)) is None:
                    await self._arrival.wait()
                    continue
                try:
                    await run_job(
                        job.id,
                        store=self._store,
                        pipelines=models.values(),
                        emit=job.log.append,
                        lane=lane,
                        flag=job.flag,
                    )
                finally:
                    self._retire(job)

    def _take(self, device: str) -> _Accepted | None:
        for job in self._queue:
            if job.device == _kind(device):
                self._queue.remove(job)
                self._tell_positions()
                return job
        return None

    def _tell_positions(self) -> None:
        now = self._store.clock()
        for position, job in enumerate(self._queue, start=1):
            job.move(position, now)

    def _retire(self, job: _Accepted) -> None:
        self._jobs.pop(job.id, None)
        self._ended[job.id] = job.log
        while len(self._ended) > KEPT_LOGS:
            self._ended.popitem(last=False)

    async def _leave(self) -> None:
        await self._abandon_queued()
        await self._owner.resign()

    async def _abandon_queued(self) -> None:
        while self._queue:
            job = self._queue.pop()
            await abandon_job(job.id, store=self._store, emit=job.log.append)
            self._retire(job)

    def _log(self, job_id: str) -> JobLog | None:
        job = self._jobs.get(job_id)
        return self._ended.get(job_id) if job is None else job.log

    def _handle(self, session: Session, job_id: str) -> LocalJob:
        return LocalJob(session, job_id, log=self._log, cancel=self._cancel)

    def _stop(self, job_id: str) -> None:
        if job := self._jobs.get(job_id):
            job.flag.set()

    def _forget(self, job_id: str) -> None:
        """The job has ended without having been started."""
        job = self._jobs.get(job_id)
        if job is not None and job in self._queue:
            self._queue.remove(job)
            self._tell_positions()
            self._retire(job)

    async def _cancel(self, job_id: str) -> JobInfo:
        log = self._log(job_id) or JobLog()
        try:
            entry = await cancel_job(job_id, store=self._store, emit=log.append)
        except (SessionNotFoundError, JobNotFoundError) as error:
            self._stop(job_id)
            raise JobNotFoundError("There is no such job any more.") from error
        if entry.unfinished:
            self._stop(job_id)
        else:
            self._forget(job_id)
        return entry


def _kind(device: str) -> str:
    return device.partition(":")[0]
