"""Blobs in this process's memory: for tests and for apps whose images need not outlive them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from async_sessions import _keys
from async_sessions._tasks import utc_now
from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobData, BlobInfo, BlobStore, Expect, Expectation, read_all
from async_sessions.errors import VersionConflictError

if TYPE_CHECKING:
    from datetime import datetime


class MemoryBlobStore(BlobStore):
    """A dict with versions. "Durable" means: as long as the object lives."""

    def __init__(self) -> None:
        self._blobs: dict[str, tuple[Blob, datetime]] = {}
        self._versions = itertools.count(1)

    def __repr__(self) -> str:
        return f"MemoryBlobStore({len(self._blobs)} blobs)"

    async def get(self, key: str) -> Blob | None:
        found = self._blobs.get(_keys.check_blob_key(key))
        return found[0] if found else None

    async def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        found = await self.get(key)
        if found is None:
            raise FileNotFoundError(key)
        view = memoryview(found.data)[start:end]
        for offset in range(0, len(view), chunk_size):
            yield bytes(view[offset : offset + chunk_size])

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        _keys.check_blob_key(key)
        value = await read_all(data)
        # From here to the end nothing is awaited: that is the compare-and-swap.
        self._check(key, expect)
        blob = Blob(value, str(next(self._versions)))
        self._blobs[key] = blob, utc_now()
        return blob.version

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        if _keys.check_blob_key(key) in self._blobs:
            self._check(key, expect)
            del self._blobs[key]

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        _keys.check_prefix(prefix)
        for key, (blob, modified) in list(self._blobs.items()):
            if key.startswith(prefix):
                yield BlobInfo(key, len(blob.data), modified)

    def _check(self, key: str, expect: Expectation) -> None:
        found = self._blobs.get(key)
        if expect is Expect.ANY or (found is None and expect is Expect.ABSENT):
            return
        if found is None or found[0].version != expect:
            raise VersionConflictError(f"{key} was changed by somebody else.")
