from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from PIL import Image

from async_sessions import (
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    QueueFullError,
    Session,
    SessionNotFoundError,
    SessionStore,
    SlotEmptyError,
    StorageFullError,
    StoreClosedError,
    UnknownPipelineError,
    open_store,
)
from async_sessions.jobs import (
    Cancelled,
    Failed,
    JobContext,
    JobEvent,
    Progress,
    Queued,
    Started,
    Succeeded,
    event_order,
)
from async_sessions.testing.pipeline import FakePipeline
from tests.faults import FaultyBlobStore, keys_of
from tests.following import Gate, collected, submit, until
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.dispatch import Dispatcher, Job

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")


# --- jobs that run


async def test_a_submitted_job_gives_its_outputs(session_store: SessionStore, session: Session) -> None:
    await session.store_image(RED, "start")
    pipeline = StepPipeline(start=True)
    pipeline.make = lambda params: {"video": pipeline.file(b"film")}
    async with local(session_store, [pipeline]) as dispatcher:
        request = await session.generation_request("steps", slots=["start"])
        job = await dispatcher.submit(request)
        outputs = await job.result()
        assert b"".join([chunk async for chunk in session.stream_output(outputs["video"])]) == b"film"
        info = await job.info()
        assert (info.status, info.outputs, info.inputs) == ("succeeded", outputs, request.inputs)
        assert await dispatcher.jobs(session) == [info]
        assert await keys_of(session_store.blobs, "queue/") == set()


async def test_events_come_in_order_and_end_with_the_terminal_one(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session, steps=500)
        events = await collected(job)
    kinds = [type(event) for event in events]
    assert kinds[0] in (Queued, Started)
    assert kinds[-1] is Succeeded
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == sorted(set(steps))
    order = [event_order(event.id) for event in events]
    assert order == sorted(set(order))


async def test_a_late_follower_and_one_that_reconnects_see_the_same_end(
    session_store: SessionStore, session: Session
) -> None:
    gate = Gate()
    pipeline = StepPipeline()
    pipeline.before_generate = gate
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session)
        first: list[JobEvent] = []
        late: list[JobEvent] = []
        again: list[JobEvent] = []

        async def follow(into: list[JobEvent], after: str | None = None) -> None:
            into += await collected(await dispatcher.job(session, job.id), after)

        async with anyio.create_task_group() as group:
            group.start_soon(follow, first)
            await gate.reached.wait()
            group.start_soon(follow, late)
            started = await until(job, Started)
            group.start_soon(follow, again, started.id)
            gate.open()
        assert isinstance(late[0], Queued)
        assert isinstance(late[1], Started)
        assert not any(isinstance(event, Queued | Started) for event in again)
        assert first[-1] == late[-1] == again[-1]
        assert [type(each[-1]) for each in (first, late, again)] == [Succeeded] * 3
        assert await collected(job, after=first[-1].id) == []
        with pytest.raises(InvalidRequestError):
            await collected(job, after="yesterday")


async def test_a_follower_that_leaves_early_leaves_nothing_behind(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session, endless=True)
        events = job.events()
        await anext(events)
        closing = asyncio.get_running_loop().create_task(events.aclose())  # type: ignore[attr-defined]
        await closing  # from another task, as Gradio does
        await job.cancel()
        assert isinstance((await collected(job))[-1], Cancelled)


