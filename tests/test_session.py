from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest
from PIL import Image, ImageDraw

from async_sessions import (
    CorruptBlobError,
    ImageRecord,
    ImageRejectedError,
    InvalidKeyError,
    Limits,
    LockTimeoutError,
    MemoryBlobStore,
    QuotaExceededError,
    RevisionConflictError,
    Session,
    SessionNotFoundError,
    SessionStore,
    SlotEmptyError,
    StorageFullError,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, files_below, keys_of
from tests.images import jpeg_with_exif

if TYPE_CHECKING:
    from async_sessions._ingest import ImageSource

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


async def chunks_after(gate: anyio.Event, data: bytes, started: anyio.Event | None = None) -> AsyncIterator[bytes]:
    """An upload that begins at once and ends when `gate` opens."""
    yield data[:10]
    if started is not None:
        started.set()
    await gate.wait()
    yield data[10:]


@pytest.mark.parametrize("source", ["image", "bytes", "path", "array", "chunks"])
async def test_an_image_comes_back_with_the_same_pixels(session: Session, tmp_path: Path, source: str) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png(RED))
    gate = anyio.Event()
    gate.set()
    sources: dict[str, ImageSource] = {
        "image": RED,
        "bytes": png(RED),
        "path": path,
        "array": np.asarray(RED),
        "chunks": chunks_after(gate, png(RED)),
    }
    record = await session.store_image(sources[source], "start")
    assert (record.size, record.mode, record.media_type) == ((40, 30), "RGB", "image/png")
    image = await session.retrieve_image("start")
    assert image.tobytes() == RED.tobytes()
    assert np.array_equal(await session.retrieve_array("start"), np.asarray(RED))
    assert (await session.info()).images == {"start": record}


async def test_uploaded_bytes_come_back_as_they_were(session: Session) -> None:
    await session.store_image(png(RED), "start")
    assert await session.retrieve_bytes("start") == png(RED)


async def test_the_thumbnail_is_a_small_webp(session: Session) -> None:
    await session.store_image(Image.new("RGB", (1000, 500), "red"), "start")
    thumbnail = Image.open(io.BytesIO(await session.retrieve_thumbnail("start")))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (320, 160))


async def test_drawing_on_an_image_changes_no_other_copy(session: Session) -> None:
    await session.store_image(RED, "start")
    mine = await session.retrieve_image("start")
    ImageDraw.Draw(mine).rectangle((0, 0, 40, 30), fill="black")
    mine.paste(BLUE)
    (await session.retrieve_array("start"))[:] = 0
    assert (await session.retrieve_image("start")).tobytes() == RED.tobytes()


async def test_drawing_on_the_source_afterwards_changes_nothing(session: Session) -> None:
    source = RED.copy()
    await session.store_image(source, "start")
    ImageDraw.Draw(source).rectangle((0, 0, 40, 30), fill="black")
    assert (await session.retrieve_image("start")).tobytes() == RED.tobytes()


async def test_an_empty_slot_is_an_error(session: Session) -> None:
    assert not await session.has_image("start")
    for retrieve in (
        session.retrieve_image,
        session.retrieve_bytes,
        session.retrieve_array,
        session.retrieve_thumbnail,
    ):
        with pytest.raises(SlotEmptyError):
            await retrieve("start")


@pytest.mark.parametrize("slot", ["", "Start", "1st", "a/b", "../x", "a" * 33, "ä", "a\n"])
async def test_a_slot_that_is_no_plain_name_is_refused(session: Session, slot: str) -> None:
    for call in (session.retrieve_image, session.has_image, session.clear_image):
        with pytest.raises(InvalidKeyError):
            await call(slot)
    with pytest.raises(InvalidKeyError):
        await session.store_image(RED, slot)


async def test_a_slot_that_the_store_does_not_have_is_refused() -> None:
    async with open_store("memory://", slots=["start", "end"]) as store:
        session = await store.create_session()
        await session.store_image(RED, "end")
        with pytest.raises(InvalidKeyError, match="end, start"):
            await session.store_image(RED, "middle")


