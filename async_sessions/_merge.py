"""Taking what one session holds along into another, at a login: blobs are copied as they are, nothing is decoded."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncGenerator, Set
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._life import NOT_WRITTEN
from async_sessions._manifest import Manifest
from async_sessions.errors import (
    CorruptBlobError,
    QuotaExceededError,
    SessionNotFoundError,
    StorageError,
    StorageFullError,
    StoreClosedError,
)
from async_sessions.records import ImageRecord, JobInfo, Limits, OutputRecord, check_state

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._life import Life

_TRIES: Final = 3  # each fails only where the other session began or ended meanwhile

_logger = logging.getLogger("async_sessions")


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """What `SessionStore.merge` took along and what it left where it was: slots, and ids of jobs."""

    moved: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


async def merge(context: StoreContext, source: Life, target: Life) -> Merged:
    """See `SessionStore.merge`."""
    if source.key == target.key:
        return Merged()
    try:
        given = await source.read()
    except SessionNotFoundError:
        return Merged()
    for tries_left in reversed(range(_TRIES)):
        try:
            after = await _take(context, given, target)
            break
        except SessionNotFoundError:
            if not tries_left:
                raise
    if after is None:
        return Merged(left=_names(given))
    taken = _taken(given, after)
    try:
        rest = await source.give_away(lambda manifest: _without(manifest, taken, after.state.keys(), context.now()))
    except SessionNotFoundError:  # somebody else has taken it along, or deleted it
        return Merged(moved=_names(given))
    left = _names(rest)
    return Merged(moved=tuple(name for name in _names(given) if name not in left), left=left)


async def _take(context: StoreContext, given: Manifest, target: Life) -> Manifest | None:
    """Copy and commit what fits. Returns the target's manifest, `None` where there still is none."""
    now = context.clock()
    try:
        present = context.lifetime.living(await context.manifests.read(target.key), context.now())
    except SessionNotFoundError:
        present = Manifest.new(target.key, _keys.new_incarnation(), now)
    records = _records(given)
    names = {blob: _keys.new_blob(present.incarnation, record.digest) for blob, record in records.items()}
    if (planned := joined(present, given, names, context.limits, now)) is present:
        return present if present.revision else None
    wanted = planned.named_blobs()
    names = {blob: name for blob, name in names.items() if name in wanted}
    written: dict[str, int] = {}
    tried = False

    def change(manifest: Manifest) -> Manifest:
        return joined(manifest, given, names, context.limits, now)

    try:
        for blob in tuple(names):
            try:
                await _copy(context, records[blob], names[blob], written)
            except (CorruptBlobError, QuotaExceededError, StorageFullError) as error:
                _logger.warning("%s stays in session %s at a login: %s", blob, given.key, error)
                del names[blob]
        if change(present) is present:
            after = present
        else:
            tried = True
            context.writing(written)
            after = await target.edit(change, incarnation=present.incarnation, creates=True)
    except BaseException as error:
        if not tried or isinstance(error, (*NOT_WRITTEN, SessionNotFoundError)):  # else they may be named by now
            await _discard(context, written)
        raise
    named = after.named_blobs()
    await _discard(context, {blob: size for blob, size in written.items() if blob not in named})
    return after if after.revision else None


def joined(target: Manifest, given: Manifest, names: dict[str, str], limits: Limits, now: datetime) -> Manifest:
    """`target` with what it lacks of `given` and has room for; itself where that is nothing.

    `names` has the copy of each blob that there is one of. Images go to slots that are empty, and where the slot holds
    another one, to those that can be put back. Nothing of the target's own goes. Unfinished jobs are not taken: they
    run where they are.
    """
    for slot, record in given.images.items():
        if record.blob in names and record.digest not in _digests(target):
            copy = _renamed(record, names)
            taken = slot in target.images
            larger = target.with_superseded(slot, copy, now) if taken else target.with_image(slot, copy, now)
            target = larger if _fits(larger, limits) else target
    for job in sorted(given.jobs.values(), key=lambda job: job.submitted_at, reverse=True):
        if not job.unfinished and _blobs(job) <= names.keys() and _moved_id(job, target) not in target.jobs:
            larger = target.with_job(_moved(job, target, names))
            target = larger if _fits(larger, limits) else target
    state = {**given.state, **target.state}
    if state != target.state:
        try:
            check_state(state, limits.max_state_bytes)
        except QuotaExceededError:
            return target
        target = replace(target, state=state)
    return target


