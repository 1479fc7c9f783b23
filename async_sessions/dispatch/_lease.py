"""Leases: how a dispatcher shows that it lives, and how the jobs of one that died come to an end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from async_sessions import _keys
from async_sessions.blobs.base import Expect
from async_sessions.errors import JobNotFoundError, SessionNotFoundError, StorageError, VersionConflictError
from async_sessions.jobs import abandon_job

if TYPE_CHECKING:
    from async_sessions.records import JobInfo
    from async_sessions.store import SessionStore

LEASE = timedelta(seconds=15)  # a dispatcher that has not renewed its lease for so long is dead

_logger = logging.getLogger("async_sessions")


class _Lease(msgspec.Struct, frozen=True):
    expires_at: datetime


_LEASE_OF: Final = msgspec.json.Decoder(_Lease)  # made once, see `_manifest`


class Owner:
    """One dispatcher as the others see it: the jobs that it accepted are its own while its lease lasts.

    `holds` tells whether a job is queued or running in this process.
    """

    def __init__(self, store: SessionStore, name: str, holds: Callable[[str], bool]) -> None:
        self.name = name
        self._holds = holds
        self._store = store
        self._key = _keys.owner_lease(name)
        self._version: str | Expect = Expect.ANY

    async def renew(self) -> None:
        """Over the last lease, so that there is room for it on a full device."""
        lease = msgspec.json.encode(_Lease(self._store.clock() + LEASE))
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
        """Renew the lease, and end the jobs that nobody runs, until cancelled."""
        while True:
            try:
                await self.renew()
                await self.bury_the_dead()
            except Exception:
                # Whatever a backend raises, an app does not end because its jobs could not be looked after.
                _logger.exception("could not renew the lease %s; trying again", self._key)
            await anyio.sleep(LEASE.total_seconds() / 3)

    async def bury_the_dead(self) -> None:
        """End, as abandoned, every unfinished job that nobody runs any more.

        That is one whose owner's lease lapsed, and one of our own whose end could not be stored when it came.
        """
        async for marker in self._store.blobs.list(_keys.QUEUE):
            job_id = _keys.job_of_marker(marker.key)
            try:
                session = await self._store.open_by_key(_keys.split_job_id(job_id)[0])
                entry = (await session.info()).jobs.get(job_id)
                if entry is None or not entry.unfinished or not await self._is_dead(entry):
                    continue
            except (SessionNotFoundError, JobNotFoundError):
                continue  # the sweep takes the marker
            except StorageError as error:
                _logger.warning("can't tell whether job %s lives: %s", job_id, error)
                continue
            _logger.warning("job %s is abandoned: nobody runs it any more", job_id)
            await abandon_job(job_id, store=self._store, emit=lambda event: None, attempt=entry.attempt)

    async def _is_dead(self, entry: JobInfo) -> bool:
        if entry.owner == self.name:
            return not self._holds(entry.id)
        found = await self._store.blobs.get(_keys.owner_lease(entry.owner))
        try:
            return found is None or _LEASE_OF.decode(found.data).expires_at < self._store.clock()
        except msgspec.DecodeError:
            return True
