"""Signed session ids: in a cookie, or in a token where cookies are blocked. What a request's headers say of them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from itsdangerous import BadSignature, Signer

from async_sessions import _keys
from async_sessions.blobs.base import Expect
from async_sessions.errors import CorruptBlobError, VersionConflictError

if TYPE_CHECKING:
    from async_sessions.blobs.base import BlobStore

Scope: TypeAlias = MutableMapping[str, Any]
Headers: TypeAlias = Iterable[tuple[bytes, bytes]]
SignerSource: TypeAlias = "CookieSigner | Callable[[], Awaitable[CookieSigner]]"

COOKIE: Final = "async_sessions"
MAX_AGE: Final = 30 * 24 * 3600  # seconds; every visit of a page counts anew

_HOST: Final = "__Host-"  # browsers take such a cookie from TLS only, and from no other host of the same domain
_SECRET_BYTES: Final = 32
_LEAST_SECRET_BYTES: Final = 16
_LONGEST: Final = 512  # characters; a signed id has 87


class Cookies(Protocol):
    """A request's cookies as a mapping: Starlette's `request.cookies`, Gradio's too."""

    def get(self, name: str, /) -> str | None: ...


class CookieSigner:
    """Signs session ids and reads them back. The first secret signs, all are accepted.

    A secret is text or bytes, at least 16 bytes long; to rotate, put a new one in front. Apps on one host that may not
    share sessions need different names: browsers don't keep the cookies of different ports apart. Under TLS the
    cookie's name is `__Host-` and `name`. A signature has no end: a session that is over is nobody's, however well its
    id is signed, and a clock that was set takes nobody's images away.
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
        self._tokens = Signer(keys[::-1], salt="async_sessions.token", digest_method=hashlib.sha256)

    def name_of(self, *, secure: bool) -> str:
        """The cookie's name under TLS, or without."""
        return _HOST + self.name if secure else self.name

    def sign(self, session_id: str) -> str:
        """The cookie's value for `session_id`."""
        return self._signer.sign(session_id).decode()

    def session_id(self, cookies: Cookies, *, secure: bool | None = None) -> str | None:
        """The id that this or an earlier secret signed; `None` where there is none, forged ones included.

        `secure`: only of the cookie for TLS, or only of the other; by default of either, the one for TLS first.
        """
        names = [self.name_of(secure=each) for each in ((True, False) if secure is None else (secure,))]
        return next((found for name in names if (found := _unsigned(self._signer, cookies.get(name)))), None)

    def sign_token(self, session_id: str) -> str:
        """What a page shows instead of a cookie; it is none, nor the other way round."""
        return self._tokens.sign(session_id).decode()

    def id_of_token(self, token: object) -> str | None:
        """The id in a token, which is whatever a client sends; `None` for anything that was not signed here."""
        return _unsigned(self._tokens, token)


def _unsigned(signer: Signer, value: object) -> str | None:
    if not isinstance(value, str) or not value or len(value) > _LONGEST:
        return None
    try:
        return signer.unsign(value).decode() or None
    except (BadSignature, UnicodeError):
        return None


async def signer_of(source: SignerSource) -> CookieSigner:
    """The signer itself, or what the function returns that may have to read it first."""
    return source if isinstance(source, CookieSigner) else await source()


async def stored_signer(blobs: BlobStore) -> CookieSigner:
    """A signer whose secret lives in the store, made there on first use: one for all processes, kept over restarts.

    In a folder it is a file that only its owner can read. The cookie's name depends on it, so that two stores served
    from one host don't take each other's sessions away. `CorruptBlobError` for one that is damaged, `StorageError` for
    one that can't be read: to make another would take every browser's session away.
    """
    while (found := await blobs.get(_keys.COOKIE_SECRET)) is None:
        with suppress(VersionConflictError):  # another process was faster: read its secret
            await blobs.put(_keys.COOKIE_SECRET, secrets.token_bytes(_SECRET_BYTES), expect=Expect.ABSENT)
    if len(found.data) < _LEAST_SECRET_BYTES:
        raise CorruptBlobError(f"The cookies' signing secret is damaged. Delete {_keys.COOKIE_SECRET} in the store.")
    return CookieSigner(found.data, name=f"{COOKIE}_{hashlib.sha256(b'name:' + found.data).hexdigest()[:8]}")


def attributes(*, secure: bool, embedded: bool) -> str:
    """Of the cookie, from its path on. `embedded`: sent in a frame of another site too, but to each site its own."""
    site = "SameSite=None; Secure; Partitioned" if embedded else f"SameSite=Lax{'; Secure' if secure else ''}"
    return f"Path=/; Max-Age={MAX_AGE}; HttpOnly; {site}"


def cookies_of(headers: Headers) -> dict[str, str]:
    pairs = (pair for name, value in headers if name == b"cookie" for pair in value.decode("latin-1").split(";"))
    return {name.strip(): value.strip() for name, _, value in (pair.partition("=") for pair in pairs)}


def comes_from_elsewhere(scope: Scope) -> bool:
    """Whether a page of another site made the browser send this request, other than by showing the app in a frame.

    Browsers say so themselves (`Sec-Fetch-*`), and no script can change it.
    """
    sent = dict(scope["headers"])
    if sent.get(b"sec-fetch-site") not in (b"cross-site", b"same-site"):
        return False
    return sent.get(b"sec-fetch-mode") != b"navigate" or scope.get("method") not in ("GET", "HEAD")


def without(headers: Headers, names: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The headers but for the cookies of these names."""
    gone = {name.encode("latin-1") for name in names}
    kept = []
    for name, value in headers:
        if name == b"cookie":
            pairs = [pair for pair in value.split(b";") if pair.partition(b"=")[0].strip() not in gone]
            value = b";".join(pairs).strip()
        kept.append((name, value))
    return kept
