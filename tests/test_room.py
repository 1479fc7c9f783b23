"""Full stores and full devices: whatever adds bytes is counted, and finds the room that a sweep or a delete makes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest
from PIL import Image

from async_sessions import (
    Expect,
    JobInfo,
    Limits,
    MemoryBlobStore,
    QuotaExceededError,
    Session,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    StorageFullError,
    _keys,
    open_store,
)
from async_sessions.bundle import import_session, stream_session
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.fuzz import fuzz
from tests.faults import FaultyBlobStore, files_below, keys_of
from tests.simulation import VirtualClock
from tests.test_quota import finish, noise, size_of_one

if TYPE_CHECKING:
    from async_sessions.blobs.base import BlobData, Expectation

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)
FILM = bytes(30_000)


async def bundle_of_jobs(films: int = 3) -> bytes:
    """A session with an image and so many finished jobs, each with a film of 30,000 bytes."""
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(noise(0), "start")
        for number in range(films):
            await finish(session, str(number), store.clock() + timedelta(seconds=number), len(FILM))
        return b"".join([chunk async for chunk in stream_session(session, jobs=True)])


# --- one session


async def test_an_import_that_one_session_may_not_keep_is_refused_and_drops_no_job() -> None:
    source = await bundle_of_jobs()
    whole = await size_of_one() + 3 * len(FILM)
    async with open_store("memory://", limits=Limits(max_session_bytes=whole - 1)) as store:
        with pytest.raises(QuotaExceededError, match="raise the store's limits"):
            await import_session(store, source)
        assert await keys_of(store.blobs) == set()
    async with open_store("memory://", limits=Limits(max_session_bytes=whole)) as store:
        assert len((await (await import_session(store, source)).info()).jobs) == 3


async def test_a_draft_of_more_images_than_one_session_may_keep_is_refused_before_they_are_written() -> None:
    async with open_store("memory://", limits=Limits(max_session_images=1)) as store:
        async with store.draft() as draft:
            await draft.store_image(noise(0), "start")
            with pytest.raises(QuotaExceededError):
                await draft.store_image(noise(1), "end")
            assert len(await keys_of(store.blobs, "blobs/")) == 2
            session = await draft.commit()
        assert set((await session.info()).images) == {"start"}


# --- the whole store


async def import_jobs(store: SessionStore, session: Session) -> None:
    await import_session(store, await bundle_of_jobs())


async def store_result(store: SessionStore, session: Session) -> None:
    await session.store_output(bytes(3 * len(FILM)), name="video", media_type="video/mp4")


async def store_picture(store: SessionStore, session: Session) -> None:
    await session.store_image(noise(7, 180), "end")


async def begin(store: SessionStore, session: Session) -> None:
    await store.create_session()


async def pin(store: SessionStore, session: Session) -> None:
    await store.session("of a user who was never seen").pin("me", until=store.clock() + HOUR)


Write = Callable[[SessionStore, Session], Awaitable[None]]
ADDING = (import_jobs, store_result, store_picture)


@pytest.mark.parametrize("write", ADDING)
async def test_what_a_full_store_has_no_room_for_is_refused_and_leaves_nothing(write: Write) -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None, limits=Limits(max_total_bytes=80_000)) as store:
        session = await store.create_session()
        await session.store_image(noise(1), "start")
        before = await keys_of(blobs)
        with pytest.raises(QuotaExceededError, match="max_total_bytes"):
            await write(store, session)
        assert await keys_of(blobs) == before
        assert store._context()._in_flight == {}


@pytest.mark.parametrize("write", ADDING)
async def test_in_a_full_store_what_is_added_takes_the_place_of_what_was_unused_for_longest(write: Write) -> None:
    clock, blobs = FrozenClock(), MemoryBlobStore()
    async with open_store(blobs, clock=clock, cleanup_interval=None) as store:
        old = await store.create_session()
        await old.store_image(noise(1, 200), "start")
    clock.advance(hours=3)
    async with open_store(blobs, clock=clock, cleanup_interval=None, limits=Limits(max_total_bytes=200_000)) as store:
        await write(store, await store.create_session())
        assert _keys.manifest(old.key) not in await keys_of(blobs, "manifests/")
        counted = (await store.cleanup(dry_run=True)).total_bytes
        assert store._context().used == counted


async def test_what_is_deleted_makes_room_at_once() -> None:
    one = await size_of_one()
    async with open_store("memory://", cleanup_interval=None, limits=Limits(max_total_bytes=int(3.5 * one))) as store:
        session, other = await store.create_session(), await store.create_session()
        await session.store_images({"start": noise(1), "end": noise(2)})
        await other.store_image(noise(3), "start")
        for make_room, images in ((other.delete, 1), (session.clear_all_images, 3)):
            with pytest.raises(QuotaExceededError):  # a sweep finds nothing, and is not repeated for a while
                await session.store_image(noise(4), "more")
            await make_room()
            for number in range(images):
                await session.store_image(noise(4 + number), f"more-{number}")


@pytest.mark.parametrize("error", [StorageFullError, asyncio.CancelledError])
async def test_a_write_that_did_not_happen_takes_no_room(error: type[BaseException]) -> None:
    """As many as would fill the store several times over."""
    blobs = FaultyBlobStore()
    fails = ""

    def fail(key: str) -> bool:
        if fails and key.startswith(fails):
            raise error
        return False

    async with open_store(blobs, cleanup_interval=None, limits=Limits(max_total_bytes=100_000)) as store:
        session = await store.create_session()
        await session.store_image(noise(1, 100), "start")
        blobs.full_for = fail
        fails = "blobs/"
        for _ in range(3):
            with pytest.raises(error):
                await session.store_output(bytes(60_000), name="video", media_type="video/mp4")
        if error is StorageFullError:
            fails = "manifests/"
            for _ in range(3):
                with pytest.raises(error):
                    await session.store_image(noise(2, 120), "end")
        fails = ""
        await session.store_output(bytes(60_000), name="video", media_type="video/mp4")
        assert store._context().used == (await store.cleanup(dry_run=True)).total_bytes


async def test_what_a_session_may_not_keep_takes_no_room_in_the_store() -> None:
    one = await size_of_one()
    limits = Limits(max_total_bytes=3 * one, max_session_images=1)
    async with open_store("memory://", cleanup_interval=None, limits=limits) as store:
        session = await store.create_session()
        await session.store_image(noise(1), "start")
        for _ in range(5):
            with pytest.raises(QuotaExceededError, match="session is full"):
                await session.store_image(noise(2), "end")
        await (await store.create_session()).store_image(noise(2), "start")


# --- the device


class Device(MemoryBlobStore):
    """Holds so many keys; one more is a `StorageFullError`, unless it takes the place of another."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys = keys

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        held = await keys_of(self)
        if key not in held and len(held) >= self.keys:
            if not isinstance(data, bytes | Path):
                async for _ in data:
                    break
            raise StorageFullError("No room is left.")
        return await super().put(key, data, expect=expect)


