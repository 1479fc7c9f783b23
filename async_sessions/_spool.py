"""Files outside the store: one that is written whole or not at all, and a source of any kind as one that can be sought.

What opens, renames or removes a file runs to its end, also where its caller is cancelled: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

import anyio
from aiofiles.threadpool import wrap

from async_sessions._lane import run_in_worker
from async_sessions.errors import BundleError, StorageError, StorageFullError

T = TypeVar("T")

BundleSource: TypeAlias = "Path | bytes | AsyncIterable[bytes]"


@asynccontextmanager
async def written(target: Path) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """`async with written(target) as write`: what was written takes the place of `target` when it is left.

    Left with an exception, `target` is as it was, unless the error says that the file is there but not durable. The
    file is private (0600).
    """
    unfinished = target.parent / f".{secrets.token_hex(8)}.part"
    held = ExitStack()
    try:
        with _in_our_words("written"):
            file = await _to_its_end(lambda: held.enter_context(_create(unfinished, target)))
        writer = wrap(file)

        async def write(chunk: bytes) -> None:
            with _in_our_words("written"):
                await writer.write(chunk)

        yield write
        with _in_our_words("written"):
            await _to_its_end(lambda: _publish(file, unfinished, target))
    finally:
        held.callback(unfinished.unlink, missing_ok=True)
        await _closed(held)


@asynccontextmanager
async def opened(source: BundleSource, max_bytes: int) -> AsyncIterator[IO[bytes]]:
    """The source as a file that can be sought. `BundleError` where it is larger than `max_bytes`."""
    if not isinstance(source, Path | bytes | AsyncIterable):
        raise TypeError(f"A bundle is a pathlib.Path, bytes or an async iterable of them, not {type(source).__name__}.")
    held = ExitStack()
    try:
        with _in_our_words("read"):
            file = await _to_its_end(lambda: held.enter_context(_open(source)))
        if isinstance(source, AsyncIterable):
            await _spool(source, file, max_bytes)
        else:
            _check_size(file.seek(0, os.SEEK_END), max_bytes)
        yield file
    finally:
        await _closed(held)


def _open(source: BundleSource) -> IO[bytes]:
    match source:
        case Path():
            return _open_regular(source)
        case bytes():
            return io.BytesIO(source)
        case _:
            return tempfile.TemporaryFile()  # without a name: a killed process leaves nothing either


def _create(path: Path, target: Path) -> IO[bytes]:
    if target.is_dir():  # whose place a file can't take: better said before all of it is written
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(target.lstat().st_mode):  # root would put a file in the place of /dev/null
            raise OSError(errno.EINVAL, "it is no regular file")
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _open_regular(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a FIFO, opening would wait for its writer
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise OSError(errno.EINVAL, "it is no regular file")


async def _spool(chunks: AsyncIterable[bytes], file: IO[bytes], max_bytes: int) -> None:
    """Write all chunks to `file`. A generator that is not read to its end is closed."""
    size, writer = 0, wrap(file)
    try:
        async for chunk in chunks:
            if not isinstance(chunk, bytes | bytearray | memoryview):
                raise TypeError(f"An async source of a bundle gives chunks of bytes, not {type(chunk).__name__}.")
            data = bytes(chunk)
            size += len(data)
            _check_size(size, max_bytes)
            with _in_our_words("kept"):
                await writer.write(data)
        with _in_our_words("kept"):
            await writer.flush()
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BundleError(f"The bundle is larger than {max_bytes:,} bytes, which is the most that is taken here.")


def _publish(file: IO[bytes], unfinished: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.replace(unfinished, target)
    try:
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"The bundle is written, but a power cut may undo that: {error.strerror}.") from error


async def _closed(held: ExitStack) -> None:
    with anyio.CancelScope(shield=True):
        await _to_its_end(held.close)


async def _to_its_end(call: Callable[[], T]) -> T:
    returned: list[T] = []
    if (error := await run_in_worker(lambda: returned.append(call()))) is not None:
        raise error
    return returned[0]


@contextlib.contextmanager
def _in_our_words(done: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError("No room is left for the bundle. Free some space and try again.") from error
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"The bundle cannot be {done}: {why}. Check the path and its permissions.") from error