async def test_of_two_uploads_the_second_wins_however_slow_the_first(session: Session) -> None:
    gate, started = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(session.store_image, chunks_after(gate, png(RED), started), "start")
        await started.wait()
        blue = await session.store_image(BLUE, "start")
        gate.set()
    info = await session.info()
    assert info.images == {"start": blue}
    assert [recent.record.size for recent in info.recent] == [RED.size]


async def test_uploads_at_once_end_in_the_order_of_their_calls(session: Session) -> None:
    sizes = list(range(20, 60))
    async with anyio.create_task_group() as group:
        for size in sizes:
            group.start_soon(session.store_image, Image.new("RGB", (size, 20 * (60 - size))), "start")
    assert (await session.info()).images["start"].width == sizes[-1]


async def test_a_clear_wins_over_an_upload_that_began_before_it(session: Session) -> None:
    gate, started = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(session.store_image, chunks_after(gate, png(RED), started), "start")
        await started.wait()
        await session.clear_image("start")
        gate.set()
    assert not await session.has_image("start")


async def test_clear_all_leaves_nothing_of_an_upload_that_began_before_it(
    session: Session, session_store: SessionStore
) -> None:
    gate, started = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(session.store_image, chunks_after(gate, png(RED), started), "start")
        await started.wait()
        await session.clear_all_images()
        gate.set()
    assert await keys_of(session_store.blobs, "blobs/") == set()


async def test_an_upload_that_everything_was_cleared_after_is_as_if_it_had_ended_before(session: Session) -> None:
    """Its record tells what was stored, as that of any image which is cleared later."""
    before = await session.store_image(RED, "start")
    await session.clear_all_images()
    gate, started = anyio.Event(), anyio.Event()
    overtaken: list[ImageRecord] = []

    async def upload() -> None:
        overtaken.append(await session.store_image(chunks_after(gate, png(RED), started), "start"))

    async with anyio.create_task_group() as group:
        group.start_soon(upload)
        await started.wait()
        await session.clear_all_images()
        gate.set()
    assert [record.size for record in overtaken] == [RED.size]
    for record in (before, *overtaken):
        with pytest.raises(CorruptBlobError):
            await (await session.read_record(record)).data()
    info = await session.info()
    assert (info.images, info.recent, info.total_bytes) == ({}, (), 0)
    assert (await session.generation_request("p")).inputs == {}


async def test_clear_all_leaves_no_image_on_disk(session: Session, tmp_path: Path) -> None:
    await session.store_images({"start": RED, "end": BLUE})
    await session.store_image(BLUE, "start")
    assert len(files_below(tmp_path, "sessions", "blobs")) == 6
    await session.clear_all_images()
    assert files_below(tmp_path, "sessions", "blobs") == []
    assert (await session.info()).recent == ()


async def test_a_replaced_image_can_be_put_back(session: Session) -> None:
    red = await session.store_image(RED, "start")
    blue = await session.store_image(BLUE, "start")
    assert [recent.record for recent in (await session.info()).recent] == [red]
    assert await session.restore_recent(red.digest, "start") == red
    info = await session.info()
    assert info.images == {"start": red}
    assert [recent.record for recent in info.recent] == [blue]
    await session.clear_image("start")
    await session.clear_image("start")
    assert await session.restore_recent(blue.digest, "end") == blue
    with pytest.raises(SlotEmptyError):
        await session.restore_recent("0" * 64, "end")


async def test_an_image_is_put_back_over_the_one_that_was_seen_and_no_other(session: Session) -> None:
    red = await session.store_image(RED, "start")
    blue = await session.store_image(BLUE, "start")
    await session.store_image(Image.new("RGB", (20, 20), "green"), "end")
    for seen in ("", red.digest):
        with pytest.raises(RevisionConflictError, match="another image by now"):
            await session.restore_recent(red.digest, "end", replaces=seen)
    assert (await session.info()).images["end"].digest not in (red.digest, blue.digest)
    assert await session.restore_recent(red.digest, "start", replaces=blue.digest) == red
    assert await session.restore_recent(red.digest, "start", replaces=blue.digest) == red  # it is there
    await session.clear_image("start")
    assert await session.restore_recent(red.digest, "start", replaces=blue.digest) == red


