from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from async_sessions import JobCancelledError, JobFailedError, Session, SessionNotFoundError, SessionStore
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import Progress
from async_sessions.testing.pipeline import FakePipeline, OutOfMemoryError, Stage

if TYPE_CHECKING:
    from async_sessions.testing.clock import FrozenClock

RED = Image.new("RGB", (40, 30), "red")


# --- the clock


@pytest.mark.anyio
async def test_a_session_expires_when_the_clock_is_advanced(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    assert session.id is not None
    assert (await session.info()).created_at == frozen_clock.now
    frozen_clock.advance(timedelta(hours=23))
    await session_store.restore_session(session.id)
    frozen_clock.advance(hours=2, minutes=1)
    with pytest.raises(SessionNotFoundError):
        await session_store.restore_session(session.id)


# --- the pipeline


@pytest.mark.anyio
async def test_a_fake_pipeline_tells_what_it_was_asked(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    await session.store_image(RED, "start")
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        job = await dispatcher.submit(await session.generation_request("fake", params={"prompt": "a boat"}))
        assert (await job.result())["video"].media_type == "video/mp4"
        assert max(event.step for event in [event async for event in job.events()] if isinstance(event, Progress)) == 3
    [run] = fake_pipeline.runs
    assert (run.job_id, run.attempt, run.device, run.params) == (job.id, 1, "cpu", {"prompt": "a boat"})
    assert run.images["start"].getpixel((0, 0)) == (255, 0, 0)
    assert fake_pipeline.calls == ["load", "prepare", "generate", "release"]


@pytest.mark.anyio
async def test_a_held_job_waits_for_its_gate_and_can_be_cancelled_there(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        with fake_pipeline.held() as gate:
            job = await dispatcher.submit(await session.generation_request("fake"))
            await gate.reached()
            assert (await job.info()).status == "running"
            await job.cancel()
            with pytest.raises(JobCancelledError):
                await job.result()
        with fake_pipeline.held() as gate:
            job = await dispatcher.submit(await session.generation_request("fake"))
            await gate.reached()
            gate.open()
            await job.result()
        await (await dispatcher.submit(await session.generation_request("fake"))).result()
    assert len(fake_pipeline.runs) == 3


@pytest.mark.anyio
@pytest.mark.parametrize("stage", ["load", "prepare", "generate"])
async def test_a_fake_pipeline_fails_where_and_as_often_as_it_is_told(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline, stage: Stage
) -> None:
    fake_pipeline.fail(OutOfMemoryError(), at=stage)
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        job = await dispatcher.submit(await session.generation_request("fake"))
        with pytest.raises(JobFailedError, match="CUDA out of memory"):
            await job.result()
        error = (await job.info()).error
        assert error is not None
        assert error.kind == "OutOfMemoryError"
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        await (await dispatcher.submit(await session.generation_request("fake"))).result()
