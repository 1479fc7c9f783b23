from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    JobInfo,
    Limits,
    LocalBlobStore,
    MemoryBlobStore,
    Merged,
    Session,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    open_store,
)
from async_sessions.testing.cancellation import Run, cancel_everywhere
from async_sessions.testing.faults import FailingBlobStore
from tests.faults import FaultyBlobStore, keys_of, named_blobs
from tests.images import jpeg_with_exif, rgba_png

pytestmark = pytest.mark.anyio

FILM = b"film"


def square(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 40), colour)


async def with_job(session: Session, name: str = "0" * 16, *, status: str = "succeeded") -> JobInfo:
    """A job on the start image that made a film."""
    record = (await session.info()).images["start"]
    output = await session.store_output(FILM, name="video", media_type="video/mp4")
    job = JobInfo(
        id=f"{session.key}.{name}",
        pipeline="steps",
        inputs={"start": record},
        params={"seed": 1},
        submitted_at=datetime.now(UTC),
        owner="tests",
        status=status,  # type: ignore[arg-type]
        outputs={"video": output} if status == "succeeded" else {},
    )
    found = await session.edit_job(job.id, lambda old: job)
    assert found is not None
    return found


async def begun(store: SessionStore) -> Session:
    session = await store.create_session(prompt="a boat", model="steps")
    await session.store_image(jpeg_with_exif(6), "start", name="start.jpg")
    await session.store_image(rgba_png(), "end", name="end.png")
    return session


async def gone(store: SessionStore, session: Session) -> bool:
    assert session.id is not None
    try:
        await store.restore_session(session.id)
    except SessionNotFoundError:
        return True
    return False


async def test_images_state_and_results_are_taken_along_as_they_are_and_the_old_session_goes(
    session_store: SessionStore,
) -> None:
    source = await begun(session_store)
    await with_job(source)
    before = await source.info()
    files = {slot: await source.retrieve_bytes(slot) for slot in before.images}
    user = session_store.session_of("carol")
    merged = await session_store.merge(source, into=user)
    assert set(merged.moved) == {"start", "end", *before.jobs}
    assert merged.left == ()
    info = await user.info()
    for slot, record in before.images.items():
        assert replace(info.images[slot], blob=record.blob) == record
        assert await user.retrieve_bytes(slot) == files[slot]
        assert (await user.retrieve_thumbnail(slot))[8:12] == b"WEBP"
    assert info.state == before.state
    (job,) = info.jobs.values()
    assert (job.id, job.params) == (f"{user.key}.{'0' * 16}", {"seed": 1})
    assert job.inputs["start"].blob == info.images["start"].blob
    assert b"".join([chunk async for chunk in user.stream_output(job.outputs["video"])]) == FILM
    assert info.total_bytes == before.total_bytes
    assert await gone(session_store, source)
    assert await keys_of(session_store.blobs, "blobs/") == await named_blobs(session_store)
    assert (await session_store.verify()).findings == ()


async def test_what_the_user_has_is_never_overwritten_and_the_other_image_can_be_put_back(
    session_store: SessionStore,
) -> None:
    source, user = await begun(session_store), session_store.session_of("carol")
    await user.store_image(square("green"), "start", name="mine.png")
    await user.update_state(prompt="my prompt")
    theirs = (await source.info()).images["start"]
    assert (await session_store.merge(source, into=user)).left == ()
    info = await user.info()
    assert {slot: record.source_name for slot, record in info.images.items()} == {"start": "mine.png", "end": "end.png"}
    assert info.state == {"prompt": "my prompt", "model": "steps"}
    assert [(recent.slot, recent.record.source_name) for recent in info.recent] == [("start", "start.jpg")]
    await user.restore_recent(theirs.digest, "start")
    assert (await user.retrieve_image("start")).size == theirs.size
    assert await gone(session_store, source)


