"""AVIF and HEIC: walk the boxes, and learn what decoding will cost before any decoder runs.

These files are decoded once and stored as PNG, so nothing is rebuilt. The containers are those of ISO/IEC 14496-12 and
23008-12; AV1 frames say their size in their sequence header (AV1 specification, 5.5). That has to be read as well:
libavif decodes a picture as large as it is and scales it to the size that the container states. libheif refuses such a
picture itself.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from async_sessions._codec.base import Rebuilt, check_metadata, check_size, corrupt, truncated
from async_sessions.errors import ImageRejectedError

if TYPE_CHECKING:
    from async_sessions.records import Limits

MAX_ITEMS: Final = 1000  # tiles of a grid, for the most part

_SEQUENCES: Final = (b"avis", b"msf1", b"hevc", b"hevx", b"heis")
_CODED: Final = (b"av01", b"hvc1", b"hev1")
_DERIVED: Final = (b"grid", b"iden", b"iovl", b"tmap")
_SEQUENCE_HEADER: Final = 1
_HEADER_BYTES: Final = 128  # of a sequence header that are looked at; 32 operating points take 96


class Box(NamedTuple):
    kind: bytes
    body: memoryview


class Reader:
    """Big-endian integers, one after the other."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._place = 0

    def take(self, size: int) -> int:
        return int.from_bytes(self.bytes(size))

    def bytes(self, size: int) -> bytes:
        if self._place + size > len(self._view):
            raise corrupt("AVIF or HEIC", "a part of it ends early")
        self._place += size
        return bytes(self._view[self._place - size : self._place])


class Parts(NamedTuple):
    """What the `meta` box says: the primary item, each item's type, size and bytes."""

    primary: int
    kinds: dict[int, bytes]
    sizes: dict[int, tuple[int, int]]
    bodies: dict[int, list[memoryview]]


def rebuild(data: bytes | bytearray, limits: Limits, form: str) -> Rebuilt:
    """Raise `ImageRejectedError` unless `data` is one whole still image within the limits; return it as it came."""
    view = memoryview(data)
    top = list(_boxes(view, form))
    if bytes(top[0].body[:4]) in _SEQUENCES or any(box.kind == b"moov" for box in top):
        raise ImageRejectedError("too_many_frames", f"This is an animated {form} file; give a still image.")
    metas = [box for box in top if box.kind == b"meta"]
    if len(metas) != 1:
        raise truncated(form) if not metas else corrupt(form, "it is described twice")
    check_metadata(len(metas[0].body), 0)
    parts = _parts(metas[0].body, view, form)
    width, height = parts.sizes.get(parts.primary, (0, 0))
    check_size(width, height, limits)
    if parts.kinds.get(parts.primary) not in (*_CODED, *_DERIVED):
        raise ImageRejectedError("unsupported_format", f"This {form} file holds no picture that is known here.")
    others = sum(len(part) for item, kind in parts.kinds.items() if kind not in _CODED for part in parts.bodies[item])
    check_metadata(len(metas[0].body) + others, 0)
    coded, units = 0, itertools.count(1)
    for item, kind in parts.kinds.items():
        if kind in _CODED:
            coded += _coded_pixels(item, parts, form, limits, units)
    if coded > 2 * limits.max_pixels:  # a picture and its transparency
        raise ImageRejectedError("too_many_pixels", f"The pictures in this {form} file have too many pixels together.")
    return Rebuilt(data=bytes(data), width=width, height=height, coded=coded)


def _boxes(view: memoryview, form: str) -> Iterator[Box]:
    position, count = 0, 0
    while position < len(view):
        if position + 8 > len(view):
            raise truncated(form)
        length, kind = struct.unpack_from(">I4s", view, position)
        head = 8
        if length == 1 and position + 16 <= len(view):
            (length,) = struct.unpack_from(">Q", view, position + 8)
            head = 16
        elif length == 0:
            length = len(view) - position
        if length < head:
            raise corrupt(form, "a part of it has no length")
        if position + length > len(view):
            raise truncated(form)
        count += 1
        check_metadata(0, count)
        yield Box(kind, view[position + head : position + length])
        position += length


def _parts(meta: memoryview, view: memoryview, form: str) -> Parts:
    found: dict[bytes, memoryview] = {}
    for box in _boxes(meta[4:], form):
        if box.kind in found:
            raise corrupt(form, f"its {box.kind.decode('latin-1')} is repeated")
        if box.kind != b"free":
            found[box.kind] = box.body
    if not {b"pitm", b"iinf", b"iprp", b"iloc"} <= found.keys():
        raise corrupt(form, "a part of its description is missing")
    pitm = Reader(found[b"pitm"])
    primary = pitm.take(2 if pitm.take(4) >> 24 == 0 else 4)
    kinds = dict(_kinds(found[b"iinf"], form))
    bodies = dict(_bodies(found[b"iloc"], view, found.get(b"idat", memoryview(b"")), form))
    if sum(len(part) for parts in bodies.values() for part in parts) > len(view):
        raise corrupt(form, "its parts overlap")
    sizes = dict(_sizes(found[b"iprp"], form))
    return Parts(primary, kinds, sizes, {item: bodies.get(item, []) for item in kinds})


