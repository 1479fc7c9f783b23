from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from async_sessions import JobFailedError, JobInfo, Session, SessionStore, _keys, open_store
from async_sessions.dispatch._lease import AWAY, UNCLAIMED
from async_sessions.jobs import JobContext, Started
from tests.faults import FaultyBlobStore, keys_of
from tests.following import on_device
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.testing.clock import FrozenClock

pytestmark = pytest.mark.anyio

LEASE = timedelta(seconds=15)
PARAMS = StepPipeline().spec.defaults


async def left_behind(store: SessionStore, session: Session, number: int = 0, **how: Any) -> JobInfo:
    """The entry and the marker of a job whose dispatcher died; `how` it was then."""
    request = await session.generation_request("steps", slots=())
    entry = StepPipeline().spec.entry(request, f"{session.key}.{number:016x}", "dead", store.clock())
    entry = JobInfo(**{**{name: getattr(entry, name) for name in entry.__struct_fields__}, **how})
    await store.blobs.put(_keys.queue_marker(entry.id), b"{}")
    await session.edit_job(entry.id, lambda _: entry)
    return entry


async def test_the_jobs_of_a_dispatcher_whose_lease_lapsed_are_taken_over_and_run(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    waiting = await left_behind(session_store, session)
    running = await left_behind(session_store, session, 1, status="running", attempt=1)
    pipeline = StepPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        for entry in (waiting, running):
            await (await dispatcher.job(session, entry.id)).result()
        assert [(await session.info()).jobs[entry.id].attempt for entry in (waiting, running)] == [1, 2]
    assert len(pipeline.ran) == 2
    assert await keys_of(session_store.blobs, "queue/") == set()


async def test_what_a_dispatcher_left_waiting_is_taken_in_without_a_warning(
    session_store: SessionStore, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """Every restart of an app does it; that a process died with a job under way is worth one."""
    async with local(session_store, [StepPipeline()]) as dispatcher:
        running = await dispatcher.submit(await session.generation_request("steps", slots=(), params={"endless": True}))
        await on_device(running)
        dispatcher.pause()
        waiting = await dispatcher.submit(await session.generation_request("steps", slots=()))
    pipeline = StepPipeline()
    pipeline.endless = False
    async with local(session_store, [pipeline]) as dispatcher:
        for job in (running, waiting):
            await (await dispatcher.job(session, job.id)).result()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    interrupted = await left_behind(session_store, session, status="running", attempt=1)
    async with local(session_store, [pipeline]) as dispatcher:
        await (await dispatcher.job(session, interrupted.id)).result()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert interrupted.id in warning
    assert "interrupted" in warning


async def test_jobs_are_taken_over_in_the_order_in_which_they_were_submitted(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    entries = []
    for number in (5, 3, 9, 1):
        entries.append(await left_behind(session_store, session, number, params={**PARAMS, "label": f"{number}"}))
        frozen_clock.advance(seconds=1)
    pipeline = StepPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        for entry in entries:
            await (await dispatcher.job(session, entry.id)).result()
    assert pipeline.ran == ["5", "3", "9", "1"]


async def test_the_jobs_of_a_living_dispatcher_are_left_alone(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    async with local(session_store, [StepPipeline()], lease=LEASE) as other:
        job = await other.submit(await session.generation_request("steps", slots=(), params={"endless": True}))
        await on_device(job)
        async with local(session_store, [StepPipeline()]) as dispatcher:
            await dispatcher._owner.take_over()
            assert not dispatcher._holds(job.id)
            frozen_clock.advance(2 * LEASE)
            await dispatcher._owner.take_over()
            assert dispatcher._holds(job.id)


async def test_a_clock_that_is_set_takes_no_job_from_a_living_dispatcher(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    async with local(session_store, [StepPipeline()], start_paused=True) as other:
        job = await other.submit(await session.generation_request("steps", slots=()))
        async with local(session_store, [StepPipeline()]) as dispatcher:
            await dispatcher._owner.take_over()
            frozen_clock.now += timedelta(days=5 * 365)
            await dispatcher._owner.take_over()
            assert not dispatcher._holds(job.id)


async def test_a_lease_that_was_written_under_a_clock_that_was_ahead_lapses_all_the_same(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    frozen_clock.now += timedelta(days=5 * 365)
    async with local(session_store, [StepPipeline()], lease=LEASE, start_paused=True) as dead:
        job = await dead.submit(await session.generation_request("steps", slots=()))
        (key,) = await keys_of(session_store.blobs, "owners/")
        lease = await session_store.blobs.get(key)
        assert lease is not None
    await session_store.blobs.put(key, lease.data)  # as it is after a `kill -9`
    frozen_clock.now -= timedelta(days=5 * 365)
    async with local(session_store, [StepPipeline()]) as dispatcher:
        await dispatcher._owner.take_over()
        frozen_clock.advance(LEASE)
        await dispatcher._owner.take_over()
        assert (await (await dispatcher.job(session, job.id)).result())["text"].byte_size == 4


async def test_of_two_dispatchers_that_run_a_job_one_gives_it_its_end(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    """As after a stall, or a jump of the clock: the first goes on and is told that nobody wants what it makes."""
    first, second = StepPipeline(), StepPipeline()
    async with local(session_store, [first]) as slow, local(session_store, [second], lease=LEASE) as quick:
        request = await session.generation_request("steps", slots=(), params={"endless": True})
        job = await slow.submit(request)
        await on_device(job)
        second.make = lambda params: {"text": (b"second", "text/plain")}
        second.endless = False
        frozen_clock.advance(2 * LEASE)
        await quick._owner.take_over()
        outputs = await (await quick.job(session, job.id)).result()
        assert await job.result() == outputs
    entry = (await session.info()).jobs[job.id]
    assert (entry.status, entry.attempt, entry.outputs) == ("succeeded", 2, outputs)
    named = {output.blob for output in outputs.values()}
    assert await keys_of(session_store.blobs, "blobs/") == named


async def test_an_interrupted_job_is_tried_again_with_nothing_beside_it(
    session_store: SessionStore, session: Session
) -> None:
    other = await session_store.create_session()
    poisoned = await left_behind(session_store, session, status="preparing", attempt=1)
    pipeline = StepPipeline()
    beside: list[int] = []
    async with local(session_store, [pipeline], devices=["cpu", "cpu:1"], start_paused=True) as dispatcher:
        pipeline.before_generate = lambda context: beside.append(len(dispatcher._scheduler._under_way))
        jobs = [await dispatcher.submit(await other.generation_request("steps", slots=())) for _ in range(5)]
        await dispatcher._owner.take_over()
        dispatcher.resume()
        poisoned_job = await dispatcher.job(session, poisoned.id)
        async for event in poisoned_job.events():
            if isinstance(event, Started):
                assert [job.id for job in dispatcher._scheduler._under_way] == [poisoned.id]
        for job in jobs:
            await job.result()
    assert len(pipeline.ran) == 6
    assert 1 in beside


async def test_a_job_that_was_interrupted_three_times_has_failed(session_store: SessionStore, session: Session) -> None:
    entry = await left_behind(session_store, session, status="running", attempt=4, excused=1)
    pipeline = StepPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        with pytest.raises(JobFailedError, match="stopped 3 times"):
            await (await dispatcher.job(session, entry.id)).result()
    error = (await session.info()).jobs[entry.id].error
    assert error is not None
    assert error.kind == "abandoned"
    assert pipeline.ran == []
    assert await keys_of(session_store.blobs, "queue/") == set()


async def test_an_interrupted_job_that_nobody_wants_any_more_is_cancelled(
    session_store: SessionStore, session: Session
) -> None:
    entry = await left_behind(session_store, session, status="running", attempt=1, cancel_requested=True)
    async with local(session_store, [StepPipeline()]) as dispatcher:
        await dispatcher._owner.take_over()
    assert (await session.info()).jobs[entry.id].status == "cancelled"


async def test_a_job_for_a_pipeline_that_is_not_here_waits_a_day_for_its_dispatcher(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    entry = await left_behind(session_store, session)
    async with local(session_store, [StepPipeline("other")]) as dispatcher:
        await dispatcher._owner.take_over()
        assert (await session.info()).jobs[entry.id] == entry
        frozen_clock.advance(UNCLAIMED)
        await dispatcher._owner.take_over()
        done = (await session.info()).jobs[entry.id]
        assert done.error is not None
        assert (done.status, done.error.kind) == ("failed", "abandoned")


async def test_a_job_that_waited_for_days_is_left_to_its_dispatcher_while_that_starts_anew(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    async with local(session_store, [StepPipeline("other")]) as dispatcher:
        async with local(session_store, [StepPipeline()], start_paused=True) as own:
            job = await own.submit(await session.generation_request("steps", slots=()))
            frozen_clock.advance(2 * UNCLAIMED)
            await own._owner.renew()
            await dispatcher._owner.take_over()
        await dispatcher._owner.take_over()
        assert (await job.info()).status == "queued"
        frozen_clock.advance(AWAY)
        async with local(session_store, [StepPipeline()], start_paused=True) as anew:
            await anew._owner.take_over()
            await dispatcher._owner.take_over()
        await dispatcher._owner.take_over()
        assert (await job.info()).status == "queued"
        frozen_clock.advance(AWAY)
        await dispatcher._owner.take_over()
        assert (await job.info()).status == "failed"


async def test_a_damaged_manifest_keeps_no_other_job_waiting(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        sessions = [await store.create_session() for _ in range(4)]
        for session in sessions:
            await left_behind(store, session)
        for session in sessions[:2]:
            (tmp_path / "root" / _keys.manifest(session.key)).write_bytes(b"{")
        async with local(store, [StepPipeline()]) as dispatcher:
            for session in sessions[2:]:
                for job_id in (await session.info()).jobs:
                    await (await dispatcher.job(session, job_id)).result()


async def test_a_job_whose_end_could_not_be_stored_is_run_again_once_there_is_room() -> None:
    blobs = FaultyBlobStore()
    pipeline = StepPipeline()

    def fill_the_disk(context: JobContext) -> None:
        if context.attempt == 1:
            blobs.full_for = lambda key: True

    async with open_store(blobs, cleanup_interval=None) as store, local(store, [pipeline]) as dispatcher:
        session = await store.create_session()
        pipeline.before_generate = fill_the_disk
        job = await dispatcher.submit(await session.generation_request("steps", slots=()))
        with anyio.fail_after(30):
            while dispatcher._holds(job.id):  # noqa: ASYNC110 - the lane tells nobody
                await anyio.sleep(0.01)
        assert (await job.info()).under_way
        blobs.full_for = lambda key: False
        await dispatcher._owner.take_over()
        assert (await job.result())["text"].byte_size == 4
        assert (await job.info()).attempt == 2


async def test_leaving_takes_the_lease_along_and_a_sweep_takes_one_that_was_left(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        async with local(store, [StepPipeline()]):
            assert len(await keys_of(store.blobs, "owners/")) == 1
        assert await keys_of(store.blobs, "owners/") == set()
        await store.blobs.put("owners/0123.json", b"{}")
        report = await store.cleanup(now=store.clock() + 10 * LEASE)
        assert report.removed == ()
        report = await store.cleanup(now=store.clock() + 1000 * LEASE)
        assert [removal.kind for removal in report.removed] == ["lease"]


async def test_a_dispatcher_goes_on_while_its_lease_can_not_be_renewed() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store, local(store, [StepPipeline()]) as dispatcher:
        blobs.full_for = lambda key: key.startswith("owners/")
        session = await store.create_session()
        job = await dispatcher.submit(await session.generation_request("steps", slots=()))
        with anyio.fail_after(30):
            assert (await job.result())["text"].byte_size == 4
