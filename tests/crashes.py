"""A process that dies after each of its writes, in one step of a job's life after the other; and who mends it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
from PIL import Image

from async_sessions import (
    AsyncSessionsError,
    BlobStore,
    JobInfo,
    MemoryBlobStore,
    Session,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    _keys,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.faults import Operation, WrappedBlobStore
from tests.faults import keys_of, named_blobs
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.dispatch import LocalDispatcher

LEASE: Final = timedelta(seconds=15)


class DyingBlobStore(WrappedBlobStore):
    """Does `left` more writes; then nothing any more, as for a process that is dead."""

    def __init__(self, inner: BlobStore) -> None:
        super().__init__(inner)
        self.left: float = float("inf")
        self.written: list[str] = []  # what the writes since `left` was set were of

    @property
    def dead(self) -> bool:
        return self.left < 0

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        await anyio.lowlevel.checkpoint()
        if operation in ("put", "delete") and not self.dead:
            self.left -= 1
            if not self.dead:
                self.written.append(f"{operation} {_keys.family(key)}")
        if self.dead:
            raise StorageError("The process is dead.")
        yield


class Life:
    """The process that dies, and what it was told is done."""

    def __init__(self, blobs: DyingBlobStore, store: SessionStore, clock: FrozenClock) -> None:
        self.blobs = blobs
        self.store = store
        self.clock = clock
        self.session: Session
        self.pipeline = StepPipeline(start=False)
        self.accepted: set[str] = set()
        self.cancelled: set[str] = set()  # those of which nothing may come
        self.worn: set[str] = set()  # those that were tried often enough
        self.deleting = False
        self.spared: float = float("inf")

    def begin(self) -> None:
        """From here on the process may die."""
        self.blobs.written.clear()
        self.blobs.left = self.spared

    def dispatcher(self, **options: Any) -> LocalDispatcher:
        return local(self.store, [self.pipeline], lease=LEASE, **options)

    async def submit(self, dispatcher: LocalDispatcher, **params: Any) -> str:
        request = await self.session.generation_request("steps", slots=["start"], params=params)
        job = await dispatcher.submit(request)
        self.accepted.add(job.id)
        return job.id

    async def until(self, job_id: str, *statuses: str) -> None:
        """What the entry says; a dead process sees nothing any more."""
        while not self.blobs.dead:
            found = await self.blobs.inner.get(_keys.manifest(self.session.key))
            if found is None or job_id not in (jobs := (await self.session.info()).jobs):
                return
            if jobs[job_id].status in statuses:
                return
            await anyio.sleep(0.001)


Step = Callable[[Life], Awaitable[object]]


async def submit(life: Life) -> None:
    async with life.dispatcher(start_paused=True) as dispatcher:
        life.begin()
        await life.submit(dispatcher)


async def run(life: Life) -> None:
    async with life.dispatcher(start_paused=True) as dispatcher:
        job_id = await life.submit(dispatcher)
        life.begin()
        dispatcher.resume()
        await life.until(job_id, "succeeded")


async def cancel_waiting(life: Life) -> None:
    async with life.dispatcher(start_paused=True) as dispatcher:
        job = await dispatcher.job(life.session, await life.submit(dispatcher))
        life.begin()
        await job.cancel()
        life.cancelled.add(job.id)


async def cancel_running(life: Life) -> None:
    async with life.dispatcher() as dispatcher:
        job = await dispatcher.job(life.session, await life.submit(dispatcher, endless=True))
        await life.until(job.id, "running")
        life.begin()
        await job.cancel()
        life.cancelled.add(job.id)
        await life.until(job.id, "cancelled")


async def delete(life: Life) -> None:
    async with life.dispatcher() as dispatcher:
        running = await life.submit(dispatcher, endless=True)
        await life.until(running, "running")
        await life.submit(dispatcher)
        life.begin()
        life.deleting = True
        await life.session.delete()
        while dispatcher._scheduler._jobs and not life.blobs.dead:  # noqa: ASYNC110 - a dead process tells nobody
            await anyio.sleep(0.001)


async def leave(life: Life) -> None:
    async with life.dispatcher() as dispatcher:
        running = await life.submit(dispatcher, endless=True)
        await life.until(running, "running")
        await life.submit(dispatcher)
        life.begin()


async def take_over(life: Life) -> None:
    """Of one job that waits, one that ran, one that nobody wants and one that was tried too often."""
    request = await life.session.generation_request("steps", slots=["start"])
    under_way: dict[str, Any] = {"status": "running", "attempt": 1}
    for number, how in enumerate(
        ({}, under_way, {**under_way, "cancel_requested": True}, {**under_way, "attempt": 3}), start=1
    ):
        entry = life.pipeline.spec.entry(request, f"{life.session.key}.{number:016x}", "dead", life.clock())
        entry = JobInfo(**{**{name: getattr(entry, name) for name in entry.__struct_fields__}, **how})
        await life.store.blobs.put(_keys.queue_marker(entry.id), b"{}")
        await life.session.edit_job(entry.id, lambda _, entry=entry: entry)  # type: ignore[misc]
        life.accepted.add(entry.id)
        if entry.attempt == 3:
            life.worn.add(entry.id)
    life.begin()
    async with life.dispatcher():
        for job_id in sorted(life.accepted):
            await life.until(job_id, "succeeded", "cancelled", "failed")


STEPS: Final[dict[str, Step]] = {
    "submit": submit,
    "run": run,
    "cancel of a job that waits": cancel_waiting,
    "cancel of a job that runs": cancel_running,
    "delete of a session": delete,
    "leaving": leave,
    "take-over": take_over,
}


class Walked(NamedTuple):
    crashes: int
    written: list[str]


async def walk(step: Step) -> Walked:
    """Do `step` again and again, and crash after 0, 1, 2 ... of its writes, until it ends without a crash."""
    writes = 0
    while True:
        life = await crashed(step, writes)
        if not life.blobs.dead:
            return Walked(writes, life.blobs.written)
        writes += 1


async def crashed(step: Step, writes: int) -> Life:
    inner, clock = MemoryBlobStore(), FrozenClock()
    blobs = DyingBlobStore(inner)
    async with open_store(blobs, cleanup_interval=None, clock=clock) as store:
        life = Life(blobs, store, clock)
        life.spared = writes
        life.session = await store.create_session()
        await life.session.store_image(Image.new("RGB", (8, 8), "red"), "start")
        logging.getLogger("async_sessions").disabled = True  # it says that a dead process can't do much
        try:
            with suppress(AsyncSessionsError):
                await step(life)
        finally:
            logging.getLogger("async_sessions").disabled = False
    await _mended(life, inner)
    return life


async def _mended(life: Life, blobs: BlobStore) -> None:
    """The next process brings everything to its end: what was acknowledged has happened, once, and nothing is left."""
    life.clock.advance(2 * LEASE)
    async with open_store(blobs, cleanup_interval=None, clock=life.clock) as store:
        before = await _entries(store, life.session.key)
        assert life.deleting or life.accepted <= set(before)
        pipeline = StepPipeline(start=False)
        pipeline.endless = False
        async with local(store, [pipeline], lease=LEASE) as dispatcher:
            with anyio.fail_after(30):
                while any(entry.unfinished for entry in (await _entries(store, life.session.key)).values()):
                    await dispatcher._owner.take_over()
                    await anyio.sleep(0.001)
        after = await _entries(store, life.session.key)
        assert {job_id: after.get(job_id) for job_id, entry in before.items() if not entry.unfinished} == {
            job_id: entry for job_id, entry in before.items() if not entry.unfinished
        }
        for entry in after.values():
            assert entry.status in ("succeeded", "cancelled", "failed")
            assert (entry.status == "failed") == (entry.id in life.worn)
            assert sorted(entry.outputs) == (["start", "text"] if entry.status == "succeeded" else [])
            assert entry.status == "cancelled" or not life.cancelled & {entry.id}
            assert entry.status != "cancelled" or entry.cancel_requested
        await store.cleanup(now=life.clock() + timedelta(hours=3))
        manifests = {_keys.manifest(info.key) async for info in store.sessions()}
        assert life.deleting or manifests
        assert await keys_of(blobs) == await named_blobs(store) | manifests


async def _entries(store: SessionStore, key: str) -> dict[str, JobInfo]:
    try:
        return dict((await (await store.open_by_key(key)).info()).jobs)
    except SessionNotFoundError:
        return {}