async def test_jobs_run_by_priority_then_in_the_order_of_their_arrival(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    async with local(session_store, [pipeline], start_paused=True) as dispatcher:
        jobs = []
        for label, priority in (("low", -1), ("one", 0), ("two", 0), ("high", 5)):
            request = await session.generation_request("steps", slots=(), params={"label": label}, priority=priority)
            jobs.append(await dispatcher.submit(request))
        positions = [(await until(job, Queued)) for job in jobs]
        assert [event.position for event in positions if isinstance(event, Queued)] == [4, 2, 3, 1]
        dispatcher.resume()
        for job in jobs:
            await job.result()
    assert pipeline.ran == ["high", "one", "two", "low"]


async def test_two_devices_run_two_jobs_at_once_each_in_its_own_thread(
    session_store: SessionStore, session: Session
) -> None:
    both = threading.Barrier(2, timeout=30)
    devices = set()
    pipeline = StepPipeline()

    def meet(context: JobContext) -> None:
        devices.add(context.device)
        both.wait()

    pipeline.before_generate = meet
    async with local(session_store, [pipeline], devices=["cpu", "cpu:1"]) as dispatcher:
        jobs = [await submit(dispatcher, session) for _ in range(2)]
        for job in jobs:
            await job.result()
    assert devices == {"cpu", "cpu:1"}
    threads = {what: {thread for each, thread in pipeline.calls if each == what} for what in ("load", "generate")}
    assert threads["load"] == threads["generate"]
    assert len(threads["load"]) == 2
    assert [what for what, _ in pipeline.calls].count("release") == 2
    assert not any(thread.name.startswith("async_sessions-") for thread in threading.enumerate())


async def test_loading_happens_in_the_background(session_store: SessionStore, session: Session) -> None:
    may_load = threading.Event()
    pipeline = StepPipeline()
    pipeline.on_load = lambda device: assert_true(may_load.wait(30))
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session)
        assert (await job.info()).status == "queued"
        may_load.set()
        await job.result()


def assert_true(value: bool) -> None:
    assert value


async def test_a_pipeline_that_cant_be_loaded_fails_its_own_jobs_only(
    session_store: SessionStore, session: Session
) -> None:
    good, bad = StepPipeline("good"), StepPipeline("bad")

    def fail(device: str) -> None:
        raise FileNotFoundError("no weights here")

    bad.on_load = fail
    async with local(session_store, [bad, good]) as dispatcher:
        job = await submit(dispatcher, session, "bad")
        with pytest.raises(JobFailedError, match="no weights here"):
            await job.result()
        await (await submit(dispatcher, session, "good")).result()
    assert ("release", good.calls[0][1]) in good.calls
    assert "release" not in [what for what, _ in bad.calls]


async def test_a_pipeline_that_raises_fails_its_job_and_the_next_one_runs(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session, fail="out of memory")
        with pytest.raises(JobFailedError, match="out of memory"):
            await job.result()
        failed = (await collected(job))[-1]
        assert isinstance(failed, Failed)
        assert (failed.error.kind, failed.error.message) == ("RuntimeError", "out of memory")
        await (await submit(dispatcher, session)).result()


# --- cancelling


async def test_a_job_fails_also_where_its_error_can_not_be_put_in_words(
    session_store: SessionStore, session: Session
) -> None:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    pipeline = FakePipeline()
    pipeline.fail(SpeechlessError())
    async with local(session_store, [pipeline]) as dispatcher:
        job = await dispatcher.submit(await session.generation_request("fake", slots=()))
        with anyio.fail_after(30), pytest.raises(JobFailedError, match="does not say"):
            await job.result()


async def test_a_queued_job_is_cancelled_at_once(session_store: SessionStore, session: Session) -> None:
    gate = Gate()
    pipeline = StepPipeline()
    pipeline.before_generate = gate
    async with local(session_store, [pipeline]) as dispatcher:
        running = await submit(dispatcher, session, label="running")
        await gate.reached.wait()
        waiting = await submit(dispatcher, session, label="waiting")
        neighbour = await submit(dispatcher, session, label="neighbour")
        info = await waiting.cancel()
        assert (info.status, info.cancel_requested) == ("cancelled", True)
        with pytest.raises(JobCancelledError):
            await waiting.result()
        async for event in neighbour.events():
            if event == Queued(id=event.id, at=event.at, position=1):
                break
        assert await keys_of(session_store.blobs, "queue/") == {f"queue/{job.id}.json" for job in (running, neighbour)}
        gate.open()
        await neighbour.result()
        await running.result()
    assert pipeline.ran == ["running", "neighbour"]


async def test_a_running_job_is_cancelled_at_its_next_report_and_its_neighbours_are_not(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()], devices=["cpu", "cpu:1"]) as dispatcher:
        first, second = [await submit(dispatcher, session, endless=True) for _ in range(2)]
        third = await submit(dispatcher, session)
        await until(first, Progress)
        await until(second, Progress)
        info = await first.cancel()
        assert info.cancel_requested
        with pytest.raises(JobCancelledError):
            await first.result()
        await third.result()
        assert (await second.info()).under_way
        assert not (await second.info()).cancel_requested
        await second.cancel()
        assert isinstance((await collected(second))[-1], Cancelled)


