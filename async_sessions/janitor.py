"""The cleaner: what may go is decided by `plan_sweep`, a pure function; `Janitor` reads, acts and reports.

Nothing goes that somebody needs: an unfinished job or a live pin keeps its session, any job entry keeps the images it
names, a removal is a compare-and-swap on the very manifest that was judged, and a blob that no manifest names is spared
for `grace`, far longer than a commit may take.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

import anyio
import msgspec

from async_sessions import _keys
from async_sessions.errors import InvalidKeyError, JobNotFoundError, StorageError, VersionConflictError

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Lifetime, Manifest, RetiredImage
    from async_sessions.blobs.base import BlobInfo

FULL_PASS = timedelta(days=1)  # how often every blob is compared with every manifest

_logger = logging.getLogger("async_sessions")

RemovalKind = Literal["session", "image", "orphan", "temporary", "marker", "lease"]


class Removal(msgspec.Struct, frozen=True):
    """Something that a sweep removed: `key` is a session's key or a blob's name, `size` in bytes."""

    kind: RemovalKind
    key: str
    reason: str
    size: int


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep did, or with `dry_run` would do. `problems` names the sessions it could not judge, and why."""

    now: datetime
    dry_run: bool
    sessions: int
    removed: tuple[Removal, ...]
    problems: tuple[str, ...]

    @property
    def freed_bytes(self) -> int:
        return sum(removal.size for removal in self.removed)


class SweepPlan(NamedTuple):
    """What is due in one session: all of it, for `expired` as the reason, or some retired images."""

    expired: str | None
    retired: tuple[RetiredImage, ...]


def plan_sweep(manifest: Manifest, *, now: datetime, lifetime: Lifetime) -> SweepPlan:
    """Decide what may go at `now`. Reads nothing but its arguments."""
    if manifest.buried:
        return SweepPlan("deleted", ())
    if not lifetime.alive(manifest, now):
        aged = lifetime.max_age is not None and now >= manifest.created_at + lifetime.max_age
        reason = f"older than {lifetime.max_age}" if aged else f"unused for {lifetime.ttl}"
        return SweepPlan(reason, ())
    kept = {each.record.blob for each in manifest.without_retired(now, lifetime.grace).retired}
    return SweepPlan(None, tuple(each for each in manifest.retired if each.record.blob not in kept))


def next_due(manifest: Manifest, modified: datetime, *, now: datetime, lifetime: Lifetime) -> datetime:
    """When a session that is not written to again has to be looked at next."""
    moments = [lifetime.expires_at(manifest), modified + lifetime.grace, *manifest.pins.values()]
    moments += [each.removed_at + lifetime.grace for each in manifest.retired]
    # a job that keeps an overdue session ends with a write, which is a look of its own
    return min((moment for moment in moments if moment > now), default=now + lifetime.grace)


class Janitor:
    """Sweeps one open store. Remembers when each session is due, so that a quiet sweep reads no manifest."""

    def __init__(self, context: StoreContext) -> None:
        self._context = context
        self._due: dict[str, tuple[datetime, datetime]] = {}  # session key: (modified, next due)
        self._last_full: datetime | None = None

    async def run(self, interval: timedelta) -> None:
        """Sweep now and every `interval`, until cancelled. A sweep that fails is logged and tried again."""
        while True:
            try:
                now = self._context.clock()
                full = self._last_full is None or now - self._last_full >= FULL_PASS
                await self.sweep(now=now, full=full)
                self._last_full = now if full else self._last_full
            except Exception:
                # Whatever a backend raises, an app does not end because its cleaner could not work.
                _logger.exception("a sweep failed; the next one is in %s", interval)
            await anyio.sleep(interval.total_seconds())

    async def sweep(self, *, now: datetime, full: bool = False, dry_run: bool = False) -> CleanupReport:
        """One pass at `now`. `full` judges every session and every blob, whatever is remembered about them."""
        sweep = _Sweep(self._context, now, dry_run)
        unnamed = {info.key: info.size async for info in sweep.aged(_keys.BLOBS)} if full else {}
        present: set[str] = set()
        # Twice where orphans are at stake: a directory that is written to while it is listed may hide an entry once.
        for _ in range(2 if unnamed else 1):
            async for listed in self._context.blobs.list(_keys.MANIFESTS):
                key = _keys.session_key_of(listed.key)
                if key in present:
                    continue
                present.add(key)
                if full or self._is_due(key, listed.modified, now):
                    manifest = await sweep.session(key, unnamed if full else None)
                    if manifest is not None:
                        due = next_due(manifest, listed.modified, now=now, lifetime=self._context.lifetime)
                        self._due[key] = listed.modified, due
        for blob, size in unnamed.items():
            await sweep.orphan(blob, size)
        await sweep.temporaries()
        await sweep.markers()
        await sweep.leases()
        if not dry_run:
            self._due = {key: seen for key, seen in self._due.items() if key in present}
        report = sweep.report(len(present))
        if report.removed or report.problems:
            _logger.info("swept: %d removed, %d problems", len(report.removed), len(report.problems))
        return report

    def _is_due(self, key: str, modified: datetime, now: datetime) -> bool:
        seen = self._due.get(key)
        if seen is None or seen[0] != modified:
            # Last used at `modified` at the latest: nothing can be due before the shorter of these two periods. With a
            # maximal age it can: how old the session is only its manifest tells.
            lifetime = self._context.lifetime
            unread = timedelta() if lifetime.max_age is not None else min(lifetime.ttl, lifetime.grace)
            self._due[key] = seen = modified, modified + unread
        return seen[1] <= now


class _Sweep:
    """The reading and the acting of one pass."""

    def __init__(self, context: StoreContext, now: datetime, dry_run: bool) -> None:
        self._context = context
        self._now = now
        self._dry_run = dry_run
        self._removed: list[Removal] = []
        self._problems: list[str] = []

    def report(self, sessions: int) -> CleanupReport:
        return CleanupReport(
            now=self._now,
            dry_run=self._dry_run,
            sessions=sessions,
            removed=tuple(self._removed),
            problems=tuple(self._problems),
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
            plan = plan_sweep(manifest, now=self._now, lifetime=self._context.lifetime)
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
        return manifest

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
            await self._context.blobs.delete(removal.key)
        self._removed.append(removal)


def _strike(manifest: Manifest, unnamed: dict[str, int] | None) -> None:
    for blob in manifest.named_blobs():
        if unnamed:
            unnamed.pop(blob, None)
