from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import zipfile
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import Struct
from msgspec.structs import asdict, replace
from PIL import Image

from async_sessions import (
    CorruptBlobError,
    ImageSource,
    JobError,
    JobInfo,
    Limits,
    MemoryBlobStore,
    QuotaExceededError,
    RevisionConflictError,
    Session,
    SessionInfo,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    StorageFullError,
    open_store,
)
from async_sessions.bundle import export_session, import_session, stream_session
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.faults import CountingBlobStore
from tests.faults import FaultyBlobStore, keys_of
from tests.images import (
    cmyk_profile,
    encoded,
    exif,
    jpeg_with_exif,
    photograph,
    png_file,
    rgba_png,
    srgb_profile,
)

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


async def bundle_of(session: Session, *, jobs: bool = False) -> bytes:
    return b"".join([chunk async for chunk in stream_session(session, jobs=jobs)])


def essence(info: SessionInfo) -> Any:
    """The snapshot without ids and times."""

    def strip(value: Any) -> Any:
        match value:
            case datetime():
                return "a time"
            case str() if info.key in value:
                return value.replace(info.key, "key")
            case Mapping():
                return {strip(name): strip(each) for name, each in value.items() if name not in ("blob", "owner")}
            case list() | tuple():
                return [strip(each) for each in value]
            case Struct():
                return strip(asdict(value))
            case _:
                return value

    return strip(asdict(replace(info, revision="")))


async def finished_job(session: Session, number: int = 0, **changes: Any) -> JobInfo:
    """A finished job on what `start` holds, with a film, as its entry."""
    now = datetime.now(UTC)
    film = await session.store_output(b"film" * 1000, name="film", media_type="video/mp4")
    text = await session.store_output("naïve".encode(), name="notes", media_type="text/plain; charset=utf-8")
    job = JobInfo(
        **{
            "id": f"{session.key}.{number:016x}",
            "pipeline": "preview",
            "inputs": {"start": (await session.info()).images["start"]},
            "params": {"steps": 4, "prompt": "a fox", "cfg": [1.5, None, True]},
            "submitted_at": now - timedelta(seconds=9),
            "started_at": now - timedelta(seconds=5),
            "finished_at": now,
            "owner": "host-4711-abc",
            "priority": -3,
            "status": "succeeded",
            "attempt": 2,
            "outputs": {"video": film, "notes": text},
            **changes,
        }
    )
    await session.edit_job(job.id, lambda old: job)
    return job


# --- what comes back


