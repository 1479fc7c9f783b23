"""PNG from a Pillow image: strips of rows, filtered by numpy and deflated in the way that an estimate prefers.

Pillow's own encoder tries every filter on every row and then lets zlib search all of it, which for a photograph takes
10 to 150 times as long. No step here holds the GIL for longer than it takes to copy a strip.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
from isal import isal_zlib

from async_sessions._codec.filters import AVERAGE, NONE, PAETH, SUB, UP, Strip
from async_sessions._codec.png import SIGNATURE, profile_body
from async_sessions.records import KIB

if TYPE_CHECKING:
    from PIL import Image

# Some rows of each of so many parts of the image stand for all of it. They lie at uneven distances, or else all of them
# could fall between the lines of a text.
_PLACES: Final = (0.08, 0.27, 0.39, 0.56, 0.77, 0.91)
_PART: Final = 32 * KIB  # bytes at most, but at least 4 rows
_SHARE: Final = 6  # of a small image, one row in so many
_STRIP: Final = 256 * KIB

_FORMATS: Final = {  # depth, colour type, bytes a pixel, Pillow's name of the raw layout
    "1": (1, 0, 1, "1"),
    "L": (8, 0, 1, "L"),
    "LA": (8, 4, 2, "LA"),
    "RGB": (8, 2, 3, "RGB"),
    "RGBA": (8, 6, 4, "RGBA"),
    "I;16": (16, 0, 2, "I;16B"),
}
_PALETTE: Final = 3  # the colour type

# On what filters leave of a photograph, the short matches that ISA-L finds far away cost more than the bytes that they
# stand for, up to 8 % of the file. So it may look back 512 bytes only; in drawings it had better look back all 32 KiB.
_LEVEL: Final = 1  # level 2 gains 1 %; 3 is slower, and larger on photographs
_NEAR: Final = 9
_FAR: Final = 15

_SMALL: Final = 96 * KIB  # a file for which zlib has nothing to gain that matters

# Decoders take twice as long to undo Paeth's filter as any other, so of a photograph in focus it has to be worth that.
_SHARP: Final = 0.4  # of the pixels; a smaller file is of something smooth
_PAETH_GAIN: Final = 0.96

# zlib, matching only runs of one byte, takes three times as long as ISA-L. On smooth photographs it gains up to 19 %.
_SMOOTH: Final = 0.3  # of the pixels; a larger file is no smooth photograph
_RUNS_GAIN: Final = 0.95

# zlib's full search gains a multiple on patterns and drawings; on photographs it takes twenty times as long as ISA-L.
_SPARSE: Final = 0.12  # of the pixels; a larger file is a photograph
_SPARSE_FEW: Final = 0.3  # of an image of few shades, such as a dithered page
_FEW: Final = 16
_SEARCH: Final = 6
_SEARCH_GAIN: Final = 0.87

# What looking far back gains this much on is no photograph but repeats itself. Of that ISA-L loses track after a few
# rows, so that its file of a tile of noise is 13 times as large as zlib's, and no sample shows it.
_FAR_GAIN: Final = 0.87


class Layout(NamedTuple):
    """How the pixels are laid out in the file. `raw` is Pillow's name of it; `step` the bytes from pixel to pixel."""

    depth: int
    colour: int
    step: int
    raw: str
    row: int  # bytes of a row, without its filter
    colours: int  # entries of the palette, if it has one


class Deflater(Protocol):
    def compress(self, data: memoryview, /) -> bytes: ...
    def flush(self) -> bytes: ...


def write(image: Image.Image) -> bytes:
    """The PNG of an image in a mode of `storable`, with its transparency and its ICC profile; nothing else of `info`.

    Of photographs it is at most 1.2 times as large as with Pillow's `optimize=True`, and of drawings, text and patterns
    128 KiB larger, for all that was measured but rings finer than the pixels (1.23 times) and grey ones (135 KiB).
    """
    layout = layout_of(image)
    colours = layout.colours
    header = struct.pack(">IIBBBBB", image.width, image.height, layout.depth, layout.colour, 0, 0, 0)
    file = io.BytesIO()  # joining parts would hold all of them twice
    file.writelines([SIGNATURE, *_chunk(b"IHDR", header)])
    if profile := image.info.get("icc_profile"):
        file.writelines(_chunk(b"iCCP", profile_body(profile)))
    if colours:
        file.writelines(_chunk(b"PLTE", bytes(image.getpalette() or ())[: 3 * colours].ljust(3 * colours, b"\0")))
    if transparency := _transparency(image, colours):
        file.writelines(_chunk(b"tRNS", transparency))
    for deflated in _deflated(image, layout):
        file.writelines(_chunk(b"IDAT", deflated))
    file.writelines(_chunk(b"IEND", b""))
    return file.getvalue()


class Way(NamedTuple):
    """One way to write an image: the filter of all its rows, and what deflates them."""

    kind: int
    deflater: Callable[[], Deflater]


