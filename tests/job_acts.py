"""A dispatcher with jobs that wait, run and are over, for calls that are cancelled; and what must hold after each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
from PIL import Image

from async_sessions import JobCancelledError, SessionNotFoundError, open_store
from async_sessions.jobs import Started
from async_sessions.testing.cancellation import Run, cancel_everywhere
from tests.faults import FaultyBlobStore, keys_of
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions import JobInfo, Session, SessionStore
    from async_sessions.dispatch import Job, LocalDispatcher
    from async_sessions.dispatch._scheduler import Scheduler

Act = Callable[["JobStage"], Coroutine[Any, Any, object]]
RED = Image.new("RGB", (40, 30), "red")


class JobStage:
    """A paused dispatcher: `over` has ended, `waiting` waits, and so does another; with `runs`, one is `running`."""

    def __init__(self, store: SessionStore, dispatcher: LocalDispatcher, *, runs: bool) -> None:
        self.store = store
        self.dispatcher = dispatcher
        self.session: Session
        self.over: Job
        self.waiting: Job
        self.running: Job | None = None
        self._runs = runs

    async def submit(self, **params: Any) -> Job:
        return await self.dispatcher.submit(await self.session.generation_request("steps", params=params))

    async def prepare(self) -> None:
        self.session = await self.store.create_session()
        await self.session.store_image(RED, "start")
        self.dispatcher.resume()
        self.over = await self.submit()
        await self.over.result()
        if self._runs:
            self.running = await self.submit(endless=True)
            async for event in self.running.events():
                if isinstance(event, Started):
                    break
        self.dispatcher.pause()
        self.waiting = await self.submit()
        await self.submit()

    async def entries(self) -> dict[str, JobInfo]:
        try:
            return dict((await self.session.info()).jobs)
        except SessionNotFoundError:
            return {}

    async def check(self, run: Run) -> None:
        """Somebody looks after every entry, every marker has one, and all come to an end; then nothing is left."""
        scheduler = self.dispatcher._scheduler
        entries = await self.entries()
        unfinished = {job_id for job_id, entry in entries.items() if entry.unfinished}
        if not self._runs and entries:
            assert await keys_of(self.store.blobs, "queue/") == {f"queue/{job_id}.json" for job_id in unfinished}
            assert set(scheduler._jobs) == unfinished
        assert all(map(self.dispatcher._holds, unfinished)) or self._runs
        assert not self.dispatcher._accepting
        self.dispatcher.resume()
        if self.running is not None:
            await self.running.cancel()
        with anyio.fail_after(20):
            while scheduler._jobs:  # noqa: ASYNC110 - the scheduler tells nobody
                await anyio.sleep(0.0005)
        for entry in (await self.entries()).values():
            assert entry.status in ("succeeded", "cancelled")
            assert (entry.status == "cancelled") == entry.cancel_requested
            assert (entry.attempt - entry.excused) <= 1
        assert await keys_of(self.store.blobs, "queue/") == set()
        assert not scheduler._under_way
        assert list(scheduler._line.order()) == []
        assert scheduler._ahead.free == scheduler._ahead.pixels
        assert followers(scheduler) == 0
        assert lanes() == 1
        with suppress(SessionNotFoundError):
            await self.session.delete()
        assert await keys_of(self.store.blobs, "blobs/") == set()


def lanes() -> int:
    return sum(thread.name.startswith("async_sessions-cpu") for thread in threading.enumerate())


def followers(scheduler: Scheduler) -> int:
    """Who waits for something to happen to a job that is over."""
    return sum(log._changed.statistics().tasks_waiting for log in scheduler._ended.values() if log._changed is not None)


async def _events(stage: JobStage) -> None:
    stage.dispatcher.resume()
    async for _ in stage.waiting.events():
        pass


async def _result(stage: JobStage) -> None:
    stage.dispatcher.resume()
    await stage.waiting.result()


async def _result_of_a_cancelled_job(stage: JobStage) -> None:
    await stage.waiting.cancel()
    with suppress(JobCancelledError):
        await stage.waiting.result()


async def _cancel_running(stage: JobStage) -> None:
    assert stage.running is not None
    await stage.running.cancel()


ACTS: dict[str, Act] = {
    "submit": lambda stage: stage.submit(),
    "events": _events,
    "result": _result,
    "result of a cancelled job": _result_of_a_cancelled_job,
    "cancel of a job that waits": lambda stage: stage.waiting.cancel(),
    "cancel of a job that runs": _cancel_running,
    "cancel of a job that is over": lambda stage: stage.over.cancel(),
    "retry": lambda stage: stage.dispatcher.retry(stage.session, stage.over.id),
    "cancel_session": lambda stage: stage.dispatcher.cancel_session(stage.session),
    "cancel_session where one runs": lambda stage: stage.dispatcher.cancel_session(stage.session),
    "job": lambda stage: stage.dispatcher.job(stage.session, stage.over.id),
    "jobs": lambda stage: stage.dispatcher.jobs(stage.session),
    "delete of the session": lambda stage: stage.session.delete(),
}
RUNNING = {"cancel of a job that runs", "cancel_session where one runs"}


async def cancel_job_act(name: str, every: int = 1) -> list[Run]:
    """Cancel one of `ACTS` at every `every`th place; see `JobStage.check`."""
    async with (
        open_store(FaultyBlobStore(), cleanup_interval=None) as store,
        local(store, [StepPipeline(start=True)]) as dispatcher,
    ):
        stage = JobStage(store, dispatcher, runs=name in RUNNING)
        return await cancel_everywhere(partial(ACTS[name], stage), stage.check, prepare=stage.prepare, every=every)


async def cancel_a_dispatcher(every: int = 1) -> list[Run]:
    """Enter a dispatcher, let it run jobs, and leave it, cancelled at every `every`th place; the next one finds all."""
    accepted: set[str] = set()
    async with open_store(FaultyBlobStore(), cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()

        async def prepare() -> None:
            nonlocal session
            session = await store.create_session()
            accepted.clear()

        async def live() -> None:
            async with AsyncExitStack() as stack:
                dispatcher = await stack.enter_async_context(local(store, [pipeline]))
                for params in ({}, {"endless": True}, {}):
                    job = await dispatcher.submit(await session.generation_request("steps", slots=(), params=params))
                    accepted.add(job.id)
                    if params:
                        async for event in job.events():
                            if isinstance(event, Started):
                                break

        async def check(run: Run) -> None:
            assert lanes() == 0
            assert await keys_of(store.blobs, "owners/") == set()
            entries = (await session.info()).jobs
            assert accepted <= set(entries)
            unfinished = {f"queue/{entry.id}.json" for entry in entries.values() if entry.unfinished}
            assert await keys_of(store.blobs, "queue/") == unfinished
            for entry in entries.values():
                assert entry.status in ("queued", "succeeded")
                assert entry.attempt - entry.excused == (1 if entry.status == "succeeded" else 0)
            await session.delete()
            for marker in unfinished:
                await store.blobs.delete(marker)

        return await cancel_everywhere(live, check, prepare=prepare, every=every)
