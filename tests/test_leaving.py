"""What becomes of jobs, and of those who follow them, when their dispatcher is left."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from async_sessions import open_store
from async_sessions.jobs import Queued
from tests.faults import FaultyBlobStore
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions import Session, SessionStore
    from async_sessions.jobs import JobContext

pytestmark = pytest.mark.anyio


async def test_who_follows_a_job_that_waits_learns_its_end_after_its_dispatcher_was_left(
    session_store: SessionStore, session: Session
) -> None:
    told: list[str] = []
    waits = anyio.Event()
    async with anyio.create_task_group() as group:
        async with local(session_store, [StepPipeline()], start_paused=True) as dispatcher:
            job = await dispatcher.submit(await session.generation_request("steps", slots=()))

            async def follow() -> None:
                async for event in job.events():
                    told.append(type(event).__name__)
                    if isinstance(event, Queued):
                        waits.set()

            group.start_soon(follow)
            await waits.wait()
        async with local(session_store, [StepPipeline()]):
            with anyio.fail_after(30):
                while told[-1] != "Succeeded":  # noqa: ASYNC110 - the follower tells nobody
                    await anyio.sleep(0.01)


async def test_leaving_goes_on_where_a_job_that_does_not_stop_cant_go_back_to_the_queue() -> None:
    blobs = FaultyBlobStore()
    pipeline = StepPipeline()
    stop = threading.Event()

    def ignore_everybody(context: JobContext) -> None:
        assert stop.wait(30)

    def full(key: str) -> bool:
        stop.set()
        return True

    pipeline.before_generate = ignore_everybody
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        async with local(store, [pipeline]) as dispatcher:
            job = await dispatcher.submit(await session.generation_request("steps", slots=()))
            with anyio.fail_after(30):
                while (await job.info()).status != "running":  # noqa: ASYNC110 - as another process would
                    await anyio.sleep(0.01)
            blobs.full_for = full
        blobs.full_for = lambda key: False
        async with local(store, [StepPipeline()]) as dispatcher:
            with anyio.fail_after(30):
                await (await dispatcher.job(session, job.id)).result()