def choose(image: Image.Image, layout: Layout) -> Way:
    """The fastest way that leaves little to gain, by what each makes of a sample of the rows."""
    kinds = (NONE,) if layout.depth < 8 or layout.colour == _PALETTE else (UP, PAETH, AVERAGE, SUB, NONE)
    filtered = _sample(image, layout, kinds)

    def size(way: Way) -> int:
        deflater = way.deflater()
        return sum(len(deflater.compress(piece)) for piece in filtered[way.kind]) + len(deflater.flush())

    sampled = sum(map(len, filtered[NONE]))
    way, least = _least([Way(kind, near) for kind in kinds], size)
    if way.kind == PAETH and least > _SHARP * sampled:
        other, other_least = _least([Way(kind, near) for kind in kinds if kind != PAETH], size)
        if _PAETH_GAIN * other_least < least:
            way, least = other, other_least
    distant, distant_least = _least([Way(kind, far) for kind in {way.kind, NONE}], size)
    small = _SMALL * sampled / (image.height * layout.row)
    if least >= small and distant_least < _FAR_GAIN * least:
        return Way(distant.kind, search)
    if distant_least < least:
        way, least = distant, distant_least
    if least < small:
        return way
    if least < _SMOOTH * sampled and PAETH in kinds:
        smooth = Way(PAETH, runs)
        if (smooth_least := size(smooth)) < _RUNS_GAIN * least:
            way, least = smooth, smooth_least
    if least < _SPARSE * sampled or (least < _SPARSE_FEW * sampled and _shades(filtered[NONE]) <= _FEW):
        searched = Way(way.kind, search)
        if size(searched) < _SEARCH_GAIN * least:
            return searched
    return way


def near() -> Deflater:
    return isal_zlib.compressobj(_LEVEL, wbits=_NEAR)


def far() -> Deflater:
    return isal_zlib.compressobj(_LEVEL, wbits=_FAR)


def runs() -> Deflater:
    return zlib.compressobj(_SEARCH, strategy=zlib.Z_RLE)


def search() -> Deflater:
    return zlib.compressobj(_SEARCH)


def _least(ways: list[Way], size: Callable[[Way], int]) -> tuple[Way, int]:
    sizes = {way: size(way) for way in ways}
    way = min(sizes, key=sizes.__getitem__)
    return way, sizes[way]


def _shades(pieces: list[memoryview]) -> int:
    """How many different bytes there are."""
    return int(np.count_nonzero(sum(np.bincount(piece, minlength=256) for piece in pieces)))


def _deflated(image: Image.Image, layout: Layout) -> Iterator[bytes]:
    kind, opened = choose(image, layout)
    rows = min(image.height, max(1, _STRIP // layout.row))
    strip, deflater = Strip(rows, layout.row, layout.step), opened()
    for top in range(0, image.height, rows):
        strip.load(_rows(image, layout, top, top + rows))
        yield deflater.compress(strip.filtered(kind).data)
    yield deflater.flush()


def _sample(image: Image.Image, layout: Layout, kinds: tuple[int, ...]) -> dict[int, list[memoryview]]:
    rows = max(4, min(_PART // layout.row, image.height // (_SHARE * len(_PLACES))))
    tops = [int(place * (image.height - rows)) for place in _PLACES]
    spans = [(top, top + rows) for top in tops] if image.height > rows * len(_PLACES) else [(0, image.height)]
    filtered: dict[int, list[memoryview]] = {kind: [] for kind in kinds}
    strip = Strip(max(end - top for top, end in spans), layout.row, layout.step)
    for top, end in spans:
        if top:
            strip.load(_rows(image, layout, top - 1, top))
        strip.load(_rows(image, layout, top, end))
        for kind in kinds:
            filtered[kind].append(memoryview(strip.filtered(kind).tobytes()))
    return filtered


def _rows(image: Image.Image, layout: Layout, top: int, end: int) -> bytes:
    # `tobytes` of the whole image would hold the GIL for 10 ms at 12 megapixels.
    return image.crop((0, top, image.width, min(end, image.height))).tobytes("raw", layout.raw)


def layout_of(image: Image.Image) -> Layout:
    colours = 0
    if image.mode == "P":
        colours = _colours(image)
        depth = next(depth for depth in (1, 2, 4, 8) if colours <= 2**depth)
        colour, step, raw = _PALETTE, 1, "P" if depth == 8 else f"P;{depth}"
    else:
        depth, colour, step, raw = _FORMATS[image.mode]
    bits = depth if depth < 8 else 8 * step
    return Layout(depth, colour, step, raw, (image.width * bits + 7) // 8, colours)


def _colours(image: Image.Image) -> int:
    """Entries that the palette needs: those that it has, and one for every index in use."""
    most = len(image.getpalette() or ()) // 3
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        indices = image.crop((0, top, image.width, min(top + rows, image.height))).tobytes()
        most = max(most, 1 + int(np.frombuffer(indices, np.uint8).max()))
    return most


def _transparency(image: Image.Image, colours: int) -> bytes:
    match image.mode, image.info.get("transparency"):
        case "P", bytes(alpha):
            return alpha[:colours]
        case "P", int(index):
            return (b"\xff" * min(max(index, 0), 255) + b"\0")[:colours]
        case "P", None if image.palette is not None and image.palette.mode == "RGBA":
            return bytes(image.getpalette("RGBA") or ())[3::4][:colours]
        case (("1" | "L" | "I;16"), int(grey)):
            return struct.pack(">H", min(max(grey, 0), 0xFFFF))
        case "RGB", (int(red), int(green), int(blue)):
            return struct.pack(">3H", *(min(max(sample, 0), 0xFFFF) for sample in (red, green, blue)))
    return b""


def _chunk(kind: bytes, body: bytes) -> tuple[bytes, ...]:
    if kind == b"IDAT" and not body:
        return ()  # the deflater kept it back
    crc = isal_zlib.crc32(body, isal_zlib.crc32(kind))
    return struct.pack(">I", len(body)), kind, body, struct.pack(">I", crc)