async def test_an_image_that_the_user_cleared_since_does_not_come_back(session_store: SessionStore) -> None:
    source, user = await begun(session_store), session_store.session_of("carol")
    assert source.id is not None
    await session_store.merge(source, into=user)
    await user.clear_image("start")
    again = session_store.session(source.id)  # as where the process died before it deleted the old session
    await again.store_image(jpeg_with_exif(6), "start", name="start.jpg")
    assert await session_store.merge(again, into=user) == Merged(moved=("start",))
    assert "start" not in (await user.info()).images


async def test_it_can_be_repeated_and_what_is_not_there_is_nothing(session_store: SessionStore) -> None:
    source, user = await begun(session_store), session_store.session_of("carol")
    await session_store.merge(source, into=user)
    before = (await user.info()).revision
    assert await session_store.merge(source, into=user) == Merged()
    assert await session_store.merge(session_store.session("nobody's"), into=user) == Merged()
    assert await session_store.merge(user, into=session_store.session_of("carol")) == Merged()
    assert (await user.info()).revision == before
    await session_store.merge(session_store.session("nobody's"), into=session_store.session_of("dave"))
    with pytest.raises(SessionNotFoundError):
        await session_store.session_of("dave").info()


async def test_two_tabs_of_two_processes_that_do_it_at_once_take_everything_once(tmp_path: Path) -> None:
    async with (
        open_store(LocalBlobStore(tmp_path), cleanup_interval=None) as one,
        open_store(LocalBlobStore(tmp_path), cleanup_interval=None) as other,
    ):
        for round_ in range(4):
            source = await begun(one)
            assert source.id is not None
            async with anyio.create_task_group() as group:
                for store in (one, other, one, other):

                    async def merge(store: SessionStore, session_id: str, user: str) -> None:
                        await store.merge(store.session(session_id), into=store.session_of(user))

                    group.start_soon(merge, store, source.id, f"carol{round_}")
            info = await one.session_of(f"carol{round_}").info()
            assert set(info.images) == {"start", "end"}
            assert info.recent == ()
            assert await gone(one, source)
        assert await keys_of(one.blobs, "blobs/") == await named_blobs(one)


async def test_an_upload_that_is_under_way_begins_the_old_session_anew() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        source, user = await begun(store), store.session_of("carol")
        assert source.id is not None
        gate = anyio.Event()
        incarnation = next(iter((await source.info()).images.values())).blob.split("/")[1]
        blobs.before_put = lambda key: gate if key.startswith(f"blobs/{incarnation}") else None
        async with anyio.create_task_group() as group:
            group.start_soon(store.session(source.id).store_image, square("green"), "start")
            await blobs.putting.wait()
            await store.merge(source, into=user)
            gate.set()
        late = await store.restore_session(source.id)
        assert await late.has_image("start")
        assert await store.merge(late, into=user) == Merged(moved=("start",))
        assert await keys_of(blobs, "blobs/") == await named_blobs(store)


@pytest.mark.parametrize("limit", ["bytes", "images", "total"])
async def test_what_the_user_has_no_room_for_stays_where_it_was(limit: str) -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        sizes = dict((await (await begun(store)).info()).images)
    first = sizes["start"].byte_size + sizes["start"].thumbnail_size
    both = first + sizes["end"].byte_size + sizes["end"].thumbnail_size
    limits = {
        "bytes": Limits(max_session_bytes=both),
        "images": Limits(max_session_images=2),
        "total": Limits(max_total_bytes=2 * both + 4000),
    }[limit]
    async with open_store("memory://", cleanup_interval=None, limits=limits) as store:
        user = store.session_of("carol")
        mine = await user.store_image(square("green"), "mine")
        source = await begun(store)
        if limit == "total":
            await (await store.create_session()).store_image(rgba_png(), "start")
        merged = await store.merge(source, into=user)
        assert merged.left
        assert set(merged.left) | set(merged.moved) == {"start", "end"}
        info = await user.info()
        assert info.images["mine"] == mine
        assert set(info.images) - {"mine"} == set(merged.moved)
        assert set((await source.info()).images) == set(merged.left)
        for slot in merged.left:
            await source.retrieve_image(slot)
        assert (await store.merge(source, into=user)).left == merged.left
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)


