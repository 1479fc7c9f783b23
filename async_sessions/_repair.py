"""`Repair`: makes good what a verification finds. What holds data is moved to `quarantine/`, never deleted.

Every step may be cut off by a crash and taken again: first a copy goes to the quarantine, then the session stops naming
the blob, by compare-and-swap, then the original goes.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec.structs import replace

from async_sessions import _keys, _manifest
from async_sessions._codec import decode
from async_sessions._reading import measure
from async_sessions.blobs.base import Expect, closing
from async_sessions.errors import CorruptManifestError, StorageError, VersionConflictError
from async_sessions.records import JobError
from async_sessions.verify import images

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Manifest
    from async_sessions._manifests import Edit
    from async_sessions.records import ImageRecord, JobInfo
    from async_sessions.verify import Finding

_LOST = JobError("CorruptBlobError", "A result of this job was damaged in the storage; submit it again.")


def without_blob(manifest: Manifest, blob: str) -> Manifest:
    """Stop naming a blob that is lost: its slot is empty, a job whose result it was has failed.

    What a job that is not over names stays: it fails by itself, where without one of its images it might succeed.
    """
    return replace(
        manifest,
        images={slot: record for slot, record in manifest.images.items() if record.blob != blob},
        retired=tuple(each for each in manifest.retired if each.record.blob != blob),
        jobs={job.id: _job_without(job, blob) for job in manifest.jobs.values()},
    )


def _job_without(job: JobInfo, blob: str) -> JobInfo:
    if job.unfinished:
        return job
    lost = tuple(role for role, record in job.inputs.items() if record.blob == blob)
    inputs = {role: record for role, record in job.inputs.items() if role not in lost}
    job = replace(job, inputs=inputs, lost=(*job.lost, *lost))
    outputs = {name: output for name, output in job.outputs.items() if output.blob != blob}
    if len(outputs) == len(job.outputs):
        return job
    return replace(job, outputs=outputs, status="failed", error=_LOST)


def with_record(manifest: Manifest, record: ImageRecord) -> Manifest:
    """Say `record` wherever its blob is named."""

    def current(old: ImageRecord) -> ImageRecord:
        return record if old.blob == record.blob else old

    return replace(
        manifest,
        images={slot: current(old) for slot, old in manifest.images.items()},
        retired=tuple(replace(each, record=current(each.record)) for each in manifest.retired),
        jobs={
            job.id: replace(job, inputs={role: current(old) for role, old in job.inputs.items()})
            for job in manifest.jobs.values()
        },
    )


class Repair:
    """Repairs one open store, which may be in use."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._blobs = context.blobs

    async def mend(self, finding: Finding) -> Finding:
        """The finding, with what was done about it. A failure to repair it is told in its reason."""
        try:
            done = await self._mended(finding)
        except FileNotFoundError:
            done = "removed meanwhile"
        except StorageError as error:
            return replace(finding, reason=f"{finding.reason}; it can't be repaired now: {error}")
        return replace(finding, repair=done)

    async def _mended(self, finding: Finding) -> str:
        match finding.kind:
            case "damaged" | "missing":
                return await self._let_go(finding)
            case "thumbnail":
                return await self._make_thumbnail(finding)
            case "orphan":
                copy = await self._copy(finding.key, finding)
                await self._blobs.delete(finding.key)
                return copy.told
            case "manifest":
                return await self._move_manifest(finding)
            case "unmarked_job":
                return await self._mark(finding)
            case "stale_marker" | "stale_lease":
                await self._blobs.delete(finding.key)
                return "removed"
            case _:
                return ""

    async def _let_go(self, finding: Finding) -> str:
        copies: list[_Copy] = []
        for key in (finding.key, _keys.thumbnail(finding.key)):
            with suppress(FileNotFoundError):
                copies.append(await self._copy(key, finding))
        edit = await self._edit(finding.session, partial(without_blob, blob=finding.key))
        dropped = edit.dropped_blobs()
        if finding.key not in dropped:
            await self._take_back(copies)
            if edit.after is not None and finding.key in edit.after.named_blobs():
                elsewhere = "" if edit.after is edit.before else "no slot holds it any more, but "
                raise StorageError(f"{elsewhere}a job that is not over names it.")
            raise FileNotFoundError(finding.key)  # its owner removed it, maybe for good
        for key in dropped:
            self._context.cache.drop(key)
            await self._blobs.delete(key)
        return ", and ".join(["not named any more", *(copy.told for copy in copies[:1])])

    async def _make_thumbnail(self, finding: Finding) -> str:
        manifest = await self._context.manifests.read(finding.session)
        blob = _keys.image_of(finding.key)
        record = next((record for _, record in images(manifest) if record.blob == blob), None) if manifest else None
        if record is None:
            return "removed with its image"
        image = await self._context.reader.image(record)
        thumbnail = await self._context.in_thread(partial(decode.thumbnail, image))
        with suppress(FileNotFoundError):
            await self._copy(finding.key, finding)
            await self._blobs.delete(finding.key)
        digest, size = await self._context.in_thread(partial(measure, thumbnail))
        made = replace(record, thumbnail_digest=digest, thumbnail_size=size)
        await self._blobs.put(finding.key, thumbnail, expect=Expect.ABSENT)
        edit = await self._edit(finding.session, partial(with_record, record=made))
        if edit.after is None or finding.key not in edit.after.named_blobs():
            await self._blobs.delete(finding.key)  # its owner removed the image meanwhile
        return "made anew"

    async def _mark(self, finding: Finding) -> str:
        manifest = await self._context.manifests.read(finding.session)
        job = manifest and manifest.jobs.get(_keys.job_of_marker(finding.key))
        if not job or not job.unfinished:
            return "over meanwhile"
        await self._blobs.put(finding.key, msgspec.json.encode({"owner": job.owner}))
        return "put back into the queue"

    async def _move_manifest(self, finding: Finding) -> str:
        blob = await self._blobs.get(finding.key)
        if blob is None:
            raise FileNotFoundError(finding.key)
        try:
            _manifest.decode(finding.session, blob.data)
        except CorruptManifestError:
            copy = await self._copy(finding.key, finding)
            try:
                await self._blobs.delete(finding.key, expect=blob.version)
            except VersionConflictError:
                await self._take_back([copy])
                raise
            return copy.told
        return "replaced meanwhile"

    async def _edit(self, session: str, change: Callable[[Manifest], Manifest]) -> Edit:
        def changed(manifest: Manifest | None) -> Manifest | None:
            after = None if manifest is None else change(manifest)
            return None if after == manifest else after

        manifests = self._context.manifests
        return await self._context.commits.uninterrupted(partial(manifests.edit, session, changed, used=False))

    async def _copy(self, key: str, finding: Finding) -> _Copy:
        """Copy `key` to the quarantine and write down why. `FileNotFoundError`."""
        target = _keys.quarantined(key)
        try:
            holds_data = await self._write_copy(key, target)
        except VersionConflictError:  # one of that name came here before
            target = f"{target}.{secrets.token_hex(4)}"
            holds_data = await self._write_copy(key, target)
        reason = {"key": key, "kind": finding.kind, "reason": finding.reason, "session": finding.session}
        reason["moved_at"] = self._context.clock().isoformat()
        await self._blobs.put(_keys.reason_for(target), msgspec.json.encode(reason))
        return _Copy(target, holds_data)

    async def _write_copy(self, key: str, target: str) -> bool:
        async with closing(self._blobs.stream(key)) as chunks:
            first = await anext(chunks, b"")
            if first:  # no blob is empty: of what was cut down to nothing only the reason is kept
                await self._blobs.put(target, _joined(first, chunks), expect=Expect.ABSENT)
            return bool(first)

    async def _take_back(self, copies: list[_Copy]) -> None:
        for copy in copies:
            await self._blobs.delete(copy.name)
            await self._blobs.delete(_keys.reason_for(copy.name))


class _Copy(NamedTuple):
    """What is in the quarantine under `name`: the data, if there was any, and the reason."""

    name: str
    holds_data: bool

    @property
    def told(self) -> str:
        return f"moved to {self.name}" if self.holds_data else "removed, since it was empty"


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