def _kinds(iinf: memoryview, form: str) -> Iterator[tuple[int, bytes]]:
    wide = bytes(iinf[:1]) != b"\0"
    for number, box in enumerate(_boxes(iinf[8 if wide else 6 :], form)):
        if number >= MAX_ITEMS:
            raise ImageRejectedError("metadata_bomb", f"The {form} file has more than {MAX_ITEMS} parts.")
        entry = Reader(box.body)
        version = entry.take(4) >> 24
        if box.kind != b"infe" or version < 2:
            continue
        item = entry.take(2 if version == 2 else 4)
        entry.take(2)
        yield item, entry.bytes(4)


def _bodies(iloc: memoryview, view: memoryview, idat: memoryview, form: str) -> Iterator[tuple[int, list[memoryview]]]:
    reader = Reader(iloc)
    version = reader.take(4) >> 24
    first, second = reader.take(1), reader.take(1)
    offset_size, length_size, base_size = first >> 4, first & 15, second >> 4
    index_size = second & 15 if version in (1, 2) else 0
    # Of all items together: where every field is stated as of no size, a place takes no bytes.
    places = itertools.count(1)
    for _ in range(reader.take(2 if version < 2 else 4)):
        check_metadata(0, next(places))
        item = reader.take(2 if version < 2 else 4)
        method = reader.take(2) & 15 if version in (1, 2) else 0
        if reader.take(2) or method > 1:
            raise ImageRejectedError("unsupported_format", f"The {form} file keeps its picture somewhere else.")
        source = idat if method else view
        base, parts = reader.take(base_size), []
        for _ in range(reader.take(2)):
            check_metadata(0, next(places))
            reader.take(index_size)
            start = base + reader.take(offset_size)
            length = reader.take(length_size) or len(source) - start
            if start + length > len(source) or length < 0:
                raise truncated(form)
            parts.append(source[start : start + length])
        yield item, parts


def _sizes(iprp: memoryview, form: str) -> Iterator[tuple[int, tuple[int, int]]]:
    """Every item's width and height, from the `ispe` property that is associated with it."""
    properties, associations = list[Box](), list[memoryview]()
    for box in _boxes(iprp, form):
        if box.kind == b"ipco":
            properties += _boxes(box.body, form)
        elif box.kind == b"ipma":
            associations.append(box.body)
    number = itertools.count(1)
    for body in associations:
        reader = Reader(body)
        flags = reader.take(4)
        wide, large = flags & 1, flags >> 24 > 0
        for _ in range(reader.take(4)):
            check_metadata(0, next(number))
            item = reader.take(4 if large else 2)
            for _ in range(reader.take(1)):
                check_metadata(0, next(number))
                index = reader.take(2) & 0x7FFF if wide else reader.take(1) & 0x7F
                if 0 < index <= len(properties) and properties[index - 1].kind == b"ispe":
                    size = Reader(properties[index - 1].body[4:])
                    yield item, (size.take(4), size.take(4))


def _coded_pixels(item: int, parts: Parts, form: str, limits: Limits, units: Iterator[int]) -> int:
    width, height = parts.sizes.get(item, (0, 0))
    check_size(width, height, limits)
    if parts.kinds[item] != b"av01":
        return width * height
    bodies = parts.bodies[item]
    across, down = _frame_size(bodies[0] if len(bodies) == 1 else memoryview(b"".join(bodies)), units)
    check_size(across, down, limits)
    if (across, down) != (width, height):
        raise corrupt(form, "its header and its picture differ in size")
    return width * height


def _frame_size(view: memoryview, units: Iterator[int]) -> tuple[int, int]:
    """The largest frame that the sequence header allows, of which there is exactly one among the OBUs of an item."""
    size, position = None, 0
    while position < len(view):
        check_metadata(0, next(units))
        header, position = view[position], position + 1 + (view[position] >> 2 & 1)
        length = len(view) - position
        if header & 2:
            length, position = _leb128(view, position)
        if position + length > len(view):
            raise truncated("AVIF")
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            if size is not None:
                raise corrupt("AVIF", "it describes its picture twice")
            size = _sequence_size(bytes(view[position : position + min(length, _HEADER_BYTES)]))
        position += length
    if size is None:
        raise truncated("AVIF")
    return size


def _leb128(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for place, byte in enumerate(view[position : position + 8]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, position + place + 1
    raise truncated("AVIF")


def _sequence_size(body: bytes) -> tuple[int, int]:
    everything, left = int.from_bytes(body), 8 * len(body)

    def bits(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise truncated("AVIF")
        return everything >> left & (1 << count) - 1

    bits(3 + 1)  # profile, still picture
    if bits(1):  # reduced header
        bits(5)
    else:
        if bits(1):  # timing: a film
            raise ImageRejectedError("unsupported_format", "The AVIF file holds a film; give a still image.")
        delays = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delays and bits(1):
                bits(4)
    across, down = bits(4) + 1, bits(4) + 1
    return bits(across) + 1, bits(down) + 1
