"""What is put together piece by piece and is there whole, with one commit, or not at all.

`Draft` is a session that begins so, `Addition` comes to one that there is.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions._ingest import ImageSource, ingest
from async_sessions._life import NOT_WRITTEN, Life, new_record
from async_sessions._quota import check_size
from async_sessions.errors import (
    QuotaExceededError,
    RevisionConflictError,
    SessionNotFoundError,
    StorageError,
    StoreClosedError,
)
from async_sessions.records import JSON, KIB, ImageRecord, JobInfo, Limits, OutputRecord, check_output, check_state
from async_sessions.session import Session

if TYPE_CHECKING:
    from async_sessions._context import StoreContext
    from async_sessions._manifest import Manifest
    from async_sessions._tasks import Tickets

_MAX_ENTRY: Final = 128 * KIB  # twice what a job's parameters may take

_logger = logging.getLogger("async_sessions")


class _Pieces:
    """Blobs of one life of a session that no manifest names yet.

    They are stored one at a time and no more is held in memory than the one in hand. From the first to the commit half
    of the store's `grace` may pass: what no session names is an orphan after it.
    """

    def __init__(self, context: StoreContext, life: Life, incarnation: str) -> None:
        self.limits = context.limits
        self._context = context
        self._life = life
        self._incarnation = incarnation
        self._last_moment = context.clock() + context.lifetime.grace / 2
        self._written: dict[str, int] = {}  # sizes of the blobs that no session names yet
        self._pictures = 0
        self._tried = False
        self._images: dict[str, ImageRecord] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(key={self._life.key!r})"

    async def store_image(
        self, image: ImageSource, slot: str | None, *, name: str | None = None, limits: Limits | None = None
    ) -> ImageRecord:
        """Keep `image` in `slot`, or in none, where only jobs name it; see `Session.store_image`.

        `limits` take the place of the store's.
        """
        context = self._context
        context.check_open()
        if slot is not None:
            context.check_slot(slot)
        limits = limits or context.limits
        async with ingest({"": image}, name=name, limits=limits, limiter=context.cpu, budget=context.budget) as found:
            ingested = found[""]
            record = new_record(ingested, _keys.new_blob(self._incarnation, ingested.digest), context.clock())
            self._check(record.byte_size + record.thumbnail_size, images=1)
            await self._write(record.blob, ingested.data, record.byte_size)
            await self._write(_keys.thumbnail(record.blob), ingested.thumbnail, record.thumbnail_size)
            self._pictures += 1
        if slot is not None:
            self._images[slot] = record
        return record

    async def discard(self) -> None:
        """Delete what was written, unless a session names it."""
        if self._written:
            try:
                await self._context.commits.uninterrupted(self._undo)
            except (StorageError, StoreClosedError):
                _logger.warning("could not delete %r; a later sweep will", self, exc_info=True)

    async def _undo(self) -> None:
        raise NotImplementedError

    def _try(self) -> None:
        if self._context.clock() > self._last_moment:
            raise StorageError("Writing the session took so long that its first parts may be gone. Try again.")
        self._tried = True
        self._context.writing(self._written)

    def _check(self, size: int, *, images: int = 0) -> None:
        """Refuse a piece before it is written; the commit would make room for it and drop others."""
        check_size(sum(self._written.values()) + size, self._pictures + images, self._context.limits)

    async def _write(self, blob: str, data: bytes | AsyncIterable[bytes], size: int) -> None:
        await self._context.write(blob, data, size)
        self._written[blob] = size


class Draft(_Pieces):
    """A session that nobody sees before `commit`; left without one, nothing of it stays. From `SessionStore.draft`.

    Pieces are stored one at a time and no more is held in memory than the piece in hand. From the first piece to the
    commit half of the store's `grace` may pass: what no session names is an orphan after it. `QuotaExceededError` where
    they are more than one session may keep, or than the store has room for: no piece makes room for another.
    """

    def __init__(self, context: StoreContext, state: Mapping[str, JSON]) -> None:
        self._id = _keys.new_session_id()
        self.key = _keys.key_of_id(self._id)
        super().__init__(context, Life(context, self.key, None), _keys.new_incarnation())
        self._begun = False
        self._state = dict(state)
        self._jobs: dict[str, JobInfo] = {}

    async def store_output(
        self, data: AsyncIterable[bytes], *, name: str, media_type: str, digest: str, byte_size: int
    ) -> OutputRecord:
        """Keep a job's result. `data` raises what it likes unless it has that size and SHA-256.

        Where the device is full it is read anew after a sweep, unless it is an iterator, which can't be. A name and a
        media type have to be such as `Session.store_output` takes.
        """
        check_output(name, media_type)
        self._context.check_open()
        self._check(byte_size)
        record = OutputRecord(
            name=name,
            media_type=media_type,
            digest=digest,
            byte_size=byte_size,
            stored_at=self._context.clock(),
            blob=_keys.new_blob(self._incarnation, digest),
        )
        await self._write(record.blob, data, byte_size)
        return record

    def add_job(self, job: JobInfo) -> None:
        """Add the entry of a job that is over; what it names was stored here.

        `QuotaExceededError` where those are more than a session remembers, or where one is larger than a job can be
        that was submitted: the manifest is read at every step, and what it costs is paid by all.
        """
        self._jobs[job.id] = job
        if len(self._jobs) > (most := self._context.limits.keep_jobs):
            raise QuotaExceededError(f"This store remembers {most} jobs of a session. Leave the others out.")
        if len(msgspec.json.encode(job)) > _MAX_ENTRY:
            raise QuotaExceededError(f"A job's entry may take {_MAX_ENTRY:,} bytes as JSON. Leave that job out.")

    async def commit(self) -> Session:
        """Begin: from now on the session is there, whole."""
        if self._begun:
            raise RuntimeError("This draft has begun; what comes after is for its session.")
        self._try()
        await self._life.edit(self._whole, incarnation=self._incarnation, creates=True, held=self._begin)
        return Session(self._context, self.key, session_id=self._id, incarnation=self._incarnation)

    async def _undo(self) -> None:
        if self._tried and not self._begun:
            try:
                await self._life.bury()  # what failed may have happened, and nobody knows its session's id
            except SessionNotFoundError:
                pass
            else:
                return
        await self._context.discard(self._written)

    def _begin(self) -> None:
        self._begun = True
        self._written.clear()

    def _whole(self, manifest: Manifest) -> Manifest:
        return replace(manifest, images=self._images, state=self._state, jobs=self._jobs)


class Addition(_Pieces):
    """Images and values for a session that there is; whatever they replace can be put back. From `adding`."""

    def __init__(
        self,
        context: StoreContext,
        life: Life,
        incarnation: str,
        tickets: Tickets,
        state: Mapping[str, JSON],
        replaces: Mapping[str, str],
    ) -> None:
        super().__init__(context, life, incarnation)
        self._tickets = tickets
        self._state = state
        self._replaces = replaces

    async def commit(self) -> None:
        """Put all in its place. What was uploaded to a slot since `adding` was called stays there.

        `QuotaExceededError` where the session has no room for it, `SessionNotFoundError` where it ended meanwhile,
        `RevisionConflictError` where a slot holds neither the image whose digest is given for it nor the one to come.
        """
        self._try()
        try:
            manifest = await self._life.edit(self._added, incarnation=self._incarnation, held=self._tickets.spend)
        except (*NOT_WRITTEN, QuotaExceededError, RevisionConflictError, SessionNotFoundError):
            self._tried = False
            raise
        named = manifest.named_blobs()
        self._written = {blob: size for blob, size in self._written.items() if blob not in named}
        self._tried = False

    async def _undo(self) -> None:
        if not self._tried:  # else the session may name them by now
            await self._context.discard(self._written)

    def _added(self, manifest: Manifest) -> Manifest:
        now = self._context.clock()
        for slot, record in self._images.items():
            held = manifest.images.get(slot)
            match self._tickets.fate(slot):
                case "current" if held is not None and held.digest == record.digest:
                    pass
                case "current":
                    manifest.check_replaces(slot, record.digest, self._replaces.get(slot))
                    manifest = manifest.with_image(slot, record, now)
                case "superseded":
                    manifest = manifest.with_superseded(slot, record, now)
                case "purged":
                    pass
        manifest = manifest.with_state(self._state)
        check_state(manifest.state, self._context.limits.max_state_bytes)
        return manifest


@asynccontextmanager
async def drafted(context: StoreContext, state: Mapping[str, JSON]) -> AsyncIterator[Draft]:
    """A draft with that state. `QuotaExceededError` and what else `check_state` raises."""
    await context.manifests.code(partial(check_state, state, context.limits.max_state_bytes))
    draft = Draft(context, state)
    try:
        yield draft
    finally:
        with anyio.CancelScope(shield=True):
            await draft.discard()


@asynccontextmanager
async def adding(
    session: Session, slots: Iterable[str], state: Mapping[str, JSON], replaces: Mapping[str, str]
) -> AsyncIterator[Addition]:
    """`async with adding(session, ["start"], {}, {}) as addition`: images for these slots, and values; see `Addition`.

    A session that has not begun begins, if its handle lets it. `QuotaExceededError` and what else `check_state` raises.
    """
    context, life = session._context, session._life
    tickets = session._draw(slots)
    await context.manifests.code(partial(check_state, state, context.limits.max_state_bytes))
    manifest = await life.edit(lambda manifest: None if manifest.revision else manifest.with_state({}), creates=True)
    addition = Addition(context, life, manifest.incarnation, tickets, state, replaces)
    try:
        yield addition
    finally:
        with anyio.CancelScope(shield=True):
            await addition.discard()