async def test_a_job_that_still_runs_keeps_its_session_and_comes_along_later(session_store: SessionStore) -> None:
    source, user = await begun(session_store), session_store.session_of("carol")
    job = await with_job(source, status="running")
    merged = await session_store.merge(source, into=user)
    assert (set(merged.moved), merged.left) == ({"start", "end"}, (job.id,))
    assert list((await source.info()).jobs) == [job.id]
    assert await (await source.read_record(job.inputs["start"])).data()
    await source.edit_job(job.id, lambda old: None if old is None else replace(old, status="cancelled"))
    assert await session_store.merge(source, into=user) == Merged(moved=(job.id,))
    assert [each.status for each in (await user.info()).jobs.values()] == ["cancelled"]
    assert await gone(session_store, source)
    assert await keys_of(session_store.blobs, "blobs/") == await named_blobs(session_store)


async def test_a_damaged_image_stays_and_the_others_come_along(tmp_path: Path) -> None:
    async with open_store(tmp_path, cleanup_interval=None) as store:
        source, user = await begun(store), store.session_of("carol")
        (tmp_path / (await source.info()).images["start"].blob).write_bytes(b"damage")
        assert await store.merge(source, into=user) == Merged(moved=("end",), left=("start",))
        assert list((await user.info()).images) == ["end"]


async def test_values_that_do_not_fit_stay_in_the_old_session() -> None:
    async with open_store("memory://", cleanup_interval=None, limits=Limits(max_state_bytes=100)) as store:
        source, user = await store.create_session(prompt="a" * 60), store.session_of("carol")
        await source.store_image(square("red"), "start")
        await user.update_state(notes="b" * 60)
        assert await store.merge(source, into=user) == Merged(moved=("start",))
        assert (await user.info()).state == {"notes": "b" * 60}
        info = await source.info()
        assert (info.images, info.state) == ({}, {"prompt": "a" * 60})


async def test_a_pin_keeps_the_old_session(session_store: SessionStore) -> None:
    source, user = await begun(session_store), session_store.session_of("carol")
    await source.pin("somebody", until=session_store.clock() + timedelta(hours=1))
    assert (await session_store.merge(source, into=user)).left == ()
    assert (await source.info()).images == {}


@pytest.mark.parametrize("after_effect", [False, True])
async def test_at_every_failure_of_the_storage_each_image_is_in_one_session_at_least(after_effect: bool) -> None:
    failures = 0
    for at in range(1, 100):
        blobs = FailingBlobStore(MemoryBlobStore(), at=None, after_effect=after_effect)
        async with open_store(blobs, cleanup_interval=None) as store:
            source, user = await begun(store), store.session_of("carol")
            blobs.arm(at)
            with contextlib.suppress(StorageError):
                await store.merge(source, into=user)
            blobs.arm(None)
            assert {slot for session in (source, user) for slot in await _slots(session)} == {"start", "end"}
            assert source.id is not None
            await store.merge(store.session(source.id), into=user)
            assert await _slots(user) == {"start", "end"}
            assert await gone(store, source)
        if not blobs.failures:
            break
        failures += 1
    assert 10 < failures < 90


async def test_a_cancelled_merge_leaves_nothing_behind_and_loses_nothing() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        sources: list[Session] = []

        async def prepare() -> None:
            await store.session_of("carol").delete()
            source = await store.create_session()
            await source.store_image(square("red"), "start")
            sources.append(source)

        async def check(run: Run) -> None:
            held = [await _slots(session) for session in (sources[-1], store.session_of("carol"))]
            assert {"start"} in held
            assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
            await sources[-1].delete()

        def merge() -> Coroutine[Any, Any, Merged]:
            return store.merge(sources[-1], into=store.session_of("carol"))

        runs = await cancel_everywhere(merge, check, prepare=prepare)
        assert {run.ending for run in runs} == {"returned", "cancelled"}


async def _slots(session: Session) -> set[str]:
    try:
        info = await session.info()
    except SessionNotFoundError:
        return set()
    for slot in info.images:
        await session.retrieve_image(slot)
    return set(info.images)
