"""What `LocalBlobStore` does with files: sync code, for a worker thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from async_sessions import _keys
from async_sessions.blobs.base import CHUNK_SIZE, Blob, BlobInfo, Expect, Expectation
from async_sessions.errors import StorageError, StorageFullError, VersionConflictError
from async_sessions.records import MIB

if TYPE_CHECKING:
    from io import BufferedReader, BufferedWriter

LOCKS = "locks"
_MIN_FREE = 64 * MIB
_MIN_INODES = 1024
_FEW_INODES = 8  # what writing one blob may take, with its directories and locks, and a manifest after it
_SHARE = 20  # of a small device, one part in so many is kept free
_OTHERS_CAN_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Folder:
    """The files below `root`. Knows which directories are durable, so that each is synced once."""

    def __init__(self, root: Path, min_free: int | None) -> None:
        self.root = root
        self._min_free = min_free
        # Directories whose entry in their parent was synced, as they were after our last change: the inode alone may by
        # now be that of one that another process removed and a third is just making anew.
        self._durable: dict[Path, tuple[int, int]] = {}

    def open(self) -> None:
        """Make the root where it is missing; refuse one that others can write to."""
        root = self.root
        _make_directories(root, Path(root.anchor))
        found = root.stat()
        if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_CAN_WRITE:
            raise StorageError(
                f"{root} belongs to another user or can be written by others. "
                f"Give it to the user that runs this process and run: chmod 700 {root}"
            )
        for name in (LOCKS, _keys.TEMPORARY):
            _make_directories(root / name, root)

    def check_room(self, size: int) -> None:
        """`StorageFullError` if a file of `size` bytes leaves less than `min_free` on the device, or too few inodes."""
        device = os.statvfs(self.root)
        least = self._min_free
        if least is None:
            least = min(_MIN_FREE, device.f_blocks * device.f_frsize // _SHARE)
        inodes = min(_MIN_INODES, max(_FEW_INODES, device.f_files // _SHARE))
        counted = device.f_files > 0  # some file systems have no fixed number of inodes
        if device.f_bavail * device.f_frsize - size < least or (counted and device.f_favail < inodes):
            raise _full(self.root)

    def write(self, temporary: Path, data: bytes | Path, *, reserved: bool) -> str:
        """Write a new file, durably; `reserved`: into the room that is kept free. Returns the SHA-256 of its bytes."""
        if not reserved:
            self.check_room(len(data) if isinstance(data, bytes) else data.stat().st_size)
        return write(temporary, data)

    def publish(self, temporary: Path, path: Path, expect: Expectation) -> None:
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
        with self._done_already("write may be lost"):
            self._sync(path.parent)
            _sync_directory(temporary.parent)

    def _make_durable(self, directory: Path) -> None:
        """Make `directory` where it is missing, and its entry durable, whoever made it, up to the root."""
        if directory == self.root:
            return
        try:
            if self._durable.get(directory) == _as_it_is(directory.stat()):
                return
        except FileNotFoundError:
            pass
        self._make_durable(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)
        made = _as_it_is(directory.stat())
        self._sync(directory.parent)
        self._durable[directory] = made

    def _sync(self, directory: Path) -> None:
        """Sync a directory that we changed, and remember it as it is now."""
        now = _sync_directory(directory)
        if (known := self._durable.get(directory)) and known[0] == now[0]:
            self._durable[directory] = now

    def remove(self, path: Path, expect: Expectation) -> None:
        if not path.exists():
            return
        _check(path, expect)
        path.unlink(missing_ok=True)
        with self._done_already("removal may be undone"), contextlib.suppress(FileNotFoundError):
            _sync_directory(path.parent)
        if path.parent.parent != self.root:
            with contextlib.suppress(OSError):  # not empty, or removed by somebody else: both are fine
                path.parent.rmdir()
                self._durable.pop(path.parent, None)

    @contextlib.contextmanager
    def _done_already(self, what: str) -> Iterator[None]:
        """A failure here is no `StorageFullError`, whatever its number: the change is visible, if not durable."""
        try:
            yield
        except OSError as error:
            message = f"{self.root}: {error.strerror or error}. The last {what} in a power cut."
            raise StorageError(message) from error

    def walk(self, prefix: str) -> Iterator[BlobInfo]:
        todo = [prefix]
        while todo:
            below = todo.pop()
            try:
                entries = list(os.scandir(self.root / below))
            except FileNotFoundError:
                continue
            for entry in entries:
                if not _keys.is_segment(entry.name):
                    continue  # .DS_Store, .nfs0001: not ours
                key = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    if below or entry.name not in (LOCKS, _keys.TEMPORARY[:-1]):
                        todo.append(f"{key}/")
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield BlobInfo(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


@contextlib.contextmanager
def in_our_words(root: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(root) from error
        raise StorageError(f"{root}: {error.strerror or error}. What was stored before is untouched.") from error


def _full(root: Path) -> StorageFullError:
    return StorageFullError(
        f"No room is left for {root}. Free some space or raise the quota; what is stored is untouched."
    )


def read(path: Path) -> Blob | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return Blob(data, hashlib.sha256(data).hexdigest())


def reader(path: Path) -> BufferedReader | None:
    try:
        return path.open("rb")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def create(temporary: Path) -> BufferedWriter:
    return open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def write(temporary: Path, data: bytes | Path) -> str:
    with create(temporary) as file:
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


def if_lock_is_free(lock: Path, call: Callable[[], None]) -> bool:
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


def _make_directories(path: Path, above: Path) -> None:
    """Make `path` durable, up to `above`, which exists; every new directory is 0700."""
    missing = []
    while path != above and not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory.parent)


def _sync_directory(path: Path) -> tuple[int, int]:
    """Returns what `_as_it_is` tells of it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
        return _as_it_is(os.fstat(fd))
    finally:
        os.close(fd)


def _as_it_is(directory: os.stat_result) -> tuple[int, int]:
    """Its inode and the time of its last change, such as a new entry: not so of another one, or of a later state."""
    return directory.st_ino, directory.st_ctime_ns


def _check(path: Path, expect: Expectation) -> None:
    found = None if expect is Expect.ANY else read(path)
    if expect is Expect.ANY or (found is None and expect is Expect.ABSENT):
        return
    if found is None or found.version != expect:
        raise VersionConflictError(f"{path.name} was changed by somebody else.")
