from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from async_sessions import JobFailedError, _keys, open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.dispatch._lease import LEASE, Owner
from async_sessions.jobs import Progress
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, keys_of
from tests.steps import StepPipeline

pytestmark = pytest.mark.anyio


async def test_a_job_of_a_dead_dispatcher_ends_as_abandoned_and_one_of_a_living_goes_on() -> None:
    clock = FrozenClock()
    async with (
        open_store("memory://", clock=clock, cleanup_interval=None) as store,
        LocalDispatcher(store, [StepPipeline()]) as other,
    ):
        session = await store.create_session()
        job = await other.submit(await session.generation_request("steps", slots=(), params={"endless": True}))
        async for event in job.events():
            if isinstance(event, Progress):
                break
        waiting = await other.submit(await session.generation_request("steps", slots=()))
        async with LocalDispatcher(store, [StepPipeline()]) as dispatcher:
            await dispatcher._owner.bury_the_dead()
            assert ((await job.info()).status, (await waiting.info()).status) == ("running", "queued")

            await store.blobs.delete(_keys.owner_lease(other._owner.name))  # as if it had lapsed long ago
            await dispatcher._owner.bury_the_dead()
            for handle in (await dispatcher.job(session, job.id), await dispatcher.job(session, waiting.id)):
                entry = await handle.info()
                assert entry.status == "failed"
                assert entry.error is not None
                assert entry.error.kind == "abandoned"
            assert await keys_of(store.blobs, "queue/") == set()


async def test_a_lease_lapses_when_it_is_not_renewed() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        session = await store.create_session()
        async with LocalDispatcher(store, [StepPipeline()]) as dispatcher:
            dead = Owner(store, "dead", lambda job_id: False)
            await dead.renew()
            entry = dispatcher._pipelines["steps"].spec.entry(
                await session.generation_request("steps", slots=()), f"{session.key}.{'0' * 16}", "dead", clock()
            )
            await store.blobs.put(_keys.queue_marker(entry.id), b"{}")
            await session.edit_job(entry.id, lambda _: entry)
            job = await dispatcher.job(session, entry.id)
            await dispatcher._owner.bury_the_dead()
            assert (await job.info()).status == "queued"
            clock.now += 2 * LEASE
            await dispatcher._owner.bury_the_dead()
            assert (await job.info()).status == "failed"


async def test_a_damaged_manifest_keeps_no_other_job_from_its_end(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        sessions = [await store.create_session() for _ in range(4)]
        async with LocalDispatcher(store, [StepPipeline()]) as dispatcher:
            spec = dispatcher._pipelines["steps"].spec
            for session in sessions:
                entry = spec.entry(
                    await session.generation_request("steps", slots=()),
                    f"{session.key}.{'0' * 16}",
                    "dead",
                    store.clock(),
                )
                await store.blobs.put(_keys.queue_marker(entry.id), b"{}")
                await session.edit_job(entry.id, lambda _, entry=entry: entry)  # type: ignore[misc]
            for session in sessions[:2]:
                (tmp_path / "root" / _keys.manifest(session.key)).write_bytes(b"{")
            await dispatcher._owner.bury_the_dead()
            for session in sessions[2:]:
                assert [job.status for job in (await session.info()).jobs.values()] == ["failed"]


async def test_a_job_whose_end_could_not_be_stored_ends_once_there_is_room_again() -> None:
    blobs = FaultyBlobStore()
    pipeline = StepPipeline()
    async with open_store(blobs, cleanup_interval=None) as store, LocalDispatcher(store, [pipeline]) as dispatcher:
        session = await store.create_session()
        pipeline.before_generate = lambda context: setattr(blobs, "full_for", lambda key: True)
        job = await dispatcher.submit(await session.generation_request("steps", slots=()))
        with pytest.raises(JobFailedError):
            await job.result()
        assert (await job.info()).status == "running"
        blobs.full_for = lambda key: False
        with anyio.fail_after(30):
            while dispatcher._holds(job.id):  # noqa: ASYNC110 - the lane tells nobody
                await anyio.sleep(0.01)
        await dispatcher._owner.bury_the_dead()
        assert (await job.info()).status == "failed"


async def test_leaving_takes_the_lease_along_and_a_sweep_takes_one_that_was_left(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        async with LocalDispatcher(store, [StepPipeline()]):
            assert len(await keys_of(store.blobs, "owners/")) == 1
        assert await keys_of(store.blobs, "owners/") == set()
        await store.blobs.put("owners/0123.json", b"{}")
        report = await store.cleanup(now=store.clock() + 10 * LEASE)
        assert report.removed == ()
        report = await store.cleanup(now=store.clock() + 1000 * LEASE)
        assert [removal.kind for removal in report.removed] == ["lease"]


async def test_a_dispatcher_goes_on_while_its_lease_can_not_be_renewed() -> None:
    blobs = FaultyBlobStore()
    async with (
        open_store(blobs, cleanup_interval=None) as store,
        LocalDispatcher(store, [StepPipeline()]) as dispatcher,
    ):
        blobs.full_for = lambda key: key.startswith("owners/")
        session = await store.create_session()
        job = await dispatcher.submit(await session.generation_request("steps", slots=()))
        with anyio.fail_after(30):
            assert (await job.result())["text"].byte_size == 4
