from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from PIL import Image

from async_sessions import (
    Draft,
    InvalidKeyError,
    JobInfo,
    Limits,
    MemoryBlobStore,
    OutputRecord,
    QuotaExceededError,
    SessionStore,
    StorageError,
    StorageFullError,
    StoreClosedError,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, keys_of
from tests.images import encoded

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
FILM = b"film"


async def stored_film(draft: Draft) -> OutputRecord:
    async def chunks() -> AsyncIterator[bytes]:
        yield FILM[:2]
        yield FILM[2:]

    return await draft.store_output(
        chunks(), name="video", media_type="video/mp4", digest=sha256(FILM).hexdigest(), byte_size=len(FILM)
    )


async def test_a_session_begins_with_all_that_its_draft_holds(session_store: SessionStore) -> None:
    async with session_store.draft({"model": "i2v"}) as draft:
        start = await draft.store_image(RED, "start", name="red.png")
        unslotted = await draft.store_image(RED, None)
        job = JobInfo(
            id=f"{draft.key}.{'0' * 16}",
            pipeline="steps",
            inputs={"start": start, "end": unslotted},
            params={},
            submitted_at=session_store.clock(),
            owner="tests",
            status="succeeded",
            outputs={"video": await stored_film(draft)},
        )
        draft.add_job(job)
        assert [info async for info in session_store.sessions()] == []
        session = await draft.commit()

    assert session.id is not None
    info = await (await session_store.restore_session(session.id)).info()
    assert (info.key, info.images, info.state, info.jobs) == (
        draft.key,
        {"start": start},
        {"model": "i2v"},
        {job.id: job},
    )
    assert info.images["start"].source_name == "red.png"
    assert (await session.retrieve_image("start")).getpixel((0, 0)) == (255, 0, 0)
    assert await (await session.read_record(unslotted)).data() == await session.retrieve_bytes("start")
    assert b"".join([chunk async for chunk in session.stream_output(job.outputs["video"])]) == FILM
    assert draft._written == {}
    await session.store_image(RED, "end")
    assert await session.has_image("start")


async def test_nothing_stays_of_a_draft_that_is_left_without_a_commit() -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs) as store:
        async with store.draft() as draft:
            await draft.store_image(RED, "start")
            await stored_film(draft)
            assert len(await keys_of(blobs, "blobs/")) == 3
        assert await keys_of(blobs) == set()
        assert store._context()._in_flight == {}


async def test_what_a_store_does_not_take_no_draft_takes(session_store: SessionStore) -> None:
    with pytest.raises(QuotaExceededError):
        async with session_store.draft({"text": "x" * 70_000}):
            pass
    async with session_store.draft() as draft:
        with pytest.raises(InvalidKeyError):
            await draft.store_image(RED, "../start")
        with pytest.raises(ValueError, match="pixels"):
            await draft.store_image(RED, "start", limits=Limits(max_pixels=10))
    assert await keys_of(session_store.blobs) == set()


async def test_a_full_disk_at_the_commit_leaves_nothing() -> None:
    blobs = FaultyBlobStore()
    blobs.full_for = lambda key: key.startswith("manifests/")
    async with open_store(blobs, cleanup_interval=None) as store:
        async with store.draft() as draft:
            await draft.store_image(RED, "start")
            with pytest.raises(StorageFullError):
                await draft.commit()
        assert await keys_of(blobs) == set()


async def test_no_sweep_takes_what_a_draft_has_written(tmp_path: Path) -> None:
    async with open_store(tmp_path, cleanup_interval=None) as store, store.draft() as draft:
        await draft.store_image(RED, "start")
        await store.cleanup(now=store.clock() + timedelta(days=2))
        session = await draft.commit()
        assert (await session.retrieve_image("start")).size == RED.size


async def test_a_draft_that_took_longer_than_half_the_grace_is_refused() -> None:
    clock = FrozenClock()
    blobs = MemoryBlobStore()
    async with open_store(blobs, clock=clock, grace=timedelta(hours=1)) as store:
        async with store.draft() as draft:
            await draft.store_image(RED, "start")
            clock.advance(minutes=31)
            with pytest.raises(StorageError, match="so long"):
                await draft.commit()
        assert await keys_of(blobs) == set()


async def test_a_draft_outlives_its_store_no_more_than_a_session_does() -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs) as store:
        leaving = store.draft()
        draft = await leaving.__aenter__()
        await draft.store_image(RED, "start")
    with pytest.raises(StoreClosedError):
        await draft.store_image(RED, "end")
    with pytest.raises(StoreClosedError):
        await draft.commit()
    await leaving.__aexit__(None, None, None)
    assert len(await keys_of(blobs)) == 2  # as after a crash: an image and its thumbnail
    async with open_store(blobs) as store:
        await store.cleanup(now=store.clock() + timedelta(hours=2))
    assert await keys_of(blobs) == set()


async def test_nothing_is_written_to_a_store_that_was_left_meanwhile() -> None:
    blobs = MemoryBlobStore()
    began, left = anyio.Event(), anyio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        began.set()
        await left.wait()
        yield encoded(RED, "PNG")

    async def store_image() -> None:
        with pytest.raises(StoreClosedError):
            await draft.store_image(slowly(), "start")

    async with anyio.create_task_group() as group:
        async with open_store(blobs, cleanup_interval=None) as store:
            draft = await store.draft().__aenter__()
            group.start_soon(store_image)
            await began.wait()
        left.set()
    assert await keys_of(blobs) == set()


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
@pytest.mark.parametrize(
    "fatal", range(5), ids=lambda put: f"put {put}"
)  # an image, its thumbnail, twice; the manifest
async def test_a_cancelled_draft_has_begun_whole_or_left_nothing(fatal: int, native: bool) -> None:
    blobs = FaultyBlobStore()
    puts: list[str] = []
    scope = anyio.CancelScope()

    def cancel_at(key: str) -> None:
        puts.append(key)
        if len(puts) == fatal + 1:
            if native:
                task.cancel()
            else:
                scope.cancel()

    async def build() -> None:
        with scope:
            async with store.draft() as draft:
                await draft.store_image(RED, "start")
                await draft.store_image(RED, "end")
                await draft.commit()

    async with open_store(blobs, cleanup_interval=None) as store:
        blobs.before_put = cancel_at
        task = asyncio.get_running_loop().create_task(build())
        await asyncio.wait({task})
        assert task.cancelled() == native
        assert len(puts) == fatal + 1
        named = {record.blob async for info in store.sessions() for record in info.images.values()}
        assert len(named) == (2 if fatal == 4 else 0)
        assert await keys_of(blobs, "blobs/") == named | {f"{blob}.thumb" for blob in named}
        assert store._context()._in_flight == {}
        assert store._context().cpu.borrowed_tokens == 0