@pytest.mark.parametrize("write", [*ADDING, begin, pin])
async def test_a_full_device_is_swept_before_anything_is_refused(write: Write) -> None:
    clock, device = FrozenClock(), Device(100)
    async with open_store(device, clock=clock, cleanup_interval=None) as store:
        for number in range(3):
            await (await store.create_session()).store_image(noise(number), "start")
        clock.advance(days=2)
        session = await store.create_session()
        device.keys = len(await keys_of(device))
        await write(store, session)
        assert len(await keys_of(device, "manifests/")) <= 2


@pytest.mark.parametrize("write", [begin, pin])
async def test_a_device_that_no_sweep_makes_room_on_takes_no_new_session(write: Write) -> None:
    device = Device(100)
    async with open_store(device, cleanup_interval=None) as store:
        session = await store.create_session()
        device.keys = len(await keys_of(device))
        with pytest.raises(StorageFullError):
            await write(store, session)
        await session.update_state(model="i2v")


async def delete(store: SessionStore, session: Session) -> None:
    await session.delete()


async def let_expire(store: SessionStore, session: Session) -> None:
    assert (await store.cleanup(now=store.clock() + timedelta(days=2))).problems == ()


@pytest.mark.parametrize("remove", [delete, let_expire])
async def test_on_a_device_that_others_filled_to_the_brim_a_session_can_still_go(remove: Write) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(noise(0), "start")
        blobs.full_for = lambda key: True
        await remove(store, session)
        assert await keys_of(blobs) == set()
        with pytest.raises(SessionNotFoundError):
            await session.retrieve_image("start")


