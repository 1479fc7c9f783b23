"""`LocalDispatcher`: jobs run in this process, one thread per device."""

from __future__ import annotations

import logging
import os
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, Self

import anyio
from anyio import AsyncContextManagerMixin

from async_sessions import _keys
from async_sessions._tasks import Commits
from async_sessions.dispatch._job import LocalJob
from async_sessions.dispatch._lease import Owner
from async_sessions.dispatch._log import JobLog
from async_sessions.dispatch._scheduled import kind_of
from async_sessions.dispatch._scheduler import Scheduler
from async_sessions.errors import (
    JobNotFoundError,
    QueueFullError,
    SessionNotFoundError,
    StoreClosedError,
    UnknownPipelineError,
)
from async_sessions.jobs import accept_job, cancel_job, give_back_job, repeated
from async_sessions.records import MIB

if TYPE_CHECKING:
    from async_sessions.jobs import Pipeline
    from async_sessions.records import GenerationRequest, JobInfo
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

PIXEL_BYTES: Final = 4  # of a decoded image in memory

_logger = logging.getLogger("async_sessions")


class LocalDispatcher(AsyncContextManagerMixin):
    """Runs jobs in this process; each of `devices` has a thread of its own, where pipelines are loaded, run, released.

    Enter it inside its store, and leave it in the task that entered it. A pipeline is loaded on every device of its
    kind (`PipelineSpec.device`), in the background: jobs may be submitted meanwhile. One that can't be loaded fails its
    jobs, with the reason. A job that another process accepted can be followed and cancelled here too.

    Jobs run by priority, the higher first; within one the sessions take turns. While a device works, the images of its
    next job are read and prepared: of one job per device, and no more than `max_prepared_bytes` of decoded images in
    all, or one job. At most `max_queued` jobs wait, `max_queued_per_session` of a session, of which at most
    `max_running_per_session` are under way at a time. With `start_paused` they wait until `resume()`. Each that waits
    is told its new place at every change, which takes the event loop 2 to 5 µs: keep `max_queued` below 2,000.

    Leaving takes no more jobs, lets those on a device go on for `drain_timeout`, stops them at their next report and
    waits for that; what has been made by then has 5 s to be stored. Whatever is not over after that waits, at no cost,
    for the next dispatcher of this store. So does what a process leaves that was killed, once its `lease` has lapsed: a
    job that was under way is tried again alone then, and has failed, `abandoned`, when it was interrupted
    `max_attempts` times. A pipeline that does not stop is told to the log, and waited for; with `hard_exit` the process
    ends instead, with status 1, for a supervisor to start it anew, and so it does while one is still being loaded. A
    storage that does not answer is waited for, up to a minute. However the `async with` is left it is so; but a
    cancellation, or an error, does not wait for `drain_timeout`, and that of a scope around it not for the storage.
    """

    def __init__(
        self,
        store: SessionStore,
        pipelines: Iterable[Pipeline],
        *,
        devices: Sequence[str] = ("cpu",),
        max_queued: int = 64,
        max_queued_per_session: int | None = None,
        max_running_per_session: int | None = None,
        max_prepared_bytes: int = 1024 * MIB,
        max_attempts: int = 3,
        start_paused: bool = False,
        lease: timedelta = timedelta(seconds=15),
        drain_timeout: timedelta = timedelta(seconds=10),
        hard_exit: bool = False,
    ) -> None:
        pipelines = list(pipelines)
        self._pipelines = {each.spec.name: each for each in pipelines}
        if len(self._pipelines) < len(pipelines):
            raise ValueError("Two pipelines have the same name; give each its own.")
        if len(set(devices)) < len(devices):
            raise ValueError("A device is named twice; it has one thread.")
        for spec in (each.spec for each in pipelines):
            if spec.device not in map(kind_of, devices):
                raise ValueError(f"Pipeline {spec.name!r} runs on {spec.device!r}; `devices` has none of that kind.")
        bounds = {
            "max_queued": max_queued,
            "max_queued_per_session": max_queued_per_session,
            "max_running_per_session": max_running_per_session,
            "max_attempts": max_attempts,
            "max_prepared_bytes": max_prepared_bytes // PIXEL_BYTES,
        }
        for name, bound in bounds.items():
            if bound is not None and bound < 1:
                raise ValueError(f"`{name}` must be at least {PIXEL_BYTES if name.endswith('bytes') else 1}.")
        if lease <= timedelta(0) or drain_timeout < timedelta(0):
            raise ValueError("`lease` must be more than nothing, `drain_timeout` not less.")
        self._store = store
        self._devices = tuple(devices)
        self._max_queued = max_queued
        self._max_queued_per_session = max_queued_per_session
        self._max_running_per_session = max_running_per_session
        self._max_prepared_bytes = max_prepared_bytes
        self._max_attempts = max_attempts
        self._start_paused = start_paused
        self._lease = lease
        self.drain_timeout = drain_timeout  # whoever ends the process waits for so long, and then for the storage
        self._hard_exit = hard_exit
        self._open = False

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        name = secrets.token_hex(8)
        self._scheduler = Scheduler(
            self._store,
            self._pipelines,
            self._devices,
            owner=name,
            max_running=self._max_running_per_session,
            ahead_pixels=self._max_prepared_bytes // PIXEL_BYTES,
            paused=self._start_paused,
        )
        self._owner = Owner(
            self._store,
            name,
            lease=self._lease,
            pipelines=self._pipelines,
            max_attempts=self._max_attempts,
            holds=self._holds,
            adopt=self._scheduler.add,
        )
        self._accepting: Counter[str] = Counter()  # by job id
        failure: Exception | None = None
        await self._owner.renew()
        try:
            async with anyio.create_task_group() as group:
                self._commits = Commits(group)
                try:
                    async with anyio.create_task_group() as lanes:
                        lanes.start_soon(self._owner.live)
                        for device in self._devices:
                            lanes.start_soon(self._scheduler.work, device)
                        self._open = True
                        try:
                            yield self
                            self._open = False
                            await self._scheduler.drain(self.drain_timeout.total_seconds())
                        except Exception as error:  # noqa: BLE001 - the caller's own, which a group would wrap
                            failure = error
                        finally:
                            self._open = False
                            try:
                                await self._commits.uninterrupted(self._halt)
                            finally:
                                lanes.cancel_scope.cancel()
                finally:
                    await self._commits.uninterrupted(self._owner.resign)
        finally:
            self._scheduler.close()
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
        arrival = self._scheduler.draw()
        entry = await anyio.to_thread.run_sync(partial(_checked, pipeline, request, job_id, self._owner.name, now))
        job = self._handle(session, job_id)
        if request.idempotency_key is not None and job_id in (await session.info()).jobs:
            return job
        self._check_open()
        if job_id not in self._accepting:
            self._check_room(session.key)
        self._accepting[job_id] += 1
        try:
            await self._commits.uninterrupted(partial(self._accept, session, entry, arrival))
        finally:
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

    async def retry(self, session: Session, job_id: str) -> LocalJob:
        """See `Dispatcher.retry`."""
        entry = await (await self.job(session, job_id)).info()
        return await self.submit(repeated(entry))

    async def cancel_session(self, session: Session) -> list[JobInfo]:
        """See `Dispatcher.cancel_session`."""
        return [await self._cancel(entry.id) for entry in await self.jobs(session) if entry.unfinished]

    def pause(self) -> None:
        """Begin no job until `resume()`; those under way go on, and jobs are accepted."""
        self._check_open()
        self._scheduler.paused = True

    def resume(self) -> None:
        """Begin jobs again."""
        self._check_open()
        self._scheduler.paused = False
        self._scheduler.wake()

    def _holds(self, job_id: str) -> bool:
        return self._scheduler.holds(job_id) or job_id in self._accepting

    def _check_open(self) -> None:
        if not self._open:
            raise StoreClosedError("The dispatcher is not open; use it inside `async with dispatcher`.")

    def _check_room(self, session_key: str) -> None:
        coming = [_keys.split_job_id(each)[0] for each in self._accepting if not self._scheduler.holds(each)]
        waiting = self._scheduler.waiting() + len(coming)
        own = self._scheduler.waiting(session_key) + coming.count(session_key)
        whose = ""
        if self._max_queued_per_session is not None and own >= self._max_queued_per_session:
            whose, waiting = " of yours", own
        elif waiting < self._max_queued:
            return
        after = self._scheduler.retry_after()
        when = "in a while" if after is None else f"in {round(after)} s"
        raise QueueFullError(f"{waiting} jobs{whose} are waiting already; try again {when}.", waiting + 1, after)

    async def _accept(self, session: Session, entry: JobInfo, arrival: int) -> None:
        if await accept_job(entry, session, blobs=self._store.blobs):
            self._scheduler.add(entry, arrival)

    async def _halt(self) -> None:
        """Stop what is under way, and see that what goes on all the same keeps nobody from its job, or this process."""
        try:
            for job in await self._scheduler.halt():
                if job.flag.in_pipeline:  # still: the storage may have taken its time for the one before
                    await self._give_back(job.id, "its pipeline does not stop")
            for job in await self._scheduler.settle():
                await self._give_back(job.id, "the storage does not take what became of it")
            if self._hard_exit and self._scheduler.busy:
                await self._owner.resign()
        finally:
            if self._hard_exit and self._scheduler.busy:
                _logger.critical("ending this process: what is under way does not stop")
                logging.shutdown()
                os._exit(1)

    async def _give_back(self, job_id: str, why: str) -> None:
        try:
            entry = await give_back_job(job_id, store=self._store, owner=self._owner.name)
        except Exception:
            # Whatever a backend raises, the other jobs are seen to.
            _logger.exception("job %s could not go back; it is taken over once the lease lapsed", job_id)
        else:
            if entry is not None and entry.status == "queued":
                _logger.error("job %s went back to the queue: %s", job_id, why)

    def _handle(self, session: Session, job_id: str) -> LocalJob:
        return LocalJob(session, job_id, log=self._scheduler.log, cancel=self._cancel)

    async def _cancel(self, job_id: str) -> JobInfo:
        return await self._commits.uninterrupted(partial(self._end, job_id))

    async def _end(self, job_id: str) -> JobInfo:
        """Not to be interrupted: the entry of a job that waits would tell of an end that nobody here knows of."""
        log = self._scheduler.log(job_id) or JobLog()
        try:
            return await cancel_job(job_id, store=self._store, emit=log.append)
        except (SessionNotFoundError, JobNotFoundError) as error:
            raise JobNotFoundError("There is no such job any more.") from error
        finally:
            self._scheduler.stop(job_id)


def _checked(pipeline: Pipeline, request: GenerationRequest, job_id: str, owner: str, now: datetime) -> JobInfo:
    """The entry for `request`, or `InvalidRequestError`; called in a thread, since a pipeline may look closely."""
    entry = pipeline.spec.entry(request, job_id, owner, now)
    check = getattr(pipeline, "check", None)
    if check is not None:
        check(entry.inputs, entry.params)
    return entry
