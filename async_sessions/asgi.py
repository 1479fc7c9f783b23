"""Which browser is this, and what may it see?

A signed cookie, set by a pure ASGI middleware, holds a session id and nothing else; ASGI apps serve that session's
images, and what its jobs made, to that browser.

The id is a secret: the cookie is HttpOnly, so no script on the page reads it, and SameSite=Lax, so no other site's form
spends it; where it is not, `SessionCookie` sees to it. Setting the cookie writes nothing to the store; a session begins
with its first image. Neither ids nor cookies are ever logged.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from async_sessions import _keys
from async_sessions._cookies import (
    COOKIE,
    MAX_AGE,
    Cookies,
    CookieSigner,
    Scope,
    SignerSource,
    attributes,
    comes_from_elsewhere,
    cookies_of,
    signer_of,
    stored_signer,
    without,
)
from async_sessions._serving import File, failure, in_one_piece, send_answer, send_file
from async_sessions.errors import (
    CorruptBlobError,
    InvalidKeyError,
    SessionNotFoundError,
    SlotEmptyError,
    StorageError,
    StoreClosedError,
)

if TYPE_CHECKING:
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = [
    "COOKIE",
    "MAX_AGE",
    "ASGIApp",
    "CookieSigner",
    "Cookies",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "SessionCookie",
    "SessionImages",
    "SessionOutputs",
    "stored_signer",
]

_SIGNER_WITHIN = 2.0  # seconds
_MINTED_ON = ("", "/", "/config")

_logger = logging.getLogger("async_sessions")


class SessionCookie:
    """Pure ASGI middleware: gives every browser that opens a page a signed session id, and renews it at each visit.

    Only the answer to a page (and to Gradio's `/config`) sets it, so that a page's parallel first requests can't
    mint several ids. `signer` is a `CookieSigner`, or an async function that returns one and is called when it is
    needed, such as `partial(stored_signer, store.blobs)`; while that fails with a `StorageError`, the app is served
    without cookies. Where the request came through TLS (`scheme`, in which a server that trusts its proxy has put what
    that said), or where `secure` says that they all do, the cookie is Secure and its name begins with `__Host-`: one
    without is nobody's then, since anybody on the network could have planted it.

    `embedded`: the app is shown in frames of other sites, over TLS. The cookie is `SameSite=None; Partitioned` then, so
    that each such site has a session of its own; and where another site's page sends the request itself, the app does
    not get to see it.
    """

    def __init__(self, app: ASGIApp, *, signer: SignerSource, secure: bool = False, embedded: bool = False) -> None:
        self._app = app
        self._signer = signer
        self._secure = secure or embedded
        self._embedded = embedded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._embedded and scope["type"] in ("http", "websocket") and comes_from_elsewhere(scope):
            await self._app(await self._without_cookie(scope), receive, send)
        elif not _opens_a_page(scope) or (cookie := await self._cookie(scope)) is None:
            await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, _sending(cookie, send))

    async def _cookie(self, scope: Scope) -> bytes | None:
        if (signer := await self._ask()) is None:
            return None
        secure = self._secure or scope.get("scheme") == "https"
        session_id = signer.session_id(cookies_of(scope["headers"]), secure=secure) or _keys.new_session_id()
        name = signer.name_of(secure=secure)
        return f"{name}={signer.sign(session_id)}; {attributes(secure=secure, embedded=self._embedded)}".encode()

    async def _without_cookie(self, scope: Scope) -> Scope:
        signer = await self._ask()
        if signer is None:
            headers = [each for each in scope["headers"] if each[0] != b"cookie"]
        else:
            headers = without(scope["headers"], [signer.name_of(secure=secure) for secure in (True, False)])
        return {**scope, "headers": headers}

    async def _ask(self) -> CookieSigner | None:
        signer = None
        try:
            with anyio.move_on_after(_SIGNER_WITHIN):  # a page without a cookie rather than no page
                signer = await signer_of(self._signer)
        except StorageError:
            _logger.warning("no session cookie: the signing secret can't be read", exc_info=True)
        return signer


class _SessionFiles:
    """Pure ASGI app: files of the session whose browser or user asks; what is in nobody's session is a 404."""

    def __init__(
        self,
        store: SessionStore,
        *,
        signer: SignerSource | None = None,
        identity: Callable[[Scope], str | Awaitable[str | None] | None] | None = None,
    ) -> None:
        if signer is None and identity is None:
            name = type(self).__name__
            raise TypeError(f"{name} has to know whose files it serves: give it `signer`, `identity` or both.")
        self._store = store
        self._signer = signer
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "http":
            await self._serve(scope, send)

    async def _file(self, session: Session, path: Sequence[str]) -> File | None:
        raise NotImplementedError

    async def _serve(self, scope: Scope, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        if scope["method"] not in ("GET", "HEAD"):
            await send_answer(send, failure(405, (b"allow", b"GET, HEAD")))
            return
        path = _path(scope).removeprefix("/").split("/")
        try:
            session = await self._session(scope)
            if session is None or (file := await self._file(session, path)) is None:
                await send_answer(send, failure(404))
            else:
                await send_file(scope, noted, file)
        except (SessionNotFoundError, SlotEmptyError, InvalidKeyError, CorruptBlobError):
            if started:
                raise  # the server breaks the connection, so that nobody takes the half for the whole
            await send_answer(send, failure(404))
        except (StorageError, StoreClosedError):
            if started:
                raise
            _logger.warning("a file can't be served", exc_info=True)
            await send_answer(send, failure(503, (b"retry-after", b"5")))

    async def _session(self, scope: Scope) -> Session | None:
        if self._identity is not None:
            found = self._identity(scope)
            if user := await found if inspect.isawaitable(found) else found:
                return self._store.session_of(user)
        if self._signer is None:
            return None
        secure = True if scope.get("scheme") == "https" else None  # None: a proxy may not say so
        session_id = (await signer_of(self._signer)).session_id(cookies_of(scope["headers"]), secure=secure)
        return None if session_id is None else self._store.session(session_id)


class SessionImages(_SessionFiles):
    """Pure ASGI app: `/start` is the image in the slot "start", `/start/thumbnail` its thumbnail (WebP).

    Mount it where you like, in Starlette, FastAPI or Gradio's `app_kwargs={"routes": [Mount("/images", app)]}`. The
    session is that of the user whom `identity` finds, your function from the ASGI scope to the user's name or `None`,
    async or not, as in `SessionStore.session_for`:

        SessionImages(store, identity=lambda scope: scope["session"].get("user"))  # Starlette's SessionMiddleware

    and where it finds none, or is not given, the one that the cookie of `SessionCookie` names, read with the same
    `signer`, a `CookieSigner` or an async function that returns one. Reading counts as use, and creates no session.
    Whatever is not in it, and whoever has no session, gets the same 404. Answers carry an ETag (so a browser that has
    the image gets a 304), serve ranges, and may be kept by the browser but by no shared cache. The file is sent as it
    is stored: turned as its EXIF says, which browsers do for JPEG and PNG.
    """

    async def _file(self, session: Session, path: Sequence[str]) -> File | None:
        slot, *part = path
        if part not in ([], ["thumbnail"]):
            return None
        image = await session.retrieve_stored(slot)
        record = image.record
        if not part:
            return File(f'"{record.digest}"', record.media_type, record.byte_size, image.stream)
        thumbnail = await image.thumbnail()
        return File(f'"{record.digest}.thumb"', "image/webp", len(thumbnail), partial(in_one_piece, thumbnail))


class SessionOutputs(_SessionFiles):
    """Pure ASGI app: `/<job id>/outputs/video` is the output "video" of one of the session's jobs. Mount it at `/jobs`.

    Whose session (`signer`, `identity`), and what the answers are: see `SessionImages`. So a browser can seek in a
    video.
    """

    async def _file(self, session: Session, path: Sequence[str]) -> File | None:
        match path:
            case [job_id, "outputs", name]:
                job = (await session.info()).jobs.get(job_id)
                record = None if job is None else job.outputs.get(name)
            case _:
                return None
        if record is None:
            return None
        with suppress(StorageError):  # a use that can't be recorded does not fail the read
            await session.touch()
        chunks = partial(session.stream_output, record)
        return File(f'"{record.digest}"', record.media_type, record.byte_size, chunks)


def _sending(cookie: bytes, send: Send) -> Send:
    async def send_with_cookie(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"set-cookie", cookie)]
            if not any(name.lower() == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"private"))  # a shared cache would hand one id to everybody
            message = {**message, "headers": headers}
        await send(message)

    return send_with_cookie


def _path(scope: Scope) -> str:
    """The path below where the app is mounted.

    `root_path` has the prefix that a proxy in front took away, too, and then the path is without it.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root if path.startswith(root) else root.removeprefix(scope.get("app_root_path", "")))


def _opens_a_page(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return _path(scope) in _MINTED_ON or b"text/html" in accepted
