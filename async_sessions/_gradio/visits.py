"""What a page's requests do with the store: find their session, keep an upload, show what is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakValueDictionary

import anyio
import gradio as gr
from cachetools import LRUCache
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from async_sessions import _keys
from async_sessions._gradio import cache
from async_sessions._gradio.identity import Tokens, gradio_user, tokens_in
from async_sessions._gradio.lifespan import Held, take_over
from async_sessions._gradio.listeners import make_room
from async_sessions._gradio.seen import page_of
from async_sessions._gradio.tabs import Tabs
from async_sessions.asgi import SessionCookie, stored_signer
from async_sessions.errors import (
    AsyncSessionsError,
    JobNotFoundError,
    SessionNotFoundError,
    StorageError,
)

if TYPE_CHECKING:
    from async_sessions._merge import Merged
    from async_sessions.asgi import CookieSigner, Scope
    from async_sessions.dispatch.base import Dispatcher
    from async_sessions.records import ImageRecord, OutputRecord, SessionInfo
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

PageKey: TypeAlias = tuple[str, str]

_ANSWER_WITHIN = 5.0  # seconds that a page waits for a store that is being opened
_REMEMBERED = 4096  # sessions of which the log has told what they left

_logger = logging.getLogger("async_sessions")


class Visits:
    """Requests, each to the session of whoever sent it. The store and the dispatcher start with the first."""

    def __init__(
        self,
        store: SessionStore,
        dispatcher: Dispatcher | None,
        signer: CookieSigner | None,
        *,
        with_tokens: bool,
        embedded: bool,
        merge_at_login: bool,
    ) -> None:
        self.store = store
        self.tokens = Tokens(self.mint) if with_tokens else None
        self.app: Any = None  # Gradio's, once it runs
        self._embedded = embedded
        self._merge_at_login = merge_at_login
        self._merges: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()  # by session key; one at a time
        self.cleared: LRUCache[str, bool] = LRUCache(_REMEMBERED)  # keys of sessions that their users have ended
        self._left: LRUCache[tuple[str, str], Merged] = LRUCache(_REMEMBERED)  # as the log tells, once
        self.held = Held([store] if dispatcher is None else [store, dispatcher])
        self._signer = signer
        self._dispatcher = dispatcher
        self.tabs = Tabs(self)

    async def signer(self) -> CookieSigner:
        if self._signer is None:
            self._signer = await stored_signer(self.store.blobs)
        return self._signer

    def cookie_middleware(self) -> Middleware:
        return Middleware(SessionCookie, signer=self.signer, embedded=self._embedded)

    async def session(self, request: gr.Request) -> Session | None:
        """A handle, which reads nothing: what is stored through it is ordered by when it was asked for."""
        if self.app is None and request.request is not None:  # reload mode runs no lifespan
            self.note_app(request.request.scope.get("app"))
        with anyio.move_on_after(_ANSWER_WITHIN) as waiting:
            await self.held.ensure_started()
            if request.username:
                return self.store.session_of(request.username)
            return await self._anonymous(request)
        if waiting.cancelled_caught:
            raise StorageError("The store did not answer.")
        return None

    async def page(self, request: gr.Request) -> PageKey:
        """What tells an open page from others: what it says of itself, and whose session it is.

        The first a client may say as it likes, so it opens nothing of a page with a session; the second is "" without
        one, where a random name that only the page knows is all there is.
        """
        session = await self.session(request)
        return page_of(request), "" if session is None else session.key

    async def mint(self, request: gr.Request, token: object) -> Any:
        """A token for a page that shows none of ours though nothing else tells who it is, or an older secret's."""
        try:
            signer = await self.signer()
        except StorageError as error:
            _logger.warning("no token for a page: %s", error)
            return gr.skip()
        if request.username or signer.session_id(request.cookies, secure=self._is_secure(request)):
            return gr.skip()
        tokens = tokens_in(token)
        signed = signer.sign_token(signer.id_of_token(tokens.get(signer.name)) or _keys.new_session_id())
        if tokens.get(signer.name) == signed:
            return gr.skip()
        return list({**tokens, signer.name: signed}.items())

    def note_app(self, app: Any) -> None:
        self.app = app
        blocks = getattr(app, "blocks", None)
        if blocks is not None:
            make_room(blocks)
            take_over(app, self.held)
        if getattr(blocks, "ssr_mode", False):
            _logger.warning(
                "With ssr_mode Gradio writes a browser's cookies into its page: scripts on the page can read them."
            )

    async def user_of(self, scope: Scope) -> str | None:
        return await gradio_user(scope, self.app)

    async def _anonymous(self, request: gr.Request) -> Session | None:
        signer = await self.signer()
        session_id = signer.session_id(request.cookies, secure=self._is_secure(request))
        if session_id is None and self.tokens is not None:
            session_id = signer.id_of_token(tokens_in(self.tokens.of(request)).get(signer.name))
        return None if session_id is None else self.store.session(session_id)

    def _is_secure(self, request: gr.Request) -> bool:
        return self._embedded or str(getattr(request, "url", "")).startswith("https:")

    async def _take_along(self, request: gr.Request, session: Session) -> None:
        """Give a user who has logged in what this browser's own session holds."""
        if (source := await self._anonymous(request)) is None:
            return
        lock = self._merges.setdefault(source.key, anyio.Lock())
        async with lock:
            try:
                merged = await self.store.merge(source, into=session)
            except AsyncSessionsError as error:
                _logger.warning("what session %s holds is not taken along to %s: %s", source.key, session.key, error)
                return
        known = source.key, session.key
        if merged.left and self._left.get(known) != merged:
            self._left[known] = merged
            _logger.warning("%s of session %s can't go to %s yet", ", ".join(merged.left), source.key, session.key)

    async def found(self, request: gr.Request) -> tuple[Session, SessionInfo] | None:
        """The request's session and what it holds; `None` for one that has not begun, or is over."""
        session = await self.session(request)
        if session is not None and request.username and self._merge_at_login:
            await self._take_along(request, session)
        try:
            if session is None:
                return None
            info = await session.info()
        except SessionNotFoundError:
            return None
        self.cleared.pop(session.key, None)
        return session, info

    async def images_of(self, request: gr.Request) -> Mapping[str, ImageRecord]:
        """The images of the request's session, by slot."""
        found = await self.found(request)
        return {} if found is None else found[1].images

    async def copy(self, session: Session, record: ImageRecord | OutputRecord, name: str) -> str:
        return await cache.copy_of(session, record, name, folder=get_upload_folder(), key=await self.signer())

    async def copy_result(self, session: Session, record: OutputRecord) -> str:
        return await self.copy(session, record, re.sub(r"\.\w+$", "", record.name))

    async def clear(self, request: gr.Request) -> None:
        """Remove the session with all that it holds, and what was uploaded to it or copied for it in Gradio's cache.

        Its runs are cancelled. It begins anew with whatever the user does next.
        """
        if (found := await self.found(request)) is None:
            return
        session, info = found
        for job in info.jobs.values():
            if self._dispatcher is not None and job.unfinished:
                with suppress(JobNotFoundError):
                    await (await self._dispatcher.job(session, job.id)).cancel()
        self.cleared[session.key] = True
        await session.delete()
        await self.remove_uploads(self.tabs.forget(session.key))
        await cache.forget(_copied(info), folder=get_upload_folder(), key=await self.signer())

    async def remove_uploads(self, paths: Iterable[str]) -> None:
        """Remove files that were uploaded, with what was hidden in them; none that the app itself shows to everybody.

        A path is whatever a browser says.
        """
        if (blocks := getattr(self.app, "blocks", None)) is not None:
            everybodys = {path for block in blocks.blocks.values() for path in getattr(block, "keep_in_cache", ())}
            uploads = [path for path in paths if path in blocks.upload_file_set and path not in everybodys]
            await cache.remove_uploads(uploads, folder=get_upload_folder())


def _copied(info: SessionInfo) -> Iterable[str]:
    """What Gradio's cache may have copies of."""
    images = [*info.images.values(), *(recent.record for recent in info.recent)]
    for job in info.jobs.values():
        images += job.inputs.values()
        yield from (record.blob for record in job.outputs.values())
    for record in images:
        yield from (record.blob, cache.drawing(record.digest))
