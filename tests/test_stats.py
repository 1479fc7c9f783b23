from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from async_sessions import JobInfo, Limits, SessionStore, open_store
from async_sessions.testing.clock import FrozenClock
from tests.faults import files_below

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


async def test_an_empty_store_has_nothing_to_tell(session_store: SessionStore) -> None:
    stats = await session_store.stats()
    assert (stats.sessions, stats.images, stats.total_bytes, stats.jobs, stats.oldest) == (0, 0, 0, {}, None)
    assert stats.cache.hit_rate is None


async def test_every_blob_is_counted_once_under_its_kind(session_store: SessionStore, tmp_path: Path) -> None:
    one, other = await session_store.create_session(prompt="a red car"), await session_store.create_session()
    red = await one.store_image(RED, "start")
    blue = await one.store_image(BLUE, "start")
    end = await other.store_image(RED, "end")
    output = await one.store_output(b"made", name="text", media_type="text/plain")
    for number, status in enumerate(("queued", "queued", "succeeded")):
        job = JobInfo(
            id=f"{one.key}.{number:016x}",
            pipeline="p",
            inputs={"start": blue, "end": red},
            params={},
            submitted_at=session_store.clock(),
            owner="o",
            status=status,  # type: ignore[arg-type]
            outputs={"text": output} if status == "succeeded" else {},
        )
        await one.edit_job(job.id, lambda _, job=job: job)  # type: ignore[misc]
    stats = await session_store.stats()
    assert (stats.sessions, stats.images, stats.unreadable) == (2, 2, 0)
    assert stats.image_bytes == blue.byte_size + end.byte_size
    assert stats.recent_bytes == red.byte_size
    assert stats.thumbnail_bytes == red.thumbnail_size + blue.thumbnail_size + end.thumbnail_size
    assert stats.output_bytes == 4
    assert stats.state_bytes == len('{"prompt":"a red car"}') + len("{}")
    assert stats.jobs == {"queued": 2, "succeeded": 1}
    blobs = files_below(tmp_path / "sessions", "blobs")
    assert stats.total_bytes == sum(path.stat().st_size for path in blobs)


async def test_the_bytes_are_told_as_a_part_of_the_limit(tmp_path: Path) -> None:
    limits = Limits(max_total_bytes=100_000)
    async with open_store(tmp_path / "root", cleanup_interval=None, limits=limits) as store:
        await (await store.create_session()).store_image(RED, "start")
        stats = await store.stats()
        assert stats.quota_use == stats.total_bytes / 100_000 > 0
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        assert (await store.stats()).quota_use is None


async def test_the_largest_session_is_told_as_a_part_of_what_one_may_keep(tmp_path: Path) -> None:
    limits = Limits(max_session_bytes=100_000)
    async with open_store(tmp_path / "root", cleanup_interval=None, limits=limits) as store:
        large, small = await store.create_session(), await store.create_session()
        await large.store_images({"start": RED, "end": BLUE})
        await small.store_image(RED, "start")
        stats = await store.stats()
        assert stats.largest_session_bytes == (await large.info()).total_bytes
        assert stats.session_quota_use == stats.largest_session_bytes / 100_000 > 0
    async with open_store(tmp_path / "root", limits=Limits(max_session_bytes=None)) as store:
        assert (await store.stats()).session_quota_use is None


async def test_ages_are_those_of_the_oldest_and_of_the_newest_session(tmp_path: Path) -> None:
    clock = FrozenClock()
    async with open_store(tmp_path / "root", cleanup_interval=None, clock=clock) as store:
        began = clock.now
        first = await store.create_session()
        clock.advance(minutes=10)
        await store.create_session()
        clock.advance(minutes=10)
        await first.update_state(a=1)
        stats = await store.stats()
        seconds = [
            (moment - began).total_seconds() for moment in (stats.oldest, stats.newest, stats.longest_unused) if moment
        ]
        assert seconds == [0, 600, 600]
        assert (stats.now - began).total_seconds() == 1200


async def test_a_session_that_can_not_be_read_is_counted_apart(session_store: SessionStore, tmp_path: Path) -> None:
    damaged = await session_store.create_session()
    await session_store.create_session()
    (tmp_path / "sessions" / "manifests" / damaged.key[:2] / f"{damaged.key}.json").write_bytes(b"{")
    stats = await session_store.stats()
    assert (stats.sessions, stats.unreadable) == (1, 1)


async def test_the_cache_counts_what_was_decoded_and_what_was_not(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(RED, "start")
        await session.retrieve_image("start")
        cache = (await store.stats()).cache
        assert (cache.hits, cache.misses, cache.bytes) == (1, 0, 4 * 40 * 30)  # kept when it was stored
    async with open_store(tmp_path / "root", cleanup_interval=None, cache_bytes=10_000) as store:
        session = await store.open_by_key(session.key)
        for _ in range(4):
            await session.retrieve_image("start")
        cache = (await store.stats()).cache
        assert (cache.hits, cache.misses, cache.hit_rate, cache.max_bytes) == (3, 1, 0.75, 10_000)
