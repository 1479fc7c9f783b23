"""How a job comes into a store: its marker, then its entry."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec

from async_sessions import _keys
from async_sessions._life import NOT_WRITTEN
from async_sessions.errors import InvalidRequestError, SlotEmptyError, StorageError
from async_sessions.records import GenerationRequest

if TYPE_CHECKING:
    from async_sessions.blobs import BlobStore
    from async_sessions.records import JobInfo
    from async_sessions.session import Session

_logger = logging.getLogger("async_sessions")


async def accept_job(entry: JobInfo, session: Session, *, blobs: BlobStore) -> bool:
    """Store a job that waits; `False` where there is one of its id already. What `Session.edit_job` raises.

    From then on it is its owner's, or, where that has no lease, that of the next dispatcher to look.
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


def repeated(entry: JobInfo) -> GenerationRequest:
    """The request of a job that is over, once more.

    `InvalidRequestError` for one that is not over, `SlotEmptyError` for one of whose images one was removed.
    """
    if entry.unfinished:
        raise InvalidRequestError("The job is not over yet; wait for its end, or cancel it.")
    if entry.lost:
        raise SlotEmptyError(f"The image that this job had as {entry.lost[0]!r} was removed; submit a new one.")
    return GenerationRequest(
        session_key=_keys.split_job_id(entry.id)[0],
        pipeline=entry.pipeline,
        inputs=entry.inputs,
        params=entry.params,
        priority=entry.priority,
    )


async def _drop(marker: str, version: str, blobs: BlobStore) -> None:
    try:
        await blobs.delete(marker, expect=version)
    except StorageError as error:  # it is only a hint; and somebody else may submit the same job just now
        _logger.info("left the marker %s: %s", marker, error)
