from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel

from async_sessions import BlobStore, MemoryBlobStore, SessionStore, StorageError, StorageFullError
from async_sessions.testing.faults import Operation, WrappedBlobStore


class FaultyBlobStore(WrappedBlobStore):
    """A memory store whose next puts fail or wait, as the test says."""

    def __init__(self) -> None:
        super().__init__(MemoryBlobStore())
        self.full_for: Callable[[str], bool] = lambda key: False
        self.error: type[StorageError] = StorageFullError  # of the puts that fail
        self.before_put: Callable[[str], anyio.Event | None] = lambda key: None
        self.before_get: Callable[[str], anyio.Event | None] = lambda key: None
        self.putting = anyio.Event()
        self.getting = anyio.Event()

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        match operation:
            case "get" if (gate := self.before_get(key)) is not None:
                self.getting.set()
                await gate.wait()
            case "put" if (gate := self.before_put(key)) is not None:
                self.putting.set()
                await gate.wait()
        await anyio.lowlevel.checkpoint()
        if operation == "put" and self.full_for(key):
            raise self.error("No room is left.")
        yield


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
