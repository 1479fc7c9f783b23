"""Accepting a job: what it asks for is checked, then its marker is written, then its entry."""

from __future__ import annotations

import logging
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from async_sessions import _keys
from async_sessions._life import NOT_WRITTEN
from async_sessions.errors import StorageError

if TYPE_CHECKING:
    from async_sessions.blobs.base import BlobStore
    from async_sessions.jobs import Pipeline
    from async_sessions.records import GenerationRequest, JobInfo
    from async_sessions.session import Session

_logger = logging.getLogger("async_sessions")


def checked(pipeline: Pipeline, request: GenerationRequest, job_id: str, owner: str, now: datetime) -> JobInfo:
    """The entry for `request`, or `InvalidRequestError`; called in a thread, since a pipeline may look closely."""
    entry = pipeline.spec.entry(request, job_id, owner, now)
    check = getattr(pipeline, "check", None)
    if check is not None:
        check(entry.inputs, entry.params)
    return entry


async def accept(entry: JobInfo, session: Session, blobs: BlobStore) -> bool:
    """Marker, then entry; `False` where there is such a job already.

    Not to be interrupted: an entry that is not in the queue waits for long.
    """
    marker = _keys.queue_marker(entry.id)
    hint = {"owner": entry.owner, "submitted_at": entry.submitted_at}
    version = await blobs.put(marker, msgspec.json.encode(hint))
    added = False

    def add(current: JobInfo | None) -> JobInfo | None:
        nonlocal added
        added = current is None
        return entry if added else None

    try:
        current = await session.edit_job(entry.id, add)
    except Exception as error:
        # after another storage error the entry may be there: then the marker leads to it, and it is taken in
        if not isinstance(error, StorageError) or isinstance(error, NOT_WRITTEN):
            await _drop(marker, version, blobs)
        raise
    if not added and current is not None and not current.unfinished:  # the same request twice at once
        await _drop(marker, version, blobs)
    return added


async def _drop(marker: str, version: str, blobs: BlobStore) -> None:
    try:
        await blobs.delete(marker, expect=version)
    except StorageError as error:  # it is only a hint; and somebody else may submit the same job just now
        _logger.info("left the marker %s: %s", marker, error)
