from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import anyio
import numpy as np
import pytest
from PIL import Image

from async_sessions import (
    JobInfo,
    Limits,
    LocalBlobStore,
    MemoryBlobStore,
    QuotaExceededError,
    Session,
    SlotEmptyError,
    StorageFullError,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from tests.faults import files_below, keys_of

pytestmark = pytest.mark.anyio

HOUR = timedelta(hours=1)


def noise(seed: int, side: int = 64) -> Image.Image:
    """Images of one side take the same room, within a percent."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


async def size_of_one() -> int:
    async with open_store("memory://") as store:
        session = await store.create_session()
        await session.store_image(noise(0), "start")
        return (await session.info()).total_bytes


async def finish(session: Session, name: str, at: datetime, size: int) -> JobInfo:
    """A job of that name that succeeded `at`, with an output of `size` bytes."""
    output = await session.store_output(bytes(size), name="video", media_type="video/mp4")
    job = JobInfo(
        id=f"{session.key}.{name * 16}",
        pipeline="p",
        inputs={},
        params={},
        submitted_at=at,
        owner="o",
        status="succeeded",
        finished_at=at,
        outputs={"video": output},
    )
    await session.edit_job(job.id, lambda _: job)
    return job


async def test_in_a_full_session_what_was_replaced_first_goes_first() -> None:
    limit = int(3.5 * await size_of_one())
    async with open_store("memory://", limits=Limits(max_session_bytes=limit)) as store:
        session = await store.create_session()
        stored = [await session.store_image(noise(seed), "start") for seed in range(5)]
        info = await session.info()
        assert info.total_bytes <= limit
        assert [recent.record for recent in info.recent] == [stored[3], stored[2]]
        kept = {stored[2].blob, stored[3].blob, stored[4].blob}
        assert {key.removesuffix(".thumb") for key in await keys_of(store.blobs, "blobs/")} == kept
        with pytest.raises(SlotEmptyError):
            await session.restore_recent(stored[0].digest, "start")


async def test_a_session_that_is_full_refuses_and_keeps_what_it_has() -> None:
    limit = int(2.5 * await size_of_one())
    async with open_store("memory://", limits=Limits(max_session_bytes=limit)) as store:
        session = await store.create_session()
        for slot in ("start", "end"):
            await session.store_image(noise(1), slot)
        before, blobs = await session.info(), await keys_of(store.blobs)
        with pytest.raises(QuotaExceededError, match="Clear an image"):
            await session.store_image(noise(2), "middle")
        with pytest.raises(QuotaExceededError):
            await session.store_images({"start": noise(3), "middle": noise(4)})
        assert await session.info() == before
        assert await keys_of(store.blobs) == blobs
        await session.clear_image("end")
        await session.store_image(noise(2), "middle")


async def test_the_number_of_images_is_limited_as_the_bytes_are() -> None:
    async with open_store("memory://", limits=Limits(max_session_images=3)) as store:
        session = await store.create_session()
        for slot in ("a", "b", "a"):
            await session.store_image(noise(1), slot)
        await session.store_image(noise(2), "c")
        assert (await session.info()).recent == ()
        with pytest.raises(QuotaExceededError):
            await session.store_image(noise(3), "d")


async def test_what_a_pin_keeps_makes_no_room() -> None:
    async with open_store("memory://", limits=Limits(max_session_images=2)) as store:
        session = await store.create_session()
        await session.store_image(noise(1), "start")
        await session.store_image(noise(2), "start")
        await session.pin("me", until=store.clock() + HOUR)
        with pytest.raises(QuotaExceededError):
            await session.store_image(noise(3), "start")
        await session.unpin("me")
        await session.store_image(noise(3), "start")


async def test_old_results_go_before_a_new_one_is_refused_and_the_newest_stays() -> None:
    async with open_store("memory://", limits=Limits(max_session_bytes=1000)) as store:
        session = await store.create_session()
        now = store.clock()
        first = await finish(session, "1", now - 2 * HOUR, 400)
        second = await finish(session, "2", now - HOUR, 400)
        assert set((await session.info()).jobs) == {first.id, second.id}
        third = await finish(session, "3", now, 500)
        assert set((await session.info()).jobs) == {second.id, third.id}
        assert await keys_of(store.blobs, "blobs/") == {
            output.blob for job in (second, third) for output in job.outputs.values()
        }
        with pytest.raises(QuotaExceededError):
            await finish(session, "4", now, 1001)
        assert third.id in (await session.info()).jobs


async def test_a_session_above_its_limits_may_shrink_but_not_grow() -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs) as store:
        session = await store.create_session()
        await session.store_images({slot: noise(1) for slot in ("a", "b", "c")})
    async with open_store(blobs, limits=Limits(max_session_images=1, max_session_bytes=1)) as store:
        session = await store.open_by_key(session.key)
        await session.update_state(model="i2v")
        await session.touch()
        with pytest.raises(QuotaExceededError):
            await session.store_image(noise(2), "d")
        await session.clear_image("a")
        assert set((await session.info()).images) == {"b", "c"}


async def test_writers_at_the_edge_overshoot_by_nothing(tmp_path: Path) -> None:
    limit = int(5.5 * await size_of_one())
    refused = 0
    async with (
        open_store(tmp_path / "s", limits=Limits(max_session_bytes=limit)) as one,
        open_store(tmp_path / "s", limits=Limits(max_session_bytes=limit)) as other,
    ):
        key = (await one.create_session()).key

        async def write(number: int) -> None:
            nonlocal refused
            session = await (one, other)[number % 2].open_by_key(key)
            try:
                await session.store_image(noise(number), f"slot-{number}")
            except QuotaExceededError:
                refused += 1

        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(write, number)
        info = await (await one.open_by_key(key)).info()
        assert (len(info.images), refused) == (5, 11)
        assert info.total_bytes <= limit
        on_disk = files_below(tmp_path, "s", "blobs")
        assert sum(path.stat().st_size for path in on_disk) == info.total_bytes


async def test_in_a_full_store_those_unused_for_longest_make_room() -> None:
    one = await size_of_one()
    clock = FrozenClock()
    blobs, limits = MemoryBlobStore(), Limits(max_total_bytes=int(10.5 * one))
    sessions: list[Session] = []
    async with open_store(blobs, clock=clock, limits=limits) as store:
        for number in range(10):
            sessions.append(await store.create_session())
            await sessions[-1].store_image(noise(number), "start")
            clock.now += timedelta(minutes=1)
        await sessions[0].pin("me", until=clock.now + 9 * HOUR)
    clock.now += 3 * HOUR
    async with open_store(blobs, clock=clock, cleanup_interval=None, limits=limits) as store:
        sessions = [await store.open_by_key(session.key) for session in sessions]
        await sessions[1].touch()
        new = await store.create_session()
        await new.store_image(noise(10), "start")
        gone = [number for number, session in enumerate(sessions) if not await alive(session)]
        assert gone == [2, 3]  # down to nine tenths, with the new one
        report = await store.cleanup()
        assert (report.overshoot, report.removed) == (0, ())
        assert report.total_bytes == pytest.approx(9 * one, rel=0.02)


async def alive(session: Session) -> bool:
    try:
        await session.info()
    except LookupError:
        return False
    return True


async def test_a_full_store_whose_sessions_are_all_in_use_refuses_and_reports_by_how_much() -> None:
    one = await size_of_one()
    blobs = MemoryBlobStore()
    async with open_store(blobs) as store:
        for number in range(4):
            await (await store.create_session()).store_image(noise(number), "start")
    limits = Limits(max_total_bytes=3 * one)
    async with open_store(blobs, cleanup_interval=None, limits=limits) as store:
        session = await store.create_session()
        with pytest.raises(QuotaExceededError, match="max_total_bytes"):
            await session.store_image(noise(5), "start")
        report = await store.cleanup(dry_run=True)
        assert report.total_bytes == pytest.approx(4 * one, rel=0.02)
        assert report.overshoot == report.total_bytes - 3 * one  # type: ignore[operator]
        await session.update_state(model="i2v")  # what is small is never refused


async def test_a_device_that_is_nearly_full_is_swept_then_refuses_images_and_still_clears(tmp_path: Path) -> None:
    clock = FrozenClock()
    async with open_store(tmp_path / "s", clock=clock) as store:
        old = await store.create_session()
        await old.store_image(noise(1, 400), "start")
        clock.now += timedelta(days=2)
        session = await store.create_session()
        await session.store_image(noise(2, 400), "start")
    full = LocalBlobStore(tmp_path / "s", min_free=2**62)
    async with open_store(full, clock=clock, cleanup_interval=None) as store:
        session = await store.open_by_key(session.key)
        with pytest.raises(StorageFullError, match="Free some space"):
            await session.store_image(noise(3, 400), "end")
        assert not files_below(tmp_path, "s", "manifests", old.key[:2])
        assert (await session.retrieve_image("start")).size == (400, 400)
        await session.clear_all_images()
        assert files_below(tmp_path, "s", "blobs") == []
        assert files_below(tmp_path, "s", "tmp") == []


async def test_an_upload_goes_through_once_a_sweep_has_made_room() -> None:
    class Device(MemoryBlobStore):
        """Holds so many blobs."""

        async def put(self, key: str, *args: object, **options: object) -> str:
            if key.startswith("blobs/") and len(await keys_of(self, "blobs/")) >= 4:
                raise StorageFullError("No room is left.")
            return await super().put(key, *args, **options)  # type: ignore[arg-type]

    clock = FrozenClock()
    async with open_store(Device(), clock=clock, cleanup_interval=None) as store:
        for number in range(2):
            await (await store.create_session()).store_image(noise(number), "start")
        clock.advance(days=2)
        session = await store.create_session()
        await session.store_image(noise(2), "start")
        assert (await session.retrieve_image("start")).tobytes() == noise(2).tobytes()
