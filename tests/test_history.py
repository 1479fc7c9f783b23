from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from async_sessions import (
    InvalidRequestError,
    Limits,
    Session,
    SessionStore,
    SlotEmptyError,
    open_store,
)
from async_sessions.jobs import Succeeded
from tests.faults import keys_of
from tests.following import HeldPipeline, collected, submit
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.dispatch import Dispatcher, Job
    from async_sessions.testing.clock import FrozenClock

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (40, 30), "blue")


async def with_image(dispatcher: Dispatcher, session: Session, **params: Any) -> Job:
    return await dispatcher.submit(await session.generation_request("steps", slots=["start"], params=params))


async def test_a_session_remembers_its_last_jobs_and_the_results_of_older_ones_go() -> None:
    async with open_store("memory://", cleanup_interval=None, limits=Limits(keep_jobs=2)) as store:
        session = await store.create_session()
        async with local(store, [StepPipeline()]) as dispatcher:
            jobs = []
            for _ in range(4):
                jobs.append(await submit(dispatcher, session))
                await jobs[-1].result()
            kept = await dispatcher.jobs(session)
            assert [info.id for info in kept] == [job.id for job in jobs[2:]]
            outputs = {output.blob for info in kept for output in info.outputs.values()}
            assert await keys_of(store.blobs, "blobs/") == outputs
            assert isinstance((await collected(jobs[0]))[-1], Succeeded)  # who still follows it learns of its end


@pytest.mark.parametrize("back", [timedelta(0), timedelta(hours=1)], ids=["standing", "set back"])
async def test_the_job_that_has_just_ended_is_remembered_whatever_the_clock_says(
    frozen_clock: FrozenClock, back: timedelta
) -> None:
    async with open_store("memory://", cleanup_interval=None, clock=frozen_clock, limits=Limits(keep_jobs=1)) as store:
        session = await store.create_session()
        pipeline = HeldPipeline()
        async with local(store, [pipeline], devices=["cpu", "cpu:1"]) as dispatcher:
            slow, quick = [await submit(dispatcher, session, label=label) for label in ("slow", "quick")]
            await pipeline.begun("generate slow")
            pipeline.let_go("quick")
            await quick.result()
            frozen_clock.now -= back
            pipeline.let_go("slow")
            await slow.result()
            assert [info.id for info in await dispatcher.jobs(session)] == [slow.id]


async def test_a_store_that_would_forget_every_job_at_its_end_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_jobs"):
        Limits(keep_jobs=0)


async def test_results_make_room_for_an_image_and_for_newer_results() -> None:
    async with open_store("memory://", cleanup_interval=None, limits=Limits(max_session_bytes=4000)) as store:
        session = await store.create_session()
        pipeline = StepPipeline()
        pipeline.make = lambda params: {"video": (bytes(1500), "video/mp4")}
        async with local(store, [pipeline]) as dispatcher:
            jobs = []
            for _ in range(4):
                jobs.append(await submit(dispatcher, session))
                await jobs[-1].result()
            assert [info.id for info in await dispatcher.jobs(session)] == [job.id for job in jobs[2:]]
            await session.store_image(RED, "start")
            await session.store_image(BLUE, "start")
            assert (await session.info()).total_bytes <= 4000
            assert len((await session.info()).recent) == 1  # the results went first
            too_much = StepPipeline("more")
            too_much.make = lambda params: {"video": (bytes(4001), "video/mp4")}
        async with local(store, [too_much]) as dispatcher:
            job = await submit(dispatcher, session, "more")
            await collected(job)
            error = (await job.info()).error
            assert error is not None
            assert error.kind == "QuotaExceededError"


# --- once more


async def test_a_retry_takes_the_same_image_and_parameters_though_the_slot_holds_another_one(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(RED, "start")
    pipeline = StepPipeline(start=True)
    async with local(session_store, [pipeline]) as dispatcher:
        first = await with_image(dispatcher, session, label="mine", steps=7, fail="not this time")
        await collected(first)
        await session.store_image(BLUE, "start")
        again = await dispatcher.retry(session, first.id)
        await collected(again)
        infos = [await job.info() for job in (first, again)]
    assert infos[0].id != infos[1].id
    assert [(info.inputs, info.params, info.status) for info in infos] == [
        (infos[0].inputs, infos[0].params, "failed")
    ] * 2
    assert pipeline.ran == ["mine", "mine"]


async def test_a_job_that_is_not_over_is_not_retried(session_store: SessionStore, session: Session) -> None:
    async with local(session_store, [StepPipeline()], start_paused=True) as dispatcher:
        job = await submit(dispatcher, session)
        with pytest.raises(InvalidRequestError, match="not over yet"):
            await dispatcher.retry(session, job.id)
        await job.cancel()
        assert (await dispatcher.retry(session, job.id)).id != job.id


@pytest.mark.parametrize("required", [True, False])
async def test_a_job_whose_image_was_removed_for_good_is_not_retried_without_it(
    session_store: SessionStore, session: Session, required: bool
) -> None:
    await session.store_image(RED, "start")
    pipeline = HeldPipeline(start=required)
    pipeline.make = lambda params: {"text": (b"done", "text/plain")}
    async with local(session_store, [pipeline]) as dispatcher:
        job = await with_image(dispatcher, session, label="a")
        await pipeline.begun("generate a")
        await session.clear_all_images()
        pipeline.let_go("a")
        await job.result()
        with pytest.raises(SlotEmptyError, match="'start' was removed"):
            await dispatcher.retry(session, job.id)
        assert len(await dispatcher.jobs(session)) == 1


# --- what a pipeline checks before it takes a job


async def test_a_pipeline_refuses_what_it_could_not_do_before_anything_is_written(
    session_store: SessionStore, session: Session
) -> None:
    seen: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []

    class Checking(StepPipeline):
        def check(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> None:
            seen.append((inputs, params))
            if params["steps"] > 10:
                raise InvalidRequestError("At most 10 steps.")

    record = await session.store_image(RED, "start")
    before = await keys_of(session_store.blobs)
    async with local(session_store, [Checking(start=True)]) as dispatcher:
        leases = await keys_of(session_store.blobs, "owners/")
        with pytest.raises(InvalidRequestError, match="At most 10"):
            await with_image(dispatcher, session, steps=11)
        assert await keys_of(session_store.blobs) == before | leases
        job = await with_image(dispatcher, session, steps=10)
        await job.result()
    assert [inputs for inputs, _ in seen] == [{"start": record}] * 2
    assert [params["label"] for _, params in seen] == [""] * 2
