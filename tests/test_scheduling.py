from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from PIL import Image

from async_sessions import QueueFullError, Session, SessionStore, open_store
from async_sessions.jobs import Cancelled, Queued
from async_sessions.records import KIB
from tests.faults import FaultyBlobStore
from tests.following import HeldPipeline, collected, submit, until
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.dispatch import Dispatcher, Job

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
TWO = ["cpu", "cpu:1"]


async def with_image(dispatcher: Dispatcher, session: Session, pipeline: str, label: str) -> Job:
    request = await session.generation_request(pipeline, slots=["start"], params={"label": label})
    return await dispatcher.submit(request)


async def position(job: Job) -> int:
    event = await until(job, Queued)
    assert isinstance(event, Queued)
    return event.position


@asynccontextmanager
async def ends(*jobs: Job) -> AsyncIterator[None]:
    """What the body does ends these jobs."""
    yield
    with anyio.fail_after(30):
        for job in jobs:
            await job.result()


# --- whose turn it is


async def test_of_a_session_with_twenty_jobs_and_one_with_one_the_others_job_is_second(
    session_store: SessionStore, session: Session
) -> None:
    other, pipeline = await session_store.create_session(), StepPipeline()
    async with local(session_store, [pipeline], start_paused=True) as dispatcher:
        many = [await submit(dispatcher, session, label=f"a{number}") for number in range(20)]
        one = await submit(dispatcher, other, label="b")
        told = [await position(job) for job in (*many, one)]
        assert told == [1, *range(3, 22), 2]
        dispatcher.resume()
        for job in many:
            await job.result()
    assert pipeline.ran == ["a0", "b", *[f"a{number}" for number in range(1, 20)]]


async def test_it_is_second_also_where_the_next_one_was_already_made_ready(
    session_store: SessionStore, session: Session
) -> None:
    other, pipeline = await session_store.create_session(), HeldPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        first, second = [await submit(dispatcher, session, label=label) for label in ("a0", "a1")]
        await pipeline.begun("generate a0")
        await pipeline.begun("prepare a1")
        one = await submit(dispatcher, other, label="b")
        await pipeline.begun("prepare b")
        assert await position(one) == 1
        async with ends(first, one, second):
            pipeline.let_go("a0", "a1", "b")
        info = await second.info()
        assert (info.attempt - info.excused, info.retry) == (1, None)
    assert pipeline.ran == ["a0", "b", "a1"]


async def test_a_job_of_a_higher_priority_overtakes_one_that_was_only_made_ready(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        low = [await submit(dispatcher, session, label=label) for label in ("a0", "a1")]
        await pipeline.begun("prepare a1")
        urgent = await dispatcher.submit(
            await session.generation_request("steps", slots=(), params={"label": "urgent"}, priority=1)
        )
        async with ends(*low, urgent):
            pipeline.let_go("a0", "a1", "urgent")
    assert pipeline.ran == ["a0", "urgent", "a1"]


async def test_of_two_jobs_that_were_made_ready_the_later_one_is_overtaken(
    session_store: SessionStore, session: Session
) -> None:
    b, c = [await session_store.create_session() for _ in range(2)]
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline], devices=TWO) as dispatcher:
        jobs = [await submit(dispatcher, session, label=label) for label in ("a0", "a1")]
        await pipeline.begun("generate a1")
        for label in ("b0", "b1"):
            jobs.append(await submit(dispatcher, b, label=label))
            await pipeline.begun(f"prepare {label}")
        jobs.append(await submit(dispatcher, c, label="c0"))
        await pipeline.begun("prepare c0")
        assert pipeline.done.count("prepare b0") == 1
        async with ends(*jobs):
            pipeline.let_go("a0", "a1", "b0", "b1", "c0")


async def test_a_device_makes_nothing_ready_while_another_one_has_nothing_to_do(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline], devices=TWO) as dispatcher:
        long = await submit(dispatcher, session, label="long")
        await pipeline.begun("generate long")
        for number in range(6):  # whichever of the two looks first
            job = await submit(dispatcher, session, label=str(number))
            async with ends(job):
                pipeline.let_go(str(number))
            assert pipeline.done.count(f"prepare {number}") == 1
        async with ends(long):
            pipeline.let_go("long")


async def test_a_job_that_was_made_ready_behind_a_long_one_goes_to_the_device_that_is_free(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline], devices=TWO) as dispatcher:
        long = await submit(dispatcher, session, label="long")
        await pipeline.begun("generate long")
        jobs = [await submit(dispatcher, session, label=str(number)) for number in range(3)]
        for number in range(3):
            await pipeline.begun(f"prepare {number}")
        async with ends(*jobs):
            pipeline.let_go("0", "1", "2")
        assert (await long.info()).under_way
        async with ends(long):
            pipeline.let_go("long")


