"""`Run`: one attempt at one job, step by step; `run_job` puts the steps together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from async_sessions import _entry, _keys
from async_sessions._events import END, Cancelled, Failed, JobEvent, Progress, Started, Succeeded, terminal_event
from async_sessions._lane import Lane, Latest, run_in_worker
from async_sessions._outputs import NotLoadedError, check, keep, out_of_device_memory, remove_files
from async_sessions._pace import Pace
from async_sessions._pipeline import JobContext
from async_sessions.errors import (
    JobCancelledError,
    JobNotFoundError,
    SessionNotFoundError,
    UnknownPipelineError,
)

if TYPE_CHECKING:
    from async_sessions._pipeline import CancelFlag, Output, Pipeline, Report
    from async_sessions.records import JobError, JobInfo, JobStatus, OutputRecord, RetryReason
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

LOOK_INTERVAL: Final = 0.25  # seconds between two looks at the entry of a job that reports
PROGRESS_INTERVAL: Final = 0.1  # seconds between two reports that followers are told of
PATIENCE: Final = 10.0  # seconds after which a pipeline that goes on though it was asked to stop is reported

_logger = logging.getLogger("async_sessions")


class OutOfDeviceMemoryError(Exception):
    """Its cause is what the pipeline raised; the job is to be tried once more."""


class Run:
    """One attempt at one job. Once it has begun, its number is what the entry must still have when this one ends."""

    def __init__(
        self,
        job_id: str,
        store: SessionStore,
        emit: Callable[[JobEvent], None],
        flag: CancelFlag,
        *,
        owner: str | None = None,
    ) -> None:
        self.flag = flag
        self.entry: JobInfo | None = None  # as it was last written
        self._job_id = job_id
        self._store = store
        self._emit = emit
        self._owner = owner
        self._session: Session | None = None
        self._attempt: int | None = None
        self._events = 0
        self._told = False
        self._reported = anyio.Event()

    async def begin(self) -> JobInfo | None:
        """Begin the next attempt and return its entry.

        `None` where there is nothing to run: the job is over, which is told then, or is somebody else's.
        """
        now = self._store.clock()

        def change(entry: JobInfo | None) -> JobInfo | None:
            changed = _entry.begun(entry, owner=self._owner, now=now)
            # known here: the commit also holds where its caller is cancelled; and anew, should this be called again
            self._attempt = changed.attempt if changed is not None and changed.under_way else None
            return changed

        entry = await self._write(change)
        return entry if entry is not None and entry.under_way and entry.attempt == self._attempt else None

    async def outputs(
        self, entry: JobInfo, pipelines: Mapping[str, Pipeline], lane: Lane | None
    ) -> dict[str, OutputRecord]:
        """See the attempt through. Raises whatever went wrong.

        `JobCancelledError` where the job was to stop, for the reason that the flag tells; `OutOfDeviceMemoryError`
        where it should be tried once more.
        """
        if (pipeline := pipelines.get(entry.pipeline)) is None:
            raise UnknownPipelineError(f"There is no pipeline {entry.pipeline!r} here, only {', '.join(pipelines)}.")
        async with AsyncExitStack() as stack:
            if lane is None:
                lane = await stack.enter_async_context(Lane(pipeline.spec.device, {entry.pipeline: pipeline}))
                await lane.load()
            return await self._produce(entry, pipeline, lane)

    async def end(
        self, status: JobStatus, *, outputs: dict[str, OutputRecord] | None = None, error: JobError | None = None
    ) -> JobInfo | None:
        """Write the end, unless the job has one or belongs to a newer attempt; drop its marker; tell what is true."""
        now = self._store.clock()
        return await self._write(lambda entry: _entry.ended(entry, self._attempt, status, now, outputs, error))

    async def give_back(self, retry: RetryReason | None = None) -> JobInfo | None:
        """Let the job wait again, here or elsewhere: the attempt that began here, or else any of this owner's."""
        now, attempt, owner = self._store.clock(), self._attempt, self._owner
        if attempt is None and owner is None:
            return None
        return await self._write(
            lambda entry: _entry.given_back(entry, attempt=attempt, owner=owner, now=now, retry=retry)
        )

    async def cancel(self) -> JobInfo:
        """Write the wish, which is the end of a job that no device works for yet."""
        now = self._store.clock()
        entry = await (await self._open()).edit_job(self._job_id, lambda entry: _entry.cancelled(entry, now))
        if entry is None:
            raise JobNotFoundError("There is no such job.")
        await self.settle(entry)
        return entry

    async def take_over(self, seen: JobInfo, *, owner: str | None, max_attempts: int) -> JobInfo | None:
        """See `take_over_job`."""
        now = self._store.clock()
        return await self._write(
            lambda entry: _entry.taken_over(entry, seen, owner=owner, max_attempts=max_attempts, now=now)
        )

    async def settle(self, entry: JobInfo | None) -> None:
        """What follows from the end that `entry` tells; `None` is that of a job that went with its session."""
        if entry is not None and entry.unfinished:
            return
        try:
            await self._store.blobs.delete(_keys.queue_marker(self._job_id))
        except Exception:  # a hint, which the entry overrules
            _logger.exception("could not delete the marker of job %s", self._job_id)
        gone = Cancelled(id=f"{self._attempt or 0}.{END}", at=self._store.clock())
        self._tell(gone if entry is None else terminal_event(entry) or gone)

    async def _write(self, change: Callable[[JobInfo | None], JobInfo | None]) -> JobInfo | None:
        try:
            entry = await (await self._open()).edit_job(self._job_id, change)
        except SessionNotFoundError:
            entry = None
        self.entry = entry
        await self.settle(entry)
        return entry

    async def _open(self) -> Session:
        if self._session is None:
            self._session = await self._store.open_by_key(_keys.split_job_id(self._job_id)[0])
        return self._session

    async def _produce(self, entry: JobInfo, pipeline: Pipeline, lane: Lane) -> dict[str, OutputRecord]:
        self._stop_if_asked()
        session = await self._open()
        again = entry.retry == "out_of_memory"
        if again or entry.pipeline in lane.lost:
            async with self._turn(lane):
                if again or entry.pipeline in lane.lost:  # else another job had it loaded meanwhile
                    with self._in_pipeline():
                        await lane.reload(entry.pipeline)
        _check_loaded(entry.pipeline, lane)
        inputs = {role: await session.read_record(record) for role, record in entry.inputs.items()}
        self._stop_if_asked()
        prepared: list[Any] = []
        produced: dict[str, Output] = {}

        def prepare() -> None:
            prepared.append(pipeline.prepare(inputs, entry.params))

        try:
            with self._in_pipeline():
                check(await run_in_worker(prepare))
            async with AsyncExitStack() as stack:
                async with self._turn(lane):
                    _check_loaded(entry.pipeline, lane)  # another job's reload may have failed since

                    def generate() -> None:
                        produced.update(pipeline.generate(prepared.pop(), entry.params, context))

                    async with self._followed(session, pipeline, lane) as context:
                        with self._in_pipeline():
                            raised = await lane.run(generate, stop=partial(self.flag.set, "drained"))
                    self._judge(raised, entry)
                    # while these outputs are stored the device runs the next job, but not one more
                    await stack.enter_async_context(lane.storing)
                return {name: await keep(session, name, output) for name, output in produced.items()}
        finally:
            prepared.clear()
            with anyio.CancelScope(shield=True):
                await run_in_worker(partial(remove_files, produced.values()))

    def _judge(self, raised: BaseException | None, entry: JobInfo) -> None:
        """What counts where a pipeline was to stop: a result that came all the same, unless the user wants none."""
        if self.flag.reason == "cancelled":
            self._stop_if_asked()
        if raised is not None and out_of_device_memory(raised) and entry.retry != "out_of_memory":
            raise OutOfDeviceMemoryError from raised
        check(raised)

    @contextmanager
    def _in_pipeline(self) -> Iterator[None]:
        self.flag.in_pipeline = True
        try:
            yield
        finally:
            self.flag.in_pipeline = False

    @asynccontextmanager
    async def _turn(self, lane: Lane) -> AsyncIterator[None]:
        """The device is this job's alone. `JobCancelledError` where the job is to stop before that."""

        async def give_up() -> None:
            await self.flag.wait()
            group.cancel_scope.cancel()

        acquired = False
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(give_up)
                await lane.turn.acquire()
                acquired = True
                group.cancel_scope.cancel()
            self._stop_if_asked()
            yield
        finally:
            if acquired:
                lane.turn.release()

    def _stop_if_asked(self) -> None:
        if self.flag.is_set():
            raise JobCancelledError("The job was cancelled.")

    @asynccontextmanager
    async def _followed(self, session: Session, pipeline: Pipeline, lane: Lane) -> AsyncIterator[JobContext]:
        """The time in which the device works for this job: its reports are told, and it is looked after."""
        attempt = self._attempt or 0
        pace, loop = Pace(), asyncio.get_running_loop()  # whose time it is: `progress` is called in no task

        def progress(report: Report) -> None:
            step, total, note, preview = report
            now, eta = self._store.clock(), pace.remaining(step, total, loop.time())
            self._tell(
                Progress(id=self._next_id(), at=now, step=step, total=total, note=note, preview=preview, eta=eta)
            )
            self._reported.set()

        reports: Latest[Report] = Latest(progress, interval=PROGRESS_INTERVAL)
        try:
            self._tell(Started(id=self._next_id(), at=self._store.clock(), attempt=attempt))
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, session)
                group.start_soon(self._complain, pipeline.spec.name)
                if pipeline.spec.timeout is not None:
                    group.start_soon(self._time_out, pipeline.spec.timeout)
                yield JobContext(self._job_id, attempt, lane.device, flag=self.flag, tell=reports.put)
                group.cancel_scope.cancel()
        finally:
            reports.close()

    async def _watch(self, session: Session) -> None:
        """Write that the device has the job; after a report, look whether somebody else has cancelled or deleted it."""
        attempt, now = self._attempt or 0, self._store.clock()
        while True:
            try:
                entry = await session.edit_job(self._job_id, lambda entry: _entry.taken_by_device(entry, attempt, now))
                if not _entry.wanted(entry, attempt):
                    self.flag.set()
            except SessionNotFoundError:
                self.flag.set()
            except Exception:
                # Whatever a backend raises, the run goes on; if it lasts, the end of the job will tell.
                _logger.info("can't see whether job %s is still wanted", self._job_id, exc_info=True)
            await anyio.sleep(LOOK_INTERVAL)
            await self._reported.wait()
            self._reported = anyio.Event()

    async def _time_out(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        self.flag.set("timeout")

    async def _complain(self, pipeline: str) -> None:
        await self.flag.wait()
        await anyio.sleep(PATIENCE)
        _logger.warning(
            "pipeline %s goes on with job %s, which was to stop %g s ago; it has to call `context.report` or "
            "`context.raise_if_cancelled` now and then",
            pipeline,
            self._job_id,
            PATIENCE,
        )

    def _next_id(self) -> str:
        self._events += 1
        return f"{self._attempt}.{self._events}"

    def _tell(self, event: JobEvent) -> None:
        if not self._told:
            self._told = isinstance(event, Succeeded | Failed | Cancelled)
            self._emit(event)


def _check_loaded(pipeline: str, lane: Lane) -> None:
    if pipeline in lane.failures:
        raise NotLoadedError from lane.failures[pipeline]
