"""The conformance suite finds what is wrong: each store here breaks one promise, and one test says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count, islice
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from async_sessions.blobs import Blob, BlobData, BlobInfo, Expect, Expectation, MemoryBlobStore, read_all
from async_sessions.testing.blobs import BlobStoreTests

pytestmark = pytest.mark.anyio


class Caching(MemoryBlobStore):
    """Believes what it has read once."""

    def __init__(self) -> None:
        super().__init__()
        self.medium = MemoryBlobStore()

    async def get(self, key: str) -> Blob | None:
        return await super().get(key) or await self.medium.get(key)

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        data = await read_all(data)
        await self.medium.put(key, data)
        return await super().put(key, data, expect=expect)


class WriteBehind(Caching):
    """Acknowledges what it has not written."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        return await MemoryBlobStore.put(self, key, data, expect=expect)


class Tearing(MemoryBlobStore):
    """Writes in place."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        data = await read_all(data)
        if key in self._blobs:
            old, modified = self._blobs[key]
            self._blobs[key] = Blob(data[: len(data) // 2] + old.data[len(data) // 2 :], old.version), modified
            await checkpoint()
        return await super().put(key, data, expect=Expect.ANY)


class CheckThenAct(MemoryBlobStore):
    """Compares, then swaps."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        self._check(key, expect)
        await checkpoint()
        return await super().put(key, data)


class Forgetful(MemoryBlobStore):
    """Counts the versions of a key from one again after a delete."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        if key not in self._blobs:
            self._versions = count(1)
        return await super().put(key, data, expect=expect)


class Littering(MemoryBlobStore):
    """Leaves its unfinished writes behind."""

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        temporary = f"tmp/{key.replace('/', '.')}"
        await super().put(temporary, b"half")
        await checkpoint()
        version = await super().put(key, data, expect=expect)
        await super().delete(temporary)
        return version


class Paging(MemoryBlobStore):
    """Lists page by page, and counts its place from the start each time."""

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        place = 0
        while page := list(islice(sorted(key for key in self._blobs if key.startswith(prefix)), place, place + 2)):
            for key in page:
                blob, modified = self._blobs[key]
                yield BlobInfo(key, len(blob.data), modified)
            place += 2
            await checkpoint()


class SecondDoorTests(BlobStoreTests):
    async def raw_get(self, blobs: Caching, key: str) -> bytes | None:
        return await super().raw_get(blobs.medium, key)

    async def raw_put(self, blobs: Caching, key: str, data: bytes) -> None:
        await blobs.medium.put(key, data)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Caching, "test_what_another_process_writes_is_read_and_not_overwritten"),
        (WriteBehind, "test_what_was_put_is_on_the_medium"),
        (Tearing, "test_a_reader_never_sees_half_a_write"),
        (CheckThenAct, "test_racing_creates_have_one_winner"),
        (CheckThenAct, "test_racing_increments_lose_nothing"),
        (Forgetful, "test_the_version_of_an_earlier_life_is_refused"),
        (Littering, "test_a_put_cancelled_in_its_source_leaves_the_old_blob"),
        (Littering, "test_a_cancelled_put_or_delete_has_happened_or_has_not"),
        (Paging, "test_a_list_during_writes_shows_what_stays"),
    ],
)
async def test_a_broken_promise_fails_the_test_of_it(broken: type[Any], test: str) -> None:
    suite = SecondDoorTests() if issubclass(broken, Caching) else BlobStoreTests()
    with pytest.raises((AssertionError, ExceptionGroup, pytest.fail.Exception)):
        await getattr(suite, test)(broken())