async def test_what_can_be_read_only_once_is_not_written_in_part_after_a_sweep() -> None:
    clock, device = FrozenClock(), Device(100)

    async def once() -> AsyncIterator[bytes]:
        yield FILM[:10]
        yield FILM[10:]

    async with open_store(device, clock=clock, cleanup_interval=None) as store:
        await (await store.create_session()).store_image(noise(1), "start")
        clock.advance(days=2)
        device.keys = 3
        async with store.draft() as draft:
            with pytest.raises(StorageFullError):
                await draft.store_output(
                    once(), name="video", media_type="video/mp4", digest=sha256(FILM).hexdigest(), byte_size=len(FILM)
                )


# --- what was written, and how long it may take


class Uncertain(FaultyBlobStore):
    """Where a manifest is put the answer is lost: before it happened, or after."""

    def __init__(self, happens: bool) -> None:
        super().__init__()
        self.happens = happens

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        if not key.startswith("manifests/") or not isinstance(expect, Expect):
            return await super().put(key, data, expect=expect)
        if self.happens:
            await super().put(key, data, expect=expect)
        raise StorageError("The connection was lost.")


@pytest.mark.parametrize("happens", [False, True])
async def test_nothing_stays_of_an_import_whose_end_is_uncertain(happens: bool) -> None:
    blobs = Uncertain(happens)
    async with open_store(blobs, cleanup_interval=None) as store:
        with pytest.raises(StorageError, match="lost"):
            await import_session(store, await bundle_of_jobs())
        assert await keys_of(blobs) == set()
        assert store._context()._in_flight == {}


async def test_a_draft_begins_once() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        async with store.draft() as draft:
            await draft.store_image(noise(0), "start")
            session = await draft.commit()
            await draft.store_image(noise(1), "end")
            with pytest.raises(RuntimeError, match="has begun"):
                await draft.commit()
        assert len(await keys_of(store.blobs, "blobs/")) == 2
        assert (await session.retrieve_image("start")).size == (64, 64)


def test_a_large_result_may_take_longer_to_write_than_a_commit() -> None:
    """And no sweep takes what lies there meanwhile."""

    async def slowly() -> AsyncIterator[bytes]:
        for start in range(0, len(FILM), 1000):
            await anyio.sleep(10)
            yield FILM[start : start + 1000]

    async def scenario() -> None:
        async with open_store(MemoryBlobStore(), clock=VirtualClock(), cleanup_interval=None) as store:
            async with store.draft() as draft:
                image = await draft.store_image(Image.new("RGB", (8, 8)), "start")
                film = await draft.store_output(
                    slowly(), name="film", media_type="video/mp4", digest=sha256(FILM).hexdigest(), byte_size=len(FILM)
                )
                await store.cleanup(now=store.clock() + timedelta(days=9000))
                job = JobInfo(
                    id=f"{draft.key}.{'0' * 16}",
                    pipeline="p",
                    inputs={"start": image},
                    params={},
                    submitted_at=store.clock(),
                    owner="o",
                    status="succeeded",
                    outputs={"film": film},
                )
                draft.add_job(job)
                session = await draft.commit()
            assert b"".join([chunk async for chunk in session.stream_output(film)]) == FILM
            assert (await session.retrieve_image("start")).size == (8, 8)

    fuzz(scenario, seeds=range(3))


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
async def test_a_result_whose_writing_is_cancelled_leaves_nothing(native: bool, tmp_path: Path) -> None:
    reading, scope = anyio.Event(), anyio.CancelScope()

    async def chunks() -> AsyncIterator[bytes]:
        yield FILM
        reading.set()
        await anyio.sleep_forever()

    async def build() -> None:
        with scope:
            async with store.draft() as draft:
                await draft.store_image(noise(0), "start")
                await draft.store_output(
                    chunks(), name="film", media_type="video/mp4", digest=sha256(FILM).hexdigest(), byte_size=len(FILM)
                )

    async with open_store(tmp_path / "s", cleanup_interval=None) as store:
        task = asyncio.get_running_loop().create_task(build())
        await reading.wait()
        if native:
            task.cancel()
        else:
            scope.cancel()
        await asyncio.wait({task})
        assert task.cancelled() == native
        assert await anyio.to_thread.run_sync(files_below, tmp_path, "s", "blobs") == []
        assert await anyio.to_thread.run_sync(files_below, tmp_path, "s", "tmp") == []
        assert store._context()._in_flight == {}