async def test_an_image_is_not_recent_for_longer_than_the_grace() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, grace=timedelta(hours=1)) as store:
        session = await store.create_session()
        red = await session.store_image(RED, "start")
        await session.clear_image("start")
        clock.advance(minutes=61)
        assert (await session.info()).recent == ()
        with pytest.raises(SlotEmptyError):
            await session.restore_recent(red.digest, "start")


async def test_a_write_on_top_of_an_unseen_change_is_refused(session: Session) -> None:
    seen = (await session.info()).revision
    await session.store_image(RED, "start", if_revision=seen)
    with pytest.raises(RevisionConflictError):
        await session.store_image(BLUE, "start", if_revision=seen)
    with pytest.raises(RevisionConflictError):
        await session.clear_image("start", if_revision=seen)
    assert (await session.info()).images["start"].size == RED.size


async def test_an_image_replaces_the_one_that_was_seen_and_no_other() -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        red = await session.store_image(RED, "start", replaces="")  # into an empty slot
        blue = await session.store_image(BLUE, "start", replaces=red.digest)
        await session.update_state(prompt="which is no conflict")
        before = await keys_of(blobs)
        with pytest.raises(RevisionConflictError, match="start"):
            await session.store_image(RED, "start", replaces=red.digest)
        assert (await session.info()).images["start"] == blue
        assert await keys_of(blobs) == before
        await session.store_image(BLUE, "start", replaces=red.digest)  # nothing is lost by that
        await session.clear_image("start")
        await session.store_image(RED, "start", replaces=blue.digest)


async def test_of_two_tabs_that_replace_one_image_at_once_one_is_refused(session: Session) -> None:
    seen = (await session.store_image(RED, "start")).digest
    ends: list[str] = []

    async def store(image: Image.Image) -> None:
        try:
            await session.store_image(image, "start", replaces=seen)
            ends.append("stored")
        except RevisionConflictError:
            ends.append("refused")

    async with anyio.create_task_group() as group:
        group.start_soon(store, BLUE)
        group.start_soon(store, Image.new("RGB", (9, 9)))
    # the earlier call may find itself overtaken instead, and then it is the one that can be put back
    assert "stored" in ends
    info = await session.info()
    assert len(info.recent) + ends.count("refused") == 2


async def test_of_several_images_all_are_stored_or_none(session: Session) -> None:
    with pytest.raises(ImageRejectedError):
        await session.store_images({"start": RED, "end": b"no image"})
    assert (await session.info()).images == {}
    assert set(await session.store_images({"start": RED, "end": BLUE})) == {"start", "end"}


@pytest.mark.parametrize("where", ["blobs/", ".thumb", "manifests/"])
async def test_a_full_disk_leaves_the_old_image_and_nothing_else(where: str) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        red = await session.store_image(RED, "start")
        before = await keys_of(blobs)
        blobs.full_for = lambda key: where in key
        with pytest.raises(StorageFullError):
            await session.store_image(BLUE, "start")
        assert await keys_of(blobs) == before
        assert (await session.info()).images == {"start": red}
        blobs.full_for = lambda key: False
        await session.store_image(BLUE, "start")


async def test_a_temporary_copy_is_not_our_file(session: Session, tmp_path: Path) -> None:
    await session.store_image(png(RED), "start")
    async with session.image_file("start") as path:
        assert path.read_bytes() == png(RED)
        assert path.suffix == ".png"
        path.write_bytes(b"drawn over")
    assert not path.parent.exists()
    assert await session.retrieve_bytes("start") == png(RED)