async def test_a_pipeline_runs_on_the_devices_of_its_kind_only(session_store: SessionStore, session: Session) -> None:
    here, there = HeldPipeline("here"), HeldPipeline("there", device="gpu")
    async with local(session_store, [here, there], devices=["cpu", "gpu:0", "gpu:1"]) as dispatcher:
        long = await submit(dispatcher, session, "here", label="long")
        behind = await submit(dispatcher, session, "here", label="behind")
        await here.begun("prepare behind")
        both = [await submit(dispatcher, session, "there", label=label) for label in "ab"]
        for label in "ab":
            await there.begun(f"generate {label}")
        assert await position(behind) == 1
        async with ends(*both):
            there.let_go("a", "b")
        async with ends(long, behind):
            here.let_go("long", "behind")
    assert {thread for what, thread in there.calls if what == "load"} == {
        "async_sessions-gpu:0_0",
        "async_sessions-gpu:1_0",
    }
    assert here.ran == ["long", "behind"]


async def test_a_session_has_no_more_jobs_under_way_than_it_may(session_store: SessionStore, session: Session) -> None:
    other, pipeline = await session_store.create_session(), HeldPipeline()
    async with local(session_store, [pipeline], devices=TWO, max_running_per_session=1) as dispatcher:
        jobs = [await submit(dispatcher, session, label=label) for label in ("a0", "a1", "a2")]
        await pipeline.begun("generate a0")
        jobs.append(await submit(dispatcher, other, label="b0"))
        await pipeline.begun("generate b0")
        assert pipeline.done == ["prepare a0", "generate a0", "prepare b0", "generate b0"]
        async with ends(*jobs):
            pipeline.let_go("a0", "a1", "a2", "b0")
    assert pipeline.done[4:] == ["prepare a1", "generate a1", "prepare a2", "generate a2"]


# --- how many may wait


async def test_a_full_queue_tells_the_position_and_when_to_come_back(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline], max_queued=2) as dispatcher:
        warm = await submit(dispatcher, session, label="warm")
        async with ends(warm):
            pipeline.let_go("warm")
        await submit(dispatcher, session, label="a")
        await pipeline.begun("generate a")
        for label in "bc":
            await submit(dispatcher, session, label=label)
        with pytest.raises(QueueFullError, match=r"in \d+ s") as refused:
            await submit(dispatcher, session, label="d")
        assert refused.value.position == 3
        assert refused.value.retry_after is not None
        assert refused.value.retry_after >= 1


async def test_a_session_whose_share_of_the_queue_is_full_keeps_no_other_out(
    session_store: SessionStore, session: Session
) -> None:
    other = await session_store.create_session()
    async with local(
        session_store, [StepPipeline()], start_paused=True, max_queued=3, max_queued_per_session=2
    ) as dispatcher:
        for _ in range(2):
            await submit(dispatcher, session)
        with pytest.raises(QueueFullError, match="2 jobs of yours are waiting already; try again in a while"):
            await submit(dispatcher, session)
        await submit(dispatcher, other)
        with pytest.raises(QueueFullError, match="3 jobs are waiting already") as refused:
            await submit(dispatcher, other)
        assert refused.value.position == 4


async def test_a_request_that_is_sent_twice_takes_one_place_of_a_full_queue(
    session_store: SessionStore, session: Session
) -> None:
    ids = set()
    async with local(session_store, [StepPipeline()], start_paused=True, max_queued=1) as dispatcher:
        request = await session.generation_request("steps", slots=(), idempotency_key="click")

        async def once() -> None:
            ids.add((await dispatcher.submit(request)).id)

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(once)
        assert len(ids) == 1


async def test_a_request_that_is_sent_twice_takes_no_place_of_another(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()], start_paused=True, max_queued=2) as dispatcher:
        request = await session.generation_request("steps", slots=(), idempotency_key="click")
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(dispatcher.submit, request)
            group.start_soon(submit, dispatcher, session)
        assert len(await dispatcher.jobs(session)) == 2


# --- ahead of the device


async def test_the_next_job_is_prepared_and_the_last_one_stored_while_the_device_works() -> None:
    blobs, pipeline, room = FaultyBlobStore(), HeldPipeline(), anyio.Event()
    async with open_store(blobs, cleanup_interval=None) as store, local(store, [pipeline]) as dispatcher:
        session = await store.create_session()
        first, second, third = [await submit(dispatcher, session, label=label) for label in "abc"]
        await pipeline.begun("generate a")
        await pipeline.begun("prepare b")
        blobs.before_put = lambda key: room if key.startswith("blobs/") else None
        pipeline.let_go("a", "b")
        await blobs.putting.wait()
        await pipeline.begun("generate b")
        await pipeline.begun("prepare c")
        assert (await first.info()).under_way
        assert "generate c" not in pipeline.done  # until what `a` made is stored
        async with ends(first, second, third):
            pipeline.let_go("c")
            room.set()
    assert pipeline.ran == ["a", "b", "c"]


class Prepared:
    """What a weak reference can be taken of."""


async def test_what_was_prepared_goes_with_its_job(session_store: SessionStore, session: Session) -> None:
    made: list[weakref.ref[Prepared]] = []

    class Pipeline(HeldPipeline):
        def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
            super().prepare(inputs, params)
            prepared = Prepared()
            made.append(weakref.ref(prepared))
            return {"": prepared}

        def generate(self, prepared: Any, params: Mapping[str, Any], context: Any) -> Any:
            return super().generate({}, params, context)

    pipeline = Pipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        running, cancelled, after = [await submit(dispatcher, session, label=label) for label in "abc"]
        await pipeline.begun("generate a")
        await pipeline.begun("prepare b")
        await cancelled.cancel()
        await pipeline.begun("prepare c")
        gc.collect()
        assert made[1]() is None
        async with ends(running, after):
            pipeline.let_go("a", "c")


