"""What the sessions of one open store share."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio

from async_sessions import _keys
from async_sessions._budget import in_thread
from async_sessions._tasks import COMMIT_DEADLINE
from async_sessions.errors import (
    QuotaExceededError,
    StorageError,
    StorageFullError,
    StoreClosedError,
)

if TYPE_CHECKING:
    from anyio import CapacityLimiter

    from async_sessions._budget import PixelBudget
    from async_sessions._cache import ImageCache
    from async_sessions._manifest import Lifetime
    from async_sessions._manifests import Manifests
    from async_sessions._reading import Reader
    from async_sessions._reckoning import Reckoning
    from async_sessions._tasks import Commits
    from async_sessions.blobs.base import BlobData, BlobStore
    from async_sessions.records import Limits

T = TypeVar("T")

_logger = logging.getLogger("async_sessions")


class StoreContext:
    """Made when a store is entered, closed when it is left. Belongs to one event loop.

    `created` names the sessions that this process made. What time it is has two answers, which differ where the clock
    was set: `clock` for what is written down, `now` for who judges what is over.
    """

    def __init__(
        self,
        *,
        blobs: BlobStore,
        manifests: Manifests,
        reader: Reader,
        cache: ImageCache,
        commits: Commits,
        cpu: CapacityLimiter,
        budget: PixelBudget,
        reckoning: Reckoning,
        lifetime: Lifetime,
        limits: Limits,
        slots: frozenset[str] | None,
    ) -> None:
        self.blobs = blobs
        self.manifests = manifests
        self.reader = reader
        self.cache = cache
        self.commits = commits
        self.cpu = cpu
        self.budget = budget
        self.reckoning = reckoning
        self.lifetime = lifetime
        self.limits = limits
        self.sweep_for_room: Callable[[int], Awaitable[None]] = _keep_all  # the janitor's, once there is one
        self.used: int | None = None  # bytes of all blobs, as the last sweep counted them, and what came and went since
        self._in_flight: dict[str, float] = {}
        self.created: set[str] = set()
        self._slots = slots
        self._open = True

    def clock(self) -> datetime:
        return self.reckoning.latest()

    def now(self) -> datetime:
        return self.reckoning.earliest()

    def close(self) -> None:
        self._open = False

    def check_open(self) -> None:
        if not self._open:
            raise StoreClosedError("The store is closed; use its sessions inside `async with store`.")

    def writing(self, blobs: Iterable[str], *, seconds: float = 2 * COMMIT_DEADLINE) -> None:
        """Spare these blobs from the sweeps of this process until they are committed, or can't be any more."""
        now = anyio.current_time()
        self._in_flight = {blob: until for blob, until in self._in_flight.items() if until > now}
        self._in_flight |= dict.fromkeys(blobs, now + seconds)

    def settled(self, blobs: Iterable[str]) -> None:
        """These are committed, or deleted."""
        for blob in self._in_flight.keys() & set(blobs):
            del self._in_flight[blob]

    def is_in_flight(self, blob: str) -> bool:
        return self._in_flight.get(blob, 0) > anyio.current_time()

    def check_slot(self, slot: str) -> str:
        return _keys.check_slot(slot, self._slots)

    async def take_room(self, size: int) -> None:
        """Count `size` bytes in. `QuotaExceededError` where even a sweep leaves the store too full for them."""
        if (limit := self.limits.max_total_bytes) is None:
            return
        if self.used is None or not self.has_room(size):
            await self._sweep(size)
        if not self.has_room(size):
            raise QuotaExceededError(
                f"The store keeps {limit:,} bytes at most and is full. Delete sessions, or raise `max_total_bytes`."
            )
        self._count(size)

    def _count(self, size: int) -> None:
        if self.used is not None:
            self.used = max(0, self.used + size)

    def has_room(self, size: int) -> bool:
        limit = self.limits.max_total_bytes
        return limit is None or (self.used or 0) + size <= limit

    async def with_room(self, write: Callable[[], Awaitable[T]]) -> T:
        """Run `write`; where the device has no room left for it, once more after a sweep."""
        try:
            return await write()
        except StorageFullError:
            await self._sweep(0)
            return await write()

    async def write(self, blob: str, data: BlobData, size: int) -> None:
        """Write a blob of `size` bytes that a later commit is to name. A failure, or a cancellation, leaves nothing.

        It may take as long as it takes: no deadline but that of `settled`, which tells that it is named or deleted. An
        iterator, which can be read only once, is not tried again after a sweep.
        """

        async def write() -> None:
            await self.take_room(size)
            self.check_open()
            self.writing([blob], seconds=math.inf)
            try:
                await self.blobs.put(blob, data)
            except BaseException:
                with anyio.CancelScope(shield=True), suppress(StoreClosedError, StorageError):  # the sweep will do it
                    await self.commits.uninterrupted(partial(self.discard, {blob: size}))
                raise

        await (write() if isinstance(data, AsyncIterator) else self.with_room(write))

    async def discard(self, blobs: Mapping[str, int]) -> None:
        """Delete blobs of these sizes, which no manifest names. What can't be deleted now is left to the sweep."""
        self.settled(blobs)
        for blob, size in blobs.items():
            self.cache.drop(blob)
            try:
                await self.blobs.delete(blob)
            except StorageError:
                _logger.warning("could not delete %s; a later sweep will", blob, exc_info=True)
            else:
                self._count(-size)

    async def _sweep(self, size: int) -> None:
        try:
            await self.sweep_for_room(size)
        except StorageError:  # what it was for tells more
            _logger.warning("could not sweep a full store", exc_info=True)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run CPU-bound `call` in a worker thread, in one of the store's `cpu` slots."""
        return await in_thread(call, self.cpu)


async def _keep_all(size: int) -> None:
    """What there is before there is a janitor."""