async def test_a_record_is_readable_after_its_slot_was_overwritten(session: Session) -> None:
    red = await session.store_image(RED, "start")
    await session.store_image(BLUE, "start")
    stored = await session.read_record(red)
    assert stored.record == red
    assert (await stored.image()).tobytes() == RED.tobytes()
    assert np.array_equal(await stored.array(), np.asarray(RED))
    assert (await stored.data())[:4] == b"\x89PNG"


async def test_state_is_merged_and_stays(session: Session, session_store: SessionStore) -> None:
    await session.update_state(model="i2v-A14B", steps=40)
    info = await session.update_state(steps=20, seeds=[1, {"a": None}])
    assert info.state == {"model": "i2v-A14B", "steps": 20, "seeds": [1, {"a": None}]}
    again = await session_store.open_by_key(session.key)
    assert (await again.info()).state == info.state


async def test_state_that_is_no_json_or_too_large_is_refused(session: Session) -> None:
    nested: list[object] = []
    for _ in range(40):
        nested = [nested]
    unfit: list[Any] = [float("nan"), float("inf"), 2**70, nested]
    for value in unfit:
        with pytest.raises(ValueError, match=r"\."):
            await session.update_state(value=value)
    untyped: list[Any] = [b"bytes", {1: 2}, object()]
    for value in untyped:
        with pytest.raises(TypeError):
            await session.update_state(value=value)
    with pytest.raises(QuotaExceededError):
        await session.update_state(value="x" * 70_000)
    assert (await session.info()).state == {}


async def test_the_id_appears_nowhere_but_in_the_handle(session: Session, tmp_path: Path) -> None:
    assert session.id is not None
    await session.store_image(RED, "start")
    await session.update_state(model="x")
    assert session.id not in repr(session)
    assert session.id not in repr(await session.info())
    with pytest.raises(SlotEmptyError) as raised:
        await session.retrieve_image("end")
    assert session.id not in str(raised.value)
    for path in files_below(tmp_path):
        assert session.id not in str(path)
        assert session.id.encode() not in path.read_bytes()


async def test_a_deleted_session_is_gone_for_every_handle(session: Session, session_store: SessionStore) -> None:
    assert session.id is not None
    other = await session_store.open_by_key(session.key)
    await other.store_image(RED, "start")
    await session.delete()
    await session.delete()
    for call in (other.info, other.touch, other.clear_all_images, lambda: other.store_image(RED, "start")):
        with pytest.raises(SessionNotFoundError):
            await call()
    assert await keys_of(session_store.blobs) == set()


async def test_a_generation_request_names_the_images_of_the_filled_slots(session: Session) -> None:
    red = await session.store_image(RED, "start")
    request = await session.generation_request("i2v-A14B", params={"steps": 4}, idempotency_key="k")
    assert request.inputs == {"start": red}
    assert (request.session_key, request.params) == (session.key, {"steps": 4})


async def test_a_string_is_no_collection_of_slots(session: Session) -> None:
    with pytest.raises(TypeError, match=r"\['start'\]"):
        await session.generation_request("i2v-A14B", slots="start")
    with pytest.raises(TypeError, match=r"\['start'\]"):
        open_store("memory://", slots="start")


async def test_two_first_writes_of_one_handle_are_both_kept(session_store: SessionStore) -> None:
    session = session_store.session("minted and signed by us")
    async with anyio.create_task_group() as group:
        group.start_soon(session.store_image, RED, "start")
        group.start_soon(session.store_image, BLUE, "end")
    assert set((await session.info()).images) == {"start", "end"}
    assert len(await keys_of(session_store.blobs, "blobs/")) == 4


async def test_a_session_deleted_during_an_upload_does_not_come_back(session_store: SessionStore) -> None:
    session = session_store.session("minted and signed by us")
    await session.update_state(a=1)
    gate, started = anyio.Event(), anyio.Event()
    upload = session_store.session("minted and signed by us")

    async def store() -> None:
        with pytest.raises(SessionNotFoundError):
            await upload.store_image(chunks_after(gate, png(RED), started), "start")

    async with anyio.create_task_group() as group:
        group.start_soon(store)
        await started.wait()
        await session_store.delete_session("minted and signed by us")
        gate.set()
    assert await keys_of(session_store.blobs) == set()


