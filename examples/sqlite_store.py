"""A `BlobStore` of your own: blobs in one SQLite file.

async with open_store(SQLiteBlobStore("sessions.db")) as store: ...
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import anyio

from async_sessions import StorageError, VersionConflictError
from async_sessions.blobs import (
    Blob,
    BlobData,
    BlobInfo,
    BlobStore,
    Expect,
    Expectation,
    check_key,
    check_prefix,
    read_all,
)

T = TypeVar("T")

TABLE = "CREATE TABLE IF NOT EXISTS blobs (key TEXT PRIMARY KEY, data BLOB, version TEXT, modified TEXT)"


class SQLiteBlobStore(BlobStore):
    """Durable as SQLite is; a transaction is the compare-and-swap."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    async def get(self, key: str) -> Blob | None:
        check_key(key)
        row = await self._run(lambda db: _first(db, "SELECT data, version FROM blobs WHERE key = ?", key))
        return Blob(*row) if row else None

    async def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = 2**20
    ) -> AsyncIterator[bytes]:
        blob = await self.get(key)
        if blob is None:
            raise FileNotFoundError(key)
        data = blob.data[start:end]
        for offset in range(0, len(data), chunk_size):
            yield data[offset : offset + chunk_size]

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        check_key(key)
        row = key, await read_all(data), uuid.uuid4().hex, datetime.now(UTC).isoformat()

        def swap(db: sqlite3.Connection) -> str:
            _check(db, key, expect)
            db.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, ?)", row)
            return row[2]

        return await self._run(swap)

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        check_key(key)

        def remove(db: sqlite3.Connection) -> None:
            if _first(db, "SELECT 1 FROM blobs WHERE key = ?", key):
                _check(db, key, expect)
                db.execute("DELETE FROM blobs WHERE key = ?", (key,))

        await self._run(remove)

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        check_prefix(prefix)
        query = "SELECT key, length(data), modified FROM blobs WHERE substr(key, 1, ?) = ?"
        for key, size, modified in await self._run(lambda db: db.execute(query, (len(prefix), prefix)).fetchall()):
            yield BlobInfo(key, size, datetime.fromisoformat(modified))

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction() -> T:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            try:
                db.execute("BEGIN IMMEDIATE")
                with db:
                    db.execute(TABLE)
                    return work(db)
            except sqlite3.Error as error:
                raise StorageError(f"SQLite: {error}. What was stored before is untouched.") from error
            finally:
                db.close()

        return await anyio.to_thread.run_sync(transaction)


def _first(db: sqlite3.Connection, query: str, key: str) -> tuple[bytes, str] | None:
    row: tuple[bytes, str] | None = db.execute(query, (key,)).fetchone()
    return row


def _check(db: sqlite3.Connection, key: str, expect: Expectation) -> None:
    if expect is Expect.ANY:
        return
    found = _first(db, "SELECT data, version FROM blobs WHERE key = ?", key)
    if (Expect.ABSENT if found is None else found[1]) != expect:
        raise VersionConflictError(f"{key} was changed by somebody else.")
