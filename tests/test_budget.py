from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from PIL import Image

from async_sessions import ImageRejectedError, MemoryBlobStore, Session, SessionStore, open_store
from async_sessions._budget import PixelBudget
from async_sessions._codec import decode
from tests.faults import FaultyBlobStore
from tests.images import corners, encoded, exif, jpeg_in_scans, png_file, segment, take
from tests.proof import stores

pytestmark = pytest.mark.anyio

IMAGE = Image.new("RGB", (40, 30), "red")  # 1200 pixels; a copy and its file count as 2400


async def test_what_is_lent_never_exceeds_the_budget() -> None:
    budget = PixelBudget(100)
    held, most = 0, 0

    async def work(pixels: int) -> None:
        nonlocal held, most
        async with budget.lent(pixels):
            held += min(pixels, 100)
            most = max(most, held)
            await anyio.lowlevel.checkpoint()
            held -= min(pixels, 100)

    async with anyio.create_task_group() as group:
        for number in range(200):
            group.start_soon(work, (number * 37) % 130)
    assert 50 < most <= 100
    assert budget.free == 100


async def test_whoever_came_first_is_served_first_and_a_large_one_is_not_overtaken() -> None:
    budget = PixelBudget(10)
    order: list[str] = []
    done = {name: anyio.Event() for name in "abcd"}

    async def work(name: str, pixels: int) -> None:
        async with budget.lent(pixels):
            order.append(name)
            await done[name].wait()

    async with anyio.create_task_group() as group:
        for name, pixels in (("a", 6), ("b", 1000), ("c", 1), ("d", 1)):
            group.start_soon(work, name, pixels)
            await anyio.wait_all_tasks_blocked()
        assert order == ["a"]
        done["a"].set()
        await anyio.wait_all_tasks_blocked()
        assert order == ["a", "b"]
        done["b"].set()
        await anyio.wait_all_tasks_blocked()
        assert order == ["a", "b", "c", "d"]
        done["c"].set()
        done["d"].set()
    assert budget.free == 10


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
@pytest.mark.parametrize("granted", [True, False], ids=["in its turn", "while it waits"])
async def test_a_cancelled_waiter_leaks_nothing_and_holds_nobody_up(native: bool, granted: bool) -> None:
    budget = PixelBudget(10)
    scope = anyio.CancelScope()
    ran: list[str] = []

    async def cancelled() -> None:
        with scope:
            async with budget.lent(9):
                await anyio.lowlevel.checkpoint()
                ran.append("cancelled")

    async def behind() -> None:
        async with budget.lent(2):
            ran.append("behind")

    async with anyio.create_task_group() as group:
        async with budget.lent(8):
            task = asyncio.get_running_loop().create_task(cancelled())
            await anyio.wait_all_tasks_blocked()
            group.start_soon(behind)
            await anyio.wait_all_tasks_blocked()
            if not granted:
                task.cancel() if native else scope.cancel()
                await anyio.wait_all_tasks_blocked()
                assert ran == ["behind"]
        if granted:
            task.cancel() if native else scope.cancel()
        await asyncio.wait({task})
    assert ran == ["behind"]
    assert budget.free == 10
    assert not budget._waiting


async def test_an_error_of_the_body_gives_the_pixels_back() -> None:
    budget = PixelBudget(10)
    with pytest.raises(LookupError):
        async with budget.lent(10):
            raise LookupError
    assert budget.free == 10


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        open_store("memory://", decode_pixels=0)


async def test_uploads_wait_for_each_other_until_their_pixels_are_stored() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None, decode_pixels=5000) as store:
        budget = store._context().budget
        sessions = [await store.create_session() for _ in range(5)]
        gate, two_put = anyio.Event(), anyio.Event()
        putting = 0

        def count(key: str) -> anyio.Event | None:
            nonlocal putting
            if not key.startswith("blobs/") or gate.is_set():
                return None
            putting += 1
            if putting == 2:
                two_put.set()
            return gate

        blobs.before_put = count
        async with anyio.create_task_group() as group:
            for session in sessions:
                group.start_soon(session.store_image, IMAGE, "start")
            await two_put.wait()
            await anyio.wait_all_tasks_blocked()
            assert (putting, budget.free) == (2, 200)
            assert len(budget._waiting) == 3
            gate.set()
        assert [await session.has_image("start") for session in sessions] == [True] * 5
        assert budget.free == 5000


