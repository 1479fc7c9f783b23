"""Answers over HTTP to requests for stored files (RFC 9110): what they are, and sending them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from async_sessions.blobs.base import closing
from async_sessions.errors import CorruptBlobError

if TYPE_CHECKING:
    from async_sessions.asgi import Message, Scope, Send

_TYPES: Final = ("image/jpeg", "image/png", "image/webp", "image/gif", "video/mp4", "video/webm")
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.IGNORECASE)

# The file is somebody's upload: it is shown as the image that it is, to its owner, and as nothing else to nobody else.
_GUARDS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_POLICY: Final = b"content-security-policy", b"default-src 'none'; sandbox"
# On a page of its own a video is loaded by that page, which a sandbox would make a stranger.
_POLICY_OF_VIDEO: Final = b"content-security-policy", b"default-src 'none'; media-src 'self'"


class Answer(NamedTuple):
    """Status and headers, and the half-open range of the file's bytes that follows."""

    status: int
    headers: list[tuple[bytes, bytes]]
    start: int = 0
    end: int = 0


class Chunks(Protocol):
    def __call__(self, *, start: int, end: int) -> AsyncIterator[bytes]: ...


class File(NamedTuple):
    """What is to be served: `chunks` are its bytes from `start` up to but not including `end`."""

    etag: str
    media_type: str
    size: int
    chunks: Chunks


def answer(method: str, headers: Mapping[str, str], *, etag: str, media_type: str, size: int) -> Answer:
    """The answer to GET or HEAD for a file of `size` bytes. A slot's image changes, so caches ask each time."""
    whose = b"vary", b"cookie, authorization"
    kind = media_type if media_type in _TYPES else "application/octet-stream"
    policy = _POLICY_OF_VIDEO if kind.startswith("video/") else _POLICY
    common = [(b"etag", etag.encode()), (b"cache-control", b"private, no-cache"), whose, policy, *_GUARDS]
    if _names(headers.get("if-none-match", ""), etag):
        return Answer(304, common)
    described = [*common, (b"content-type", kind.encode()), (b"accept-ranges", b"bytes")]
    status, start, end = 200, 0, size
    if method == "GET" and headers.get("if-range", etag) == etag and "range" in headers:
        status, start, end = _part(headers["range"], size)
    if status == 416:
        return Answer(416, [*common, (b"content-range", f"bytes */{size}".encode()), (b"content-length", b"0")])
    if status == 206:
        described.append((b"content-range", f"bytes {start}-{end - 1}/{size}".encode()))
    described.append((b"content-length", str(end - start).encode()))
    return Answer(status, described, start, start if method == "HEAD" else end)


def failure(status: int, *more: tuple[bytes, bytes]) -> Answer:
    """An answer without a body; all that say 404 are the same, whatever the reason was."""
    return Answer(status, [(b"content-length", b"0"), (b"cache-control", b"no-store"), _POLICY, *_GUARDS, *more])


async def send_answer(send: Send, planned: Answer) -> None:
    """An answer without a body."""
    await send({"type": "http.response.start", "status": planned.status, "headers": planned.headers})
    await send({"type": "http.response.body", "body": b""})


async def send_file(scope: Scope, send: Send, file: File) -> None:
    """Nothing is sent before the first chunk was read, so a file that is gone can still be a 404."""
    headers = header_map(scope["headers"])
    planned = answer(scope["method"], headers, etag=file.etag, media_type=file.media_type, size=file.size)
    if planned.start == planned.end:
        await send_answer(send, planned)
        return
    start: Message = {"type": "http.response.start", "status": planned.status, "headers": planned.headers}
    begun = False
    async with closing(file.chunks(start=planned.start, end=planned.end)) as chunks:
        async for chunk in chunks:
            if not begun:
                await send(start)
                begun = True
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    if not begun:
        raise CorruptBlobError("The file ends early.")
    await send({"type": "http.response.body", "body": b""})


async def in_one_piece(data: bytes, *, start: int, end: int) -> AsyncIterator[bytes]:
    """The `chunks` of a file that is in memory."""
    yield data[start:end]


def header_map(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Names in lower case; several lines of one name are one list."""
    merged: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        merged[key] = f"{merged[key]}, {text}" if key in merged else text
    return merged


def _names(given: str, etag: str) -> bool:
    return etag in {tag.strip().removeprefix("W/") for tag in given.split(",")} or given.strip() == "*"


def _part(given: str, size: int) -> tuple[int, int, int]:
    """Status, start and end of one range; several at once, or what is no range, are answered with the whole file."""
    found = _RANGE.fullmatch(given.strip())
    if found is None or not any(found.groups()):
        return 200, 0, size
    first, last = found.groups()
    if not first:  # the last bytes
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return 200, 0, size
    return (206, start, end) if start < end else (416, 0, 0)
