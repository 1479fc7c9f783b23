"""`Life`: one life of one session, read and committed. Everything that `Session` writes goes through here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._manifest import Manifest, sizes_of
from async_sessions._quota import within
from async_sessions.errors import (
    LockTimeoutError,
    QuotaExceededError,
    RevisionConflictError,
    SessionNotFoundError,
    StorageError,
    StorageFullError,
    VersionConflictError,
)
from async_sessions.records import ImageRecord

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._ingest import Ingested
    from async_sessions._tasks import Tickets

Change = Callable[[Manifest], Manifest | None]

# After these a write has certainly not happened; after another `StorageError` it may have, and the sweep will tell.
NOT_WRITTEN = (StorageFullError, VersionConflictError, LockTimeoutError)

_logger = logging.getLogger("async_sessions")


class _OtherLifeError(SessionNotFoundError):
    """The blobs lie under another life than the one that the session has by now."""


class Life:
    """A session's manifest as one handle sees it: the life it was opened in, or whichever it meets or makes first."""

    def __init__(self, context: StoreContext, key: str, incarnation: str | None) -> None:
        self.key = key
        self._context = context
        self._incarnation = incarnation

    async def read(self) -> Manifest:
        self._context.check_open()
        manifest = self._living(await self._context.manifests.read(self.key), self._incarnation)
        self._incarnation = manifest.incarnation
        return manifest

    async def use(self) -> Manifest:
        """Read, and record that the session was used. A use that can't be recorded does not fail the read."""
        manifest = await self.read()
        if self._touch_is_due(manifest):
            try:
                await self.touch()
            except StorageError:
                _logger.warning("could not record the use of session %s", self.key, exc_info=True)
        return manifest

    async def touch(self) -> None:
        await self.edit(lambda manifest: replace(manifest) if self._touch_is_due(manifest) else None)

    async def edit(
        self,
        change: Change,
        *,
        incarnation: str | None = None,
        creates: bool = False,
        if_revision: str | None = None,
        held: Callable[[], None] | None = None,
    ) -> Manifest:
        """Commit `change`, uninterrupted by cancellation; then delete the blobs that the manifest stopped naming.

        `change` returns `None` for nothing to write. `creates`: a session that does not exist begins with this edit.
        `incarnation`: the life under which the blobs that `change` names are written. `held` is called once the edit
        holds, whether or not the caller is told of it.
        """
        self._context.check_open()
        bound = self._incarnation

        async def commit() -> Manifest:
            return await self._edit(change, bound, incarnation, creates, if_revision, held)

        return await self._context.with_room(partial(self._context.commits.uninterrupted, commit))

    async def commit_images(
        self,
        images: Mapping[str, Ingested],
        tickets: Tickets,
        if_revision: str | None = None,
        replaces: str | None = None,
    ) -> dict[str, ImageRecord]:
        """Blobs first, then one edit that names them all; a failure leaves neither."""
        self._context.check_open()
        bound = self._incarnation
        while True:
            try:
                commit = partial(self._commit_images, images, bound, tickets, if_revision, replaces)
                return await self._context.with_room(commit)
            except _OtherLifeError:
                if bound is not None:
                    raise
                # the session began or ended while the blobs were written: write them under the life it has now

    async def bury(self) -> None:
        """Remove this life with all that it holds: a tombstone first, so that a late writer sees it, then the blobs.

        What was being uploaded when this was called does not bring the session back.
        """
        self._context.check_open()
        bound = self._incarnation
        tickets = self._context.manifests.order(self.key).draw_all()

        async def commit() -> None:
            try:
                tombstone = await self._edit(Manifest.as_tombstone, bound)
            except SessionNotFoundError:
                tickets.spend(purge=True)
                raise
            tickets.spend(purge=True)
            await self._context.manifests.clear_away(tombstone)

        await self._context.commits.uninterrupted(commit)

    async def give_away(self, change: Change) -> Manifest:
        """Commit `change`; where it leaves a tombstone, remove this life, but let what is being uploaded begin anew."""
        self._context.check_open()
        bound = self._incarnation

        async def commit() -> Manifest:
            manifest = await self._edit(change, bound)
            if manifest.buried:
                await self._context.manifests.clear_away(manifest)
            return manifest

        return await self._context.commits.uninterrupted(commit)

    def _living(self, manifest: Manifest | None, bound: str | None) -> Manifest:
        return self._context.lifetime.living(manifest, self._context.now(), bound)

    def _touch_is_due(self, manifest: Manifest) -> bool:
        now = self._context.clock()
        # one that was used in the future shows its uses by when it was written: see `Sweep`
        last = manifest.used_at if manifest.used_at <= now else manifest.updated_at
        return abs(now - last) >= self._context.lifetime.touch_after

    async def _edit(
        self,
        change: Change,
        bound: str | None,
        incarnation: str | None = None,
        creates: bool = False,
        if_revision: str | None = None,
        held: Callable[[], None] | None = None,
    ) -> Manifest:
        """`bound` is the life that the call belongs to, `incarnation` the one that its blobs are written under."""

        def checked(found: Manifest | None) -> Manifest | None:
            try:
                manifest = self._living(found, bound)
            except SessionNotFoundError:
                if not creates or bound is not None:
                    raise
                manifest = Manifest.new(self.key, incarnation or _keys.new_incarnation(), self._context.clock())
            if incarnation not in (None, manifest.incarnation):
                raise _OtherLifeError("The session ended while this was being stored. Start a new one.")
            if if_revision is not None and if_revision != manifest.revision:
                raise RevisionConflictError(
                    "The session was changed by somebody else since you read it. Read `info()` again and decide anew."
                )
            changed = change(manifest)
            if changed is None or changed is manifest:
                return changed
            return within(changed, self._context.limits, before=manifest, now=self._context.now())

        edit = await self._context.manifests.edit(self.key, checked, written=held)
        if edit.after is None:
            return self._living(edit.before, bound)
        if edit.before is None or edit.before.incarnation != edit.after.incarnation:
            self._context.created.add(self.key)
        self._incarnation = edit.after.incarnation
        self._context.settled(edit.after.named_blobs())
        await self._context.discard(edit.dropped_blobs())
        return edit.after

    async def _commit_images(
        self,
        images: Mapping[str, Ingested],
        bound: str | None,
        tickets: Tickets,
        if_revision: str | None,
        replaces: str | None,
    ) -> dict[str, ImageRecord]:
        found = await self._context.manifests.read(self.key)
        now = self._context.clock()
        try:
            present = self._living(found, bound)
        except SessionNotFoundError:
            if bound is not None:
                raise
            present = Manifest.new(self.key, _keys.new_incarnation(), now)
        incarnation = present.incarnation
        records = {
            slot: new_record(image, _keys.new_blob(incarnation, image.digest), now) for slot, image in images.items()
        }

        def change(manifest: Manifest) -> Manifest:
            if not manifest.revision and all(tickets.fate(slot) == "purged" for slot in records):
                raise SessionNotFoundError("The session was deleted while this was being stored. Start a new one.")
            for slot, record in records.items():
                match tickets.fate(slot):
                    case "current":
                        manifest.check_replaces(slot, record.digest, replaces)
                        manifest = manifest.with_image(slot, record, now)
                    case "superseded":
                        manifest = manifest.with_superseded(slot, record, now)
                    case "purged":
                        pass
            return manifest

        # so that what can't be kept is not written either; the edit looks again
        within(change(present), self._context.limits, before=present, now=self._context.now())
        written = {blob: size for record in records.values() for blob, size in sizes_of(record).items()}

        async def commit() -> None:
            self._context.writing(written)
            try:
                await self._write_blobs(images, records)
                manifest = await self._edit(change, bound, incarnation, True, if_revision, tickets.spend)
            except (*NOT_WRITTEN, QuotaExceededError, RevisionConflictError, SessionNotFoundError):
                await self._context.discard(written)
                raise
            named = manifest.named_blobs()
            for slot, record in records.items():
                if record.blob in named and (image := images[slot].image) is not None:
                    self._context.cache.put(record.blob, image)
            await self._context.discard({blob: size for blob, size in written.items() if blob not in named})

        await self._context.take_room(sum(written.values()))
        await self._context.commits.uninterrupted(commit)
        return records

    async def _write_blobs(self, images: Mapping[str, Ingested], records: Mapping[str, ImageRecord]) -> None:
        for slot, record in records.items():
            await self._context.blobs.put(record.blob, images[slot].data)
            await self._context.blobs.put(_keys.thumbnail(record.blob), images[slot].thumbnail)


def new_record(image: Ingested, blob: str, now: datetime) -> ImageRecord:
    return ImageRecord(
        digest=image.digest,
        media_type=image.media_type,
        width=image.width,
        height=image.height,
        mode=image.mode,
        has_alpha=image.has_alpha,
        orientation=image.orientation,
        byte_size=len(image.data),
        thumbnail_size=len(image.thumbnail),
        stored_at=now,
        blob=blob,
        source_name=image.source_name,
        verbatim=image.verbatim,
        thumbnail_digest=image.thumbnail_digest,
    )
