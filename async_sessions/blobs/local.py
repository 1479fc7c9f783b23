"""Blobs as files below one folder. POSIX only: durability and locking rest on fsync, rename and flock.

A write is a temporary file under `tmp/`, fsync, rename, fsync of the directories, so a reader sees the old file or the
new one, whole. Compare-and-swap happens under `flock` on one of 256 lock files, which are never unlinked: unlinking one
gives two holders. A version is the SHA-256 of the content. A killed process leaves a file in `tmp/` and no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable
from functools import partial
from io import BufferedReader, BufferedWriter
from itertools import islice
from pathlib import Path
from typing import TypeVar

import anyio
from aiofiles.threadpool import wrap
from anyio.lowlevel import RunVar

from async_sessions import _keys
from async_sessions._tasks import finish_in_thread, in_thread
from async_sessions.blobs import _files
from async_sessions.blobs._files import LOCKS, Folder, if_lock_is_free, in_our_words
from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobData, BlobInfo, BlobStore, Expect, Expectation
from async_sessions.errors import LockTimeoutError

T = TypeVar("T")
F = TypeVar("F", BufferedReader, BufferedWriter)

_THREADS = 16  # worker threads that one store may occupy in one event loop
_LISTED_PER_HOP = 1000


class LocalBlobStore(BlobStore):
    """Blobs below `root`, which is created (0700) at the first use and refused if others can write to it.

    A write that waits longer than `lock_timeout` seconds for another process is a `LockTimeoutError`. `min_free` bytes
    of the device stay free, by default 64 MiB or a twentieth of a small device: a write that would leave less is a
    `StorageFullError`. A write over a given version may use that room, so that on a full device sessions can still be
    cleared and deleted. No file is held open between calls, so there is nothing to close.
    """

    def __init__(self, root: Path | str, *, lock_timeout: float = 10.0, min_free: int | None = None) -> None:
        self.root = Path(root).expanduser().absolute()
        self._lock_timeout = lock_timeout
        self._threads: RunVar[anyio.CapacityLimiter] = RunVar("async_sessions.blobs.local")
        self._opened = False
        self._folder = Folder(self.root, min_free)
        self._writing: set[str] = set()  # temporary files of writes under way: no sweep of ours may take them

    def __repr__(self) -> str:
        return f"LocalBlobStore({str(self.root)!r})"

    async def get(self, key: str) -> Blob | None:
        return await self._hop(partial(_files.read, self._path(key)))

    async def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        async with self._file(partial(_files.reader, self._path(key)), key) as opened:
            file = wrap(opened)
            with in_our_words(self.root):
                await file.seek(start)
                while size := chunk_size if end is None else max(0, min(chunk_size, end - start)):
                    chunk = await file.read(size)
                    if not chunk:
                        return
                    start += len(chunk)
                    yield chunk

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        path = self._path(key)
        name = _keys.TEMPORARY + secrets.token_hex(16)
        temporary = self.root / name
        self._writing.add(name)
        try:
            if isinstance(data, bytes | Path):
                version = await self._hop(
                    partial(self._folder.write, temporary, data, reserved=not isinstance(expect, Expect))
                )
            else:
                version = await self._write_chunks(temporary, data)
            await self._guarded(key, expect, partial(self._folder.publish, temporary, path))
        except BaseException:
            with contextlib.suppress(OSError):
                await finish_in_thread(partial(temporary.unlink, missing_ok=True))
            raise
        finally:
            self._writing.remove(name)
        return version

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        await self._guarded(key, expect, partial(self._folder.remove, self._path(key)))

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        found = self._folder.walk(_keys.check_prefix(prefix))
        while batch := await self._hop(lambda: list(islice(found, _LISTED_PER_HOP))):
            for info in batch:
                if info.key not in self._writing:
                    yield info

    def _path(self, key: str) -> Path:
        return self.root / _keys.check_blob_key(key)

    async def _hop(self, call: Callable[[], T]) -> T:
        """Run `call` in a worker thread; the first one opens the root."""
        try:
            threads = self._threads.get()
        except LookupError:
            self._threads.set(threads := anyio.CapacityLimiter(_THREADS))

        def opened() -> T:
            with in_our_words(self.root):
                if not self._opened:
                    self._folder.open()
                    self._opened = True
                try:
                    return call()
                except FileNotFoundError:
                    self._opened = False  # the root may have been removed: the next call makes it anew
                    raise

        return await in_thread(opened, threads)

    async def _guarded(self, key: str, expect: Expectation, call: Callable[[Expectation], None]) -> None:
        """Run `call`, under the key's lock if it is conditional; a busy lock is waited for without a thread."""
        if expect is Expect.ANY:
            await self._hop(partial(call, expect))
            return
        lock = self.root / LOCKS / hashlib.sha256(key.encode()).hexdigest()[:2]
        give_up = anyio.current_time() + self._lock_timeout
        while not await self._hop(partial(if_lock_is_free, lock, partial(call, expect))):
            if anyio.current_time() >= give_up:
                raise LockTimeoutError(
                    f"Another process has held {lock} for {self._lock_timeout:g} s. "
                    "Look for a stopped process that uses this store, and resume or kill it."
                )
            await anyio.sleep(random.uniform(0.0005, 0.005))

    async def _write_chunks(self, temporary: Path, chunks: AsyncIterable[bytes]) -> str:
        digest = hashlib.sha256()
        async with self._file(partial(_files.create, temporary), temporary.name) as opened:
            file = wrap(opened)
            async for chunk in chunks:  # a failure of theirs is not the storage's
                await self._hop(partial(self._folder.check_room, len(chunk)))
                await self._hop(partial(digest.update, chunk))
                with in_our_words(self.root):
                    await file.write(chunk)
            with in_our_words(self.root):
                await file.flush()
            await self._hop(partial(os.fsync, opened.fileno()))
        return digest.hexdigest()

    @contextlib.asynccontextmanager
    async def _file(self, make: Callable[[], F | None], name: str) -> AsyncIterator[F]:
        """The file that `make` opens in a thread; it is closed however a cancellation falls.

        `FileNotFoundError`, of `name`, where it opens none.
        """
        files: list[F] = []

        def keep() -> None:
            if (file := make()) is not None:
                files.append(file)

        try:
            await self._hop(keep)
            if not files:
                raise FileNotFoundError(name)
            yield files[0]
        finally:
            with in_our_words(self.root):
                for file in files:
                    await finish_in_thread(file.close)
