"""What the sessions of one open store share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

import anyio

from async_sessions import _keys
from async_sessions.errors import InvalidKeyError, StoreClosedError

if TYPE_CHECKING:
    from anyio import CapacityLimiter

    from async_sessions._cache import ImageCache
    from async_sessions._manifest import Lifetime
    from async_sessions._manifests import Manifests
    from async_sessions._reading import Reader
    from async_sessions._tasks import Commits
    from async_sessions.blobs.base import BlobStore
    from async_sessions.records import Limits

T = TypeVar("T")


class StoreContext:
    """Made when a store is entered, closed when it is left. Belongs to one event loop.

    `in_flight` names the blobs that are written but not committed yet, `created` the sessions that this process made.
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
        clock: Callable[[], datetime],
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
        self.clock = clock
        self.lifetime = lifetime
        self.limits = limits
        self.in_flight: set[str] = set()
        self.created: set[str] = set()
        self._slots = slots
        self._open = True

    def close(self) -> None:
        self._open = False

    def check_open(self) -> None:
        if not self._open:
            raise StoreClosedError("The store is closed; use its sessions inside `async with store`.")

    def check_slot(self, slot: str) -> str:
        _keys.check_slot(slot)
        if self._slots is not None and slot not in self._slots:
            raise InvalidKeyError(f"This store's slots are {', '.join(sorted(self._slots))}; not {slot!r}.")
        return slot

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run CPU-bound `call` in a worker thread, in one of the store's `cpu` slots."""
        return await anyio.to_thread.run_sync(call, limiter=self.cpu)
