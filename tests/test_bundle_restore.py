"""A bundle that is put into a session that there is: all of it that the app takes, or nothing."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from async_sessions import (
    BundleError,
    Limits,
    MemoryBlobStore,
    QuotaExceededError,
    RevisionConflictError,
    Session,
    SessionStore,
    StorageError,
    StorageFullError,
    open_store,
)
from async_sessions._draft import adding
from async_sessions.bundle import export_session, restore_bundle, stream_session
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, keys_of, named_blobs
from tests.images import encoded, noise, photograph, rgba_png

pytestmark = pytest.mark.anyio


@pytest.fixture
async def bundle(tmp_path: Path) -> Path:
    """Of two images and three values."""
    async with open_store("memory://") as store:
        session = await store.create_session(prompt="a boat", steps=7, credits=1000)
        await session.store_image(rgba_png(90, 60), "start", name="boat.png")
        await session.store_image(encoded(photograph(64, 48), "JPEG"), "end", name="shore.jpg")
        await export_session(session, tmp_path / "session.zip")
    return tmp_path / "session.zip"


async def test_the_session_holds_what_the_bundle_does_and_what_it_held_can_be_put_back(
    session_store: SessionStore, bundle: Path
) -> None:
    session = await session_store.create_session(prompt="a car", other=1)
    old = await session.store_image(rgba_png(30, 20), "start", name="car.png")
    await session.store_image(rgba_png(31, 20), "third")
    assert sorted(await restore_bundle(session, bundle)) == ["end", "start"]
    info = await session.info()
    assert {slot: record.source_name for slot, record in info.images.items()} == {
        "start": "boat.png",
        "end": "shore.jpg",
        "third": None,
    }
    assert info.state == {"prompt": "a boat", "steps": 7, "credits": 1000, "other": 1}
    assert (await session.retrieve_image("start")).size == (90, 60)
    assert len(await session.retrieve_thumbnail("end")) > 0
    await session.restore_recent(old.digest, "start")
    assert (await session.info()).images["start"].source_name == "car.png"


async def test_an_image_that_is_there_already_is_left_where_it_is(bundle: Path) -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await restore_bundle(session, bundle)
        before, files = await session.info(), await keys_of(blobs)
        await restore_bundle(session, bundle)
        after = await session.info()
        assert (after.images, after.recent) == (before.images, ())
        assert await keys_of(blobs) == files


async def test_only_what_the_app_takes_is_taken(session_store: SessionStore, bundle: Path) -> None:
    session = await session_store.create_session()
    slots = await restore_bundle(
        session, bundle, takes_slot=lambda slot: slot == "end", takes_value=lambda name, value: name != "credits"
    )
    info = await session.info()
    assert (slots, list(info.images), info.state) == (("end",), ["end"], {"prompt": "a boat", "steps": 7})
    before = (await session.info()).revision
    with pytest.raises(BundleError, match="nothing that belongs here"):
        await restore_bundle(session, bundle, takes_slot=lambda slot: False, takes_value=lambda name, value: False)
    assert (await session.info()).revision == before


async def test_nothing_of_it_goes_over_an_image_that_was_not_seen(bundle: Path) -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        seen = await session.store_image(rgba_png(30, 20), "start")
        await session.store_image(rgba_png(20, 30), "end")
        before, files = await session.info(), await keys_of(blobs)
        with pytest.raises(RevisionConflictError, match="'end' holds another image"):
            await restore_bundle(session, bundle, replaces={"start": seen.digest, "end": ""})
        assert await session.info() == before
        assert await keys_of(blobs) == files
        await session.clear_image("end")
        assert len(await restore_bundle(session, bundle, replaces={"start": seen.digest, "end": ""})) == 2
        after = (await session.info()).images
        assert len(await restore_bundle(session, bundle, replaces={"start": "", "end": ""})) == 2  # they are there
        assert (await session.info()).images == after


async def test_a_session_that_has_not_begun_begins_with_it(session_store: SessionStore, bundle: Path) -> None:
    session = session_store.session("an id of the tests")
    await restore_bundle(session, bundle)
    assert len((await session.info()).images) == 2


async def test_what_does_not_fit_leaves_the_session_as_it_was(bundle: Path) -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None, limits=Limits(max_session_images=2)) as store:
        session = await store.create_session(prompt="a car")
        await session.store_image(rgba_png(30, 20), "third")
        before, files = await session.info(), await keys_of(blobs)
        with pytest.raises(QuotaExceededError):
            await restore_bundle(session, bundle)
        assert await session.info() == before
        assert await keys_of(blobs) == files


async def test_a_value_too_many_leaves_the_session_as_it_was(bundle: Path) -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None, limits=Limits(max_state_bytes=100)) as store:
        session = await store.create_session(other="x" * 80)
        before, files = await session.info(), await keys_of(blobs)
        with pytest.raises(QuotaExceededError, match="state"):
            await restore_bundle(session, bundle)
        assert await session.info() == before
        assert await keys_of(blobs) == files


async def test_a_bundle_that_is_damaged_at_its_end_leaves_the_session_as_it_was(
    session_store: SessionStore, bundle: Path
) -> None:
    session = await session_store.create_session(prompt="a car")
    before, files = await session.info(), await keys_of(session_store.blobs)
    data = bytearray(await anyio.Path(bundle).read_bytes())
    at = data.rindex(b"\xff\xd9")  # the end of the photograph, which comes second
    data[at - 20] ^= 1
    with pytest.raises(BundleError):
        await restore_bundle(session, bytes(data))
    assert await session.info() == before
    assert await keys_of(session_store.blobs) == files


async def test_a_full_disk_leaves_the_session_as_it_was(bundle: Path) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session(prompt="a car")
        before, files = await session.info(), await keys_of(blobs)
        blobs.full_for = lambda key: "manifests/" in key
        with pytest.raises(StorageFullError):
            await restore_bundle(session, bundle)
        blobs.full_for = lambda key: False
        assert await session.info() == before
        assert await keys_of(blobs) == files


async def test_an_upload_that_came_after_it_stays(bundle: Path) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        asked, gate = anyio.Event(), anyio.Event()

        def before_put(key: str) -> anyio.Event | None:
            if key.startswith("blobs/") and not asked.is_set():
                asked.set()
                return gate
            return None

        blobs.before_put = before_put
        async with anyio.create_task_group() as group:
            group.start_soon(restore_bundle, session, bundle)
            await asked.wait()
            await session.store_image(rgba_png(31, 21), "start", name="newer.png")
            gate.set()
        info = await session.info()
        assert (info.images["start"].source_name, info.images["end"].source_name) == ("newer.png", "shore.jpg")
        assert [recent.record.source_name for recent in info.recent] == ["boat.png"]
        assert {key for key in await keys_of(blobs) if key.startswith("blobs/")} == await named_blobs(store)


async def test_a_session_that_was_deleted_meanwhile_does_not_come_back(bundle: Path) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        asked, gate = anyio.Event(), anyio.Event()

        def before_put(key: str) -> anyio.Event | None:
            if key.startswith("blobs/") and not asked.is_set():
                asked.set()
                return gate
            return None

        blobs.before_put = before_put
        told: list[BaseException] = []

        async def restore() -> None:
            try:
                await restore_bundle(session, bundle)
            except LookupError as error:
                told.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(restore)
            await asked.wait()
            await session.delete()
            gate.set()
        assert len(told) == 1
        assert await keys_of(blobs) == set()


async def test_what_took_longer_than_half_the_grace_is_refused() -> None:
    blobs, clock = MemoryBlobStore(), FrozenClock()
    async with open_store(blobs, cleanup_interval=None, clock=clock, grace=timedelta(minutes=10)) as store:
        session = await store.create_session()
        async with adding(session, ["start"], {}, {}) as addition:
            await addition.store_image(rgba_png(), "start")
            clock.advance(minutes=6)
            with pytest.raises(StorageError, match="took so long"):
                await addition.commit()
        assert {key for key in await keys_of(blobs) if key.startswith("blobs/")} == set()


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
@pytest.mark.parametrize("fatal", range(5))  # at a put: of an image, its thumbnail, both again, the manifest
async def test_a_cancelled_restore_has_happened_whole_or_not_at_all(bundle: Path, fatal: int, native: bool) -> None:
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

    async def restore() -> None:
        with scope:
            await restore_bundle(session, bundle)

    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(rgba_png(30, 20), "third")
        before = await keys_of(blobs, "blobs/")
        blobs.before_put = cancel_at
        task = asyncio.get_running_loop().create_task(restore())
        await asyncio.wait({task})
        assert task.cancelled() == native
        info = await session.info()
        whole = fatal == 4
        assert (len(info.images), len(info.state)) == ((3, 3) if whole else (1, 0))
        named = {record.blob for record in info.images.values()}
        after = await keys_of(blobs, "blobs/")
        assert after == named | {f"{blob}.thumb" for blob in named}
        assert whole or after == before
        assert store._context()._in_flight == {}
        assert store._context().cpu.borrowed_tokens == 0


async def test_an_own_png_larger_than_an_upload_may_be_comes_back(session_store: SessionStore) -> None:
    limits = Limits(max_bytes=50_000)
    async with open_store("memory://", limits=limits) as store:
        session = await store.create_session()
        record = await session.store_image(noise("RGB", 200, 200), "start")
        assert record.byte_size > limits.max_bytes
        bundle = b"".join([chunk async for chunk in stream_session(session)])
        other: Session = await store.create_session()
        await restore_bundle(other, bundle)
        assert (await other.info()).images["start"].digest == record.digest
