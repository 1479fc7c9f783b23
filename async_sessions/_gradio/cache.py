"""Copies of what is stored in Gradio's cache, from where the browser gets them.

A copy, never a link: apps and Gradio itself write to files in that cache. Gradio serves a file there to whoever knows
its path, so each copy lies in a directory with a name that can't be guessed. A path inside the cache costs Gradio
nothing; any other it would hash and copy on the event loop.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from async_sessions.bundle import export_session
from async_sessions.errors import StorageError, StorageFullError
from async_sessions.records import ImageRecord, OutputRecord

if TYPE_CHECKING:
    from async_sessions.asgi import CookieSigner
    from async_sessions.session import Session

_SUFFIXES = {
    "image/gif": ".gif",
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
}


async def copy_of(
    session: Session, record: ImageRecord | OutputRecord, name: str, *, folder: str, key: CookieSigner
) -> str:
    """The path of an untouched copy of what `record` names, below `folder`, with a file name like `name`.

    `CorruptBlobError` where the stored bytes are gone or damaged, `StorageError` where the copy can't be written.
    """
    with _writing(folder):
        return str(await _copied(session, record, name, Path(folder), key))


async def _copied(
    session: Session, record: ImageRecord | OutputRecord, name: str, folder: Path, key: CookieSigner
) -> Path:
    target = _copy_folder(record.blob, folder, key) / f"{_plain(name)}{_SUFFIXES.get(record.media_type, '')}"
    written = int(record.stored_at.timestamp()) * 10**9  # a copy that somebody wrote to has another time
    if await anyio.to_thread.run_sync(_is_untouched, target, record.byte_size, written):
        return target
    if isinstance(record, OutputRecord):
        async with session.output_file(record) as file:
            await anyio.to_thread.run_sync(_place, file, target, written)
    else:
        data = await (await session.read_record(record)).data()
        await anyio.to_thread.run_sync(_place, data, target, written)
    return target


async def bundle_of(session: Session, *, folder: str, key: CookieSigner) -> tuple[str, int]:
    """A ZIP of the session as it is now, with its finished jobs and what they made; see `export_session`.

    Returns its path and its size in bytes. It takes the place of the one before. `StorageError` as in `copy_of`.
    """
    target = _copy_folder(_bundle(session), Path(folder), key) / "session.zip"
    with _writing(folder):
        await anyio.to_thread.run_sync(partial(target.parent.mkdir, mode=0o700, parents=True, exist_ok=True))
        await export_session(session, target, jobs=True)
        return str(target), (await anyio.Path(target).stat()).st_size


async def forget_bundle(session: Session, *, folder: str, key: CookieSigner) -> None:
    """Remove what `bundle_of` made."""
    await forget([_bundle(session)], folder=folder, key=key)


def _bundle(session: Session) -> str:
    return f"bundle of {session.key}"


async def forget(blobs: Iterable[str], *, folder: str, key: CookieSigner) -> None:
    """Remove the copies of `blobs`."""
    folders = [_copy_folder(blob, Path(folder), key) for blob in blobs]
    await anyio.to_thread.run_sync(_remove, folders)


def is_copy_of(path: str, blob: str, *, folder: str, key: CookieSigner) -> bool:
    return Path(path).parent == _copy_folder(blob, Path(folder), key)


async def holds(path: str, record: ImageRecord) -> bool:
    """Whether the file has the very bytes that are stored."""
    return await anyio.to_thread.run_sync(_holds, Path(path), record.byte_size, record.digest)


async def keep_drawing(data: bytes, *, folder: str, key: CookieSigner) -> str:
    """The path of a file with `data`, one for the same. `StorageError` as in `copy_of`."""
    digest = (await anyio.to_thread.run_sync(hashlib.sha256, data)).hexdigest()
    target = _copy_folder(drawing(digest), Path(folder), key) / "image.png"
    with _writing(folder):
        await anyio.to_thread.run_sync(_place, data, target, time.time_ns())
    return str(target)


def drawing(digest: str) -> str:
    """What `forget` knows the file by that `keep_drawing` made of the bytes with this digest."""
    return f"drawing {digest}"


async def remove_uploads(paths: Iterable[str], *, folder: str) -> None:
    """Remove files that were uploaded to `folder`, with what was hidden in them; nothing outside of it."""
    inside = [path for path in map(Path, paths) if path.is_relative_to(folder)]
    await anyio.to_thread.run_sync(_unlink, inside)


@contextmanager
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"No room is left in {folder}. Free some space and try again.") from error
        raise StorageError(f"{folder}: {error.strerror or error}.") from error


def _copy_folder(blob: str, folder: Path, key: CookieSigner) -> Path:
    return folder / hashlib.sha256(key.sign(blob).encode()).hexdigest()


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40]


def _is_untouched(path: Path, size: int, written: int) -> bool:
    try:
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) != (size, written):
            return False
        os.utime(path, ns=(time.time_ns(), written))  # Gradio's `delete_cache` goes by the time of the last such change
    except FileNotFoundError:
        return False
    return True


def _holds(path: Path, size: int, digest: str) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def _place(source: bytes | Path, target: Path, written: int) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = target.with_name(f".{secrets.token_hex(8)}")
    try:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        os.utime(temporary, ns=(time.time_ns(), written))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
