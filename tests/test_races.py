"""What two things at once can do to a session, in as many orders as there are seeds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import anyio
import pytest
from PIL import Image

from async_sessions import (
    BlobStore,
    LocalBlobStore,
    Session,
    SessionInfo,
    SessionNotFoundError,
    SessionStore,
    SlotEmptyError,
    StorageError,
    open_store,
)
from async_sessions.testing.fuzz import fuzz
from tests.faults import keys_of, named_blobs
from tests.images import encoded
from tests.simulation import Call, VirtualBlobStore, VirtualClock, linearizable

SEEDS = range(100)
GRACE = timedelta(minutes=2)
ID = "of the session in these tests"


def picture(width: int) -> bytes:
    """A picture that is known by its width."""
    return encoded(Image.new("RGB", (width, 1)), "PNG")


class Processes:
    """Several stores, each as if in a process of its own, on the same blobs, in virtual time."""

    def __init__(self, *, ttl: timedelta = timedelta(hours=24)) -> None:
        self.clock = VirtualClock()
        self.blobs = VirtualBlobStore(self.clock)
        self._ttl = ttl
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def open(self) -> SessionStore:
        store = open_store(
            self.blobs, ttl=self._ttl, grace=GRACE, cleanup_interval=None, cache_bytes=300, clock=self.clock
        )
        return await self._stack.enter_async_context(store)


async def width_of(session: Session, slot: str = "start") -> int | None:
    try:
        return (await session.retrieve_image(slot)).width
    except SlotEmptyError:
        return None


async def together(*calls: Callable[[], Awaitable[object]]) -> None:
    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(call)  # type: ignore[arg-type]


# --- everything at once


class Users:
    """Users of one session's slot who do this and that, and remember what they saw and when."""

    def __init__(self) -> None:
        self.history: list[Call] = []
        self._widths = iter(range(1, 1000))

    async def use(self, session: Session) -> None:
        now = asyncio.get_running_loop().time
        for _ in range(2):
            start = now()
            match random.choice(("store", "store", "retrieve", "retrieve", "undo", "clear", "clear all", "evict")):
                case "store":
                    kind, value = "write", next(self._widths)
                    await session.store_image(picture(value), "start")
                case "retrieve":
                    kind, value = "read", await width_of(session)  # type: ignore[assignment]
                case "undo":
                    recent = (await session.info()).recent
                    try:
                        kind, value = "write", (await session.restore_recent(recent[-1].record.digest, "start")).width
                    except (IndexError, SlotEmptyError):
                        continue
                case "clear":
                    kind, value = "write", None  # type: ignore[assignment]
                    await session.clear_image("start")
                case "clear all":
                    kind, value = "write", None  # type: ignore[assignment]
                    await session.clear_all_images()
                case "evict":
                    session._context.cache._images.clear()
                    continue
            self.history.append(Call(kind, value, start, now()))


async def check_what_is_left(store: SessionStore, users: Users) -> None:
    now = asyncio.get_running_loop().time
    width, at = await width_of(store.session(ID)), now()
    assert linearizable([*users.history, Call("read", width, at, at)])
    await store.cleanup(now=store.clock() + 2 * GRACE)
    assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
    assert await width_of(store.session(ID)) == width
    context = store._context()
    assert context._in_flight == {}
    assert context.cpu.borrowed_tokens == 0
    assert context.budget.free == context.budget.pixels


async def two_processes_with_janitors() -> None:
    """In each round the sweep has something to take that the users left in the last."""
    users = Users()
    async with Processes() as processes:
        first, second = await processes.open(), await processes.open()
        await first.session(ID).update_state()
        for _ in range(3):
            sweeps = (
                partial(store._open()[1].sweep, now=processes.clock(), full=random.choice((True, False)))
                for store in (first, second)
            )
            await together(*(partial(users.use, store.session(ID)) for store in (first, first, second)), *sweeps)
            await anyio.sleep(GRACE.total_seconds() * random.uniform(0.5, 1.5))
        await check_what_is_left(first, users)


async def one_process_on_disk(root: Path) -> None:
    users = Users()
    start = datetime.now(UTC) + timedelta(seconds=1)  # file times are real
    blobs: BlobStore = LocalBlobStore(root)
    async with open_store(
        blobs, grace=GRACE, cleanup_interval=None, cache_bytes=300, clock=VirtualClock(start)
    ) as store:
        session = store.session(ID)
        await session.update_state()

        async def sweep() -> None:
            for _ in range(4):
                await store.cleanup(now=store.clock() + 2 * GRACE)

        await together(*(partial(users.use, session) for _ in range(6)), sweep)
        await check_what_is_left(store, users)


@pytest.mark.slow
def test_a_session_of_two_processes_is_linearizable_and_no_sweep_takes_what_is_in_use() -> None:
    fuzz(two_processes_with_janitors, seeds=SEEDS)


@pytest.mark.slow
def test_a_session_on_disk_is_linearizable_and_no_sweep_takes_what_is_in_use(tmp_path: Path) -> None:
    with mock.patch.object(os, "fsync"):  # nobody cuts the power here
        for seed in SEEDS:
            fuzz(partial(one_process_on_disk, tmp_path / str(seed)), seeds=[seed])


