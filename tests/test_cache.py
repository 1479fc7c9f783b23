from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from PIL import Image, ImageDraw

from async_sessions import CorruptBlobError, MemoryBlobStore, open_store
from async_sessions._cache import ImageCache, view
from async_sessions.testing.cancellation import Run, cancel_everywhere
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.faults import Operation, WrappedBlobStore

pytestmark = pytest.mark.anyio


async def test_many_readers_share_one_load() -> None:
    cache = ImageCache(10_000)
    gate = anyio.Event()
    loads = 0
    seen: list[Image.Image] = []

    async def load() -> Image.Image:
        nonlocal loads
        loads += 1
        await gate.wait()
        return Image.new("RGB", (10, 10), "red")

    async def read() -> None:
        seen.append(await cache.get("a", load))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        gate.set()
    assert loads == 1
    assert len(seen) == 8


async def test_a_cancelled_load_is_taken_over_by_a_waiter() -> None:
    cache = ImageCache(10_000)
    gates = [anyio.Event(), anyio.Event()]
    gates[1].set()
    loads: list[anyio.Event] = []

    async def load() -> Image.Image:
        loads.append(gates[len(loads)])
        await loads[-1].wait()
        return Image.new("RGB", (10, 10))

    async with anyio.create_task_group() as group:
        first = anyio.CancelScope()

        async def cancelled() -> None:
            with first:
                await cache.get("a", load)

        group.start_soon(cancelled)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(cache.get, "a", load)
        await anyio.wait_all_tasks_blocked()
        first.cancel()
    assert len(loads) == 2


async def test_a_load_that_is_cancelled_anywhere_is_done_by_the_next_who_asks() -> None:
    cache = ImageCache(10_000)
    loads = 0

    async def load() -> Image.Image:
        nonlocal loads
        await anyio.lowlevel.checkpoint()
        loads += 1
        return Image.new("RGB", (10, 10))

    async def prepare() -> None:
        nonlocal loads
        cache.drop("a")
        loads = 0

    async def check(run: Run) -> None:
        assert (cache.find("a") is not None) == (loads == 1)
        with anyio.fail_after(1):
            await cache.get("a", load)
        assert loads in (1, 2)

    await cancel_everywhere(lambda: cache.get("a", load), check, prepare=prepare)


async def test_each_waiter_gets_an_exception_of_its_own() -> None:
    cache = ImageCache(10_000)
    raised: list[Exception] = []

    async def load() -> Image.Image:
        await anyio.lowlevel.checkpoint()
        raise LookupError("x")

    async def read() -> None:
        try:
            await cache.get("a", load)
        except LookupError as error:
            raised.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(read)
    assert len({id(error) for error in raised}) == 4


async def test_the_cache_is_bounded_by_bytes_and_an_oversize_image_bypasses_it() -> None:
    cache = ImageCache(1000)
    loads: list[str] = []

    async def get(name: str, side: int) -> None:
        async def load() -> Image.Image:
            loads.append(name)
            return Image.new("RGB", (side, side))

        await cache.get(name, load)

    await get("a", 10)
    await get("b", 10)
    await get("a", 10)
    await get("huge", 100)
    await get("huge", 100)
    await get("a", 10)
    await get("c", 10)
    await get("b", 10)
    assert loads == ["a", "b", "huge", "huge", "c", "b"]


class _Decoded(Image.Image):
    """Says in which threads it was copied."""

    def __init__(self) -> None:
        super().__init__()
        self._size, self.copied_in = (10, 10), list[int]()

    def copy(self) -> Image.Image:
        self.copied_in.append(threading.get_ident())
        return Image.new("RGB", self.size)


async def test_whatever_thread_decodes_an_image_one_thread_allocates_what_is_kept() -> None:
    cache, image, together = ImageCache(10_000), _Decoded(), threading.Barrier(2)
    decoders: list[int] = []

    def decode() -> None:
        decoders.append(threading.get_ident())
        together.wait(10)
        assert cache.own(image) is not image

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(anyio.to_thread.run_sync, decode)
    cache.close()
    assert len(set(image.copied_in)) == 1
    assert len({*decoders, *image.copied_in}) == 3


async def test_an_image_that_is_not_kept_is_not_copied() -> None:
    small, closed, image = ImageCache(10), ImageCache(10_000), Image.new("RGB", (10, 10))
    closed.close()
    assert small.own(image) is image
    assert closed.own(image) is image


async def test_a_store_that_is_left_leaves_no_thread_of_its_cache() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        await (await store.create_session()).store_image(Image.new("RGB", (10, 10)), "start")
        (keeper,) = [each for each in threading.enumerate() if each.name.startswith("async_sessions-cache")]
    await anyio.to_thread.run_sync(keeper.join, 10)
    assert not keeper.is_alive()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_drawing_on_a_view_leaves_the_shared_image_alone(mode: str) -> None:
    shared = Image.new(mode, (20, 20))
    before = shared.tobytes()
    drawn, pasted, cut = view(shared), view(shared), view(shared)
    if mode != "LA":
        ImageDraw.Draw(drawn).rectangle((0, 0, 9, 9), fill=1)
    pasted.paste(Image.new(mode, (5, 5), 1 if len(shared.getbands()) == 1 else (1,) * len(shared.getbands())))
    cut.putpixel((0, 0), 1 if len(shared.getbands()) == 1 else (1,) * len(shared.getbands()))
    assert shared.tobytes() == before
    assert pasted.tobytes() != before
    assert cut.tobytes() != before


async def test_what_a_deleted_blob_held_in_the_cache_is_let_go(tmp_path: Path) -> None:
    clock, image = FrozenClock(), Image.new("RGB", (10, 10))
    async with open_store(tmp_path / "root", cleanup_interval=None, clock=clock) as store:

        async def cached() -> int:
            return (await store.stats()).cache.bytes // 400

        swept = await store.create_session()
        await swept.store_image(image, "start")
        await swept.retrieve_rendition("start", (20, 5))
        await swept.store_image(image, "start")
        assert await cached() == 3
        clock.advance(timedelta(hours=2))
        await store.cleanup()  # past the grace of what was replaced
        assert await cached() == 1
        deleted = await store.create_session()
        await deleted.store_image(image, "start")
        clock.advance(timedelta(hours=24))
        await store.cleanup()  # past the life of the first
        assert await cached() == 1
        await deleted.delete()
        assert await cached() == 0


async def test_a_store_that_was_left_holds_no_pixels() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        await (await store.create_session()).store_image(Image.new("RGB", (10, 10)), "start")
        cache = store._context().cache
        assert cache.size == 400
    assert cache.size == 0


class SlowToTell(WrappedBlobStore):
    """Has read what it is asked for, but does not tell before the test says so."""

    def __init__(self) -> None:
        super().__init__(MemoryBlobStore())
        self.has_read, self.tell = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        yield
        if operation == "get" and key.startswith("blobs/"):
            self.has_read.set()
            await self.tell.wait()


@pytest.mark.parametrize("rendition", [False, True])
async def test_an_image_that_is_cleared_for_good_while_it_is_loaded_is_not_kept(rendition: bool) -> None:
    blobs = SlowToTell()
    async with open_store(blobs.inner, cleanup_interval=None) as store:
        session = await store.create_session()
        record = await session.store_image(Image.new("RGB", (10, 10)), "start")
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.open_by_key(session.key)
        image = await session.read_record(record)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(image.rendition, (5, 5)) if rendition else image.image)
            await blobs.has_read.wait()
            await session.clear_all_images()
            blobs.tell.set()
        assert (await store.stats()).cache.bytes == 0
        with pytest.raises(CorruptBlobError):
            await image.image()