async def test_states_take_effect_in_the_order_of_their_calls(session: Session) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: session.update_state(steps=1, seeds=list(range(5000))))
        group.start_soon(lambda: session.update_state(steps=2))
    assert (await session.info()).state["steps"] == 2


async def test_an_image_cleared_while_it_is_read_is_an_empty_slot() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None, cache_bytes=0) as store:
        session = await store.create_session()
        await session.store_image(RED, "start")
        gate = anyio.Event()
        blobs.before_get = lambda key: gate if key.startswith("blobs/") else None

        async def read() -> None:
            with pytest.raises(SlotEmptyError):
                await session.retrieve_image("start")

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            await blobs.getting.wait()
            await session.clear_all_images()
            gate.set()


async def test_an_undo_does_not_overwrite_a_later_upload() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store, open_store(blobs.inner) as other:
        session = await store.create_session()
        red = await session.store_image(RED, "start")
        await session.clear_image("start")
        gate = anyio.Event()
        blobs.before_put = lambda key: gate if key.startswith("manifests/") else None
        async with anyio.create_task_group() as group:
            group.start_soon(session.restore_recent, red.digest, "start")
            await blobs.putting.wait()
            blobs.before_put = lambda key: None
            group.start_soon(session.store_image, BLUE, "start")
            await (await other.open_by_key(session.key)).update_state(a=1)  # the undo loses its compare-and-swap
            await anyio.wait_all_tasks_blocked()
            gate.set()
        assert (await session.info()).images["start"].size == BLUE.size


@pytest.mark.parametrize("turns", range(0, 40, 4))
async def test_a_temporary_copy_goes_however_its_reader_is_cancelled(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    await session.store_image(png(RED), "start")

    async def read() -> None:
        async with session.image_file("start"):
            await anyio.sleep_forever()

    task = asyncio.get_running_loop().create_task(read())
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    task.cancel()
    await asyncio.wait({task})
    with anyio.fail_after(10):
        while list(folder.iterdir()):  # noqa: ASYNC110 - a thread that was not waited for removes it
            await anyio.sleep(0.01)


async def test_a_damaged_or_empty_output_is_refused(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        await session.store_output(b"", name="text", media_type="text/plain")
    output = await session.store_output(b"made", name="text", media_type="text/plain")
    async with session.output_file(output) as path:
        assert path.read_bytes() == b"made"
    (tmp_path / "sessions" / output.blob).write_bytes(b"flip")
    with pytest.raises(CorruptBlobError):
        async with session.output_file(output):
            pass


async def test_a_file_kept_with_its_metadata_is_read_again_after_a_restart() -> None:
    blobs, data = FaultyBlobStore(), jpeg_with_exif(6)
    async with open_store(blobs, limits=Limits(keep_metadata=True)) as store:
        session = await store.create_session()
        record = await session.store_image(data, "start")
        warm = await session.retrieve_image("start")
    async with open_store(blobs) as store:
        session = await store.restore_session(session.id or "")
        assert (await session.info()).images["start"] == record
        assert await session.retrieve_bytes("start") == data
        cold = await session.retrieve_image("start")
        assert (cold.size, cold.tobytes(), cold.info) == (warm.size, warm.tobytes(), warm.info)


async def test_an_upload_beside_a_delete_that_failed_is_kept() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8)), "start")
        gate = anyio.Event()
        blobs.before_put = lambda key: gate if key.startswith("blobs/") else None
        async with anyio.create_task_group() as group:
            group.start_soon(session.store_image, Image.new("RGB", (9, 9)), "start")
            await blobs.putting.wait()
            blobs.full_for, blobs.error = (lambda key: key.startswith("manifests/")), LockTimeoutError
            with pytest.raises(LockTimeoutError):
                await session.delete()
            blobs.full_for = lambda key: False
            gate.set()
        assert (await session.info()).images["start"].size == (9, 9)
