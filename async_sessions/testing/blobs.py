"""`BlobStoreTests`: what every `BlobStore` must do. Subclass it in your tests and give it a `blobs` fixture."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobStore, Expect
from async_sessions.errors import InvalidKeyError, VersionConflictError
from async_sessions.testing.races import BlobStoreRaces

BAD_KEYS = (
    "",
    "/",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\x00b",
    "a\\b",
    "ä",
    "a b",
    "a\n",
)


class BlobStoreTests(BlobStoreRaces):
    """Conformance tests, to be collected by pytest under anyio's plugin.

    `raw_get` and `raw_put` are a second door to the medium: override them to reach the files, rows or objects without
    the store, so that it is not its own witness. By default they go through the store itself.
    """

    async def raw_get(self, blobs: Any, key: str) -> bytes | None:
        """The bytes that the medium of `blobs` holds at `key`, or `None`."""
        found = await blobs.get(key)
        return found.data if found else None

    async def raw_put(self, blobs: Any, key: str, data: bytes) -> None:
        """Write `data` to the medium of `blobs`, as another process that uses it would."""
        await blobs.put(key, data)

    async def test_what_was_put_is_on_the_medium(self, blobs: BlobStore) -> None:
        await blobs.put("a/b", b"one")
        await blobs.put("a/c", _chunks(b"one", b"two"))
        assert await self.raw_get(blobs, "a/b") == b"one"
        assert await self.raw_get(blobs, "a/c") == b"onetwo"
        await blobs.delete("a/b")
        assert await self.raw_get(blobs, "a/b") is None

    async def test_what_is_on_the_medium_is_what_is_read(self, blobs: BlobStore) -> None:
        await self.raw_put(blobs, "a/b", b"one")
        found = await blobs.get("a/b")
        assert found is not None
        assert found.data == b"one"
        assert b"".join([chunk async for chunk in blobs.stream("a/b")]) == b"one"
        assert [(info.key, info.size) async for info in blobs.list()] == [("a/b", 3)]
        await blobs.delete("a/b", expect=found.version)
        assert await self.raw_get(blobs, "a/b") is None

    async def test_what_another_process_writes_is_read_and_not_overwritten(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", b"one")
        await self.raw_put(blobs, "a", b"two")
        with pytest.raises(VersionConflictError):
            await blobs.put("a", b"three", expect=version)
        found = await blobs.get("a")
        assert found is not None
        assert found.data == b"two"
        assert found.version != version

    async def test_a_missing_blob_is_none(self, blobs: BlobStore) -> None:
        assert await blobs.get("a/b") is None

    async def test_what_was_put_is_what_is_read(self, blobs: BlobStore) -> None:
        version = await blobs.put("a/b", b"one")
        assert await blobs.get("a/b") == Blob(b"one", version)

    async def test_a_put_replaces_and_changes_the_version(self, blobs: BlobStore) -> None:
        first = await blobs.put("a", b"one")
        second = await blobs.put("a", b"two")
        assert first != second
        assert await blobs.get("a") == Blob(b"two", second)

    async def test_a_file_is_put_whole(self, blobs: BlobStore, tmp_path: Path) -> None:
        data = bytes(range(256)) * 10_000
        await anyio.Path(tmp_path / "source").write_bytes(data)
        version = await blobs.put("a", tmp_path / "source")
        assert await blobs.get("a") == Blob(data, version)

    async def test_chunks_are_put_in_order(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", _chunks(b"one", b"two", b"three"))
        assert await blobs.get("a") == Blob(b"onetwothree", version)

    async def test_empty_chunks_change_nothing(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", _chunks(b"", b"one", b"", b"two", b""))
        assert await blobs.get("a") == Blob(b"onetwo", version)

    async def test_a_source_that_fails_leaves_the_old_blob(self, blobs: BlobStore) -> None:
        await blobs.put("a", b"old")
        with pytest.raises(EOFError):
            await blobs.put("a", _chunks(b"one", error=EOFError()))
        found = await blobs.get("a")
        assert found is not None
        assert found.data == b"old"
        assert [info.key async for info in blobs.list("tmp/")] == []

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0, None, b"0123456789"),
            (3, None, b"3456789"),
            (3, 7, b"3456"),
            (8, 99, b"89"),
            (20, None, b""),
            (7, 3, b""),
        ],
    )
    async def test_a_stream_yields_the_range(
        self, blobs: BlobStore, start: int, end: int | None, expected: bytes
    ) -> None:
        await blobs.put("a", b"0123456789")
        chunks = [chunk async for chunk in blobs.stream("a", start=start, end=end, chunk_size=4)]
        assert b"".join(chunks) == expected
        assert all(0 < len(chunk) <= 4 for chunk in chunks)

    async def test_a_large_blob_is_streamed_in_pieces(self, blobs: BlobStore) -> None:
        data = bytes(range(251)) * (3 * CHUNK_SIZE // 251 + 1)
        await blobs.put("a", data)
        chunks = [chunk async for chunk in blobs.stream("a")]
        assert b"".join(chunks) == data
        assert max(map(len, chunks)) <= CHUNK_SIZE
        middle = [chunk async for chunk in blobs.stream("a", start=CHUNK_SIZE - 1, end=2 * CHUNK_SIZE + 1)]
        assert b"".join(middle) == data[CHUNK_SIZE - 1 : 2 * CHUNK_SIZE + 1]

    async def test_streaming_a_missing_blob_is_an_error(self, blobs: BlobStore) -> None:
        with pytest.raises(FileNotFoundError):
            [chunk async for chunk in blobs.stream("a")]

    async def test_absent_creates_only(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", b"one", expect=Expect.ABSENT)
        with pytest.raises(VersionConflictError):
            await blobs.put("a", b"two", expect=Expect.ABSENT)
        assert await blobs.get("a") == Blob(b"one", version)

    async def test_a_stale_version_is_refused(self, blobs: BlobStore) -> None:
        first = await blobs.put("a", b"one")
        second = await blobs.put("a", b"two", expect=first)
        with pytest.raises(VersionConflictError):
            await blobs.put("a", b"three", expect=first)
        with pytest.raises(VersionConflictError):
            await blobs.delete("a", expect=first)
        assert await blobs.get("a") == Blob(b"two", second)

    async def test_a_version_of_a_missing_blob_is_refused(self, blobs: BlobStore) -> None:
        version = await blobs.put("a", b"one")
        await blobs.delete("a")
        with pytest.raises(VersionConflictError):
            await blobs.put("a", b"two", expect=version)
        assert await blobs.get("a") is None

    async def test_delete_is_idempotent(self, blobs: BlobStore) -> None:
        version = await blobs.put("a/b", b"one")
        await blobs.delete("a/b", expect=version)
        await blobs.delete("a/b")
        await blobs.delete("a/b", expect=version)
        assert await blobs.get("a/b") is None
        assert [info.key async for info in blobs.list()] == []

    async def test_a_deleted_key_can_be_put_again(self, blobs: BlobStore) -> None:
        await blobs.put("a/b", b"one")
        await blobs.delete("a/b")
        version = await blobs.put("a/b", b"two", expect=Expect.ABSENT)
        assert await blobs.get("a/b") == Blob(b"two", version)

    async def test_the_version_of_an_earlier_life_is_refused(self, blobs: BlobStore) -> None:
        earlier = await blobs.put("a", b"one")
        await blobs.delete("a")
        version = await blobs.put("a", b"two")
        with pytest.raises(VersionConflictError):
            await blobs.put("a", b"three", expect=earlier)
        with pytest.raises(VersionConflictError):
            await blobs.delete("a", expect=earlier)
        assert await blobs.get("a") == Blob(b"two", version)

    async def test_a_list_shows_the_prefix_and_nothing_else(self, blobs: BlobStore) -> None:
        for key in ("a/b/c", "a/d", "ab/e", "f"):
            await blobs.put(key, key.encode())
        assert {info.key: info.size async for info in blobs.list()} == {"a/b/c": 5, "a/d": 3, "ab/e": 4, "f": 1}
        assert all([info.modified.tzinfo async for info in blobs.list()])
        assert {info.key async for info in blobs.list("a/")} == {"a/b/c", "a/d"}
        assert {info.key async for info in blobs.list("a/b/")} == {"a/b/c"}
        assert {info.key async for info in blobs.list("x/")} == set()

    @pytest.mark.parametrize("key", BAD_KEYS)
    async def test_a_key_that_is_no_plain_name_is_refused(self, blobs: BlobStore, key: str) -> None:
        with pytest.raises(InvalidKeyError):
            await blobs.get(key)
        with pytest.raises(InvalidKeyError):
            await blobs.put(key, b"x")
        with pytest.raises(InvalidKeyError):
            await blobs.delete(key)
        with pytest.raises(InvalidKeyError):
            [chunk async for chunk in blobs.stream(key)]

    @pytest.mark.parametrize("prefix", ["a", "/", "../", "a/../", "a//"])
    async def test_a_prefix_that_is_no_folder_is_refused(self, blobs: BlobStore, prefix: str) -> None:
        with pytest.raises(InvalidKeyError):
            [info async for info in blobs.list(prefix)]


async def _chunks(*chunks: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error