def zoo() -> dict[str, ImageSource]:
    """One image of every kind that a store keeps in a way of its own."""
    photo = photograph(64, 48)
    grey16 = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21
    return {
        **{f"jpeg_turned_{number}": jpeg_with_exif(number) for number in range(1, 9)},
        "jpeg_progressive": encoded(photo, "JPEG", progressive=True, icc_profile=srgb_profile(), comment=b"hello"),
        "jpeg_grey": encoded(photo.convert("L"), "JPEG"),
        "jpeg_cmyk": encoded(photo.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
        "png_rgb": encoded(photo, "PNG", exif=exif(6)),
        "png_rgba": rgba_png(64, 48),
        "png_palette": encoded(photo.quantize(17), "PNG", transparency=3),
        "png_bits": encoded(photo.convert("1"), "PNG"),
        "png_grey_alpha": encoded(photo.convert("LA"), "PNG"),
        "png_grey_16": png_file(9, 7, 16, 0),
        "png_rgb_16": png_file(9, 7, 16, 2),
        "png_interlaced": png_file(1, 1, 8, 6, interlaced=1),
        "webp_lossy": encoded(photo, "WEBP", exif=exif(3)),
        "webp_lossless": encoded(photo.convert("RGBA"), "WEBP", lossless=True),
        "avif": encoded(photo, "AVIF"),
        "pil_rgb": photo,
        "pil_palette": photo.quantize(5),
        "pil_cmyk": photo.convert("CMYK"),
        "pil_float": photo.convert("I;16"),
        "array_grey": grey16.astype(np.uint8),
        "array_grey_16": grey16,
    }


@pytest.mark.parametrize("keep_metadata", [False, True], ids=["", "keep_metadata"])
async def test_every_kind_of_image_comes_back_as_it_was(keep_metadata: bool) -> None:
    limits = Limits(keep_metadata=keep_metadata)
    async with open_store("memory://", limits=limits) as store, open_store("memory://", limits=limits) as other:
        session = await store.create_session(model="i2v-A14B", steps=4, size=[832, 480.5], note="naïve \N{FOX FACE}")
        for slot, source in zoo().items():
            await session.store_image(source, slot, name=f"{slot} (1).bin")
        again = await import_session(other, await bundle_of(session))

        before, after = await session.info(), await again.info()
        assert essence(after) == essence(before)
        assert after.total_bytes == before.total_bytes
        assert list(after.images) == list(before.images)
        for slot in before.images:
            assert await again.retrieve_bytes(slot) == await session.retrieve_bytes(slot)
            assert await again.retrieve_thumbnail(slot)


async def test_a_store_that_keeps_no_metadata_removes_it_from_what_it_imports() -> None:
    async with open_store("memory://", limits=Limits(keep_metadata=True)) as store, open_store("memory://") as other:
        session = await store.create_session()
        await session.store_image(jpeg_with_exif(gps=True), "start")
        again = await import_session(other, await bundle_of(session))
        assert b"north of everything" in await session.retrieve_bytes("start")
        assert b"north of everything" not in await again.retrieve_bytes("start")
        assert not (await again.info()).images["start"].verbatim


async def test_what_a_store_encoded_itself_it_takes_again_whatever_files_it_takes() -> None:
    limits = Limits(formats=("JPEG",), max_bytes=2000)
    async with open_store("memory://", limits=limits) as store:
        session = await store.create_session()
        record = await session.store_image(photograph(320, 200), "start")
        assert record.byte_size > limits.max_bytes
        again = await import_session(store, await bundle_of(session))
        assert (await again.info()).images["start"].digest == record.digest


async def test_finished_jobs_come_with_what_they_were_given_and_what_they_made() -> None:
    async with open_store("memory://") as store, open_store("memory://") as other:
        session = await store.create_session()
        await session.store_image(RED, "start", name="red.png")
        first = await finished_job(session)
        await session.store_image(BLUE, "start", name="blue.png")  # the first job alone names the red one now
        failed = JobError("RuntimeError", "out of memory")
        await finished_job(session, 1, status="failed", error=failed, outputs={}, cancel_requested=True)
        await finished_job(session, 2, status="queued", outputs={}, finished_at=None)

        again = await import_session(other, await bundle_of(session, jobs=True))

        await session.edit_job(f"{session.key}.{2:016x}", lambda job: job and replace(job, status="cancelled"))
        before, after = await session.info(), await again.info()
        unfinished = f"{session.key}.{2:016x}"
        expected = replace(before, jobs={name: job for name, job in before.jobs.items() if name != unfinished})
        assert essence(after) == essence(expected) | {"recent": []}
        assert after.total_bytes == before.total_bytes
        for job in after.jobs.values():
            assert job.id.startswith(again.key)
            for record in job.inputs.values():
                await (await again.read_record(record)).image()
        old, new = first.outputs["video"], after.jobs[f"{again.key}.{0:016x}"].outputs["video"]
        assert (new.digest, new.byte_size, new.media_type) == (old.digest, old.byte_size, old.media_type)
        async with again.output_file(new) as path:
            assert path.read_bytes() == b"film" * 1000
        second = after.jobs[f"{again.key}.{1:016x}"]
        assert second.inputs["start"] == after.images["start"]
        assert second.submitted_at == before.jobs[f"{session.key}.{1:016x}"].submitted_at
        report = await other.cleanup(now=other.clock() + timedelta(hours=2))
        assert report.removed == ()


async def test_jobs_stay_where_they_are_unless_asked_for(session: Session, session_store: SessionStore) -> None:
    await session.store_image(RED, "start")
    await finished_job(session)
    again = await import_session(session_store, await bundle_of(session))
    assert (await again.info()).jobs == {}


async def test_an_empty_session_is_a_bundle_too(session: Session, session_store: SessionStore) -> None:
    again = await import_session(session_store, await bundle_of(session, jobs=True))
    assert essence(await again.info()) == essence(await session.info())


async def test_an_import_is_a_session_of_its_own(session: Session, session_store: SessionStore) -> None:
    await session.store_image(RED, "start")
    again = await import_session(session_store, await bundle_of(session))
    assert again.id is not None
    assert again.id != session.id
    await session.delete()
    restored = await session_store.restore_session(again.id)
    assert (await restored.retrieve_image("start")).size == RED.size
    await again.delete()
    assert await keys_of(session_store.blobs) == set()


# --- what is written


async def test_a_bundle_tells_neither_who_it_was_nor_what_was_removed(session: Session) -> None:
    await session.store_image(RED, "start")
    removed = await session.store_image(BLUE, "end")
    await session.clear_image("end")
    await finished_job(session)
    await session.pin("somebody", until=datetime.now(UTC) + timedelta(hours=1))
    bundle = await bundle_of(session, jobs=True)
    info = await session.info()
    assert session.id is not None
    incarnation = removed.blob.split("/")[1]
    for secret in (session.id, session.key, incarnation, removed.digest, "host-4711-abc", "somebody", info.revision):
        assert secret.encode() not in bundle


async def test_people_find_their_files_in_a_bundle(session: Session, tmp_path: Path) -> None:
    await session.store_image(jpeg_with_exif(), "start")
    await finished_job(session)
    text = {"media_type": "text/plain"}
    made = {name: await session.store_output(name.encode(), name=name, **text) for name in ("a", "a_-1")}
    await finished_job(session, 1, outputs=made)
    await export_session(session, tmp_path / "session.zip", jobs=True)

    with zipfile.ZipFile(tmp_path / "session.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            "manifest.json",
            "images/start.jpg",
            "jobs/0000000000000000/outputs/video.mp4",
            "jobs/0000000000000000/outputs/notes.txt",
            "jobs/0000000000000001/outputs/a.txt",
            "jobs/0000000000000001/outputs/a_-1.txt",
        ]
        assert archive.read("images/start.jpg") == await session.retrieve_bytes("start")
        assert json.loads(archive.read("manifest.json"))["images"] == {"start": "images/start.jpg"}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        stored_at = (await session.info()).images["start"].stored_at
        assert archive.getinfo("images/start.jpg").date_time[:5] == stored_at.timetuple()[:5]
    tested = subprocess.run(["unzip", "-t", tmp_path / "session.zip"], capture_output=True, text=True, check=False)
    assert "No errors detected" in tested.stdout
    async with open_store("memory://") as store:
        again = await import_session(store, tmp_path / "session.zip")
        assert essence(await again.info()) == essence(await session.info())


async def test_no_name_that_a_job_holds_is_a_path_in_a_bundle(session: Session) -> None:
    await session.store_image(jpeg_with_exif(), "start")
    text = {"name": "text", "media_type": "text/plain"}
    odd = {name: await session.store_output(name.encode(), **text) for name in ("../../x", "..:..:x", "Ü")}
    await finished_job(session, outputs=odd)
    with zipfile.ZipFile(io.BytesIO(await bundle_of(session, jobs=True))) as archive:
        assert [name.rpartition("/")[2] for name in archive.namelist()[2:]] == ["------x.txt", "------x1.txt", "-.txt"]


async def test_a_bundle_of_files_beyond_two_gigabytes_is_written_as_zip64(
    session: Session, session_store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3000)  # as if these were bytes of a ZIP with 2 GiB in it
    await session.store_image(RED, "start")
    await finished_job(session)
    await export_session(session, tmp_path / "session.zip", jobs=True)
    assert b"PK\x06\x06" in (tmp_path / "session.zip").read_bytes()  # the directory's end as ZIP64 has it
    tested = subprocess.run(["unzip", "-t", tmp_path / "session.zip"], capture_output=True, text=True, check=False)
    assert "No errors detected" in tested.stdout
    again = await import_session(session_store, tmp_path / "session.zip")
    assert essence(await again.info()) == essence(await session.info())


async def test_an_export_is_private_and_replaces_an_older_one_whole(session: Session, tmp_path: Path) -> None:
    target = tmp_path / "exports" / "session.zip"
    target.parent.mkdir()
    target.write_bytes(b"an older one")
    await session.store_image(RED, "start")
    await export_session(session, target)
    assert zipfile.is_zipfile(target)
    assert target.stat().st_mode & 0o777 == 0o600
    assert list(target.parent.iterdir()) == [target]


async def test_an_export_that_fails_leaves_what_was_there(
    session: Session, session_store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "exports" / "session.zip"
    target.parent.mkdir()
    target.write_bytes(b"an older one")
    record = await session.store_image(RED, "start")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StorageFullError, match="No room is left for the bundle"):
            await export_session(session, target)
    await session_store.blobs.delete(record.blob)
    with pytest.raises(CorruptBlobError, match="missing"):
        await export_session(session, target)
    await session_store.blobs.put(record.blob, b"something else")
    with pytest.raises(CorruptBlobError, match="damaged"):
        await export_session(session, target)
    await session_store.blobs.put(record.blob, bytes(record.byte_size))
    with pytest.raises(CorruptBlobError, match="damaged"):
        await export_session(session, target)
    assert target.read_bytes() == b"an older one"
    assert list(target.parent.iterdir()) == [target]


async def test_a_damaged_result_is_found_whatever_its_size(session: Session, session_store: SessionStore) -> None:
    await session.store_image(RED, "start")
    video = (await finished_job(session)).outputs["video"]
    for damaged in (b"film" * 999, b"FILM" * 1000, b"film" * 1001):
        await session_store.blobs.put(video.blob, damaged)
        with pytest.raises(CorruptBlobError, match="damaged"):
            await bundle_of(session, jobs=True)
    assert await bundle_of(session)


async def test_a_session_whose_jobs_are_too_much_for_a_manifest_is_exported_without_them(session: Session) -> None:
    await session.store_image(RED, "start")
    await finished_job(session, params={"prompt": "x" * 5_000_000})
    with pytest.raises(QuotaExceededError, match="export it without them"):
        await bundle_of(session, jobs=True)
    assert await bundle_of(session)


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["missing/session.zip", ".", "session\0.zip", "x" * 300])
async def test_a_target_that_cannot_be_written_is_said_without_its_path(
    name: str, session: Session, tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    folder.mkdir()
    with pytest.raises(StorageError, match="The bundle cannot be written: ") as raised:
        await export_session(session, folder / name)
    assert str(tmp_path) not in str(raised.value)
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("target", [Path("/"), Path("."), Path("..")], ids=str)
async def test_a_folder_is_no_target_and_that_is_said_before_anything_is_read(target: Path) -> None:
    counting = CountingBlobStore(MemoryBlobStore())
    async with open_store(counting, cleanup_interval=None) as store:
        session = await store.create_session()
        counting.calls.clear()
        with pytest.raises(StorageError, match="Is a directory"):
            await export_session(session, target)
    assert not counting.calls


async def test_what_is_no_file_is_no_target_and_stays(session: Session, tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)  # as /dev/null would be
    file.write_bytes(b"x")
    link.symlink_to(file)
    for target in (pipe, link):
        with pytest.raises(StorageError, match="no regular file"):
            await export_session(session, target)
    assert (pipe.is_fifo(), link.is_symlink(), file.read_bytes()) == (True, True, b"x")
    assert list(tmp_path.glob(".*.part")) == []


async def test_an_export_whose_folder_can_not_be_synced_says_that_it_is_there(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def failing_fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(StorageError, match="is written, but a power cut may undo that") as caught:
            await export_session(session, tmp_path / "session.zip")
    assert not isinstance(caught.value, StorageFullError)
    async with open_store("memory://", cleanup_interval=None) as store:
        await import_session(store, tmp_path / "session.zip")


async def test_exporting_counts_as_use_and_works_where_that_cannot_be_written() -> None:
    clock, blobs = FrozenClock(), FaultyBlobStore()
    async with open_store(blobs, clock=clock, cleanup_interval=None) as store:
        session = await store.create_session()
        clock.advance(hours=12)
        blobs.full_for = lambda key: True
        assert zipfile.is_zipfile(io.BytesIO(await bundle_of(session)))
        blobs.full_for = lambda key: False
        await bundle_of(session)
        assert (await session.info()).expires_at > clock.now + timedelta(hours=24)


# --- while others go on


async def begun(session: Session) -> tuple[AsyncGenerator[bytes], bytes]:
    stream = stream_session(session, jobs=True)
    return stream, await anext(stream)


async def test_an_export_is_the_session_at_one_moment(session: Session, session_store: SessionStore) -> None:
    await session.store_image(RED, "start")
    await session.store_image(BLUE, "end")
    before = essence(await session.info())
    stream, bundle = await begun(session)
    await session.store_image(photograph(64, 48), "end")
    await session.clear_image("start")
    await session.update_state(model="another")
    bundle += b"".join([chunk async for chunk in stream])
    again = await import_session(session_store, bundle)
    assert essence(await again.info()) == before


async def test_what_is_removed_for_good_meanwhile_ends_the_export(session: Session) -> None:
    await session.store_image(RED, "start")
    await session.store_image(BLUE, "end")
    stream, _ = await begun(session)
    await session.clear_all_images()
    with pytest.raises(RevisionConflictError, match="export it again"):
        await anext(stream)

    await session.store_image(RED, "start")
    await session.store_image(BLUE, "end")
    stream, _ = await begun(session)
    await session.delete()
    with pytest.raises(SessionNotFoundError):
        await anext(stream)
    with pytest.raises(SessionNotFoundError):
        await bundle_of(session)


async def test_a_download_that_is_broken_off_leaves_no_file_open(session: Session, tmp_path: Path) -> None:
    await session.store_image(RED, "start")
    film = await session.store_output(bytes(3_000_000), name="film", media_type="video/mp4")
    await finished_job(session, outputs={"film": film})
    stream = stream_session(session, jobs=True)
    while len(await anext(stream)) < 1_000_000:
        pass
    assert open_below(tmp_path) != []
    await stream.aclose()
    assert open_below(tmp_path) == []


def open_below(folder: Path) -> list[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [target for link in links if link.is_symlink() and (target := os.readlink(link)).startswith(str(folder))]
