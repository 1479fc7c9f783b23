from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import anyio
import pytest

from async_sessions import open_store
from tests.faults import FaultyBlobStore
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.jobs import JobContext

pytestmark = pytest.mark.anyio


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
