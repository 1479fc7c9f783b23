"""`BlobStoreRaces`: what a `BlobStore` must do when many use it at once, and when a call is cancelled half way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from async_sessions.blobs.base import Blob, BlobStore, Expect
from async_sessions.errors import VersionConflictError


class BlobStoreRaces:
    """The part of `BlobStoreTests` in which calls run at the same time."""

    pytestmark = pytest.mark.anyio

    async def test_racing_creates_have_one_winner(self, blobs: BlobStore) -> None:
        won: list[int] = []

        async def create(number: int) -> None:
            try:
                await blobs.put("a", b"%d" % number, expect=Expect.ABSENT)
            except VersionConflictError:
                return
            won.append(number)

        async with anyio.create_task_group() as group:
            for number in range(16):
                group.start_soon(create, number)
        found = await blobs.get("a")
        assert found is not None
        assert [found.data] == [b"%d" % number for number in won]

    async def test_racing_increments_lose_nothing(self, blobs: BlobStore) -> None:
        await blobs.put("n", b"0")

        async def increment() -> None:
            while True:
                found = await blobs.get("n")
                assert found is not None
                await checkpoint()
                try:
                    await blobs.put("n", b"%d" % (int(found.data) + 1), expect=found.version)
                except VersionConflictError:
                    continue
                return

        async with anyio.create_task_group() as group:
            for _ in range(24):
                group.start_soon(increment)
        found = await blobs.get("n")
        assert found is not None
        assert found.data == b"24"

    async def test_a_reader_never_sees_half_a_write(self, blobs: BlobStore) -> None:
        """Each value is one byte repeated; conditional and unconditional writers race for one key."""
        size = 200_000
        written = {await blobs.put("a", b"0" * size): b"0" * size}
        seen: list[Blob] = []

        async def write(byte: bytes) -> None:
            for number in range(4):
                found = await blobs.get("a")
                assert found is not None
                expect = found.version if number % 2 else Expect.ANY
                data = byte * (size + number)
                with suppress(VersionConflictError):
                    written[await blobs.put("a", data, expect=expect)] = data
                await checkpoint()

        async def read() -> None:
            while True:
                found = await blobs.get("a")
                assert found is not None
                seen.append(found)
                assert len(set(b"".join([chunk async for chunk in blobs.stream("a")]))) == 1
                await checkpoint()

        async with anyio.create_task_group() as readers:
            readers.start_soon(read)
            async with anyio.create_task_group() as writers:
                for byte in (b"1", b"2", b"3"):
                    writers.start_soon(write, byte)
            readers.cancel_scope.cancel()
        assert seen
        assert all(written[blob.version] == blob.data for blob in seen)

    async def test_a_list_during_writes_shows_what_stays(self, blobs: BlobStore) -> None:
        stay = {f"a/{number}/stays": 5 for number in range(20)}
        for key in stay:
            await blobs.put(key, b"stays")

        async def come_and_go(key: str) -> None:
            while True:
                await blobs.put(key, b"goes")
                await checkpoint()
                await blobs.delete(key)
                await checkpoint()

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(come_and_go, f"a/{number}/goes")
            for _ in range(10):
                listed = [(info.key, info.size) async for info in blobs.list("a/") if info.key.endswith("stays")]
                assert sorted(listed) == sorted(stay.items())
                await checkpoint()
            group.cancel_scope.cancel()

    async def test_a_put_beside_a_delete_is_kept(self, blobs: BlobStore) -> None:
        """A backend that removes empty folders must not remove one that is just being filled."""

        async def keep(key: str) -> None:
            version = await blobs.put(key, b"kept")
            assert await blobs.get(key) == Blob(b"kept", version)
            await blobs.delete(key)

        for _ in range(10):
            async with anyio.create_task_group() as group:
                for number in range(4):
                    group.start_soon(keep, f"a/b/{number}")
        assert [info.key async for info in blobs.list()] == []

    async def test_a_put_cancelled_in_its_source_leaves_the_old_blob(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", b"old")
        with anyio.CancelScope() as scope:
            await blobs.put("a", _cut_short(scope))
        assert scope.cancelled_caught
        assert await blobs.get("a") == Blob(b"old", version)
        assert [info.key async for info in blobs.list("tmp/")] == []

    async def test_a_cancelled_put_or_delete_has_happened_or_has_not(self, blobs: BlobStore) -> None:
        for turns in (0, 1, 2, 4, 8, 16, 32, 64, 128):
            version = await blobs.put(f"a/{turns}", b"old")
            await _cancelled_after(turns, partial(blobs.put, f"a/{turns}", b"new" * 1000, expect=version))
            found = await blobs.get(f"a/{turns}")
            assert found is not None
            assert found.data in (b"old", b"new" * 1000)

            version = await blobs.put(f"b/{turns}", b"old")
            await _cancelled_after(turns, partial(blobs.delete, f"b/{turns}", expect=version))
            assert await blobs.get(f"b/{turns}") in (Blob(b"old", version), None)
        assert [info.key async for info in blobs.list("tmp/")] == []


async def _cut_short(scope: anyio.CancelScope) -> AsyncIterator[bytes]:
    yield b"half"
    scope.cancel()
    await checkpoint()


async def _cancelled_after(turns: int, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(call)
        for _ in range(turns):
            await checkpoint()
        group.cancel_scope.cancel()
