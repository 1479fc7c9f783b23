"""What `SessionStore.stats` tells: how much a store holds, as its manifests say."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions.errors import InvalidKeyError, StorageError
from async_sessions.records import JobStatus
from async_sessions.verify import images

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Manifest


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """Decoded images in this process's memory, since the store was opened."""

    hits: int
    misses: int
    bytes: int
    max_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Between 0 and 1, or `None` where nothing was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None


class StoreStats(msgspec.Struct, frozen=True, kw_only=True):
    """A store's content by its manifests, those of expired sessions that no sweep has taken yet among them.

    `images` counts those in slots, with `image_bytes`; `recent_bytes` are those that can be put back or that jobs name.
    `state_bytes` is JSON within the manifests. `oldest` and `newest` tell when those sessions began, `longest_unused`
    when that one was last used; `None` where there is none. `unreadable` sessions are in no other number.
    `largest_session_bytes` are all blobs of one session. `max_total_bytes` and `max_session_bytes` are the store's
    limits.
    """

    now: datetime
    cache: CacheStats
    sessions: int = 0
    unreadable: int = 0
    images: int = 0
    image_bytes: int = 0
    thumbnail_bytes: int = 0
    recent_bytes: int = 0
    output_bytes: int = 0
    state_bytes: int = 0
    jobs: Mapping[JobStatus, int] = {}
    oldest: datetime | None = None
    newest: datetime | None = None
    longest_unused: datetime | None = None
    largest_session_bytes: int = 0
    max_total_bytes: int | None = None
    max_session_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """All blobs; the state, which is part of the manifests, is none."""
        return self.image_bytes + self.thumbnail_bytes + self.recent_bytes + self.output_bytes

    @property
    def quota_use(self) -> float | None:
        """`total_bytes` as a part of the limit, above 1 where they exceed it; `None` where there is no limit."""
        return self.total_bytes / self.max_total_bytes if self.max_total_bytes else None

    @property
    def session_quota_use(self) -> float | None:
        """`largest_session_bytes` as a part of what one session may keep; `None` where there is no limit."""
        return self.largest_session_bytes / self.max_session_bytes if self.max_session_bytes else None

    def including(self, manifest: Manifest) -> StoreStats:
        """These, and one session more."""
        held = {record.blob: record for _, record in images(manifest)}
        in_slots = {record.blob for record in manifest.images.values()}
        outputs = (output.byte_size for job in manifest.jobs.values() for output in job.outputs.values())
        jobs = dict(self.jobs)
        for job in manifest.jobs.values():
            jobs[job.status] = jobs.get(job.status, 0) + 1
        return replace(
            self,
            sessions=self.sessions + 1,
            images=self.images + len(manifest.images),
            image_bytes=self.image_bytes + sum(held[blob].byte_size for blob in in_slots),
            thumbnail_bytes=self.thumbnail_bytes + sum(record.thumbnail_size for record in held.values()),
            recent_bytes=self.recent_bytes + sum(held[blob].byte_size for blob in held.keys() - in_slots),
            output_bytes=self.output_bytes + sum(outputs),
            state_bytes=self.state_bytes + len(msgspec.json.encode(manifest.state)),
            jobs=jobs,
            oldest=min(self.oldest or manifest.created_at, manifest.created_at),
            newest=max(self.newest or manifest.created_at, manifest.created_at),
            longest_unused=min(self.longest_unused or manifest.used_at, manifest.used_at),
            largest_session_bytes=max(self.largest_session_bytes, manifest.total_bytes()),
        )


async def count(context: StoreContext) -> StoreStats:
    """Read every manifest, one after the other."""
    cache = context.cache
    counted = CacheStats(hits=cache.hits, misses=cache.misses, bytes=cache.size, max_bytes=cache.max_size)
    limits = context.limits
    stats = StoreStats(
        now=context.clock(),
        cache=counted,
        max_total_bytes=limits.max_total_bytes,
        max_session_bytes=limits.max_session_bytes,
    )
    async for listed in context.blobs.list(_keys.MANIFESTS):
        try:
            manifest = await context.manifests.read(_keys.session_key_of(listed.key))
        except (StorageError, InvalidKeyError):
            stats = replace(stats, unreadable=stats.unreadable + 1)
            continue
        if manifest is not None and not manifest.buried:
            stats = stats.including(manifest)
    return stats
