"""`Run`: one attempt at one job, step by step; `run_job` puts the steps together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._events import END, Cancelled, Failed, JobEvent, Progress, Started, Succeeded, terminal_event
from async_sessions._lane import Lane, Latest, run_in_worker
from async_sessions._pipeline import JobContext
from async_sessions.errors import (
    AsyncSessionsError,
    JobCancelledError,
    JobNotFoundError,
    SessionNotFoundError,
    UnknownPipelineError,
)
from async_sessions.records import JobError, JobInfo, JobStatus, OutputRecord

if TYPE_CHECKING:
    from async_sessions._pipeline import CancelFlag, Output, Pipeline, Report
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

MAX_MESSAGE: Final = 2000  # characters of a failure that are kept
LOOK_INTERVAL: Final = 0.25  # seconds between two looks at the entry of a job that reports

MEDIA_TYPES: Final = {
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".txt": "text/plain",
    ".wav": "audio/wav",
    ".webm": "video/webm",
    ".webp": "image/webp",
}

_logger = logging.getLogger("async_sessions")


class _NotLoadedError(Exception):
    """Its cause is what `Pipeline.load` raised."""


class Run:
    """One attempt at one job. `attempt` is the number that the entry must still have when this one ends."""

    def __init__(
        self,
        job_id: str,
        store: SessionStore,
        emit: Callable[[JobEvent], None],
        flag: CancelFlag,
        *,
        attempt: int | None = None,
    ) -> None:
        self.flag = flag
        self._job_id = job_id
        self._store = store
        self._emit = emit
        self._session: Session | None = None
        self._attempt = attempt
        self._events = 0
        self._told = False
        self._reported = anyio.Event()

    async def outputs(self, pipelines: Mapping[str, Pipeline], lane: Lane | None) -> dict[str, OutputRecord]:
        """Start the job and run it. Raises whatever went wrong, `JobCancelledError` where it is not wanted any more."""
        session = await self._open()
        entry = await self._start(session)
        if (pipeline := pipelines.get(entry.pipeline)) is None:
            raise UnknownPipelineError(f"There is no pipeline {entry.pipeline!r} here, only {', '.join(pipelines)}.")
        async with AsyncExitStack() as stack:
            if lane is None:
                lane = await stack.enter_async_context(Lane(pipeline.spec.device, {entry.pipeline: pipeline}))
                await lane.load()
            if entry.pipeline in lane.failures:
                raise _NotLoadedError from lane.failures[entry.pipeline]
            return await self._produce(session, entry, pipeline, lane)

    async def end(
        self,
        status: JobStatus,
        *,
        outputs: dict[str, OutputRecord] | None = None,
        error: JobError | None = None,
    ) -> JobInfo | None:
        """Write the end, unless the job has one or belongs to a newer attempt; drop its marker; tell what is true."""

        def change(entry: JobInfo | None) -> JobInfo | None:
            if entry is None or not entry.unfinished:
                return None
            ours = entry.status == "queued" or entry.attempt == self._attempt
            now = self._store.clock()
            return replace(entry, status=status, finished_at=now, outputs=outputs or {}, error=error) if ours else None

        try:
            entry = await (await self._open()).edit_job(self._job_id, change)
        except SessionNotFoundError:
            entry = None
        except Exception as failure:
            _logger.exception("the end of job %s could not be stored", self._job_id)
            if status == "succeeded":
                return await self.end("failed", error=job_error(failure))
            self._tell(Failed(id=self._last_id(), at=self._store.clock(), error=error or job_error(failure)))
            return None
        await self._settle(entry)
        return entry

    async def cancel(self) -> JobInfo:
        """Write the wish, which is the end of a job that nobody runs yet."""

        def change(entry: JobInfo | None) -> JobInfo | None:
            if entry is None or not entry.unfinished or entry.cancel_requested:
                return None
            if entry.status == "queued":
                return replace(entry, status="cancelled", cancel_requested=True, finished_at=self._store.clock())
            return replace(entry, cancel_requested=True)

        entry = await (await self._open()).edit_job(self._job_id, change)
        if entry is None:
            raise JobNotFoundError("There is no such job.")
        await self._settle(entry)
        return entry

    async def _settle(self, entry: JobInfo | None) -> None:
        """What follows from the end that `entry` tells; `None` is that of a job that went with its session."""
        if entry is not None and entry.unfinished:
            return
        try:
            await self._store.blobs.delete(_keys.queue_marker(self._job_id))
        except Exception:  # a hint, which the entry overrules
            _logger.exception("could not delete the marker of job %s", self._job_id)
        gone = Cancelled(id=self._last_id(), at=self._store.clock())
        self._tell(gone if entry is None else terminal_event(entry) or gone)

    async def _open(self) -> Session:
        if self._session is None:
            self._session = await self._store.open_by_key(_keys.split_job_id(self._job_id)[0])
        return self._session

    async def _start(self, session: Session) -> JobInfo:
        def change(entry: JobInfo | None) -> JobInfo | None:
            if entry is None or not entry.unfinished or entry.cancel_requested:
                return None
            self._attempt = entry.attempt + 1  # known here: the commit also holds where its caller is cancelled
            return replace(entry, status="running", attempt=self._attempt, started_at=self._store.clock())

        entry = await session.edit_job(self._job_id, change)
        if entry is None or not entry.unfinished or entry.cancel_requested:
            self.flag.set()
            raise JobCancelledError("The job is over, or was cancelled.")
        self._tell(Started(id=self._next_id(), at=self._store.clock(), attempt=entry.attempt))
        return entry

    async def _produce(
        self, session: Session, entry: JobInfo, pipeline: Pipeline, lane: Lane
    ) -> dict[str, OutputRecord]:
        inputs = {role: await session.read_record(record) for role, record in entry.inputs.items()}
        reports: Latest[Report] = Latest(self._progress)
        context = JobContext(entry.id, entry.attempt, lane.device, flag=self.flag, tell=reports.put)
        prepared: list[Any] = []
        produced: dict[str, Output] = {}

        def prepare() -> None:
            prepared.append(pipeline.prepare(inputs, entry.params))

        def generate() -> None:
            produced.update(pipeline.generate(prepared.pop(), entry.params, context))

        try:
            _check(await run_in_worker(prepare))
            context.raise_if_cancelled()
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, session)
                raised = await lane.run(generate, stop=self.flag.set)
                group.cancel_scope.cancel()
            _check(raised)
            context.raise_if_cancelled()
            return {name: await _keep(session, name, output) for name, output in produced.items()}
        finally:
            reports.close()
            with anyio.CancelScope(shield=True):
                await run_in_worker(partial(_remove_files, produced.values()))

    async def _watch(self, session: Session) -> None:
        """After a report, look whether the job is still wanted: another process may have cancelled or deleted it."""
        while True:
            await self._reported.wait()
            self._reported = anyio.Event()
            try:
                entry = (await session.info()).jobs.get(self._job_id)
                wanted = (
                    entry is not None
                    and entry.unfinished
                    and entry.attempt == self._attempt
                    and not entry.cancel_requested
                )
            except SessionNotFoundError:
                wanted = False
            except AsyncSessionsError:  # if it lasts, the end of the job will tell
                wanted = True
            if not wanted:
                self.flag.set()
            await anyio.sleep(LOOK_INTERVAL)

    def _progress(self, report: Report) -> None:
        step, total, note, preview = report
        now = self._store.clock()
        self._tell(Progress(id=self._next_id(), at=now, step=step, total=total, note=note, preview=preview))
        self._reported.set()

    def _next_id(self) -> str:
        self._events += 1
        return f"{self._attempt}.{self._events}"

    def _last_id(self) -> str:
        return f"{self._attempt or 0}.{END}"

    def _tell(self, event: JobEvent) -> None:
        if not self._told:
            self._told = isinstance(event, Succeeded | Failed | Cancelled)
            self._emit(event)


async def _keep(session: Session, name: str, output: Output) -> OutputRecord:
    _keys.check_slot(name)
    if isinstance(output, tuple):
        return await session.store_output(output[0], name=name, media_type=output[1])
    suffix = output.suffix.lower() if isinstance(output, Path) else ".png"
    return await session.store_output(output, name=name, media_type=MEDIA_TYPES.get(suffix, "application/octet-stream"))


def _remove_files(outputs: Iterable[Output]) -> None:
    for output in outputs:
        if isinstance(output, Path):
            try:
                output.unlink(missing_ok=True)
            except OSError:  # the pipeline's own leftover; the job's end matters more
                _logger.warning("could not delete %s", output, exc_info=True)


def _check(raised: BaseException | None) -> None:
    """Raise what a pipeline raised in its thread; there, a `SystemExit` is a failure like any other."""
    if raised is None:
        return
    if isinstance(raised, Exception):
        raise raised
    raise RuntimeError(f"{type(raised).__name__}: {raised}") from raised


def job_error(error: Exception) -> JobError:
    if isinstance(error, _NotLoadedError) and error.__cause__ is not None:
        kind, message = type(error.__cause__).__name__, f"The pipeline could not be loaded: {error.__cause__}"
    else:
        kind, message = type(error).__name__, str(error)
    return JobError(kind, message[:MAX_MESSAGE].encode(errors="replace").decode())
