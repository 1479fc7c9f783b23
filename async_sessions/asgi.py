"""Which browser is this, and what may it see?

A signed cookie, set by a pure ASGI middleware, holds a session id and nothing else; ASGI apps serve that session's
images, and what its jobs made, to that browser.

The id is a secret: the cookie is HttpOnly, so no script on the page reads it, and SameSite=Lax, so no other site's form
spends it. Setting the cookie writes nothing to the store; a session begins with its first image. Neither ids nor
cookies are ever logged.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import anyio
from itsdangerous import BadSignature, Signer

from async_sessions import _keys
from async_sessions._serving import File, failure, in_one_piece, send_answer, send_file
from async_sessions.blobs.base import Expect
from async_sessions.errors import (
    CorruptBlobError,
    InvalidKeyError,
    SessionNotFoundError,
    SlotEmptyError,
    StorageError,
    StoreClosedError,
    VersionConflictError,
)

if TYPE_CHECKING:
    from async_sessions.blobs.base import BlobStore
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE: Final = "async_sessions"
MAX_AGE: Final = 30 * 24 * 3600  # seconds; every visit of a page counts anew

_SIGNER_WITHIN = 2.0  # seconds
_SECRET_BYTES = 32
_LEAST_SECRET_BYTES = 16
_MINTED_ON = ("", "/", "/config")

_logger = logging.getLogger("async_sessions")


class Cookies(Protocol):
    """A request's cookies as a mapping: Starlette's `request.cookies`, Gradio's too."""

    def get(self, name: str, /) -> str | None: ...


class CookieSigner:
    """Signs session ids and reads them back. The first secret signs, all are accepted.

    A secret is text or bytes, at least 16 bytes long; to rotate, put a new one in front. Apps on one host that may not
    share sessions need different names: browsers don't keep the cookies of different ports apart.
    """

    def __init__(self, *given: str | bytes, name: str = COOKIE) -> None:
        keys = [secret.encode() if isinstance(secret, str) else secret for secret in given]
        if not keys or min(map(len, keys)) < _LEAST_SECRET_BYTES:
            raise ValueError(
                f"A cookie secret has at least {_LEAST_SECRET_BYTES} bytes; make one with secrets.token_hex()."
            )
        self.name = name
        # itsdangerous signs with the last key of its list
        self._signer = Signer(keys[::-1], salt="async_sessions.cookie", digest_method=hashlib.sha256)

    def sign(self, session_id: str) -> str:
        """The cookie's value for `session_id`."""
        return self._signer.sign(session_id).decode()

    def session_id(self, cookies: Cookies) -> str | None:
        """The id that this or an earlier secret signed; `None` where there is none, forged ones included."""
        try:
            return self._signer.unsign(cookies.get(self.name) or "").decode()
        except (BadSignature, UnicodeError):
            return None


async def stored_signer(blobs: BlobStore) -> CookieSigner:
    """A signer whose secret lives in the store, made there on first use: one for all processes, kept over restarts.

    In a folder it is a file that only its owner can read. The cookie's name depends on it, so that two stores served
    from one host don't take each other's sessions away.
    """
    while (found := await blobs.get(_keys.COOKIE_SECRET)) is None:
        with suppress(VersionConflictError):  # another process was faster: read its secret
            await blobs.put(_keys.COOKIE_SECRET, secrets.token_bytes(_SECRET_BYTES), expect=Expect.ABSENT)
    if len(found.data) < _LEAST_SECRET_BYTES:
        raise CorruptBlobError(f"The cookies' signing secret is damaged. Delete {_keys.COOKIE_SECRET} in the store.")
    return CookieSigner(found.data, name=f"{COOKIE}_{hashlib.sha256(b'name:' + found.data).hexdigest()[:8]}")


class SessionCookie:
    """Pure ASGI middleware: gives every browser that opens a page a signed session id, and renews it at each visit.

    Only the answer to a page (and to Gradio's `/config`) sets it, so that a page's parallel first requests can't
    mint several ids. `signer` is asked for once it is needed; while it fails with a `StorageError`, the app is served
    without cookies. `secure` sets the Secure attribute; by default it follows the scheme of the request.
    """

    def __init__(
        self, app: ASGIApp, *, signer: Callable[[], Awaitable[CookieSigner]], secure: bool | None = None
    ) -> None:
        self._app = app
        self._signer = signer
        self._secure = secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _opens_a_page(scope) or (cookie := await self._cookie(scope)) is None:
            await self._app(scope, receive, send)
            return

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"set-cookie", cookie)]
                if not any(name.lower() == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"private"))  # a shared cache would hand one id to everybody
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_cookie)

    async def _cookie(self, scope: Scope) -> bytes | None:
        signer = None
        try:
            with anyio.move_on_after(_SIGNER_WITHIN):  # a page without a cookie rather than no page
                signer = await self._signer()
        except StorageError:
            _logger.warning("no session cookie: the signing secret can't be read", exc_info=True)
        if signer is None:
            return None
        session_id = signer.session_id(_cookies(scope["headers"])) or _keys.new_session_id()
        secure = scope.get("scheme") == "https" if self._secure is None else self._secure
        attributes = f"Path=/; Max-Age={MAX_AGE}; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}"
        return f"{signer.name}={signer.sign(session_id)}; {attributes}".encode()


class _SessionFiles:
    """Pure ASGI app: files of the session whose browser or user asks; what is in nobody's session is a 404."""

    def __init__(
        self,
        store: SessionStore,
        *,
        signer: Callable[[], Awaitable[CookieSigner]] | None = None,
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
        session_id = (await self._signer()).session_id(_cookies(scope["headers"]))
        return None if session_id is None else self._store.session(session_id)


class SessionImages(_SessionFiles):
    """Pure ASGI app: `/start` is the image in the slot "start", `/start/thumbnail` its thumbnail (WebP).

    Mount it where you like, in Starlette, FastAPI or Gradio's `app_kwargs={"routes": [Mount("/images", app)]}`. The
    session is that of the user whom `identity` finds in the request, as in `SessionStore.session_for`:

        SessionImages(store, identity=lambda scope: scope["session"].get("user"))  # Starlette's SessionMiddleware

    and where it finds none, or is not given, the one that the cookie of `SessionCookie` names, read with the same
    `signer`. Reading counts as use, and creates no session. Whatever is not in it, and whoever has no session, gets the
    same 404. Answers carry an ETag (so a browser that has the image gets a 304), serve ranges, and may be kept by the
    browser but by no shared cache. The file is sent as it is stored: turned as its EXIF says, which browsers do for
    JPEG and PNG.
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

    Whose session, and what the answers are: see `SessionImages`. So a browser can seek in a video.
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


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _opens_a_page(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept")
    return _path(scope) in _MINTED_ON or b"text/html" in accepted


def _cookies(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    pairs = (pair for name, value in headers if name == b"cookie" for pair in value.decode("latin-1").split(";"))
    return {name.strip(): value.strip() for name, _, value in (pair.partition("=") for pair in pairs)}