async def test_what_is_prepared_ahead_is_bounded_in_bytes(session_store: SessionStore, session: Session) -> None:
    await session.store_image(RED, "start")
    pipeline = HeldPipeline(start=False)
    async with local(session_store, [pipeline], devices=TWO, max_prepared_bytes=6 * KIB) as dispatcher:
        running = [await submit(dispatcher, session, label=label) for label in ("r0", "r1")]
        await pipeline.begun("generate r1")
        ahead = [await with_image(dispatcher, session, "steps", label) for label in ("a0", "a1")]
        await pipeline.begun("prepare a0")
        await anyio.wait_all_tasks_blocked()
        assert "prepare a1" not in pipeline.done
        async with ends(*running, *ahead):
            pipeline.let_go("r0", "r1", "a0", "a1")
    assert pipeline.done.index("generate a0") < pipeline.done.index("prepare a1")


async def test_a_job_that_waits_for_its_device_gives_its_memory_to_one_whose_device_is_free(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(RED, "start")
    here, there = HeldPipeline("here", start=False), HeldPipeline("there", device="gpu", start=False)
    async with local(session_store, [here, there], devices=["cpu", "gpu"], max_prepared_bytes=6 * KIB) as dispatcher:
        long = await submit(dispatcher, session, "here", label="long")
        await here.begun("generate long")
        behind = await with_image(dispatcher, session, "here", "behind")
        await here.begun("prepare behind")
        job = await with_image(dispatcher, session, "there", "job")
        async with ends(job):
            there.let_go("job")
        assert (await long.info()).under_way
        async with ends(long, behind):
            here.let_go("long", "behind")


async def test_a_job_that_is_cancelled_while_it_waits_for_memory_makes_way_at_once(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(RED, "start")
    here, there = HeldPipeline("here", start=False), HeldPipeline("there", device="gpu", start=False)
    async with local(session_store, [here, there], devices=["cpu", "gpu"], max_prepared_bytes=6 * KIB) as dispatcher:
        running = await submit(dispatcher, session, "here", label="r"), await submit(dispatcher, session, "there")
        await here.begun("generate r")
        await there.begun("generate ")
        behind = await with_image(dispatcher, session, "here", "behind")
        await here.begun("prepare behind")
        unwanted = await with_image(dispatcher, session, "there", "unwanted")
        await unwanted.cancel()
        assert isinstance((await collected(unwanted))[-1], Cancelled)
        after = await submit(dispatcher, session, "there", label="after")
        await there.begun("prepare after")
        async with ends(*running, behind, after):
            here.let_go("r", "behind")
            there.let_go("", "after")
    assert "prepare unwanted" not in there.done


# --- pausing and leaving


async def test_a_pause_lets_what_is_under_way_go_on_and_begins_nothing(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        running, ready, waiting = [await submit(dispatcher, session, label=label) for label in "abc"]
        await pipeline.begun("prepare b")
        dispatcher.pause()
        async with ends(running, ready):
            pipeline.let_go("a", "b", "c")
        assert (await waiting.info()).status == "queued"
        assert await position(waiting) == 1
        async with ends(waiting):
            dispatcher.resume()
    assert pipeline.ran == ["a", "b", "c"]


async def test_who_follows_a_job_that_waits_is_not_left_hanging_when_its_dispatcher_is_left(
    session_store: SessionStore, session: Session
) -> None:
    ends_told: list[object] = []
    async with anyio.create_task_group() as group:
        async with local(session_store, [HeldPipeline()], start_paused=True) as dispatcher:
            job = await submit(dispatcher, session, label="a")

            async def follow() -> None:
                ends_told.append((await collected(job))[-1])

            group.start_soon(follow)
            await until(job, Queued)
            await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(30):
            async with local(session_store, [StepPipeline()]) as other:
                await (await other.job(session, job.id)).result()
            while not ends_told:  # noqa: ASYNC110 - it looks at the entry now and then
                await anyio.sleep(0.01)
    assert len(ends_told) == 1


async def test_a_pipeline_that_leaves_while_it_is_loaded_takes_no_other_one_along(
    session_store: SessionStore, session: Session
) -> None:
    bad, good = StepPipeline("bad"), StepPipeline("good")

    def leave(device: str) -> None:
        raise SystemExit(3)

    bad.on_load = leave
    async with local(session_store, [bad, good]) as dispatcher:
        failed = await submit(dispatcher, session, "bad")
        async with ends(await submit(dispatcher, session, "good")):
            pass
        await collected(failed)
        error = (await failed.info()).error
    assert error is not None
    assert error.kind == "SystemExit"
    assert [what for what, _ in good.calls] == ["load", "prepare", "generate", "release"]
    assert bad.ran == []
