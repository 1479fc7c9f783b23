from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio

from async_sessions import Blob, BlobInfo, BlobStore, Expect, MemoryBlobStore, SessionStore, StorageFullError
from async_sessions.blobs.base import CHUNK_SIZE, BlobData, Expectation


class FaultyBlobStore(BlobStore):
    """A memory store whose next puts fail or wait, as the test says."""

    def __init__(self) -> None:
        self.inner = MemoryBlobStore()
        self.full_for: Callable[[str], bool] = lambda key: False
        self.before_put: Callable[[str], anyio.Event | None] = lambda key: None
        self.before_get: Callable[[str], anyio.Event | None] = lambda key: None
        self.putting = anyio.Event()
        self.getting = anyio.Event()

    async def get(self, key: str) -> Blob | None:
        if (gate := self.before_get(key)) is not None:
            self.getting.set()
            await gate.wait()
        await anyio.lowlevel.checkpoint()
        return await self.inner.get(key)

    def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        return self.inner.stream(key, start=start, end=end, chunk_size=chunk_size)

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        if (gate := self.before_put(key)) is not None:
            self.putting.set()
            await gate.wait()
        await anyio.lowlevel.checkpoint()
        if self.full_for(key):
            raise StorageFullError("No room is left.")
        return await self.inner.put(key, data, expect=expect)

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        await anyio.lowlevel.checkpoint()
        await self.inner.delete(key, expect=expect)

    def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        return self.inner.list(prefix)


async def keys_of(blobs: BlobStore, prefix: str = "") -> set[str]:
    return {info.key async for info in blobs.list(prefix)}


def files_below(root: Path, *names: str) -> list[Path]:
    return sorted(path for path in root.joinpath(*names).rglob("*") if path.is_file())


async def named_blobs(store: SessionStore) -> set[str]:
    """What the manifests name: all that should be below `blobs/`."""
    manifests = store._context().manifests
    keys = [key.rpartition("/")[2].removesuffix(".json") for key in await keys_of(store.blobs, "manifests/")]
    found = [await manifests.read(key) for key in keys]
    return {name for manifest in found if manifest is not None for name in manifest.named_blobs()}


def open_files() -> list[str]:
    """What this process holds open, by path."""
    found = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            found.append(os.readlink(entry.path))
        except FileNotFoundError:
            continue  # that of the listing itself
    return found
