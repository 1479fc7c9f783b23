from __future__ import annotations

import traceback
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import count, cycle
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from PIL import Image

from async_sessions import (
    BlobInfo,
    BlobStore,
    LocalBlobStore,
    MemoryBlobStore,
    StorageError,
    StorageFullError,
    open_store,
)
from async_sessions.blobs.base import closing
from async_sessions.testing.blobs import BlobStoreTests
from async_sessions.testing.faults import (
    OPERATIONS,
    CountingBlobStore,
    FailingBlobStore,
    Operation,
    SlowBlobStore,
    WrappedBlobStore,
)

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


class WrappedTests(BlobStoreTests):
    async def raw_get(self, blobs: WrappedBlobStore, key: str) -> bytes | None:
        return await super().raw_get(blobs.inner, key)

    async def raw_put(self, blobs: WrappedBlobStore, key: str, data: bytes) -> None:
        await blobs.inner.put(key, data)


class TestSlowBlobStore(WrappedTests):
    @pytest.fixture
    def blobs(self) -> SlowBlobStore:
        delays = cycle((0, 0.001, 0.0005))  # so that calls overtake each other
        return SlowBlobStore(MemoryBlobStore(), delay=lambda: next(delays))


class TestFailingBlobStoreAfterItsFailure(WrappedTests):
    @pytest.fixture
    async def blobs(self) -> AsyncIterator[FailingBlobStore]:
        blobs = FailingBlobStore(MemoryBlobStore())
        with pytest.raises(StorageError):
            await blobs.put("a", b"never")
        yield blobs
        assert blobs.failures == 1


class TestCountingBlobStore(WrappedTests):
    @pytest.fixture
    def blobs(self) -> CountingBlobStore:
        return CountingBlobStore(MemoryBlobStore())


@pytest.mark.parametrize("operation", ["stream", "list"])
async def test_who_stops_reading_leaves_no_file_open(operation: str, tmp_path: Path) -> None:
    blobs = WrappedBlobStore(_Noting(tmp_path / "root"))
    for key in ("a/b", "a/c"):
        await blobs.put(key, b"one")
    items = blobs.stream("a/b", chunk_size=1) if operation == "stream" else blobs.list()
    assert isinstance(items, AsyncGenerator)
    await anext(items)
    await items.aclose()
    assert isinstance(blobs.inner, _Noting)
    assert blobs.inner.ended == [operation]


class _Noting(LocalBlobStore):
    """Notes which of its streams and lists have ended."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ended: list[str] = []

    async def stream(self, *arguments: Any, **options: Any) -> AsyncIterator[bytes]:
        try:
            async with closing(super().stream(*arguments, **options)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self.ended.append("stream")

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        try:
            async for info in super().list(prefix):
                yield info
        finally:
            self.ended.append("list")


async def use(blobs: BlobStore, operation: Operation, key: str = "a/b") -> None:
    match operation:
        case "get":
            await blobs.get(key)
        case "put":
            await blobs.put(key, b"data")
        case "delete":
            await blobs.delete(key)
        case "stream":
            [chunk async for chunk in blobs.stream(key)]
        case "list":
            [info async for info in blobs.list("a/")]


async def test_a_slow_put_has_happened_before_its_caller_knows() -> None:
    delays = iter((0, 3600))
    inner = MemoryBlobStore()
    async with anyio.create_task_group() as group:
        group.start_soon(SlowBlobStore(inner, delay=lambda: next(delays)).put, "a", b"one")
        while await inner.get("a") is None:
            await checkpoint()
        group.cancel_scope.cancel()
    assert list(delays) == []


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("after_effect", [False, True])
async def test_an_operation_fails_once_or_for_good(operation: Operation, after_effect: bool) -> None:
    inner = MemoryBlobStore()
    await inner.put("a/b", b"data")
    for for_good, expected in ((False, [True, False, True, True]), (True, [True, False, False, False])):
        blobs = FailingBlobStore(inner, at=2, for_good=for_good, after_effect=after_effect, operations=[operation])
        succeeded = []
        for _ in expected:
            try:
                await use(blobs, operation)
            except StorageError:
                succeeded.append(False)
            else:
                succeeded.append(True)
        assert succeeded == expected
        assert blobs.failures == expected.count(False)


async def test_the_effect_of_a_failed_write_is_there_or_not_as_the_test_says() -> None:
    for after_effect, left in ((False, None), (True, b"new")):
        inner = MemoryBlobStore()
        blobs = FailingBlobStore(inner, error=StorageFullError("No room."), after_effect=after_effect)
        with pytest.raises(StorageFullError, match="No room"):
            await blobs.put("a", b"new")
        found = await inner.get("a")
        assert (found and found.data) == left


async def test_only_the_operations_and_keys_that_are_named_fail() -> None:
    blobs = FailingBlobStore(MemoryBlobStore(), operations=["put"], prefix="manifests/", for_good=True)
    await blobs.put("blobs/a", b"data")
    assert await blobs.get("manifests/a") is None
    with pytest.raises(StorageError):
        await blobs.put("manifests/a", b"data")


async def test_a_failing_store_counts_anew_when_it_is_armed() -> None:
    blobs = FailingBlobStore(MemoryBlobStore(), at=None)
    for _ in range(3):
        await blobs.get("a")
    blobs.arm(2)
    await blobs.get("a")
    with pytest.raises(StorageError):
        await blobs.get("a")


async def test_a_stream_that_fails_after_its_effect_breaks_off_before_its_end() -> None:
    inner = MemoryBlobStore()
    await inner.put("a", b"0123456789")
    chunks: list[bytes] = []
    with pytest.raises(StorageError):  # noqa: PT012 - what came before it is looked at
        async for chunk in FailingBlobStore(inner, after_effect=True).stream("a", chunk_size=4):
            chunks.append(chunk)  # noqa: PERF401 - the same
    assert chunks == [b"0123", b"4567", b"89"]


async def test_each_failure_has_a_traceback_of_its_own() -> None:
    blobs = FailingBlobStore(MemoryBlobStore(), for_good=True)
    lengths = set()
    for _ in range(3):
        with pytest.raises(StorageError) as caught:
            await blobs.get("a")
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(lengths) == 1


async def test_calls_are_counted_by_operation_and_by_prefix() -> None:
    blobs = CountingBlobStore(MemoryBlobStore())
    for operation in OPERATIONS:
        with pytest.raises(FileNotFoundError) if operation == "stream" else anyio.CancelScope():
            await use(blobs, operation, "b/c")
    await blobs.put("a/b", b"data")
    assert blobs.count() == 6
    assert blobs.count("put") == 2
    assert blobs.count("put", "delete", prefix="b/") == 2
    assert blobs.count(prefix="a/") == 2
    assert blobs.calls["put", "a/b"] == 1


@pytest.mark.parametrize("after_effect", [False, True])
async def test_a_store_that_fails_anywhere_leaves_the_old_image_or_the_new_one(after_effect: bool) -> None:
    for at in count(1):
        blobs = FailingBlobStore(MemoryBlobStore(), at=None, after_effect=after_effect)
        async with open_store(blobs, cleanup_interval=None) as store:
            session = await store.create_session()
            await session.store_image(RED, "start")
            blobs.arm(at)
            try:
                await session.store_image(BLUE, "start")
            except StorageError:
                expected = [RED.size, BLUE.size] if after_effect else [RED.size]
            else:
                expected = [BLUE.size]
            blobs.arm(None)
            assert (await session.retrieve_image("start")).size in expected
            if not blobs.failures:
                break
    assert at > 3
