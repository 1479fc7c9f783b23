"""Reading and committing manifests: the one writer rule, compare-and-swap, for every backend."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import NamedTuple, TypeVar

import anyio

from async_sessions import _keys, _manifest
from async_sessions._manifest import Manifest
from async_sessions._tasks import Order, Orders
from async_sessions.blobs.base import BlobStore, Expect
from async_sessions.errors import StorageFullError, VersionConflictError

T = TypeVar("T")

CONTENTION_TIMEOUT = 30.0  # seconds of lost races after which a commit gives up
_INLINE_JSON = 64 * 1024  # bytes; a larger manifest is coded in a worker thread

Change = Callable[[Manifest | None], Manifest | None]


class Edit(NamedTuple):
    """What a commit found and what it left; the same object where nothing had to be written."""

    before: Manifest | None
    after: Manifest | None

    def dropped_blobs(self) -> dict[str, int]:
        """The sizes of the blobs that the manifest stopped naming; the next life of a key shares none with the last."""
        before = self.before.blob_sizes() if self.before else {}
        after = self.after.blob_sizes() if self.after else {}
        return {blob: size for blob, size in before.items() if blob not in after}


class Manifests:
    """The manifests of one blob store. `forget` is called with each blob that goes with its session."""

    def __init__(self, blobs: BlobStore, clock: Callable[[], datetime], forget: Callable[[str], None]) -> None:
        self._blobs = blobs
        self._clock = clock
        self._forget = forget
        self._coders = anyio.CapacityLimiter(2)  # its own, so that JSON never waits behind a decode
        self._orders = Orders()

    def order(self, key: str) -> Order:
        """This process's order of writes to a session; hold it for as long as the write lasts."""
        return self._orders.of(key)

    async def code(self, call: Callable[[], T]) -> T:
        """Run `call`, which reads or writes JSON of size, in a worker thread."""
        return await anyio.to_thread.run_sync(call, limiter=self._coders)

    async def read(self, key: str) -> Manifest | None:
        found = await self.read_version(key)
        return found[0] if found else None

    async def read_version(self, key: str) -> tuple[Manifest, str] | None:
        """The manifest with the version that a compare-and-swap names."""
        blob = await self._blobs.get(_keys.manifest(key))
        if blob is None:
            return None
        if len(blob.data) <= _INLINE_JSON:
            return _manifest.decode(key, blob.data), blob.version
        return await self.code(partial(_manifest.decode, key, blob.data)), blob.version

    async def edit(
        self, key: str, change: Change, *, written: Callable[[], None] | None = None, used: bool = True
    ) -> Edit:
        """Read, apply `change`, write if it returned something new; on a lost race, read and apply again.

        `change` is pure and may raise. `written` is called under the lock once the edit holds. Counts as use of the
        session, unless `used` is false. To be called within `Commits.uninterrupted`.
        """
        order = self.order(key)
        give_up = anyio.current_time() + CONTENTION_TIMEOUT
        while True:
            try:
                async with order.lock:
                    edit = await self._edit_once(key, change, used)
                    if written is not None:
                        written()
                    return edit
            except VersionConflictError:
                if anyio.current_time() >= give_up:
                    raise
                await anyio.sleep(random.uniform(0.001, 0.02))

    async def _edit_once(self, key: str, change: Change, used: bool) -> Edit:
        found = await self.read_version(key)
        before, version = found or (None, None)
        after = change(before)
        if after is None or after is before:
            return Edit(before, before)
        after = await self.write(after, version, used=used)
        return Edit(before, after)

    async def write(self, manifest: Manifest, version: str | None, *, used: bool = True) -> Manifest:
        """Write, sealed, over exactly `version`, or where there is none; else `VersionConflictError`.

        Where there is no room for a tombstone the manifest is deleted at once, so that room can be made. What a crash
        leaves then are orphans.
        """
        manifest = manifest.sealed(_keys.new_revision(), self._clock(), used=used)
        data = await self.code(partial(_manifest.encode, manifest))
        expect = Expect.ABSENT if version is None else version
        try:
            await self._blobs.put(_keys.manifest(manifest.key), data, expect=expect)
        except StorageFullError:
            if not manifest.buried:
                raise
            await self._blobs.delete(_keys.manifest(manifest.key), expect=expect)
        return manifest

    async def bury(self, manifest: Manifest, version: str) -> None:
        """Remove a session, if its manifest is still that version; finish the removal of one that is buried."""
        if not manifest.buried:
            manifest = await self.write(manifest.as_tombstone(), version, used=False)
        await self.clear_away(manifest)

    async def clear_away(self, tombstone: Manifest) -> None:
        """Delete the blobs of a buried life, then its manifest if it is still that tombstone."""
        async for info in self._blobs.list(_keys.incarnation_prefix(tombstone.incarnation)):
            self._forget(info.key)
            await self._blobs.delete(info.key)
        found = await self.read_version(tombstone.key)
        if found is not None and found[0].revision == tombstone.revision:
            with contextlib.suppress(VersionConflictError):  # the key lives again
                await self._blobs.delete(_keys.manifest(tombstone.key), expect=found[1])
