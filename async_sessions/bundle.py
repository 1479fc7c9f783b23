"""Bundles: a session as one ZIP, to download, to keep, to move to another store.

    await export_session(session, Path("session.zip"))
    session = await import_session(store, Path("session.zip"))
    await restore_bundle(session, Path("session.zip"))

A bundle holds the images, the state and, where asked, the finished jobs with their results; neither the session's id
nor its key, no pins, and nothing that was replaced or cleared. The import has a new id, and times of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio.to_thread
import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._archive import ZipWriter
from async_sessions._bundle import MANIFEST, MAX_MANIFEST, Bundle, describe
from async_sessions._draft import adding
from async_sessions._spool import BundleSource, opened, written
from async_sessions.errors import (
    BundleError,
    CorruptBlobError,
    ImageRejectedError,
    InvalidKeyError,
    QuotaExceededError,
    RevisionConflictError,
    StorageError,
)
from async_sessions.records import JSON, MIB, ImageRecord, OutputRecord, SessionInfo

if TYPE_CHECKING:
    from async_sessions._bundle import Record
    from async_sessions._draft import Addition, Draft
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

__all__ = ["BundleSource", "export_session", "import_session", "restore_bundle", "stream_session"]

MAX_BYTES: Final = 1024 * MIB
MAX_FILES: Final = 2000  # with the manifest


async def export_session(session: Session, target: Path, *, jobs: bool = False) -> None:
    """Write a bundle to `target`, whole or not at all; a file that was there is replaced. See `stream_session`.

    A link or a device in its place stays, and is a `StorageError`.
    """
    async with written(target) as write, aclosing(stream_session(session, jobs=jobs)) as chunks:
        async for chunk in chunks:
            await write(chunk)


async def stream_session(session: Session, *, jobs: bool = False) -> AsyncGenerator[bytes]:
    """The bytes of a bundle of the session as it is now, for a download; a few MiB of it are in memory at a time.

    `jobs`: with the finished ones, what they were given and what they made. Counts as use of the session.
    `RevisionConflictError` where something of it is removed for good meanwhile, `CorruptBlobError` where it is damaged:
    what was streamed until then is no bundle.
    """
    with contextlib.suppress(StorageError):  # a use that can't be recorded does not fail the reading
        await session.touch()
    info = await session.info()
    contents, records = await anyio.to_thread.run_sync(partial(describe, info, jobs=jobs))
    manifest = await anyio.to_thread.run_sync(msgspec.json.encode, contents)
    if len(manifest) > MAX_MANIFEST:
        raise QuotaExceededError("The session has too many jobs for one bundle; export it without them.")
    with contextlib.closing(ZipWriter()) as archive:
        archive.begin(MANIFEST, len(manifest), info.updated_at)
        await anyio.to_thread.run_sync(archive.write, manifest)
        for file, record in records.items():
            archive.begin(file, record.byte_size, record.stored_at)
            async with aclosing(_checked(session, record)) as chunks:
                async for chunk in chunks:
                    await anyio.to_thread.run_sync(archive.write, chunk)
                    yield archive.take()
        await anyio.to_thread.run_sync(archive.close)
        yield archive.take()


async def import_session(
    store: SessionStore, source: BundleSource, *, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES
) -> Session:
    """A new session with what the bundle holds: all of it, or nothing and an error.

    `source` is a `Path`, bytes, or an async iterator of chunks, which are kept in a nameless temporary file meanwhile;
    it is only read. Every image goes through the checks of `Session.store_image`, and every file has to have the size
    and the digest that the manifest states. `BundleError` says what is wrong with a bundle, also where it has more than
    `max_bytes` (1 GiB) or `max_files` (2,000, its manifest among them). `QuotaExceededError` where it is more than the
    store lets one session keep, or has room for; nothing of it is dropped to make it fit.
    """
    async with opened(source, max_bytes) as file:
        bundle = await anyio.to_thread.run_sync(partial(Bundle, file, max_files=max_files))
        contents = bundle.contents
        async with store.draft(contents.state) as draft:
            images = {name: await _store_image(draft, bundle, name, slot) for name, slot in contents.pictures.items()}
            outputs = {name: await _store_output(draft, bundle, name) for name in contents.results}
            for name, job in contents.jobs.items():
                draft.add_job(job.entry(_keys.job_id(draft.key, name), images, outputs))
            return await draft.commit()


async def restore_bundle(
    session: Session,
    source: BundleSource,
    *,
    takes_slot: Callable[[str], bool] = lambda slot: True,
    takes_value: Callable[[str, JSON], bool] = lambda name, value: True,
    replaces: Mapping[str, str] | None = None,
    max_bytes: int = MAX_BYTES,
    max_files: int = MAX_FILES,
) -> tuple[str, ...]:
    """Put the images and the state that the bundle holds into a session, all or nothing; return the slots.

    Each image goes to the slot it has in the bundle, if `takes_slot`, and each value to its name, if `takes_value`: a
    bundle may come from anybody, so an app takes what its users may set and no more. What they replace can be put back
    as after `store_image`; what else the session holds stays. Jobs are left out. `BundleError` also for a bundle of
    which nothing is taken, `RevisionConflictError` if one of its slots holds neither the image whose digest `replaces`
    gives for it nor the bundle's own; else see `import_session` and `Session.store_image`.
    """
    async with opened(source, max_bytes) as file:
        bundle = await anyio.to_thread.run_sync(partial(Bundle, file, max_files=max_files))
        slots = {name: slot for slot, name in bundle.contents.images.items() if takes_slot(slot)}
        state = {name: value for name, value in bundle.contents.state.items() if takes_value(name, value)}
        if not slots and not state:
            raise BundleError("The bundle holds nothing that belongs here. Give one that was exported from this app.")
        async with adding(session, slots.values(), state, replaces or {}) as addition:
            for name, slot in slots.items():
                await _store_image(addition, bundle, name, slot)
            await addition.commit()
    return tuple(slots.values())


async def _checked(session: Session, record: Record) -> AsyncGenerator[bytes]:
    """The bytes of a record; an error at their end, if not before, where they are not those that were stored."""
    digest = hashlib.sha256()
    chunks = await _stream(session, record)
    try:
        async for chunk in chunks:
            await anyio.to_thread.run_sync(digest.update, chunk)
            yield chunk
        _check(digest.hexdigest(), record)
    except CorruptBlobError as error:
        if record.blob in _blobs_of(await session.info()):
            raise
        raise RevisionConflictError("The session was changed while it was exported; export it again.") from error
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


def _check(digest: str, record: Record) -> None:
    if digest != record.digest:
        raise CorruptBlobError(f"The blob {record.blob} is damaged; remove it and export the session again.")


async def _stream(session: Session, record: Record) -> AsyncIterator[bytes]:
    if isinstance(record, OutputRecord):
        return session.stream_output(record)
    return (await session.read_record(record)).stream()


def _blobs_of(info: SessionInfo) -> set[str]:
    blobs = {record.blob for record in info.images.values()}
    for job in info.jobs.values():
        blobs.update(record.blob for record in job.inputs.values())
        blobs.update(record.blob for record in job.outputs.values())
    return blobs


async def _store_image(draft: Draft | Addition, bundle: Bundle, name: str, slot: str | None) -> ImageRecord:
    file, limits = bundle.contents.files[name], draft.limits
    if file.media_type == "image/png":
        # What a store encodes itself is PNG, whatever files it takes, and can be as large as its pixels.
        limits = replace(limits, formats=("PNG",), max_bytes=max(limits.max_bytes, 4 * limits.max_pixels + 2 * MIB))
    try:
        record = await draft.store_image(_in_thread(bundle.chunks(name)), slot, name=file.name, limits=limits)
    except (ImageRejectedError, InvalidKeyError) as error:
        raise BundleError(f"The bundle's {name} is refused: {error}") from error
    if record.media_type != file.media_type:
        raise BundleError(f"The bundle's {name} is no {file.media_type}, as it says. Export it again.")
    return record


async def _store_output(draft: Draft, bundle: Bundle, name: str) -> OutputRecord:
    file = bundle.contents.files[name]
    return await draft.store_output(
        _Chunks(bundle, name),
        name=file.name or "",
        media_type=file.media_type,
        digest=file.digest,
        byte_size=file.byte_size,
    )


class _Chunks:
    """The bytes of a file of a bundle, which can be read again: where the device was full, after a sweep."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self._bundle = bundle
        self._name = name

    def __aiter__(self) -> AsyncGenerator[bytes]:
        return _in_thread(self._bundle.chunks(self._name))


async def _in_thread(chunks: Iterator[bytes]) -> AsyncGenerator[bytes]:
    while chunk := await anyio.to_thread.run_sync(next, chunks, b""):
        yield chunk
