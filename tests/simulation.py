"""Blob storage and a clock in a `FuzzLoop`'s virtual time, and what must be true of a history of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import NamedTuple

import anyio

from async_sessions import Blob, BlobInfo, BlobStore, Expect, MemoryBlobStore, StorageError
from async_sessions.blobs.base import CHUNK_SIZE, BlobData, Expectation


class VirtualClock:
    """The loop's time, on a day of its own."""

    def __init__(self, start: datetime = datetime(2030, 1, 1, tzinfo=UTC)) -> None:
        self._start = start

    def __call__(self) -> datetime:
        return self._start + timedelta(seconds=asyncio.get_running_loop().time())


class VirtualBlobStore(BlobStore):
    """A memory store whose calls take their time before and after they happen, as over a network; several
    `SessionStore`s on it are several processes. Blobs have the age that `clock` gives them.
    """

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._inner = MemoryBlobStore()
        self._modified: dict[str, datetime] = {}
        self.fails_for: Callable[[str], bool] = lambda key: False

    async def get(self, key: str) -> Blob | None:
        await anyio.lowlevel.checkpoint()
        found = await self._inner.get(key)
        await anyio.lowlevel.checkpoint()
        return found

    def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        return self._inner.stream(key, start=start, end=end, chunk_size=chunk_size)

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        await anyio.lowlevel.checkpoint()
        if self.fails_for(key):
            raise StorageError("The connection was lost.")
        version = await self._inner.put(key, data, expect=expect)
        self._modified[key] = self._clock()
        await anyio.lowlevel.checkpoint()
        return version

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        await anyio.lowlevel.checkpoint()
        await self._inner.delete(key, expect=expect)
        await anyio.lowlevel.checkpoint()

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        await anyio.lowlevel.checkpoint()
        for info in [info async for info in self._inner.list(prefix)]:
            yield BlobInfo(info.key, info.size, self._modified[info.key])
            await anyio.lowlevel.checkpoint()


class Call(NamedTuple):
    """One call on a slot, from when it was made to when it returned. `None` is the empty slot."""

    kind: str  # "write" or "read"
    value: int | None
    start: float
    end: float


def linearizable(history: Sequence[Call]) -> bool:
    """Whether each call can have happened at one instant between its start and its end: Wing and Gong's search."""

    @cache
    def possible(left: frozenset[Call], value: int | None) -> bool:
        if not left:
            return True
        first_end = min(call.end for call in left)
        for call in left:
            if call.start <= first_end and (call.kind == "write" or call.value == value):
                after = call.value if call.kind == "write" else value
                if possible(left - {call}, after):
                    return True
        return False

    return possible(frozenset(history), None)