def _digests(manifest: Manifest) -> set[str]:
    kept = (retired.record for retired in manifest.retired if not retired.discarded)
    return {record.digest for record in (*manifest.images.values(), *kept)}


def _fits(manifest: Manifest, limits: Limits) -> bool:
    finished = sum(not job.unfinished for job in manifest.jobs.values())
    return (
        (limits.max_session_bytes is None or manifest.total_bytes() <= limits.max_session_bytes)
        and (limits.max_session_images is None or manifest.image_count() <= limits.max_session_images)
        and finished <= limits.keep_jobs
    )


def _moved_id(job: JobInfo, target: Manifest) -> str:
    return _keys.job_id(target.key, _keys.split_job_id(job.id)[1])


def _moved(job: JobInfo, target: Manifest, names: dict[str, str]) -> JobInfo:
    return replace(
        job,
        id=_moved_id(job, target),
        inputs={role: _renamed(record, names) for role, record in job.inputs.items()},
        outputs={name: replace(record, blob=names[record.blob]) for name, record in job.outputs.items()},
    )


def _renamed(record: ImageRecord, names: dict[str, str]) -> ImageRecord:
    return replace(record, blob=names[record.blob])


def _records(manifest: Manifest) -> dict[str, ImageRecord | OutputRecord]:
    """What would be copied, by blob."""
    records: dict[str, ImageRecord | OutputRecord] = {record.blob: record for record in manifest.images.values()}
    for job in manifest.jobs.values():
        if not job.unfinished:
            records |= {record.blob: record for record in job.inputs.values()}
            records |= {record.blob: record for record in job.outputs.values()}
    return records


def _blobs(job: JobInfo) -> set[str]:
    return {record.blob for record in job.inputs.values()} | {record.blob for record in job.outputs.values()}


def _taken(given: Manifest, after: Manifest) -> set[str]:
    """The blobs of images, and the ids of jobs, that `after` holds too."""
    digests = _digests(after)
    images = {record.blob for record in given.images.values() if record.digest in digests}
    return images | {job.id for job in given.jobs.values() if _moved_id(job, after) in after.jobs}


def _without(manifest: Manifest, taken: set[str], known: Set[str], now: datetime) -> Manifest:
    """The source without what was taken; a tombstone where nothing is left that anybody needs.

    `known` names the values that are taken, or that the user has.
    """
    images = {slot: record for slot, record in manifest.images.items() if record.blob not in taken}
    jobs = {name: job for name, job in manifest.jobs.items() if name not in taken}
    if not images and not jobs and manifest.state.keys() <= known and not manifest.held(now):
        return manifest.as_tombstone()
    if (len(images), len(jobs)) == (len(manifest.images), len(manifest.jobs)):
        return manifest
    return replace(manifest, images=images, jobs=jobs)


def _names(manifest: Manifest) -> tuple[str, ...]:
    return (*manifest.images, *manifest.jobs)


async def _copy(context: StoreContext, record: ImageRecord | OutputRecord, name: str, written: dict[str, int]) -> None:
    if isinstance(record, OutputRecord):
        async with aclosing(_checked(context, record)) as chunks:
            await context.write(name, chunks, record.byte_size)
        written[name] = record.byte_size
        return
    await context.write(name, await context.reader.data(record), record.byte_size)
    written[name] = record.byte_size
    thumbnail = _keys.thumbnail(name)
    await context.write(thumbnail, await context.reader.thumbnail(record), record.thumbnail_size)
    written[thumbnail] = record.thumbnail_size


async def _checked(context: StoreContext, record: OutputRecord) -> AsyncGenerator[bytes]:
    digest = hashlib.sha256()
    async with aclosing(context.reader.stream(record, 0, None)) as chunks:
        async for chunk in chunks:
            await anyio.to_thread.run_sync(digest.update, chunk)
            yield chunk
    if digest.hexdigest() != record.digest:
        raise CorruptBlobError(f"The blob {record.blob} is damaged.")


async def _discard(context: StoreContext, written: dict[str, int]) -> None:
    if written:
        try:
            with anyio.CancelScope(shield=True):
                await context.commits.uninterrupted(partial(context.discard, written))
        except (StorageError, StoreClosedError):
            _logger.warning("could not delete copies that nobody needs; a later sweep will", exc_info=True)