async def test_the_latest_of_a_job_is_told_without_waiting(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    async with local(session_store, [pipeline], start_paused=True) as here, local(session_store, [pipeline]) as there:
        job = await here.submit(await session.generation_request("steps", params={"endless": True}))
        seen_from_there = await there.job(session, job.id)
        latest = await job.latest()
        assert isinstance(latest, Queued)
        assert latest.position == 1
        assert await seen_from_there.latest() is None
        here.resume()
        async for event in job.events():
            if isinstance(event, Progress):
                break
        assert isinstance(await job.latest(), Progress)
        async for event in seen_from_there.events():
            assert isinstance(event, Started)
            assert event.elsewhere
            break
        await job.cancel()
        async for _ in job.events():
            pass
        assert await job.latest() == await seen_from_there.latest()
        assert isinstance(await job.latest(), Cancelled)


async def test_cancelling_a_job_that_has_ended_changes_nothing(session_store: SessionStore, session: Session) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session)
        await job.result()
        before = await job.info()
        assert await job.cancel() == before
        assert await job.info() == before


async def test_a_job_is_cancelled_through_another_dispatcher(session_store: SessionStore, session: Session) -> None:
    async with local(session_store, [StepPipeline()]) as here:
        running = await submit(here, session, endless=True)
        waiting = await submit(here, session, label="waiting")
        await until(running, Progress)
        async with local(session_store, [StepPipeline()]) as there:
            info = await (await there.job(session, waiting.id)).cancel()
            assert info.status == "cancelled"
            elsewhere = await there.job(session, running.id)
            assert (await elsewhere.cancel()).cancel_requested
            with pytest.raises(JobCancelledError):
                await elsewhere.result()
        assert isinstance((await collected(waiting))[-1], Cancelled)
        assert (await running.info()).status == "cancelled"


async def test_a_session_deleted_during_the_run_ends_the_job_and_not_the_lane(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    pipeline.make = lambda params: {"video": pipeline.file(b"film")}
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session, endless=True)
        waiting = await submit(dispatcher, session)
        await until(job, Progress)
        await session.delete()
        assert isinstance((await collected(job))[-1], Cancelled)
        assert isinstance((await collected(waiting))[-1], Cancelled)
        with pytest.raises(JobNotFoundError):
            await job.info()
        other = await session_store.create_session()
        await (await submit(dispatcher, other)).result()
        await other.delete()
    assert await keys_of(session_store.blobs) == set()


# --- what is refused


