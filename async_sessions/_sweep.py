"""The reading and the acting of one sweep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._plan import FULL_SHARE, CleanupReport, Removal, Usage, idle, plan_room, plan_sweep
from async_sessions.errors import InvalidKeyError, JobNotFoundError, StorageError, VersionConflictError

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Manifest, RetiredImage
    from async_sessions.blobs.base import BlobInfo

_AHEAD = timedelta(hours=1)  # by which the clocks of two machines may differ

_logger = logging.getLogger("async_sessions")


class Sweep:
    """One pass at `now`; with `dry_run` it only reads.

    `ahead` is what the sweeps of a store remember of sessions that were used in the future: when they were written
    last, and when that was first seen, in seconds of the steady clock.
    """

    def __init__(
        self, context: StoreContext, now: datetime, dry_run: bool, ahead: dict[str, tuple[datetime, float]]
    ) -> None:
        self._context = context
        self._now = now
        self._dry_run = dry_run
        self._ahead = ahead
        self._removed: list[Removal] = []
        self._problems: list[str] = []
        self.total_bytes: int | None = None  # of all blobs, once `room` has counted them

    def report(self, sessions: int) -> CleanupReport:
        return CleanupReport(
            now=self._now,
            dry_run=self._dry_run,
            sessions=sessions,
            removed=tuple(self._removed),
            problems=tuple(self._problems),
            total_bytes=self.total_bytes,
            overshoot=self._excess(1.0),
        )

    async def aged(self, prefix: str) -> AsyncIterator[BlobInfo]:
        """What was written more than `grace` ago and is not part of a commit under way."""
        async for info in self._context.blobs.list(prefix):
            if info.modified + self._context.lifetime.grace <= self._now and not self._context.is_in_flight(info.key):
                yield info

    async def session(self, key: str, unnamed: dict[str, int] | None) -> Manifest | None:
        """Judge one session; strike what it names from `unnamed`, or compare its own blobs where that is `None`.

        Returns the manifest that stands afterwards, `None` where there is none or it can't be judged.
        """
        try:
            found = await self._context.manifests.read_version(key)
            if found is None:
                return None
            manifest, version = found
            _strike(manifest, unnamed)
            if manifest.updated_at > self._now + _AHEAD:
                self._problems.append(f"Session {key} was written in the future, {manifest.updated_at}: set the clock.")
            plan = plan_sweep(self._as_seen(manifest), now=self._now, lifetime=self._context.lifetime)
            if plan.expired is not None:
                return await self._expire(manifest, version, plan.expired)
            if plan.retired:
                manifest = await self._retire(manifest, version, plan.retired)
            if unnamed is None:
                await self._orphans(manifest)
            else:
                await self._mend_markers(manifest)
        except VersionConflictError:
            return None  # it is being used this very moment; the next sweep judges it anew
        except (StorageError, InvalidKeyError) as error:
            self._problems.append(str(error))
            _logger.warning("the sweep left session %s alone: %s", key, error)
            if unnamed is not None:
                unnamed.clear()  # a session that can't be read may name any of them
            return None
        return self._as_seen(manifest)

    def _as_seen(self, manifest: Manifest) -> Manifest:
        """`manifest`; one that was used in the future, under a clock that was ahead, as unused since that was seen."""
        now, steady = self._context.now(), self._context.reckoning.steady()
        if manifest.used_at <= now + _AHEAD:
            self._ahead.pop(manifest.key, None)
            return manifest
        written, seen = self._ahead.get(manifest.key, (None, steady))
        if written != manifest.updated_at:
            seen = steady
        self._ahead[manifest.key] = manifest.updated_at, seen
        since = now - timedelta(seconds=steady - seen)
        return replace(manifest, used_at=since, created_at=min(manifest.created_at, since))

    async def orphan(self, blob: str, size: int) -> None:
        await self._delete(Removal("orphan", blob, "no session names it", size))

    async def temporaries(self) -> None:
        async for info in self.aged(_keys.TEMPORARY):
            await self._delete(Removal("temporary", info.key, "left by an interrupted write", info.size))

    async def markers(self) -> None:
        async for info in self.aged(_keys.QUEUE):
            try:
                job_id = _keys.job_of_marker(info.key)
                manifest = await self._context.manifests.read(_keys.split_job_id(job_id)[0])
            except (StorageError, JobNotFoundError, InvalidKeyError) as error:
                self._problems.append(str(error))
                continue
            job = manifest.jobs.get(job_id) if manifest else None
            if job is None or not job.unfinished:
                await self._delete(Removal("marker", info.key, "its job is over or was never accepted", info.size))

    async def leases(self) -> None:
        async for info in self.aged(_keys.OWNERS):
            await self._delete(Removal("lease", info.key, "its process is gone", info.size))

    async def room(self, wanted: int) -> None:
        """Count all bytes, where they are limited; where `wanted` more are too many, those unused for longest go."""
        if self._context.limits.max_total_bytes is None:
            return
        self.total_bytes = 0
        async for info in self._context.blobs.list(_keys.BLOBS):
            self.total_bytes += info.size
        if self._dry_run:  # the rest of the sweep only said what it would remove
            blobs = ("session", "image", "orphan")
            self.total_bytes -= sum(removal.size for removal in self._removed if removal.kind in blobs)
        if not self._excess(1.0, wanted):
            return
        lifetime, unneeded = self._context.lifetime, []
        async for listed in self._context.blobs.list(_keys.MANIFESTS):
            found = await self._found(_keys.session_key_of(listed.key))
            if found is not None and idle(found[0], now=self._now, lifetime=lifetime):
                unneeded.append(Usage(found[0].used_at, found[0].key, found[0].total_bytes()))
        for usage in plan_room(unneeded, self._excess(FULL_SHARE, wanted)):
            found = await self._found(usage.key)
            if found is not None and idle(found[0], now=self._now, lifetime=lifetime):
                with contextlib.suppress(VersionConflictError):  # it is being used this very moment
                    await self._expire(*found, "unused for longest in a store that is full")
                    self.total_bytes -= usage.size
        if self._excess(1.0):
            _logger.warning("the store is %d bytes above its limit", self._excess(1.0))

    def _excess(self, share: float, wanted: int = 0) -> int:
        limit = self._context.limits.max_total_bytes
        if limit is None or self.total_bytes is None:
            return 0
        return max(0, self.total_bytes + wanted - int(share * limit))

    async def _found(self, key: str) -> tuple[Manifest, str] | None:
        try:
            return await self._context.manifests.read_version(key)
        except (StorageError, InvalidKeyError):
            return None  # said already, by `session`

    async def _expire(self, manifest: Manifest, version: str, reason: str) -> Manifest | None:
        removal = Removal("session", manifest.key, reason, manifest.total_bytes())
        if not self._dry_run:
            await self._context.commits.uninterrupted(lambda: self._context.manifests.bury(manifest, version))
        self._removed.append(removal)
        return manifest if self._dry_run else None

    async def _retire(self, manifest: Manifest, version: str, retired: tuple[RetiredImage, ...]) -> Manifest:
        removals = []
        for each in retired:
            reason = f"replaced or cleared at {each.removed_at:%Y-%m-%d %H:%M:%S}"
            thumbnail = _keys.thumbnail(each.record.blob)
            removals.append(Removal("image", each.record.blob, reason, each.record.byte_size))
            removals.append(Removal("image", thumbnail, reason, each.record.thumbnail_size))

        async def retire() -> Manifest:
            kept = manifest
            if not self._dry_run:
                kept = manifest.without_retired(self._now, self._context.lifetime.grace)
                kept = await self._context.manifests.write(kept, version, used=False)
            for removal in removals:
                await self._delete(removal)
            return kept

        # as one: a sweep that is cancelled in between would leave orphans
        return await self._context.commits.uninterrupted(retire)

    async def _mend_markers(self, manifest: Manifest) -> None:
        """Put back the marker of an unfinished job that lost it: by its marker a dispatcher finds it."""
        for job in manifest.unfinished_jobs():
            marker = _keys.queue_marker(job.id)
            if not self._dry_run and await self._context.blobs.get(marker) is None:
                await self._context.blobs.put(marker, msgspec.json.encode({"owner": job.owner}))

    async def _orphans(self, manifest: Manifest) -> None:
        named = manifest.named_blobs()
        prefix = _keys.incarnation_prefix(manifest.incarnation)
        candidates = [info async for info in self.aged(prefix) if info.key not in named]
        if not candidates:
            return
        # listed before this second reading: what was committed in between is named by now
        fresh = await self._context.manifests.read(manifest.key)
        if fresh is None or fresh.incarnation != manifest.incarnation:
            return
        named = fresh.named_blobs()
        for info in candidates:
            if info.key not in named:
                await self.orphan(info.key, info.size)

    async def _delete(self, removal: Removal) -> None:
        if not self._dry_run:
            self._context.cache.drop(removal.key)
            try:
                await self._context.blobs.delete(removal.key)
            except StorageError as error:  # the next sweep tries again; the others go on
                self._problems.append(str(error))
                return
        self._removed.append(removal)


def _strike(manifest: Manifest, unnamed: dict[str, int] | None) -> None:
    for blob in manifest.named_blobs():
        if unnamed:
            unnamed.pop(blob, None)
