"""AVIF and HEIC, which are decoded once and stored as PNG."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pillow_heif
from PIL import Image

from tests.corpus.base import PAGE, XMP, Make, Refused, cuts
from tests.images import corners, encoded, exif, photograph, rgba_png, srgb_profile


def avif(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "AVIF", **{"speed": 10, "quality": 95, "subsampling": "4:4:4", **options})


def heic(image: Image.Image, **options: Any) -> bytes:
    written = io.BytesIO()
    pillow_heif.from_pillow(image).save(written, **{"quality": 95, "chroma": "444", **options})
    return written.getvalue()


def lying(data: bytes, width: int, height: int) -> bytes:
    """The file with another size in its container."""
    changed, place = bytearray(data), data.find(b"ispe") + 8
    struct.pack_into(">II", changed, place, width, height)
    return bytes(changed)


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def moving() -> bytes:
    frames = [photograph(64, 48, seed) for seed in range(2)]
    return avif(frames[0], save_all=True, append_images=frames[1:])


def _renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


# Units of AV1: a sequence header, and one of a kind that decoders skip.
_HEADER = b"\x0a\x09" + bytes.fromhex("18157fbda2021a0d08")  # of 64 x 48 pixels
_NOTHING = b"\x7a\0"
_AVIF = avif(photograph(64, 48), exif=exif(6))
_HEIC = heic(photograph(64, 48), exif=exif(1))


def _ends(data: bytes) -> Iterator[tuple[str, int]]:
    """In and around every box, and the boxes of the description."""
    position = 0
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        name = kind.decode()
        if position:  # before the first there is nothing at all
            yield f"before {name}", position
            yield f"in the length of {name}", position + 2
            yield f"in the name of {name}", position + 6
        yield f"in {name}", position + max(12, length // 2)
        position += 12 if kind == b"meta" else 8 if kind in (b"iprp", b"ipco") else length


def _without_picture() -> bytes:
    place = _AVIF.index(b"mdat") + 4
    return _AVIF[:place] + bytes(len(_AVIF) - place)


def _refused(make: Callable[..., bytes], whole: bytes) -> dict[str, Refused]:
    return {
        **cuts(whole, _ends(whole)),
        "cut by one byte": (lambda: whole[:-1], "truncated"),
        "no description": (lambda: _renamed(whole, b"meta", b"free"), "truncated"),
        "two descriptions": (lambda: whole + box(b"meta", bytes(4)), "corrupt"),
        "no list of its items": (lambda: _renamed(whole, b"iinf", b"free"), "corrupt"),
        "no list of their places": (lambda: _renamed(whole, b"iloc", b"free"), "corrupt"),
        "no properties": (lambda: _renamed(whole, b"iprp", b"free"), "corrupt"),
        "no size": (lambda: _renamed(whole, b"ispe", b"free"), "corrupt"),
        "a size of nothing": (lambda: lying(whole, 0, 48), "corrupt"),
        "a size of 2^62 pixels": (lambda: lying(whole, 2**31 - 1, 2**31 - 1), "too_many_pixels"),
        "a size that is not the picture's": (lambda: lying(make(Image.new("RGB", (320, 200))), 8, 8), "corrupt"),
        "a picture of an unknown kind": (
            lambda: _renamed(whole, b"av01" if make is avif else b"hvc1", b"abcd"), "unsupported_format",
        ),
        "a part without a length": (lambda: whole + struct.pack(">I4s", 1, b"free") + bytes(8), "corrupt"),
        "a part of 4 GB": (lambda: whole + b"\xff\xff\xff\xfffree", "truncated"),
        "a film": (lambda: whole + box(b"moov"), "too_many_frames"),
        "20,001 empty parts": (lambda: whole + 20_001 * box(b"free"), "metadata_bomb"),
        "an HTML page behind it": (lambda: whole + PAGE, "truncated"),
    }  # fmt: skip


def _made(*items: bytes, iloc: bytes = b"", ipma: bytes = b"") -> bytes:
    """An AVIF of these items, each a row of AV1 units, or with these boxes in the place of those that belong to it."""
    numbers, starts = range(len(items)), accumulate(map(len, items), initial=0)
    entries = [box(b"infe", struct.pack(">B3xHH4sx", 2, number, 0, b"av01")) for number in numbers]
    places = [
        struct.pack(">4HII", number, 1, 0, 1, start, len(item))
        for number, start, item in zip(numbers, starts, items, strict=False)
    ]
    sizes = struct.pack(">4xI", len(items)) + b"".join(struct.pack(">HBB", number, 1, 1) for number in numbers)
    parts = [
        box(b"pitm", bytes(6)),
        box(b"iinf", struct.pack(">4xH", len(items)) + b"".join(entries)),
        box(b"iloc", iloc or struct.pack(">B3xBBH", 1, 0x44, 0, len(items)) + b"".join(places)),
        box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">4xII", 64, 48))) + box(b"ipma", ipma or sizes)),
        box(b"idat", b"".join(items)),
    ]
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4) + b"".join(parts))


REFUSED: dict[str, Refused] = {
    **{f"AVIF, {name}": refused for name, refused in _refused(avif, _AVIF).items()},
    **{f"HEIC, {name}": refused for name, refused in _refused(heic, _HEIC).items()},
    "AVIF, an animation": (moving, "too_many_frames"),
    "AVIF, an animation that says it is none": (
        lambda: _renamed(moving(), b"ftypavis", b"ftypavif"), "too_many_frames",
    ),
    "AVIF, 65 million pixels": (lambda: lying(_AVIF, 8125, 8000), "too_many_pixels"),
    "AVIF, 1.1 MB of XMP": (lambda: avif(corners(), xmp=bytes(1_100_000)), "metadata_bomb"),
    "AVIF, 65,535 parts in 20,000 places each": (
        # with every field stated as of no size, a place takes no bytes
        lambda: _made(iloc=struct.pack(">4xBBH", 0, 0, 65_535) + struct.pack(">3H", 0, 0, 20_000) * 65_535),
        "metadata_bomb",
    ),
    "AVIF, a million properties": (
        lambda: _made(ipma=struct.pack(">4xI", 4000) + (b"\0\0\xff" + 255 * b"\1") * 4000), "metadata_bomb",
    ),
    "AVIF, 30,000 units": (lambda: _made(_HEADER + 30_000 * _NOTHING), "metadata_bomb"),
    "AVIF, 30,000 units in 10 parts": (lambda: _made(*10 * [_HEADER + 3000 * _NOTHING]), "metadata_bomb"),
    "AVIF, 1001 parts": (lambda: _made(*1001 * [_HEADER]), "metadata_bomb"),
    "AVIF, a picture that is described twice": (lambda: _made(_HEADER + _HEADER), "corrupt"),
    "AVIF, a picture that is described and not there": (lambda: _made(_HEADER), "corrupt"),
    "AVIF, a picture without its header": (lambda: _without_picture(), "truncated"),
}  # fmt: skip

TAKEN: dict[str, Make] = {
    "AVIF": lambda: avif(photograph(64, 48)),
    "AVIF with transparency": lambda: avif(Image.open(io.BytesIO(rgba_png(96, 64)))),
    "AVIF with a profile": lambda: avif(photograph(64, 48), icc_profile=srgb_profile()),
    "AVIF with a quarter of the colour": lambda: avif(photograph(65, 49), subsampling="4:2:0"),
    "AVIF of one grey": lambda: avif(Image.new("L", (64, 48), 9)),
}

CLEANED: dict[str, Make] = {
    "AVIF with GPS": lambda: _AVIF,
    "AVIF with XMP": lambda: avif(photograph(64, 48), xmp=XMP),
    "AVIF with an HTML page in a part of its own": lambda: avif(photograph(64, 48)) + box(b"free", PAGE),
}