async def test_cold_reads_share_the_budget_with_uploads_and_warm_ones_need_none() -> None:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_images({"a": IMAGE, "b": IMAGE})
    async with open_store(blobs, cleanup_interval=None, decode_pixels=1200) as store:
        budget = store._context().budget
        session = await store.restore_session(session.id or "")
        await session.retrieve_image("a")
        async with budget.lent(1200):
            await session.retrieve_image("a")
            with anyio.move_on_after(0.05) as scope:
                await session.retrieve_image("b")
            assert scope.cancelled_caught
        assert (await session.retrieve_image("b")).size == (40, 30)
        assert budget.free == 1200


READS: dict[str, Callable[[Session], Coroutine[Any, Any, object]]] = {
    "array": lambda session: session.retrieve_array("start"),
    "rendition": lambda session: session.retrieve_rendition("start", (8, 6)),
    "palette image": lambda session: session.retrieve_image("start"),
}


async def _stored(store: SessionStore, how: str) -> Session:
    session = await store.create_session()
    await session.store_image(IMAGE.convert("P") if how == "palette image" else IMAGE, "start")
    return session


@pytest.mark.parametrize("how", READS)
async def test_what_is_made_of_a_cached_image_waits_for_its_turn(how: str) -> None:
    async with open_store("memory://", decode_pixels=10_000) as store:
        session, budget = await _stored(store, how), store._context().budget
        async with budget.lent(10_000):
            with anyio.move_on_after(0.05) as scope:
                await READS[how](session)
            assert scope.cancelled_caught
        assert budget.free == 10_000
        await READS[how](session)
        assert budget.free == 10_000


@pytest.mark.parametrize("how", READS)
async def test_an_image_that_left_the_cache_while_it_was_waited_for_is_read_again(how: str) -> None:
    async with open_store("memory://", decode_pixels=10_000) as store:
        session, budget = await _stored(store, how), store._context().budget
        record = (await session.info()).images["start"]
        async with anyio.create_task_group() as group, budget.lent(10_000):
            group.start_soon(READS[how], session)
            while not budget._waiting:
                await anyio.lowlevel.checkpoint()
            store._context().cache.drop(record.blob)
        assert record.blob in store._context().cache
        assert budget.free == 10_000


@pytest.mark.parametrize("cache_bytes", [1, 10**6], ids=["without a cache", "with a cache"])
@pytest.mark.parametrize("decode_pixels", [1, 2500, 10_000])
async def test_reads_and_uploads_of_all_kinds_do_not_wait_for_each_other_for_ever(
    decode_pixels: int, cache_bytes: int
) -> None:
    async with open_store("memory://", decode_pixels=decode_pixels, cache_bytes=cache_bytes) as store:
        sessions = [await _stored(store, how) for how in READS]
        async with anyio.create_task_group() as group:
            for session in sessions:
                for read in 3 * [*READS.values()]:
                    group.start_soon(read, session)
                group.start_soon(session.store_images, {"a": IMAGE, "b": IMAGE})
        assert store._context().budget.free == decode_pixels


async def test_an_image_that_a_job_made_waits_for_its_turn_and_its_bytes_do_not() -> None:
    async with open_store("memory://", decode_pixels=10_000) as store:
        session, budget = await store.create_session(), store._context().budget
        async with budget.lent(10_000 - 2 * 1200 + 1):
            with anyio.move_on_after(0.05) as scope:
                await session.store_output(IMAGE, name="frame", media_type="image/png")
            assert scope.cancelled_caught
            await session.store_output(b"a film", name="film", media_type="video/mp4")
        await session.store_output(IMAGE, name="frame", media_type="image/png")
        assert budget.free == 10_000


async def test_a_loan_is_asked_for_once() -> None:
    async with PixelBudget(10).loan() as loan:
        await loan.ask(1)
        with pytest.raises(RuntimeError, match="all at once"):
            await loan.ask(1)


async def test_two_calls_that_store_several_images_do_not_wait_for_each_other_for_ever() -> None:
    async with open_store("memory://", decode_pixels=4800) as store, anyio.create_task_group() as group:
        for _ in range(4):
            session = await store.create_session()
            group.start_soon(session.store_images, {"a": IMAGE, "b": IMAGE})


async def test_an_image_larger_than_the_budget_is_stored_alone() -> None:
    async with open_store("memory://", decode_pixels=1) as store:
        session = await store.create_session()
        async with anyio.create_task_group() as group:
            for slot in "abc":
                group.start_soon(session.store_image, IMAGE, slot)
        assert set((await session.info()).images) == set("abc")


