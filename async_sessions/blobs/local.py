"""Blobs as files below one folder. POSIX only: durability and locking rest on fsync, rename and flock.

A write is a temporary file under `tmp/`, fsync, rename, fsync of the directories, so a reader sees the old file or the
new one, whole. Compare-and-swap happens under `flock` on one of 256 lock files, which are never unlinked: unlinking one
gives two holders. A version is the SHA-256 of the content. A killed process leaves a file in `tmp/` and no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import secrets
import stat
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import aiofiles
import anyio
from anyio.lowlevel import RunVar

from async_sessions import _keys
from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobData, BlobInfo, BlobStore, Expect, Expectation
from async_sessions.errors import (
    InvalidKeyError,
    LockTimeoutError,
    StorageError,
    StorageFullError,
    VersionConflictError,
)

T = TypeVar("T")

_LOCKS = "locks"
_THREADS = 16  # worker threads that one store may occupy in one event loop
_LISTED_PER_HOP = 1000
_OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH


class LocalBlobStore(BlobStore):
    """Blobs below `root`, which is created (0700) at the first use and refused if others can write to it.

    A write that waits longer than `lock_timeout` seconds for another process raises `LockTimeoutError`. No file is held
    open between calls, so there is nothing to close.
    """

    def __init__(self, root: Path | str, *, lock_timeout: float = 10.0) -> None:
        self.root = Path(root).expanduser().absolute()
        self._lock_timeout = lock_timeout
        self._threads: RunVar[anyio.CapacityLimiter] = RunVar("async_sessions.blobs.local")
        self._opened = False
        self._durable: dict[Path, int] = {}  # directories, by inode, whose entry in their parent was synced

    def __repr__(self) -> str:
        return f"LocalBlobStore({str(self.root)!r})"

    async def get(self, key: str) -> Blob | None:
        return await self._hop(partial(_read, self._path(key)))

    async def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        path = self._path(key)
        if not await self._hop(path.is_file):
            raise FileNotFoundError(key)
        with _in_our_words(self.root):
            async with aiofiles.open(path, "rb") as file:
                await file.seek(start)
                while size := chunk_size if end is None else max(0, min(chunk_size, end - start)):
                    chunk = await file.read(size)
                    if not chunk:
                        return
                    start += len(chunk)
                    yield chunk

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        path = self._path(key)
        temporary = self.root / _keys.TEMPORARY / secrets.token_hex(16)
        try:
            if isinstance(data, bytes | Path):
                version = await self._hop(partial(_write, temporary, data))
            else:
                version = await self._write_chunks(temporary, data)
            await self._guarded(key, expect, partial(self._publish, temporary, path))
        except BaseException:
            with anyio.CancelScope(shield=True), contextlib.suppress(StorageError):
                await self._hop(partial(temporary.unlink, missing_ok=True))
            raise
        return version

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        await self._guarded(key, expect, partial(_remove, self._path(key), self.root))

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        found = _walk(self.root, _keys.check_prefix(prefix))
        while batch := await self._hop(lambda: list(islice(found, _LISTED_PER_HOP))):
            for info in batch:
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
            with _in_our_words(self.root):
                if not self._opened:
                    _open_root(self.root)
                    self._opened = True
                try:
                    return call()
                except FileNotFoundError:
                    self._opened = False  # the root may have been removed: the next call makes it anew
                    raise

        return await anyio.to_thread.run_sync(opened, limiter=threads)

    async def _guarded(self, key: str, expect: Expectation, call: Callable[[Expectation], None]) -> None:
        """Run `call`, under the key's lock if it is conditional; a busy lock is waited for without a thread."""
        if expect is Expect.ANY:
            await self._hop(partial(call, expect))
            return
        lock = self.root / _LOCKS / hashlib.sha256(key.encode()).hexdigest()[:2]
        give_up = anyio.current_time() + self._lock_timeout
        while not await self._hop(partial(_if_lock_is_free, lock, partial(call, expect))):
            if anyio.current_time() >= give_up:
                raise LockTimeoutError(
                    f"Another process has held {lock} for {self._lock_timeout:g} s. "
                    "Look for a stopped process that uses this store, and resume or kill it."
                )
            await anyio.sleep(random.uniform(0.0005, 0.005))

    def _publish(self, temporary: Path, path: Path, expect: Expectation) -> None:
        _check(path, expect)
        while True:
            try:
                self._make_durable(path.parent)
                os.replace(temporary, path)
                break
            except FileNotFoundError:
                if not temporary.exists():
                    raise
                # a delete in another process removed the directory, which was empty until now
        try:
            _sync_directory(path.parent)
            _sync_directory(temporary.parent)
        except OSError as error:  # not a StorageFullError, whatever its number: the write is visible, if not durable
            message = f"{self.root}: {error.strerror or error}. The last write may be lost in a power cut."
            raise StorageError(message) from error

    def _make_durable(self, directory: Path) -> None:
        """Make `directory` where it is missing, and its entry durable, whoever made it, up to the root."""
        if directory == self.root:
            return
        try:
            if self._durable.get(directory) == directory.stat().st_ino:
                return
        except FileNotFoundError:
            pass
        self._make_durable(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        inode = directory.stat().st_ino
        _sync_directory(directory.parent)
        self._durable[directory] = inode

    async def _write_chunks(self, temporary: Path, chunks: AsyncIterable[bytes]) -> str:
        digest = hashlib.sha256()
        fd = await self._hop(partial(_create, temporary))
        with _in_our_words(self.root):
            file = await aiofiles.open(fd, "wb")
        try:
            async for chunk in chunks:  # a failure of theirs is not the storage's
                await self._hop(partial(digest.update, chunk))
                with _in_our_words(self.root):
                    await file.write(chunk)
            with _in_our_words(self.root):
                await file.flush()
            await self._hop(partial(os.fsync, fd))
        finally:
            with anyio.CancelScope(shield=True), _in_our_words(self.root):
                await file.close()
        return digest.hexdigest()


@contextlib.contextmanager
def _in_our_words(root: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"No room is left for {root}. Free some space or raise the quota; what is stored is untouched."
            raise StorageFullError(message) from error
        raise StorageError(f"{root}: {error.strerror or error}. What was stored before is untouched.") from error


def _open_root(root: Path) -> None:
    _make_directories(root, Path(root.anchor))
    found = root.stat()
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_CAN_WRITE:
        raise StorageError(
            f"{root} belongs to another user or can be written by others. "
            f"Give it to the user that runs this process and run: chmod 700 {root}"
        )
    for name in (_LOCKS, _keys.TEMPORARY):
        _make_directories(root / name, root)


def _make_directories(path: Path, above: Path) -> None:
    """Make `path` durable, up to `above`, which exists; every new directory is 0700."""
    missing = []
    while path != above and not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> Blob | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return Blob(data, hashlib.sha256(data).hexdigest())


def _create(temporary: Path) -> int:
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _write(temporary: Path, data: bytes | Path) -> str:
    with open(_create(temporary), "wb") as file:
        if isinstance(data, bytes):
            file.write(data)
            version = hashlib.sha256(data).hexdigest()
        else:
            digest = hashlib.sha256()
            with data.open("rb") as source:
                while chunk := source.read(CHUNK_SIZE):
                    digest.update(chunk)
                    file.write(chunk)
            version = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return version


def _if_lock_is_free(lock: Path, call: Callable[[], None]) -> bool:
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        call()
        return True
    finally:
        os.close(fd)


def _check(path: Path, expect: Expectation) -> None:
    found = None if expect is Expect.ANY else _read(path)
    if expect is Expect.ANY or (found is None and expect is Expect.ABSENT):
        return
    if found is None or found.version != expect:
        raise VersionConflictError(f"{path.name} was changed by somebody else.")


def _remove(path: Path, root: Path, expect: Expectation) -> None:
    if not path.exists():
        return
    _check(path, expect)
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _sync_directory(path.parent)
    if path.parent.parent != root:
        with contextlib.suppress(OSError):  # not empty, or removed by somebody else: both are fine
            path.parent.rmdir()


def _is_key(name: str) -> bool:
    try:
        _keys.check_blob_key(name)
    except InvalidKeyError:
        return False
    return True


def _walk(root: Path, prefix: str) -> Iterator[BlobInfo]:
    todo = [prefix]
    while todo:
        below = todo.pop()
        try:
            entries = list(os.scandir(root / below))
        except FileNotFoundError:
            continue
        for entry in entries:
            key = below + entry.name
            if entry.is_dir(follow_symlinks=False):
                if below or entry.name not in (_LOCKS, _keys.TEMPORARY[:-1]):
                    todo.append(f"{key}/")
                continue
            if not _is_key(key):
                continue  # .DS_Store, .nfs0001: not ours
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                yield BlobInfo(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))