# --- two at a time


async def an_orphan_is_swept_while_its_image_is_stored_again() -> None:
    async with Processes() as processes:
        store, other = await processes.open(), await processes.open()
        session = await store.create_session()
        processes.blobs.fails_for = lambda key: key.startswith("manifests/")
        with pytest.raises(StorageError):
            await session.store_image(picture(7), "start")
        processes.blobs.fails_for = lambda key: False
        assert await keys_of(store.blobs, "blobs/") != set()
        await anyio.sleep(2 * GRACE.total_seconds())
        await together(other.cleanup, partial(session.store_image, picture(7), "start"))
        assert await width_of(await other.open_by_key(session.key)) == 7
        await other.cleanup()
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)


async def begin_anew(store: SessionStore, identity: str, key: str) -> None:
    """Wait until a user's session is gone, then make the next one and keep an image in it."""
    with contextlib.suppress(SessionNotFoundError):
        while True:
            await (await store.open_by_key(key)).info()
    await (await store.session_for(identity)).store_image(picture(9), "start")


async def a_deleter_is_late() -> None:
    async with Processes() as processes:
        store, other = await processes.open(), await processes.open()
        session = await store.session_for("ada")
        await session.store_image(picture(7), "start")
        await together(session.delete, other.cleanup, partial(begin_anew, other, "ada", session.key))
        assert await width_of(await store.session_for("ada")) == 9
        await store.cleanup(now=store.clock() + 2 * GRACE)
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
        assert len(await named_blobs(store)) == 2


async def two_janitors_finish_one_tombstone() -> None:
    async with Processes() as processes:
        store, other = await processes.open(), await processes.open()
        session = await store.session_for("ada")
        await session.store_image(picture(7), "start")
        # as a deleter leaves it that is killed
        await store._context().manifests.edit(session.key, lambda manifest: manifest and manifest.as_tombstone())
        await together(store.cleanup, other.cleanup, partial(begin_anew, other, "ada", session.key))
        assert await width_of(await store.session_for("ada")) == 9
        await store.cleanup(now=store.clock() + 2 * GRACE)
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)


async def a_session_is_used_while_a_sweep_takes_it_for_expired() -> None:
    ttl = timedelta(hours=1)
    async with Processes(ttl=ttl) as processes:
        store, other = await processes.open(), await processes.open()
        session = await store.create_session()
        await session.store_image(picture(7), "start")
        expires_at = (await session.info()).expires_at
        await anyio.sleep((expires_at - processes.clock()).total_seconds() - 10 ** random.uniform(-5, -1))
        used: list[bool] = []

        async def touch() -> None:
            with contextlib.suppress(SessionNotFoundError):
                await session.touch()
                used.append(True)

        async def sweep() -> None:
            while processes.clock() <= expires_at:
                await anyio.lowlevel.checkpoint()
            await other.cleanup()

        await together(touch, sweep)
        if used:
            assert await width_of(await other.open_by_key(session.key)) == 7
        else:
            await anyio.sleep(1)
            await other.cleanup()
            assert await keys_of(store.blobs) == set()


async def after_a_slow_upload_began(then: Callable[[Session], Awaitable[object]]) -> SessionInfo:
    """Run `then` while an upload is under way that was asked for before it."""
    began = anyio.Event()

    async def slowly(data: bytes) -> AsyncIterator[bytes]:
        began.set()
        for byte in data:
            await anyio.lowlevel.checkpoint()
            yield bytes([byte])

    async def later() -> None:
        await began.wait()
        await then(session)

    async with Processes() as processes:
        store = await processes.open()
        session = await store.create_session()
        await together(partial(session.store_image, slowly(picture(7)), "start"), later)
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
        return await session.info()


async def a_slow_upload_ends_after_a_later_one() -> None:
    info = await after_a_slow_upload_began(lambda session: session.store_image(picture(9), "start"))
    assert info.images["start"].width == 9
    assert [recent.record.width for recent in info.recent] == [7]


async def an_upload_ends_after_everything_was_cleared() -> None:
    info = await after_a_slow_upload_began(lambda session: session.clear_all_images())
    assert info.images == {}
    assert info.recent == ()


RACES = (
    an_orphan_is_swept_while_its_image_is_stored_again,
    a_deleter_is_late,
    two_janitors_finish_one_tombstone,
    a_session_is_used_while_a_sweep_takes_it_for_expired,
    a_slow_upload_ends_after_a_later_one,
    an_upload_ends_after_everything_was_cleared,
)


@pytest.mark.no_cover
@pytest.mark.parametrize("race", RACES, ids=lambda race: race.__name__.replace("_", " "))
def test_nothing_is_lost_where(race: Callable[[], Awaitable[None]]) -> None:
    fuzz(race, seeds=SEEDS)


def test_a_seed_replays_a_whole_session() -> None:
    assert fuzz(two_processes_with_janitors, seeds=range(3)) == fuzz(two_processes_with_janitors, seeds=range(3))
