"""`Verification`: reads a whole store and compares it, byte by byte, with what its manifests say.

It may run while the store is in use, here and elsewhere: what looks wrong is held against the manifest once more, and
what is younger than `grace` may be part of a commit under way and is spared. One session is looked at after the other,
and a large blob in chunks: all that is kept is a name for every session, and the findings.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Literal

from msgspec.structs import replace

from async_sessions import _keys
from async_sessions.blobs.base import closing
from async_sessions.errors import CorruptManifestError, InvalidKeyError, StorageError, UnknownSchemaError
from async_sessions.records import MIB
from async_sessions.verify import Finding, VerifyReport, claims, still_so

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Manifest
    from async_sessions._repair import Repair
    from async_sessions.blobs.base import BlobInfo
    from async_sessions.verify import Claim, FindingKind

Progress = Callable[[int, int], None]

_AT_ONCE = 4 * MIB  # bytes; a larger blob is read in chunks


class Verification:
    """One pass over one open store; `repair` makes good what it finds."""

    def __init__(self, context: StoreContext, repair: Repair | None) -> None:
        self._context = context
        self._repair = repair
        self._now = context.now()
        self._findings: list[Finding] = []
        self._incarnations: set[str] = set()  # of all sessions that were looked at
        self._damaged: dict[str, Finding] = {}  # manifests
        self._blind = False  # a manifest that can't be read has to stay where it is, and may name any blob
        self._blobs = self._bytes = 0

    async def run(self, progress: Progress | None = None) -> VerifyReport:
        total, done = 0, 0
        if progress is not None:
            async for _ in self._manifests():
                total += 1
        async for listed in self._manifests():
            await self._session(listed)
            done += 1
            if progress is not None:
                progress(done, max(done, total))
        # orphans first: as long as a damaged manifest is there, no sweep deletes what it may name
        await self._orphans(await self._everything_else())
        for finding in self._damaged.values():
            if not self._blind:
                await self._found(finding)
            else:
                later = f"it stays until it is older than {self._context.lifetime.grace} and its blobs can go with it"
                self._findings.append(replace(finding, reason=f"{finding.reason}; {later}"))
        held = [info.size async for info in self._context.blobs.list(_keys.QUARANTINE) if not _keys.is_reason(info.key)]
        return VerifyReport(
            now=self._now,
            sessions=len(self._incarnations),
            blobs=self._blobs,
            bytes=self._bytes,
            quarantined=len(held),
            quarantined_bytes=sum(held),
            findings=tuple(self._findings),
        )

    async def _manifests(self) -> AsyncIterator[BlobInfo]:
        async for info in self._context.blobs.list(_keys.MANIFESTS):
            if _keys.family(info.key) == "manifest":
                yield info

    async def _session(self, listed: BlobInfo) -> None:
        key = _keys.session_key_of(listed.key)
        manifest = await self._read(listed)
        if manifest is None or manifest.incarnation in self._incarnations:
            return
        self._incarnations.add(manifest.incarnation)
        if manifest.buried:
            return  # the next sweep finishes its removal
        try:
            suspicions = [finding async for finding in self._compare(manifest)]
            fresh = await self._context.manifests.read(key) if suspicions else None
        except (StorageError, InvalidKeyError) as error:
            self._unreadable(listed, error)
            return
        for finding in suspicions:
            if fresh is not None and still_so(finding, fresh):
                await self._found(finding)

    async def _read(self, listed: BlobInfo) -> Manifest | None:
        key = _keys.session_key_of(listed.key)
        try:
            return await self._context.manifests.read(key)
        except CorruptManifestError as error:
            self._damaged[listed.key] = Finding(kind="manifest", key=listed.key, reason=str(error), session=key)
            self._blind |= not self._is_old(listed)
        except StorageError as error:
            self._unreadable(listed, error)
        return None

    def _unreadable(self, listed: BlobInfo, error: Exception) -> None:
        """A manifest that is left alone: whatever is a blob, it may name it."""
        kind: FindingKind = "newer_schema" if isinstance(error, UnknownSchemaError) else "unreadable"
        session = _keys.session_key_of(listed.key)
        self._findings.append(Finding(kind=kind, key=listed.key, reason=str(error), session=session))
        self._blind = True

    async def _compare(self, manifest: Manifest) -> AsyncIterator[Finding]:
        """What looks wrong: between the reading of `manifest` and now the session may have been written to."""
        found = partial(Finding, session=manifest.key)
        claimed = claims(manifest)
        prefix = _keys.incarnation_prefix(manifest.incarnation)
        listed = {info.key: info async for info in self._context.blobs.list(prefix)}
        for key, claim in claimed.items():
            try:
                flaw = await self._flaw(key, claim, listed.get(key))
            except StorageError as error:
                yield found(kind="unreadable", key=key, reason=f"{claim.what}: {error}")
                continue
            if flaw is not None:
                kind: FindingKind = flaw if _keys.image_of(key) == key else "thumbnail"
                reason = "is not there" if flaw == "missing" else "is not what was stored"
                yield found(kind=kind, key=key, reason=f"{claim.what} {reason}")
        for key, info in listed.items():
            if key not in claimed and _keys.family(key) == "blob" and self._is_old(info):
                yield found(kind="orphan", key=key, reason="its session does not name it")
        for job in manifest.unfinished_jobs():
            marker = _keys.queue_marker(job.id)
            if await self._context.blobs.get(marker) is None:
                yield found(kind="unmarked_job", key=marker, reason="a job that is not over is not in the queue")

    async def _flaw(self, key: str, claim: Claim, listed: BlobInfo | None) -> Literal["missing", "damaged"] | None:
        if listed is not None and listed.size != claim.size:
            return "damaged"
        try:
            digest, size = await self._measure(key, claim)
        except FileNotFoundError:
            return "missing"
        self._blobs += 1
        self._bytes += size
        return None if size == claim.size and claim.digest in ("", digest) else "damaged"

    async def _measure(self, key: str, claim: Claim) -> tuple[str, int]:
        """SHA-256 and size of what is there. `FileNotFoundError` where nothing is."""
        digest, size = hashlib.sha256(), 0
        if claim.size <= _AT_ONCE:
            blob = await self._context.blobs.get(key)
            if blob is None:
                raise FileNotFoundError(key)
            if blob.version != claim.digest:  # which would have been computed from what was read: see `Blob`
                await self._context.in_thread(partial(digest.update, blob.data))
            return claim.digest if blob.version == claim.digest else digest.hexdigest(), len(blob.data)
        async with closing(self._context.blobs.stream(key)) as chunks:
            async for chunk in chunks:
                await self._context.in_thread(partial(digest.update, chunk))
                size += len(chunk)
        return digest.hexdigest(), size

    async def _everything_else(self) -> set[str]:
        """Judge each key that is no session's; return the lives with old blobs that no session is known to have."""
        unclaimed = set()
        async for info in self._context.blobs.list():
            match _keys.family(info.key):
                case None:
                    await self._found(Finding(kind="foreign", key=info.key, reason="it has no place in a store"))
                case "blob" if self._is_old(info):
                    if (incarnation := _keys.incarnation_of(info.key)) not in self._incarnations:
                        unclaimed.add(incarnation)
                case "marker" if self._is_old(info):
                    await self._marker(info)
                case "lease" if self._is_old(info):
                    await self._found(Finding(kind="stale_lease", key=info.key, reason="its process is gone"))
        return unclaimed

    async def _marker(self, info: BlobInfo) -> None:
        job_id = _keys.job_of_marker(info.key)
        key = _keys.split_job_id(job_id)[0]
        try:
            manifest = await self._context.manifests.read(key)
        except StorageError:
            return  # the session is a finding of its own
        job = manifest.jobs.get(job_id) if manifest else None
        if job is not None and (job.unfinished or not self._is_past(job.finished_at or self._now)):
            return  # one that has just ended is about to lose its marker
        reason = "its job is over or was never accepted"
        await self._found(Finding(kind="stale_marker", key=info.key, reason=reason, session=key))

    async def _orphans(self, unclaimed: set[str]) -> None:
        # They were listed before this reading, so what was committed meanwhile is named by now. Twice, since a
        # directory that is written to while it is listed may hide an entry once.
        for _ in range(2 if unclaimed else 0):
            async for listed in self._manifests():
                if self._blind:
                    return
                if listed.key not in self._damaged and (manifest := await self._read(listed)) is not None:
                    unclaimed.discard(manifest.incarnation)
        if self._blind:
            return
        reason = "no session that can be read names it" if self._damaged else "no session names it"
        for incarnation in unclaimed:
            async for info in self._context.blobs.list(_keys.incarnation_prefix(incarnation)):
                if _keys.family(info.key) == "blob" and self._is_old(info):
                    finding = await self._found(Finding(kind="orphan", key=info.key, reason=reason))
                    self._blind |= self._repair is not None and not finding.repair

    async def _found(self, finding: Finding) -> Finding:
        self._findings.append(finding if self._repair is None else await self._repair.mend(finding))
        return self._findings[-1]

    def _is_old(self, info: BlobInfo) -> bool:
        return self._is_past(info.modified) and not self._context.is_in_flight(info.key)

    def _is_past(self, moment: datetime) -> bool:
        return moment + self._context.lifetime.grace <= self._now
