"""Good files of every format, and what becomes of them by chance."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from async_sessions._codec import decode, encode
from async_sessions.errors import ImageRejectedError
from async_sessions.records import Limits
from tests import corpus
from tests.corpus.bmff import avif, box, heic
from tests.images import (
    PNG_SIGNATURE,
    encoded,
    exif,
    jpeg_of,
    jpeg_segments,
    jpeg_with_exif,
    photograph,
    png_chunk,
    png_chunks,
    png_file,
    rgba_png,
    srgb_profile,
    take,
    webp_chunks,
    webp_file,
)

if TYPE_CHECKING:
    from random import Random

LIMITS = Limits(max_pixels=1_000_000, formats=corpus.LIMITS.formats)

_SMALL = photograph(24, 20)
_WITH_ALPHA = Image.open(io.BytesIO(rgba_png(24, 20)))

SEEDS: dict[str, tuple[bytes, ...]] = {
    "PNG": (
        encoded(_SMALL, "PNG", icc_profile=srgb_profile(), exif=exif(6)),
        encoded(_SMALL.quantize(16), "PNG"),
        png_file(9, 7, 16, 6),
        png_file(9, 7, 8, 2, bytes(203), interlaced=1),
    ),
    "JPEG": (
        jpeg_with_exif(6, image=_SMALL, icc_profile=srgb_profile()),
        encoded(_SMALL, "JPEG", progressive=True),
        encoded(_SMALL.convert("CMYK"), "JPEG", restart_marker_rows=1),
    ),
    "WebP": (
        encoded(_SMALL, "WEBP", exif=exif(6), icc_profile=srgb_profile()),
        encoded(_WITH_ALPHA, "WEBP", lossless=True),
        encoded(_WITH_ALPHA, "WEBP"),
    ),
    "AVIF and HEIC": (avif(_SMALL, exif=exif(6)), avif(_WITH_ALPHA), heic(_SMALL)),
}


def check(data: bytes) -> bool:
    """Whether a file is taken, as what can be stored and read again; `ImageRejectedError` is the only error."""
    try:
        rebuilt, image = take(data, LIMITS)
    except ImageRejectedError:
        return False
    assert decode.thumbnail(image)
    assert encode.to_array(image).shape[:2] == (image.height, image.width)
    if rebuilt.data[4:8] == b"ftyp":
        assert encode.png(image)
    else:
        again, same = take(rebuilt.data, LIMITS)
        assert again == rebuilt
        assert same.tobytes() == image.tobytes()
    return True


def damaged(chance: Random, form: str) -> bytes:
    """A good file of that format, which is good no more, or not as it was."""
    seed = chance.choice(SEEDS[form])
    return _overwritten(seed, chance) if chance.random() < 0.5 else _reassembled(seed, form, chance)


def _overwritten(seed: bytes, chance: Random) -> bytes:
    """The file after some bytes were changed, inserted, repeated or cut out."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        # Most structure is in the first bytes, so half of the changes go there.
        start = chance.randint(0, chance.choice([min(len(data), 120), len(data)]))
        match chance.choice(["set", "extreme", "insert", "cut", "repeat", "end"]):
            case "set":
                data[start : start + 1] = chance.randbytes(chance.randint(1, 4))
            case "extreme":
                data[start : start + 4] = chance.choice(
                    [bytes(4), b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"]
                )
            case "insert":
                data[start:start] = chance.randbytes(chance.randint(0, 12))
            case "cut":
                del data[start : start + chance.randint(1, 40)]
            case "repeat":
                data[start:start] = data[start : start + chance.randint(1, 60)] * chance.randint(1, 5)
            case "end":
                del data[start:]
    return bytes(data)


def _reassembled(seed: bytes, form: str, chance: Random) -> bytes:
    """The parts of the file, some changed, dropped, repeated or moved, with right lengths and checksums."""
    split, join = _PARTS[form]
    parts = split(seed)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(parts))
        kind, body = parts[place]
        match chance.choice(["set", "cut", "drop", "repeat", "move"]):
            case "set":
                start, changed = chance.randint(0, min(len(body), 30)), chance.randbytes(chance.randint(1, 4))
                parts[place] = kind, body[:start] + changed + body[start + len(changed) :]
            case "cut":
                parts[place] = kind, body[: chance.randint(0, len(body))]
            case "drop" if len(parts) > 1:
                del parts[place]
            case "repeat":
                parts[place:place] = [parts[place]] * chance.randint(1, 3)
            case _:
                parts.insert(chance.randrange(len(parts)), parts.pop(place))
    return join(parts)


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """The boxes of the file, and those of its description in the place of it."""
    found, position = list[tuple[bytes, bytes]](), 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + length]
        found += _boxes(body[4:]) if kind == b"meta" else [(kind, body)]
        position += length
    return found


def _file_of(boxes: list[tuple[bytes, bytes]]) -> bytes:
    first, *rest = [box(*each) for each in boxes]
    return first + box(b"meta", bytes(4) + b"".join(rest[:-1])) + b"".join(rest[-1:])


_PARTS: dict[str, tuple[Callable[[bytes], list[Any]], Callable[[list[Any]], bytes]]] = {
    "PNG": (png_chunks, lambda chunks: PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)),
    "JPEG": (jpeg_segments, jpeg_of),
    "WebP": (webp_chunks, lambda chunks: webp_file(*chunks)),
    "AVIF and HEIC": (_boxes, _file_of),
}
