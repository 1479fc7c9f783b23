"""Leases: how a dispatcher shows that it lives, and how it comes by the jobs of one that died."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from async_sessions import _keys
from async_sessions.blobs.base import Expect
from async_sessions.errors import (
    InvalidKeyError,
    JobNotFoundError,
    SessionNotFoundError,
    StorageError,
    VersionConflictError,
)
from async_sessions.jobs import take_over_job

if TYPE_CHECKING:
    from async_sessions.records import JobInfo
    from async_sessions.store import SessionStore

UNCLAIMED: Final = timedelta(days=1)  # after its acceptance a job ends whose pipeline no living dispatcher has
SKEW: Final = timedelta(minutes=15)  # between two machines' clocks; S3 refuses requests beyond it
WATCHED: Final = 10.0  # seconds for which one look at a lease lasts at most
LOOK_INTERVAL: Final = 0.25  # seconds between two looks at a lease that is watched
AWAY: Final = timedelta(hours=1)  # for which a dispatcher may be gone before that happens to what it had

_logger = logging.getLogger("async_sessions")


class _Lease(msgspec.Struct, frozen=True):
    expires_at: datetime
    seconds: float  # that it lasts


_LEASE_OF: Final = msgspec.json.Decoder(_Lease)  # made once, see `_manifest`


class Owner:
    """One dispatcher as the others see it: what it looks after is its own while its lease, of `lease`, lasts.

    `holds` tells whether a job waits or is under way in this process; `adopt` gets the entries of those that were taken
    over and wait now. Only jobs for one of `pipelines` are taken over.
    """

    def __init__(
        self,
        store: SessionStore,
        name: str,
        *,
        lease: timedelta,
        pipelines: Container[str],
        max_attempts: int,
        holds: Callable[[str], bool],
        adopt: Callable[[JobInfo], None],
    ) -> None:
        self.name = name
        self._store = store
        self._lease = lease
        self._pipelines = pipelines
        self._max_attempts = max_attempts
        self._holds = holds
        self._adopt = adopt
        self._key = _keys.owner_lease(name)
        self._version: str | Expect = Expect.ANY
        self._seen: dict[str, tuple[str, float]] = {}  # of others' leases: the version, and since when, by `steady`
        self._unclaimed: dict[str, float] = {}  # jobs for pipelines that are not here: since when nobody has them

    async def renew(self) -> None:
        """Over the last lease, so that there is room for it on a full device."""
        lease = msgspec.json.encode(_Lease(self._store.clock() + self._lease, self._lease.total_seconds()))
        try:
            self._version = await self._store.blobs.put(self._key, lease, expect=self._version)
        except VersionConflictError:  # a sweep took it for that of a dead process
            self._version = await self._store.blobs.put(self._key, lease)

    async def resign(self) -> None:
        try:
            await self._store.blobs.delete(self._key)
        except StorageError:  # it lapses by itself
            _logger.warning("could not delete the lease %s", self._key, exc_info=True)

    async def live(self) -> None:
        """Renew the lease, and take over the jobs that nobody looks after, until cancelled."""
        while True:
            try:
                await self.renew()
                await self.take_over()
            except Exception:
                # Whatever a backend raises, an app does not end because its jobs could not be looked after.
                _logger.exception("could not renew the lease %s; trying again", self._key)
            await anyio.sleep(self._lease.total_seconds() / 3)

    async def take_over(self) -> None:
        """Adopt every unfinished job whose owner's lease lapsed, and any of our own that was lost from sight.

        The latter are those whose beginning, or end, could not be stored when it came. Those submitted first go first.
        """
        owners: set[str] = set()
        orphaned: list[JobInfo] = []
        async for marker in self._store.blobs.list(_keys.QUEUE):
            job_id = _keys.job_of_marker(marker.key)
            if self._holds(job_id):
                continue
            try:
                session = await self._store.open_by_key(_keys.split_job_id(job_id)[0])
                entry = (await session.info()).jobs.get(job_id)
                if entry is None or not entry.unfinished:
                    continue
                owners.add(entry.owner)
                if await self._is_dead(entry):
                    orphaned.append(entry)
            except (SessionNotFoundError, JobNotFoundError, InvalidKeyError):
                continue  # the sweep takes the marker
            except StorageError as error:
                _logger.warning("can't tell whether job %s lives: %s", job_id, error)
        for entry in sorted(orphaned, key=lambda entry: entry.submitted_at):
            self._unclaimed.setdefault(entry.id, self._store.steady())
            try:
                await self._take(entry)
            except (SessionNotFoundError, StorageError) as error:
                _logger.warning("can't take job %s over: %s", entry.id, error)
        self._seen = {owner: seen for owner, seen in self._seen.items() if owner in owners}
        still = {entry.id for entry in orphaned}
        self._unclaimed = {job_id: since for job_id, since in self._unclaimed.items() if job_id in still}

    async def _take(self, seen: JobInfo) -> None:
        owner = self.name if seen.pipeline in self._pipelines else None
        away = timedelta(seconds=self._store.steady() - self._unclaimed[seen.id])
        if owner is None and (away < AWAY or self._store.clock() - seen.submitted_at < UNCLAIMED):
            return  # its own dispatcher may come back
        entry = await take_over_job(
            seen, store=self._store, emit=lambda event: None, owner=owner, max_attempts=self._max_attempts
        )
        if entry is None or self._holds(entry.id):
            return
        if entry.status == "queued" and entry.owner == self.name:
            if seen.under_way:
                _logger.warning("job %s was interrupted and is tried again, alone", entry.id)
            else:
                _logger.info("job %s, which its dispatcher left waiting, is taken over", entry.id)
            self._adopt(entry)
        elif not entry.unfinished:
            _logger.warning("job %s is over, %s: nobody looked after it any more", entry.id, entry.status)

    async def _is_dead(self, entry: JobInfo) -> bool:
        """The clock is asked at the first sight of a lease only: it may be set, or have been ahead."""
        if entry.owner == self.name:
            return not self._holds(entry.id)
        if (found := await _read(entry.owner, self._store)) is None:
            return True
        lease, version = found
        now = self._store.steady()
        if (seen := self._seen.get(entry.owner)) is None:
            lapsed = lease.expires_at < self._store.clock()
            self._seen[entry.owner] = version, -math.inf if lapsed else now
            return lapsed
        if version != seen[0]:
            self._seen[entry.owner] = version, now
            return False
        return now - seen[1] >= lease.seconds


async def lives(owner: str, store: SessionStore) -> bool:
    """Whether the dispatcher of that name still looks after its jobs, as far as can be told within seconds.

    Its clock may be behind ours: a lease that lapsed a short while ago is watched for half the time that it lasts,
    `WATCHED` seconds at most, and a dispatcher that renews it lives.
    """
    if (found := await _read(owner, store)) is None:
        return False
    lease, version = found
    late = store.clock() - lease.expires_at
    if late <= timedelta(0) or late > SKEW:
        return late <= timedelta(0)
    give_up = anyio.current_time() + min(lease.seconds / 2, WATCHED)
    while anyio.current_time() < give_up:
        await anyio.sleep(LOOK_INTERVAL)
        if (again := await _read(owner, store)) is None:
            return False
        if again[1] != version:
            return True
    return False


async def _read(owner: str, store: SessionStore) -> tuple[_Lease, str] | None:
    """A lease and its version; `None` where there is none, or none that can be read."""
    if (found := await store.blobs.get(_keys.owner_lease(owner))) is None:
        return None
    try:
        return _LEASE_OF.decode(found.data), found.version
    except msgspec.DecodeError:
        return None
