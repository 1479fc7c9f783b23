"""The open pages of a session: what is kept is shown, in all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from gradio.utils import get_upload_folder

from async_sessions._gradio import cache
from async_sessions._gradio.html import warn
from async_sessions._gradio.keeping import Keeping
from async_sessions._gradio.payloads import path_of
from async_sessions._gradio.question import GoneError
from async_sessions._gradio.seen import EMPTY, VALUE, mark, page_of
from async_sessions.errors import SessionNotFoundError, StorageError

if TYPE_CHECKING:
    import gradio as gr

    from async_sessions._gradio.listeners import Payload
    from async_sessions.records import ImageRecord
    from async_sessions.session import Session

_REVISION: Final = " revision"  # what `Seen` knows it by
_UNSET: Final = object()  # of a value that the session does not have

_logger = logging.getLogger("async_sessions")


class Tabs(Keeping):
    """What is shown of a session is what its pages have seen."""

    async def is_outdated(self, request: gr.Request, slot: str, payload: Payload | None) -> bool:
        """Whether the page shows the upload that was refused last, or a copy of what the slot does not hold any more.

        A copy is shown after what the user chose if it was on its way to the page. Another choice of the user's by now
        is neither.
        """
        refused = self._refused.pop((page_of(request), slot), None)
        path = "" if payload is None else path_of(payload)
        if path == refused:
            return True
        if (session := await self._visits.session(request)) is None:
            return False
        blob = self._shown.get((session.key, slot, path))
        if blob is None or not cache.is_copy_of(
            path, blob, folder=get_upload_folder(), key=await self._visits.signer()
        ):
            return False
        held = (await self._visits.images_of(request)).get(slot)
        return held is None or held.blob != blob

    async def unseen_revision(self, request: gr.Request) -> str | None:
        """The session's revision (`EMPTY` where it was cleared), unless the page `saw_revision`. It counts as use."""
        if (session := await self._visits.session(request)) is None:
            return None
        found = await self._visits.found(request)
        if found is None and session.key not in self._visits.cleared:
            return None  # it has expired: what the page shows can be stored again
        revision = EMPTY if found is None else found[1].revision
        if self._seen.seen(request, session.key, _REVISION) == revision:
            if found is not None:
                await _touch(session)
            return None
        return revision

    async def saw_revision(self, request: gr.Request, revision: str) -> None:
        if (session := await self._visits.session(request)) is not None:
            self._seen.saw(request, session.key, _REVISION, revision)

    async def keep_shown(
        self, request: gr.Request, session: Session, shown: Mapping[str, Payload], values: Mapping[str, Any]
    ) -> dict[str, ImageRecord]:
        """The images that the page shows, by slot, as `session` keeps them.

        What has expired is stored again, of `values` too what was kept: none goes but with all else. Where another tab
        has replaced what this page shows, that stays as it is. `UndecidedError` where what it shows was never kept, and
        would go over an image that it has not shown.
        """
        state, seen = None, self._seen.all_of(session.key)
        try:
            state = (await session.info()).state
        except SessionNotFoundError:
            self._begins(session, seen)
        kept = {
            name: value
            for name, value in values.items()
            if name not in (state or ()) and self._seen.shows(request, session.key, VALUE + name, mark(value))
        }
        if kept or state is None:
            await session.update_state(**kept)
        return {slot: await self._kept_shown(request, session, slot, payload) for slot, payload in shown.items()}

    async def _kept_shown(self, request: gr.Request, session: Session, slot: str, payload: Payload) -> ImageRecord:
        async with self._seen.turn(request, slot):
            info, path = await session.info(), path_of(payload)
            held = info.images.get(slot)
            if held is None or not await self._shows(session, slot, path, held):
                seen = self._seen.seen(request, session.key, slot)
                for record in (each.record for each in info.recent if held is not None and each.slot == slot):
                    if record.digest == seen and await self._shows(session, slot, path, record):
                        return record
                try:
                    held = await self._put(request, session, slot, payload)
                except StorageError as error:
                    if held is None or not isinstance(error.__cause__, FileNotFoundError):
                        raise
                    # after a restart: most likely an upload that Gradio has removed since the slot holds it
                    if seen is not None:
                        raise GoneError(slot) from error
            self._seen.answered(request, session.key, slot)
            self._seen.saw(request, session.key, slot, held.digest)
            return held

    async def _shows(self, session: Session, slot: str, path: str, record: ImageRecord) -> bool:
        if self._shown.get((session.key, slot, path)) == record.blob:
            return True
        if cache.is_copy_of(path, record.blob, folder=get_upload_folder(), key=await self._visits.signer()):
            return True
        return await cache.holds(path, record)  # an editor uploads anew what it shows

    async def restored(
        self, request: gr.Request, slots: Iterable[str], names: Iterable[str] = (), *, news: bool = False
    ) -> tuple[dict[str, str | None], dict[str, Any]]:
        """What to show: paths of copies of the images, `None` where there is none, and values. It counts as use.

        What is damaged is as if it was not there, but for a notice. What the user has changed on this page meanwhile is
        left out, and with `news` also what this page has seen; one that is not known (the server was started
        anew) has seen all.
        """
        memory, values = self._seen, {VALUE + name: name for name in names}
        acts = memory.acts(request, (*slots, *values))
        if (session := await self._visits.session(request)) is None:
            return {}, {}
        images, state = await self._held(request)
        holds: dict[str, Any] = {slot: images[slot].digest if slot in images else EMPTY for slot in slots}
        holds |= {value: mark(state[name]) if name in state else _UNSET for value, name in values.items()}
        shown = {name for name, what in holds.items() if what is not _UNSET}
        if news:
            shown -= memory.asked(request, session.key).keys()
            shown = {name for name in shown if memory.knows(request, session.key, name)}
            shown = {name for name in shown if memory.seen(request, session.key, name) != holds[name]}
        paths: dict[str, str | None] = {}
        for slot in shown & set(slots):
            try:
                paths[slot] = await self._path(session, slot, images.get(slot))
            except StorageError as error:
                paths[slot] = None
                warn(f"The {slot} image can't be shown", error)
        now = memory.acts(request, holds)
        for name in holds:
            if now[name] != acts[name]:
                paths.pop(name, None)
                shown.discard(name)
            elif name in shown or not memory.knows(request, session.key, name):
                memory.saw(request, session.key, name, holds[name])
        return paths, {values[name]: state[values[name]] for name in shown & values.keys()}

    async def _held(self, request: gr.Request) -> tuple[Mapping[str, ImageRecord], Mapping[str, Any]]:
        if (found := await self._visits.found(request)) is None:
            return {}, {}
        session, info = found
        await _touch(session)
        return info.images, info.state

    async def _path(self, session: Session, slot: str, record: ImageRecord | None) -> str | None:
        if record is None:
            return None
        path = await self._visits.copy(session, record, slot)
        self._shown[session.key, slot, path] = record.blob
        return path

    def forget_guest(self, key: str) -> None:
        """Of a session that nobody comes back to: all that its page has seen."""
        self._seen.forget(key)

    def forget(self, key: str) -> list[str]:
        """Of a session that is over: the values that its pages have seen; returns the paths that only they showed."""
        self._seen.forget(key, VALUE)
        others = {path for known, _, path in self._shown if known != key}  # Gradio has one file for equal uploads
        return [path for known, _, path in self._shown if known == key and path not in others]


async def _touch(session: Session) -> None:
    try:
        await session.touch()
    except (SessionNotFoundError, StorageError) as error:
        _logger.warning("the use of session %s is not recorded: %s", session.key, error)