async def test_an_image_that_is_too_large_is_refused_before_it_is_its_turn() -> None:
    async with open_store("memory://") as store:
        session = await store.create_session()
        async with store._context().budget.lent(10**9):
            for source in (Image.new("1", (9000, 9000)), np.broadcast_to(np.uint8(0), (9000, 9000, 3))):
                with anyio.fail_after(10), pytest.raises(ImageRejectedError) as caught:
                    await session.store_image(source, "start")
                assert caught.value.reason == "too_many_pixels"


async def test_what_takes_nothing_waits_for_nobody() -> None:
    budget = PixelBudget(10)
    async with budget.lent(10), anyio.create_task_group() as group:
        waiting = anyio.CancelScope()

        async def wait() -> None:
            with waiting:
                async with budget.lent(1):
                    raise AssertionError

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(10):
            async with budget.lent(0):
                pass
        waiting.cancel()


async def test_a_refused_image_gives_its_pixels_back() -> None:
    async with open_store("memory://") as store:
        session = await store.create_session()
        data = png_file(40, 30, 8, 0, rows=bytes(30 * 41 - 7))
        for source in (data, data[:-30], Image.new("F", (4, 4))):
            with pytest.raises(ImageRejectedError):
                await session.store_image(source, "start")
        assert store._context().budget.free == store._context().budget.pixels


WIDE = corners(160, 96)
PLAIN = encoded(WIDE, "JPEG")

PEAKS: dict[str, tuple[bytes, float]] = {
    "JPEG": (PLAIN, 1),
    "JPEG, turned": (encoded(WIDE, "JPEG", exif=exif(6)), 2),
    "JPEG in three scans": (jpeg_in_scans(WIDE), 2.5),
    "JPEG, progressive": (encoded(WIDE, "JPEG", progressive=True), 1.75),
    "JPEG, progressive, turned": (encoded(WIDE, "JPEG", progressive=True, exif=exif(6)), 2),
    "JPEG, progressive, with all of its colour": (encoded(WIDE, "JPEG", progressive=True, subsampling=0), 2.5),
    "JPEG, progressive, grey": (encoded(WIDE.convert("L"), "JPEG", progressive=True), 1.5),
    "JPEG, progressive, CMYK": (encoded(WIDE.convert("CMYK"), "JPEG", progressive=True), 3),
    "JPEG whose frame is hard to find": (PLAIN[:2] + 99 * segment(0xDD, b"\0\0") + PLAIN[2:], 3),
    "PNG": (encoded(WIDE, "PNG"), 1),
    "PNG, turned": (encoded(WIDE, "PNG", exif=exif(6)), 2),
    "WEBP": (encoded(WIDE, "WEBP"), 4),
}


@pytest.mark.parametrize("case", PEAKS)
def test_what_takes_more_memory_counts_for_more(case: str) -> None:
    data, times = PEAKS[case]
    rebuilt, image = take(data)
    media_type = f"image/{case.split()[0].strip(',').lower()}"
    pixels = image.width * image.height
    assert decode.peak(rebuilt.data, media_type, pixels, rebuilt.orientation) == times * pixels


async def test_a_webp_counts_four_times_when_it_is_stored() -> None:
    async with open_store("memory://", decode_pixels=10_000) as store:
        session = await store.create_session()
        budget = store._context().budget
        async with budget.lent(10_000 - 4 * 48 * 32 + 1):
            with anyio.move_on_after(0.05) as scope:
                await session.store_image(encoded(corners(), "WEBP"), "start")
            assert scope.cancelled_caught
        await session.store_image(encoded(corners(), "WEBP"), "start")


async def test_images_of_every_kind_are_stored_at_once_without_a_blocking_call(tmp_path: Path) -> None:
    await stores.store_at_once(tmp_path / "root", stores.sources(1600, 1200), 8)


async def test_of_images_that_do_not_fit_together_only_the_files_are_held() -> None:
    images = {f"slot{number}": Image.new("RGB", (100, 100), (number, 0, 0)) for number in range(5)}
    async with open_store("memory://", cleanup_interval=None, decode_pixels=20_000) as store:
        session = await store.create_session()
        await session.store_images(images)
        assert store._context().cache.size == 0
        for slot, image in images.items():
            assert (await session.retrieve_image(slot)).tobytes() == image.tobytes()
