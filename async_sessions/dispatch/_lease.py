"""Leases: how a dispatcher shows that it lives, and how the jobs of one that died come to an end."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import anyio
import msgspec

from async_sessions import _keys
from async_sessions.errors import JobNotFoundError, SessionNotFoundError, StorageError
from async_sessions.jobs import abandon_job

if TYPE_CHECKING:
    from async_sessions.store import SessionStore

LEASE = timedelta(seconds=15)  # a dispatcher that has not renewed its lease for so long is dead

_logger = logging.getLogger("async_sessions")


class _Lease(msgspec.Struct, frozen=True):
    expires_at: datetime


class Owner:
    """One dispatcher as the others see it: the jobs that it accepted are its own while its lease lasts."""

    def __init__(self, store: SessionStore, name: str) -> None:
        self.name = name
        self._store = store
        self._key = _keys.owner_lease(name)

    async def renew(self) -> None:
        lease = _Lease(self._store.clock() + LEASE)
        await self._store.blobs.put(self._key, msgspec.json.encode(lease))

    async def resign(self) -> None:
        try:
            await self._store.blobs.delete(self._key)
        except StorageError:  # it lapses by itself
            _logger.warning("could not delete the lease %s", self._key, exc_info=True)

    async def live(self) -> None:
        """Renew the lease, and end the jobs of the dead, until cancelled."""
        while True:
            try:
                await self.renew()
                await self.bury_the_dead()
            except StorageError:
                _logger.warning("could not renew the lease %s; trying again", self._key, exc_info=True)
            await anyio.sleep(LEASE.total_seconds() / 3)

    async def bury_the_dead(self) -> None:
        """End, as abandoned, every unfinished job whose owner's lease lapsed: nobody runs it any more."""
        async for marker in self._store.blobs.list(_keys.QUEUE):
            job_id = _keys.job_of_marker(marker.key)
            try:
                session = await self._store.open_by_key(_keys.split_job_id(job_id)[0])
                entry = (await session.info()).jobs.get(job_id)
            except (SessionNotFoundError, JobNotFoundError):
                continue  # the sweep takes the marker
            if entry is not None and entry.unfinished and await self._is_dead(entry.owner):
                _logger.warning("job %s is abandoned: its process is gone", job_id)
                await abandon_job(job_id, store=self._store, emit=lambda event: None, attempt=entry.attempt)

    async def _is_dead(self, owner: str) -> bool:
        if owner == self.name:
            return False
        found = await self._store.blobs.get(_keys.owner_lease(owner))
        try:
            return found is None or msgspec.json.decode(found.data, type=_Lease).expires_at < self._store.clock()
        except msgspec.DecodeError:
            return True
