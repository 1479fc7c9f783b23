"""What users do on the open pages of a session: it is kept, and nothing that a page has not seen is undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from cachetools import LRUCache

from async_sessions._gradio import cache
from async_sessions._gradio.payloads import brief, path_of
from async_sessions._gradio.question import Conflict, UndecidedError, UnseenError, question_html
from async_sessions._gradio.seen import EMPTY, VALUE, Seen, mark, page_of
from async_sessions.errors import (
    ImageRejectedError,
    QuotaExceededError,
    RevisionConflictError,
    SessionNotFoundError,
    StorageError,
)

if TYPE_CHECKING:
    from async_sessions._gradio.listeners import Payload
    from async_sessions._gradio.visits import Visits
    from async_sessions.records import ImageRecord
    from async_sessions.session import Session

_REMEMBERED: Final = 4096  # images on open pages, of which it is known what the session holds


class Keeping:
    """By `name` and slot, for the page that sent a request."""

    def __init__(self, visits: Visits) -> None:
        self._visits = visits
        self._seen = Seen()
        # by session key, slot and path: the blob; by page and slot: the path
        self._shown: LRUCache[tuple[str, str, str], str] = LRUCache(_REMEMBERED)
        self._refused: LRUCache[tuple[str, str], str] = LRUCache(_REMEMBERED)

    async def keep(self, request: gr.Request, slot: str, payload: Payload) -> None:
        """Store an upload. Raises what `store_image` does; `ImageRejectedError` for a payload without a file.

        `UndecidedError` where the slot holds an image by now that this page has not shown.
        """
        self._seen.act(request, slot)
        async with self._seen.turn(request, slot):
            if (session := await self._visits.session(request)) is None:
                gr.Warning("This image is not kept: your browser sends no cookie. Allow cookies for this site.")
                return
            self._seen.answered(request, session.key, slot)
            path = path_of(payload)
            self._shown.setdefault((session.key, slot, path), EMPTY)  # it goes with the session
            try:
                held = (await self._images(request, session)).get(slot)
                if held is None or not await cache.holds(path, held):  # an editor uploads what it is made to show
                    held = await self._put(request, session, slot, payload)
            except (ImageRejectedError, QuotaExceededError):
                self._refused[page_of(request), slot] = path
                raise
            self._seen.saw(request, session.key, slot, held.digest)

    async def _put(self, request: gr.Request, session: Session, slot: str, payload: Payload) -> ImageRecord:
        """Store an upload; over an image that this page has not shown only after its user was asked."""
        path = path_of(payload)
        while True:
            seen = self._seen.seen(request, session.key, slot)
            try:
                record = await session.store_image(Path(path), slot, name=payload.get("orig_name"), replaces=seen)
            except RevisionConflictError:
                if (other := await _image(session, slot)) is None:
                    continue  # it is gone again
                try:
                    thumbnail = await (await session.read_record(other)).thumbnail()
                except StorageError:
                    thumbnail = None
                self._seen.ask(request, session.key, slot, Conflict(slot, brief(payload), other, thumbnail))
                self._seen.saw(request, session.key, slot, other.digest)
                raise UndecidedError(question_html(self._seen.asked(request, session.key).values())) from None
            self._shown[session.key, slot, path] = record.blob
            return record

    async def question(self, request: gr.Request, revision: str | None = None) -> str:
        """About the uploads of this page that are not kept until its user says so; see `question_html`."""
        session = await self._visits.session(request)
        return question_html(() if session is None else self._seen.asked(request, session.key).values(), revision)

    async def answered(self, request: gr.Request, slot: str) -> Payload | None:
        """The upload that waited for this answer, if one did."""
        session = await self._visits.session(request)
        conflict = None if session is None else self._seen.answered(request, session.key, slot)
        return None if conflict is None else conflict.mine

    def seen(self, request: gr.Request, session: Session, slots: Iterable[str]) -> dict[str, str]:
        """The digest of what this page has shown last, `EMPTY` for no image, by slot; where it is known."""
        seen = {slot: self._seen.seen(request, session.key, slot) for slot in slots}
        return {slot: digest for slot, digest in seen.items() if digest is not None}

    async def put_back(self, request: gr.Request, session: Session, digest: str, slot: str) -> None:
        """`Session.restore_recent`, but `UnseenError` over an image that this page has not shown.

        It is shown then: on the panel, if no component of the page has that slot.
        """
        self._seen.act(request, slot)
        async with self._seen.turn(request, slot):
            seen = self._seen.seen(request, session.key, slot)
            try:
                record = await session.restore_recent(digest, slot, replaces=seen)
            except RevisionConflictError:
                if (held := await _image(session, slot)) is not None:
                    self._seen.saw(request, session.key, slot, held.digest)
                raise UnseenError(slot) from None
            self._seen.saw(request, session.key, slot, record.digest)

    async def remove(self, request: gr.Request, slot: str) -> None:
        """Empty a slot. `UnseenError` where it holds an image by now that this page has not shown."""
        self._seen.act(request, slot)
        async with self._seen.turn(request, slot):
            if (session := await self._visits.session(request)) is None:
                return
            self._seen.answered(request, session.key, slot)
            while not await self._removed(request, session, slot):
                pass
            self._seen.saw(request, session.key, slot, EMPTY)

    async def _removed(self, request: gr.Request, session: Session, slot: str) -> bool:
        """Whether the slot is empty now; if not, something else of the session was changed in between."""
        try:
            info = await session.info()
        except SessionNotFoundError:
            return True
        held = info.images.get(slot)
        if held is not None and self._seen.seen(request, session.key, slot) not in (None, held.digest):
            self._seen.saw(request, session.key, slot, held.digest)
            raise UnseenError(slot)
        try:
            await session.clear_image(slot, if_revision=info.revision)
        except SessionNotFoundError:
            return True
        except RevisionConflictError:
            return False
        return True

    async def keep_value(self, request: gr.Request, name: str, value: Any) -> None:
        """Store a value, unless it is the one that was just shown to this page, or kept for it."""
        self._seen.act(request, VALUE + name)
        if (session := await self._visits.session(request)) is None:
            return
        if not self._seen.shows(request, session.key, VALUE + name, mark(value)):
            await self._images(request, session)
            await session.update_state(**{name: value})
            self._seen.saw(request, session.key, VALUE + name, mark(value))

    async def _images(self, request: gr.Request, session: Session) -> Mapping[str, ImageRecord]:
        """Those that it holds, by slot, before something is written to it."""
        seen = self._seen.all_of(session.key)
        if (found := await self._visits.found(request)) is None:
            self._begins(session, seen)
            return {}
        return found[1].images

    def _begins(self, session: Session, seen: Mapping[tuple[str, str], Any]) -> None:
        """Where it has expired its pages still show what they had `seen`: no image that another tab has removed.

        What is put there meanwhile is another matter, so that is from before it was found to be over.
        """
        if session.key not in self._visits.cleared:
            self._seen.lost(session.key, seen)


async def _image(session: Session, slot: str) -> ImageRecord | None:
    try:
        return (await session.info()).images.get(slot)
    except SessionNotFoundError:
        return None
