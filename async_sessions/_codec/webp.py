"""WebP: walk the RIFF chunks, check that there is one picture, and write the file again without the rest.

Kept are the picture and its alpha as they came, and the ICC profile. EXIF, XMP and unknown chunks are dropped, the
orientation with them: browsers do not turn a WebP, and what a page shows and what a job gets must agree. The format is
that of RFC 9649.

Not looked for: bytes behind the last block of a partition, and behind the last pixel of a lossless picture.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from async_sessions._codec.base import Rebuilt, check_metadata, check_size, corrupt, icc_profile, truncated
from async_sessions.errors import ImageRejectedError

if TYPE_CHECKING:
    from async_sessions.records import Limits

_PICTURES: Final = (b"VP8 ", b"VP8L")
_ANIMATION: Final = 0x02
_ALPHA: Final = 0x10
_PROFILE: Final = 0x20


class Chunk(NamedTuple):
    kind: bytes
    body: memoryview


def rebuild(data: bytes | bytearray, limits: Limits) -> Rebuilt:
    """Raise `ImageRejectedError` unless `data` is one whole still image; return it without the rest."""
    canvas: memoryview | None = None
    stated = 0, 0
    before, picture, profiled = list[Chunk](), None, False
    for place, chunk in enumerate(_chunks(memoryview(data))):
        if chunk.kind in (b"ANIM", b"ANMF"):
            raise _animated()
        if chunk.kind == b"VP8X":
            if place or len(chunk.body) < 10:
                raise corrupt("WebP", "its header is misplaced or too short")
            if chunk.body[0] & _ANIMATION:
                raise _animated()
            canvas = chunk.body
            stated = 1 + int.from_bytes(canvas[4:7], "little"), 1 + int.from_bytes(canvas[7:10], "little")
            check_size(*stated, limits)
        elif chunk.kind in _PICTURES:
            if picture is not None:
                raise corrupt("WebP", "it holds two pictures")
            picture = chunk
        elif chunk.kind == b"ALPH" and canvas is not None and picture is None:
            before.append(chunk)
        elif chunk.kind == b"ICCP" and canvas is not None and picture is None and not profiled:
            profiled = True
            if profile := icc_profile(bytes(chunk.body)):
                before.append(Chunk(b"ICCP", memoryview(profile)))
    if picture is None:
        raise truncated("WebP")
    width, height = _size(picture)
    check_size(width, height, limits)
    chunks = [*before, picture]
    if canvas is not None:
        if stated != (width, height):
            raise corrupt("WebP", "its header and its picture differ in size")
        flags = canvas[0] & _ALPHA | (_PROFILE if any(chunk.kind == b"ICCP" for chunk in before) else 0)
        chunks.insert(0, Chunk(b"VP8X", memoryview(bytes([flags, 0, 0, 0]) + canvas[4:10])))
    whole = b"".join(part for chunk in chunks for part in _written(chunk))
    return Rebuilt(data=struct.pack("<4sI4s", b"RIFF", 4 + len(whole), b"WEBP") + whole, width=width, height=height)


def _chunks(view: memoryview) -> Iterator[Chunk]:
    """Every chunk of the RIFF file; what lies behind its end is not looked at."""
    if len(view) < 12:
        raise truncated("WebP")
    end = 8 + int.from_bytes(view[4:8], "little")
    if end > len(view) + 1:  # the last byte may be padding that was left out
        raise truncated("WebP")
    position, count, metadata = 12, 0, 0
    while position + 8 <= end:
        if position + 8 > len(view):
            raise truncated("WebP")
        kind, length = struct.unpack_from("<4sI", view, position)
        if position + 8 + length > min(end, len(view)):
            raise truncated("WebP")
        count += 1
        metadata += 0 if kind in (*_PICTURES, b"ALPH") else length
        check_metadata(metadata, count)
        yield Chunk(kind, view[position + 8 : position + 8 + length])
        position += 8 + length + length % 2


def _animated() -> ImageRejectedError:
    return ImageRejectedError("too_many_frames", "This is an animated WebP; give a still image.")


def _size(picture: Chunk) -> tuple[int, int]:
    """Width and height from the frame header of VP8 (RFC 6386, 9.1) or the image header of VP8L."""
    body = bytes(picture.body[:10])
    if picture.kind == b"VP8L":
        if len(body) < 5:
            raise truncated("WebP")
        bits = int.from_bytes(body[1:5], "little")
        if body[0] != 0x2F or bits >> 29:
            raise corrupt("WebP", "its picture has no valid header")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if len(body) < 10:
        raise truncated("WebP")
    tag = int.from_bytes(body[:3], "little")
    if tag & 1 or body[3:6] != b"\x9d\x01\x2a":
        raise corrupt("WebP", "its picture has no valid header")
    if 10 + (tag >> 5) > len(picture.body):
        raise truncated("WebP")
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _written(chunk: Chunk) -> tuple[bytes, memoryview, bytes]:
    return chunk.kind + struct.pack("<I", len(chunk.body)), chunk.body, bytes(len(chunk.body) % 2)
