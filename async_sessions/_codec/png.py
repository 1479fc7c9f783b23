"""PNG: check every chunk, inflate the pixels once without keeping them, and write the file again.

Kept are the pixels as they came, what is needed to show them, the colour space, and the orientation. Text, XMP, EXIF,
animation and whatever follows the image are dropped. The format is that of https://www.w3.org/TR/png-3/.

Not looked for: colours of a palette, and their transparency, that no pixel has.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from async_sessions._codec.base import (
    MAX_METADATA,
    Rebuilt,
    check_metadata,
    check_size,
    corrupt,
    icc_profile,
    read_orientation,
    truncated,
    write_orientation,
)
from async_sessions.errors import ImageRejectedError
from async_sessions.records import KIB, Limits

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_PASSES: Final = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_CRITICAL: Final = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_INDEXED: Final = 3  # the colour type whose pixels are indices into PLTE
_COLOUR_SIZES: Final = {b"cICP": 4, b"cHRM": 32, b"gAMA": 4, b"sRGB": 1, b"mDCV": 24, b"cLLI": 8}
_LONGEST: Final = 2**31 - 1
_STEP: Final = 64 * KIB  # compressed bytes per call: what a call leaves over is copied, so keep it small
_BURST: Final = 256 * KIB  # inflated bytes held at a time


class Header(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    interlaced: int

    def inflated_size(self) -> int:
        """Bytes of all rows, each with its filter byte."""
        bits = _CHANNELS[self.colour] * self.depth
        if not self.interlaced:
            return self.height * (1 + (self.width * bits + 7) // 8)
        size = 0
        for left, top, across, down in _PASSES:
            width, height = -((left - self.width) // across), -((top - self.height) // down)
            if width > 0 and height > 0:
                size += height * (1 + (width * bits + 7) // 8)
        return size


class Chunk(NamedTuple):
    kind: bytes
    body: memoryview
    whole: memoryview  # with its length before and its CRC behind


def rebuild(data: bytes | bytearray, limits: Limits) -> Rebuilt:
    """Raise `ImageRejectedError` unless `data` is one whole still image; return it without the rest."""
    chunks = _chunks(memoryview(data))
    first = next(chunks, None)
    if first is None or first.kind != b"IHDR":
        raise corrupt("PNG", "it does not begin with its header")
    header = _header(_sound(first).body, limits)
    kept: list[bytes | memoryview] = [SIGNATURE, first.whole]
    pixels = list[Chunk]()
    seen, last, orientation = {b"IHDR"}, first.kind, 1
    for chunk in chunks:
        kind, new = chunk.kind, chunk.kind not in seen
        if kind == b"IDAT":
            if pixels and last != b"IDAT":
                raise corrupt("PNG", "its pixels are in two places")
            pixels.append(chunk)
        elif kind == b"acTL" and int.from_bytes(chunk.body[:4]) > 1:
            raise ImageRejectedError("too_many_frames", "This is an animated PNG; give a still image.")
        elif kind == b"eXIf" and new:
            orientation = read_orientation(bytes(chunk.body))
        elif kind in (b"IHDR", b"PLTE") and (pixels or not new):
            raise corrupt("PNG", f"its {kind.decode()} is repeated or misplaced")
        elif kind == b"iCCP" and new and not pixels:
            if profile := _profile(bytes(chunk.body)):
                _sound(chunk)
                kept.append(_written(b"iCCP", profile_body(profile)))
        elif new and not pixels and _is_needed(chunk, header):
            kept.append(_sound(chunk).whole)
        seen.add(kind)
        last = kind
    if not pixels:
        raise truncated("PNG")
    if header.colour == _INDEXED and b"PLTE" not in seen:
        raise corrupt("PNG", "its palette is missing")
    if orientation != 1:
        kept.append(_written(b"eXIf", write_orientation(orientation)))
    used = _inflate([_sound(chunk).body for chunk in pixels], header.inflated_size())
    if used == sum(len(chunk.body) for chunk in pixels):
        kept += [chunk.whole for chunk in pixels]
    else:  # what follows the compressed rows is trailing data, too
        kept.append(_written(b"IDAT", b"".join(chunk.body for chunk in pixels)[:used]))
    kept.append(_written(b"IEND", b""))
    return Rebuilt(data=b"".join(kept), width=header.width, height=header.height, orientation=orientation)


def _chunks(view: memoryview) -> Iterator[Chunk]:
    """Every chunk up to IEND, which is not among them."""
    position, count, metadata = len(SIGNATURE), 0, 0
    while position + 12 <= len(view):
        length, kind = struct.unpack_from(">I4s", view, position)
        end = position + 12 + length
        if not kind.isalpha() or length > _LONGEST:
            raise corrupt("PNG", "what should be a chunk is none")
        if end > len(view):
            break
        if kind == b"IEND":
            return
        count += 1
        if kind not in _CRITICAL:
            if kind[:1].isupper():
                raise corrupt("PNG", "it holds a critical chunk that no standard knows")
            metadata += length
        check_metadata(metadata, count)
        yield Chunk(kind, view[position + 8 : end - 4], view[position:end])
        position = end
    raise truncated("PNG")


def _sound(chunk: Chunk) -> Chunk:
    """The chunk, if its checksum is right. What is dropped anyway is not asked."""
    if zlib.crc32(chunk.whole[4:-4]) != int.from_bytes(chunk.whole[-4:]):
        raise corrupt("PNG", f"the checksum of its {chunk.kind.decode()} is wrong")
    return chunk


def _written(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _header(body: memoryview, limits: Limits) -> Header:
    if len(body) != 13:
        raise corrupt("PNG", "its header has the wrong size")
    width, height, depth, colour, compression, filters, interlaced = struct.unpack(">IIBBBBB", body)
    check_size(width, height, limits)
    if depth not in _DEPTHS.get(colour, ()) or compression or filters or interlaced > 1:
        raise corrupt("PNG", "its header is not valid")
    return Header(width, height, depth, colour, interlaced)


def _is_needed(chunk: Chunk, header: Header) -> bool:
    """Whether a chunk before the pixels changes what is seen, and is one that decoders do not ignore."""
    size = len(chunk.body)
    match chunk.kind:
        case b"PLTE":  # elsewhere a mere suggestion
            if header.colour == _INDEXED and (size % 3 or not 3 <= size <= 768):
                raise corrupt("PNG", "its palette has the wrong size")
            return header.colour == _INDEXED
        case b"tRNS":
            return 1 <= size <= 256 if header.colour == _INDEXED else size == {0: 2, 2: 6}.get(header.colour)
        case b"sBIT":
            return size == (3 if header.colour == _INDEXED else _CHANNELS[header.colour])
        case kind:
            return size == _COLOUR_SIZES.get(kind)


def profile_body(profile: bytes) -> bytes:
    """What an iCCP chunk holds. The name, which may be anything, is always the same."""
    return b"ICC Profile\0\0" + zlib.compress(profile)


def _profile(body: bytes) -> bytes:
    """The ICC profile of an iCCP chunk; nothing where there is none."""
    name, separator, compressed = body.partition(b"\0")
    if not separator or not 1 <= len(name) <= 79 or compressed[:1] != b"\0":
        return b""
    inflater = zlib.decompressobj()
    try:
        inflated = inflater.decompress(compressed[1:], MAX_METADATA)
    except zlib.error:
        return b""
    check_metadata(len(inflated) + (len(inflated) == MAX_METADATA), 0)
    return icc_profile(inflated) if inflater.eof else b""


def _inflate(parts: list[memoryview], expected: int) -> int:
    """How many bytes of `parts` are the zlib stream, which must hold exactly `expected` bytes. Keeps none of them."""
    inflater, fed, found = zlib.decompressobj(), 0, 0
    try:
        for part in parts:
            for start in range(0, len(part), _STEP):
                rest: bytes | memoryview = part[start : start + _STEP]
                fed += len(rest)
                while rest:
                    found += len(inflater.decompress(rest, min(_BURST, expected - found + 1)))
                    if found > expected:
                        raise corrupt("PNG", "it holds more pixels than it says")
                    if inflater.eof:
                        if found < expected:
                            raise truncated("PNG")
                        return fed - len(inflater.unused_data)
                    rest = inflater.unconsumed_tail
    except zlib.error as error:
        raise corrupt("PNG", "its pixels cannot be decompressed") from error
    raise truncated("PNG")
