"""Blob stores around a blob store: one that is slow, one that fails, one that counts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import anyio

from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobInfo, BlobStore, Expect, closing
from async_sessions.errors import StorageError

if TYPE_CHECKING:
    from async_sessions.blobs.base import BlobData, Expectation

Operation: TypeAlias = Literal["get", "stream", "put", "delete", "list"]
OPERATIONS: Final[tuple[Operation, ...]] = ("get", "stream", "put", "delete", "list")


class WrappedBlobStore(BlobStore):
    """Passes every operation on to `inner`. Override `around` for a fault of your own."""

    def __init__(self, inner: BlobStore) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        """Entered around each operation; `key` is the prefix of a `list`.

        What it raises before its `yield` keeps the operation from happening; what it raises after it hides that it did.
        A stream or a list has happened when its last item was taken.
        """
        yield

    async def get(self, key: str) -> Blob | None:
        async with self.around("get", key):
            return await self.inner.get(key)

    async def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        chunks = self.inner.stream(key, start=start, end=end, chunk_size=chunk_size)
        async with self.around("stream", key), closing(chunks):
            async for chunk in chunks:
                yield chunk

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        async with self.around("put", key):
            return await self.inner.put(key, data, expect=expect)

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        async with self.around("delete", key):
            await self.inner.delete(key, expect=expect)

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        infos = self.inner.list(prefix)
        async with self.around("list", prefix), closing(infos):
            async for info in infos:
                yield info


class SlowBlobStore(WrappedBlobStore):
    """Waits `delay` seconds, or what `delay()` says, before each operation and again after it.

    Between the two waits a write has happened and its caller doesn't know: cancel it there.
    """

    def __init__(self, inner: BlobStore, delay: float | Callable[[], float] = 0.01) -> None:
        super().__init__(inner)
        self._delay = delay if callable(delay) else lambda: delay

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        await anyio.sleep(self._delay())
        yield
        await anyio.sleep(self._delay())


class FailingBlobStore(WrappedBlobStore):
    """Raises a copy of `error` in the `at`-th operation, counted from 1, or from it on `for_good`.

    Only the `operations` on keys that start with `prefix` are counted, and fail. With `after_effect` the operation is
    carried out first, as where a connection breaks before the answer: a write may have happened though it failed.
    `arm` counts anew; `at=None` lets nothing fail until then. `failures` tells how many did, so that a test can try
    every `at` until one is never reached.
    """

    def __init__(
        self,
        inner: BlobStore,
        *,
        at: int | None = 1,
        error: Exception | None = None,
        operations: Collection[Operation] = OPERATIONS,
        prefix: str = "",
        for_good: bool = False,
        after_effect: bool = False,
    ) -> None:
        super().__init__(inner)
        self.failures = 0
        self._error = error or StorageError("The storage failed, as the test wants it.")
        self._operations = frozenset(operations)
        self._prefix = prefix
        self._for_good = for_good
        self._after_effect = after_effect
        self.arm(at)

    def arm(self, at: int | None = 1) -> None:
        """Let the `at`-th operation from now on fail, or none."""
        self._at = at
        self._counted = 0

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        fails = operation in self._operations and key.startswith(self._prefix) and self._is_next()
        if fails and not self._after_effect:
            self._fail()
        yield
        if fails:
            self._fail()

    def _is_next(self) -> bool:
        self._counted += 1
        return self._at is not None and (self._counted == self._at or (self._for_good and self._counted > self._at))

    def _fail(self) -> None:
        self.failures += 1
        raise copy.copy(self._error)  # a copy, since each raise adds to an exception's traceback


class CountingBlobStore(WrappedBlobStore):
    """Counts what is asked of `inner` in `calls`, by operation and key; a call that fails counts too."""

    def __init__(self, inner: BlobStore) -> None:
        super().__init__(inner)
        self.calls: Counter[tuple[Operation, str]] = Counter()

    def count(self, *operations: Operation, prefix: str = "") -> int:
        """How many calls there were of `operations`, or of any, on keys that start with `prefix`."""
        return sum(
            number
            for (operation, key), number in self.calls.items()
            if operation in (operations or OPERATIONS) and key.startswith(prefix)
        )

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        self.calls[operation, key] += 1
        yield