async def test_a_full_queue_refuses_in_a_sentence_and_takes_jobs_again_later(
    session_store: SessionStore, session: Session
) -> None:
    gate = Gate()
    pipeline = StepPipeline()
    pipeline.before_generate = gate
    async with local(session_store, [pipeline], max_queued=2) as dispatcher:
        jobs = [await submit(dispatcher, session)]
        await gate.reached.wait()
        jobs += [await submit(dispatcher, session) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 jobs are waiting already"):
            await submit(dispatcher, session)
        assert len((await session.info()).jobs) == 3
        assert len(await keys_of(session_store.blobs, "queue/")) == 3
        await jobs[-1].cancel()
        jobs[-1] = await submit(dispatcher, session)
        gate.open()
        for job in jobs:
            await job.result()


async def test_a_hundred_submits_at_once_never_exceed_the_queue(session_store: SessionStore, session: Session) -> None:
    gate = Gate()
    pipeline = StepPipeline()
    pipeline.before_generate = gate
    refused = 0
    async with local(session_store, [pipeline], max_queued=3) as dispatcher:
        await submit(dispatcher, session)
        await gate.reached.wait()

        async def one() -> None:
            nonlocal refused
            try:
                await submit(dispatcher, session)
            except QueueFullError:
                refused += 1

        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(one)
        assert refused == 97
        gate.open()


async def test_what_does_not_fit_is_refused_before_anything_is_written(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(RED, "start")
    async with local(session_store, [StepPipeline(start=True)]) as dispatcher:
        with pytest.raises(UnknownPipelineError, match="steps"):
            await dispatcher.submit(await session.generation_request("wan"))
        with pytest.raises(InvalidRequestError):
            await submit(dispatcher, session)
        with pytest.raises(InvalidRequestError):
            await dispatcher.submit(await session.generation_request("steps", params={"cfg": 5}))
        gone = await session.generation_request("steps")
        await session.clear_all_images()
        with pytest.raises(SlotEmptyError):
            await dispatcher.submit(gone)
        await session.delete()
        with pytest.raises(SessionNotFoundError):
            await dispatcher.submit(gone)
    assert await keys_of(session_store.blobs) == set()


async def test_a_job_of_another_session_is_not_found(session_store: SessionStore, session: Session) -> None:
    other = await session_store.create_session()
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session)
        await job.result()
        for job_id in (job.id, f"{other.key}.{'0' * 16}", "../../etc/passwd", ""):
            with pytest.raises(JobNotFoundError):
                await dispatcher.job(other, job_id)
        assert await dispatcher.jobs(other) == []


async def test_a_dispatcher_works_inside_its_async_with_only(session_store: SessionStore, session: Session) -> None:
    dispatcher = local(session_store, [StepPipeline()])
    with pytest.raises(StoreClosedError):
        await submit(dispatcher, session)
    async with dispatcher:
        await (await submit(dispatcher, session)).result()
    with pytest.raises(StoreClosedError):
        await submit(dispatcher, session)


@pytest.mark.parametrize(
    "make",
    [
        lambda store: local(store, [StepPipeline(), StepPipeline()]),
        lambda store: local(store, [StepPipeline()], devices=["cuda:0"]),
        lambda store: local(store, [StepPipeline()], devices=["cpu", "cpu"]),
        lambda store: local(store, [StepPipeline()], max_queued=0),
    ],
    ids=["two of a name", "no such device", "a device twice", "no queue"],
)
async def test_a_dispatcher_that_could_not_work_is_refused(
    session_store: SessionStore, make: Callable[[SessionStore], Dispatcher]
) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        make(session_store)


async def test_what_the_body_raises_leaves_as_itself(session_store: SessionStore) -> None:
    with pytest.raises(ZeroDivisionError):
        async with local(session_store, [StepPipeline()]):
            raise ZeroDivisionError


# --- what is kept


async def test_one_idempotency_key_is_one_job(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        request = await session.generation_request("steps", slots=(), idempotency_key="click 7")
        jobs: list[Job] = []

        async def one() -> None:
            jobs.append(await dispatcher.submit(request))

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(one)
        results = [await job.result() for job in jobs]
        assert len({job.id for job in jobs}) == 1
        assert results == [results[0]] * 8
        again = await dispatcher.submit(request)
        assert (again.id, await again.result()) == (jobs[0].id, results[0])
        assert await keys_of(session_store.blobs, "queue/") == set()
    assert len(pipeline.ran) == 1


async def test_a_queued_job_finds_its_images_after_everything_was_cleared_and_then_they_go(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(RED, "start")
    gate = Gate()
    pipeline = StepPipeline(start=False)
    pipeline.before_generate = gate
    pipeline.make = lambda params: {}
    async with local(session_store, [pipeline]) as dispatcher:
        running = await submit(dispatcher, session)
        await gate.reached.wait()
        job = await dispatcher.submit(await session.generation_request("steps", slots=["start"]))
        await session.clear_all_images()
        assert not await session.has_image("start")
        gate.open()
        await running.result()
        outputs = await job.result()
        async with session.output_file(outputs["start"]) as path:
            with Image.open(path) as image:
                assert image.getpixel((0, 0)) == (255, 0, 0)
        assert await keys_of(session_store.blobs, "blobs/") == {outputs["start"].blob}


async def test_a_new_dispatcher_tells_the_end_of_an_old_job_from_its_entry(tmp_path: Path) -> None:
    async with open_store(tmp_path / "sessions", cleanup_interval=None) as store:
        session = await store.create_session()
        assert session.id is not None
        async with local(store, [StepPipeline()]) as dispatcher:
            done = await submit(dispatcher, session)
            outputs = await done.result()
            last = (await collected(done))[-1]
            failed = await submit(dispatcher, session, fail="no")
            assert isinstance((await collected(failed))[-1], Failed)
    async with open_store(tmp_path / "sessions", cleanup_interval=None) as store:
        session = await store.restore_session(session.id)
        async with local(store, [StepPipeline()]) as dispatcher:
            job = await dispatcher.job(session, done.id)
            assert await collected(job) == [last]
            assert await collected(job, after=last.id) == []
            assert await job.result() == outputs
            with pytest.raises(JobFailedError, match="no"):
                await (await dispatcher.job(session, failed.id)).result()
            assert [info.id for info in await dispatcher.jobs(session)] == [done.id, failed.id]


async def test_of_jobs_that_ended_long_ago_only_the_entry_is_kept(
    session_store: SessionStore, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_sessions.dispatch._scheduler.KEPT_LOGS", 2)
    async with local(session_store, [StepPipeline()]) as dispatcher:
        jobs = [await submit(dispatcher, session) for _ in range(4)]
        for job in jobs:
            await job.result()
        told = [[type(event) for event in await collected(job)] for job in jobs]
    assert told[:2] == [[Succeeded], [Succeeded]]
    assert [len(kinds) > 1 and kinds[-1] is Succeeded for kinds in told[2:]] == [True, True]


async def test_leaving_returns_what_runs_and_what_waits_to_the_queue_at_no_cost(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        jobs = [await submit(dispatcher, session, endless=True)]
        jobs += [await submit(dispatcher, session) for _ in range(3)]
        await until(jobs[0], Progress)
    assert not any(thread.name.startswith("async_sessions-") for thread in threading.enumerate())
    entries = [await job.info() for job in jobs]
    assert [(entry.status, entry.attempt - entry.excused, entry.retry) for entry in entries] == [
        ("queued", 0, None)
    ] * 4
    assert await keys_of(session_store.blobs, "queue/") == {f"queue/{job.id}.json" for job in jobs}
    assert await keys_of(session_store.blobs, "owners/") == set()

    pipeline = StepPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        again = [await dispatcher.job(session, job.id) for job in jobs]
        await again[0].cancel()
        for job in again[1:]:
            await job.result()
        with pytest.raises(JobCancelledError):
            await again[0].result()


async def test_leaving_waits_for_what_is_on_the_device_and_begins_nothing_else(
    session_store: SessionStore, session: Session
) -> None:
    gate = Gate()
    pipeline = StepPipeline()
    pipeline.before_generate = gate
    async with local(session_store, [pipeline], drain_timeout=timedelta(minutes=1)) as dispatcher:
        running = await submit(dispatcher, session)
        waiting = [await submit(dispatcher, session) for _ in range(2)]
        await gate.reached.wait()
        gate.open()
    assert [(await job.info()).status for job in (running, *waiting)] == ["succeeded", "queued", "queued"]
    assert len(pipeline.ran) == 1


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
async def test_cancelling_the_task_that_holds_a_dispatcher_leaves_in_the_same_order(
    session_store: SessionStore, session: Session, native: bool
) -> None:
    jobs: list[Job] = []
    busy = anyio.Event()
    scope = anyio.CancelScope()

    async def serve() -> None:
        with scope:
            async with local(session_store, [StepPipeline()]) as dispatcher:
                jobs.extend([await submit(dispatcher, session, endless=True) for _ in range(2)])
                await until(jobs[0], Progress)
                busy.set()
                await anyio.sleep_forever()

    task = asyncio.get_running_loop().create_task(serve())
    await busy.wait()
    if native:
        task.cancel()
    else:
        scope.cancel()
    await asyncio.wait({task})
    assert task.cancelled() == native
    assert [(await job.info()).status for job in jobs] == ["queued", "queued"]
    assert not any(thread.name.startswith("async_sessions-") for thread in threading.enumerate())


async def test_a_submit_cancelled_in_the_middle_is_accepted_whole() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        gate = anyio.Event()
        pipeline = StepPipeline()
        async with local(store, [pipeline]) as dispatcher:
            request = await session.generation_request("steps", slots=(), idempotency_key="once")
            blobs.before_put = lambda key: gate if key.startswith("queue/") else None
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(dispatcher.submit, request)
                    await blobs.putting.wait()
                    scope.cancel()
                    gate.set()
            job = await dispatcher.submit(request)
            await job.result()
        assert len(pipeline.ran) == 1


async def test_a_submit_that_can_not_be_stored_leaves_nothing() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()
        async with local(store, [pipeline]) as dispatcher:
            blobs.full_for = lambda key: key.startswith("manifests/")
            with pytest.raises(StorageFullError):
                await submit(dispatcher, session)
            blobs.full_for = lambda key: False
            assert await keys_of(blobs, "queue/") == set()
            assert (await session.info()).jobs == {}
        assert pipeline.ran == []
