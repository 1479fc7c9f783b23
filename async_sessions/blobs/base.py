"""`BlobStore`: the whole extension point. A backend is these five methods and nothing else is probed for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final, Protocol, TypeAlias, TypeVar

import anyio
import msgspec

from async_sessions.records import MIB

T = TypeVar("T")

CHUNK_SIZE: Final = MIB  # bytes per chunk of a streamed read or write


class Expect(Enum):
    """What a conditional write demands of the key; a version string demands exactly that version."""

    ANY = "any"
    ABSENT = "absent"


Expectation: TypeAlias = str | Expect
BlobData: TypeAlias = bytes | Path | AsyncIterable[bytes]


class Blob(msgspec.Struct, frozen=True):
    """A blob's bytes, and the version that a compare-and-swap names.

    A version that is the SHA-256 of the data, in hexadecimal, is taken as proof that the data is whole: a backend that
    uses it computes it from what it has read, every time.
    """

    data: bytes
    version: str


class BlobInfo(msgspec.Struct, frozen=True):
    """One line of a listing: `size` in bytes, `modified` by the backend's clock."""

    key: str
    size: int
    modified: datetime


class BlobStore(Protocol):
    """Durable, flat key-value storage for bytes with compare-and-swap. Safe to use from many tasks and processes.

    A key is plain names joined by '/'; anything else is an `InvalidKeyError`. Data is never empty. A write that
    returned is durable, and a reader sees a value whole or not at all. Failures are `StorageError`s: after
    `StorageFullError`, `VersionConflictError` and `LockTimeoutError` a write did not happen, after others it may have.

    `Expect.ANY` is for names that one writer writes; on a name that others swap it may overwrite what they never saw.

    Keys under `tmp/` are the backend's own unfinished writes: `list("tmp/")` shows them where there are any, so that
    the sweep can `delete` what a crash left; no other listing does, and `get` and `put` are never called for them.
    """

    async def get(self, key: str) -> Blob | None:
        """The whole blob, or `None` where there is none."""
        ...

    def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        """The bytes from `start` up to but not including `end`, in chunks. `FileNotFoundError` where there is none."""
        ...

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        """Write, durably, and return the new version. `VersionConflictError` unless `expect` holds."""
        ...

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        """Remove. A key that is not there is a success; another version than `expect` is a `VersionConflictError`."""
        ...

    def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        """Every key below `prefix`, which is empty or ends with '/', in no particular order."""
        ...


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """A stream or a list, closed on leaving: who stops reading before its end leaves no file open."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


async def read_all(data: BlobData) -> bytes:
    """The bytes of what `put` was given, for a backend that can't take it in pieces."""
    match data:
        case bytes():
            return data
        case Path():
            return await anyio.Path(data).read_bytes()
        case _:
            return b"".join([chunk async for chunk in data])
