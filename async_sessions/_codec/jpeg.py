"""JPEG: walk the segments, check the frame and its scans, and write the file again without the rest.

Kept are tables, frame and scans as they came, the ICC profile, what tells the colour model (JFIF, Adobe) and the
orientation. Other EXIF, with its GPS and its thumbnail, XMP, comments and whatever follows the image (the second
picture of an MPO, a gain map, a video) are dropped. The format is that of ITU-T T.81.

Not looked for: bytes of a scan behind its last block, and tables that no channel uses.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Final, NamedTuple

import numpy as np

from async_sessions._codec.base import (
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

MAX_SCANS: Final = 100  # each costs a pass over all pixels, however few its bytes; encoders write about ten
MAX_FULL_SCANS: Final = 20  # of an image as large as the limits allow; of smaller ones, as many more

_EOI: Final = 0xD9
_SOS: Final = 0xDA
_PROGRESSIVE: Final = 0xC2
_APPLICATION: Final = frozenset((*range(0xE0, 0xF0), 0xFE))  # APP0 to APP15, and comments
_CODED: Final = 0  # no marker: the entropy-coded data that follows the header of a scan
_BARE: Final = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length: TEM, RST0 to RST7, SOI
_ICC: Final = b"ICC_PROFILE\0"
_ICC_PART: Final = 0xFFFF - 2 - len(_ICC) - 2  # bytes of a profile that a segment holds
_MARKER: Final = re.compile(rb"\xff{1,4096}[^\x00\xff]")  # fill bytes may come before it
_WINDOW: Final = 256 * KIB  # bytes searched at a time
_HEAD: Final = 64  # parts that come before the first scan; encoders write about ten, and a large ICC profile is sixteen
_COEFFICIENTS: Final = 64 * 2  # bytes of a block


class Component(NamedTuple):
    across: int
    down: int


class Frame(NamedTuple):
    width: int
    height: int
    progressive: bool
    components: dict[int, Component]


class Segment(NamedTuple):
    marker: int
    body: bytes
    whole: memoryview  # with marker and length


def rebuild(data: bytes | bytearray, limits: Limits) -> Rebuilt:
    """Raise `ImageRejectedError` unless `data` is one whole image; return it without the rest."""
    frame: Frame | None = None
    application, image = list[Segment](), list[memoryview]()
    complete, scans, least = set[int](), 0, 0
    for segment in _segments(data):
        match segment.marker:
            case 0xC0 | 0xC1 | 0xC2:  # baseline, extended and progressive; all three Huffman coded
                if frame is not None:
                    raise corrupt("JPEG", "it has two frames")
                frame = _frame(segment)
                check_size(frame.width, frame.height, limits)
            case 0xDA:  # start of scan
                if frame is None:
                    raise corrupt("JPEG", "its pixels come before their description")
                scans += 1
                passes = scans * frame.width * frame.height
                if scans > MAX_SCANS or passes > MAX_FULL_SCANS * limits.max_pixels:
                    raise ImageRejectedError("cpu_bomb", "The JPEG has far too many scans for its size. Save it again.")
                given, least = _scan(segment, frame)
                complete |= given
            case 0:  # `_CODED`
                if 8 * len(segment.whole) < least:
                    raise truncated("JPEG")
            case 0xC4 | 0xDB | 0xDD:  # Huffman tables, quantization tables, restart interval
                pass
            case 0xDC:  # repeats the height
                continue
            case marker if marker in _APPLICATION:
                if not scans:
                    application.append(segment)
                continue
            case marker if 0xC3 <= marker <= 0xCF:
                raise _unsupported("lossless, hierarchical or arithmetic-coded")
            case marker:
                raise corrupt("JPEG", f"it holds a marker {marker:02X}")
        image.append(segment.whole)
    if frame is None or complete != frame.components.keys():
        raise truncated("JPEG")
    kept, orientation = _kept(application)
    whole = b"".join([b"\xff\xd8", *kept, *image, b"\xff\xd9"])
    return Rebuilt(data=whole, width=frame.width, height=frame.height, orientation=orientation)


def coefficients(data: bytes | bytearray, pixels: int) -> int:
    """Bytes that a decoder keeps beside the pixels of a checked file, until it has read the last of its scans.

    None where there is one scan, which is decoded as it is read. Cheap; for a file with a strange head, too many.
    """
    frame: Frame | None = None
    for segment in islice(_segments(data), _HEAD):
        if segment.marker in (0xC0, 0xC1, _PROGRESSIVE):
            frame = _frame(segment)
        elif segment.marker == _SOS and frame is not None:
            buffered = frame.progressive or segment.body[0] < len(frame.components)
            return _blocks(frame, [*frame.components.values()]) * _COEFFICIENTS if buffered else 0
    return 4 * 2 * pixels


def _segments(data: bytes | bytearray) -> Iterator[Segment]:
    """Every segment between SOI and EOI; the data of a scan is one of its own."""
    view, position, count, metadata = memoryview(data), 2, 0, 0
    while found := _MARKER.match(data, position):
        marker, start = data[found.end() - 1], found.end()
        if marker == _EOI:
            return
        if marker in _BARE:
            raise corrupt("JPEG", f"it holds a marker {marker:02X} out of place")
        length = int.from_bytes(view[start : start + 2])
        position = start + length
        if start + 2 > len(view) or position > len(view):
            raise truncated("JPEG")
        if length < 2:
            raise corrupt("JPEG", "a part of it has no length")
        count += 1
        metadata += length if marker in _APPLICATION else 0
        check_metadata(metadata, count)
        body = bytes(view[start + 2 : position])
        yield Segment(marker, body, view[start - 2 : position])
        if marker == _SOS:
            start, position = position, _end_of_scan(data, position)
            yield Segment(_CODED, b"", view[start:position])
    if position + 1 < len(view):
        raise corrupt("JPEG", "what should be a marker is none")
    raise truncated("JPEG")


def _end_of_scan(data: bytes | bytearray, start: int) -> int:
    """Where the first marker is that ends a scan: neither a stuffed zero, nor a restart, nor a fill byte."""
    for window in range(start, len(data) - 1, _WINDOW):
        codes = np.frombuffer(data, np.uint8, min(_WINDOW + 1, len(data) - window), window)
        after = codes[1:]
        ends = (codes[:-1] == 0xFF) & (after != 0x00) & (after != 0xFF) & (after & 0xF8 != 0xD0)
        first = int(ends.argmax())
        if ends[first]:
            return window + first
    raise truncated("JPEG")


def _unsupported(what: str) -> ImageRejectedError:
    return ImageRejectedError(
        "unsupported_format", f"This is a {what} JPEG, which browsers do not show. Save it again."
    )


def _frame(segment: Segment) -> Frame:
    body = segment.body
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise corrupt("JPEG", "its frame has the wrong size")
    depth, height, width, count = struct.unpack_from(">BHHB", body)
    if depth != 8 or count not in (1, 3, 4):
        raise _unsupported(f"{depth}-bit, {count}-channel")
    components = {}
    for name, sampling, table in struct.iter_unpack("BBB", body[6:]):
        across, down = sampling >> 4, sampling & 15
        if not (1 <= across <= 4 and 1 <= down <= 4 and table < 4):
            raise corrupt("JPEG", "its frame is not valid")
        components[name] = Component(across, down)
    if len(components) != count:
        raise corrupt("JPEG", "a colour channel is described twice")
    return Frame(width, height, segment.marker == _PROGRESSIVE, components)


def _scan(segment: Segment, frame: Frame) -> tuple[set[int], int]:
    """Check a scan's header. Return the components that it gives a value in every block, and its least size in bits.

    The finer scans of a progressive file give none.
    """
    body = segment.body
    if not body or len(body) != 4 + 2 * body[0]:
        raise corrupt("JPEG", "a scan has the wrong size")
    names, first, last = body[1:-3:2], body[-3], body[-2]
    if not names or len(set(names)) != len(names) or not frame.components.keys() >= set(names):
        raise corrupt("JPEG", "a scan is of a channel that is not there")
    if frame.progressive and not (first <= last < 64 and (last == 0 or (first > 0 and len(names) == 1))):
        raise corrupt("JPEG", "a scan is not valid")
    if frame.progressive and first > 0:
        return set(), 0
    # A block takes one bit for its first coefficient, at least, and one to say that there are no others.
    blocks = _blocks(frame, [frame.components[name] for name in names])
    return set(names), blocks * (1 if frame.progressive else 2)


def _blocks(frame: Frame, scanned: list[Component]) -> int:
    """How many 8 x 8 blocks a scan codes (T.81, A.2)."""
    across = max(component.across for component in frame.components.values())
    down = max(component.down for component in frame.components.values())
    if len(scanned) == 1:
        width, height = _over(frame.width * scanned[0].across, across), _over(frame.height * scanned[0].down, down)
        return _over(width, 8) * _over(height, 8)
    units = _over(frame.width, 8 * across) * _over(frame.height, 8 * down)
    return units * sum(component.across * component.down for component in scanned)


def _over(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _kept(segments: list[Segment]) -> tuple[list[bytes], int]:
    """What is written before the image, and the orientation among it."""
    jfif, adobe, orientation, profile = b"", b"", 0, list[Segment]()
    for segment in segments:
        marker, body = segment.marker, segment.body
        if marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
            jfif = _written(marker, body[:12] + b"\0\0")  # the last two: no thumbnail
        elif marker == 0xE1 and body[:5] == b"Exif\0" and not orientation:
            orientation = read_orientation(body[6:])
        elif marker == 0xE2 and body[:12] == _ICC and len(body) > 14:
            profile.append(segment)
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = _written(marker, body[:12])
    exif = _written(0xE1, b"Exif\0\0" + write_orientation(orientation)) if orientation > 1 else b""
    places = sorted((segment.body[12], segment.body[13]) for segment in profile)
    whole = places == [(place, len(profile)) for place in range(1, len(profile) + 1)]
    profile.sort(key=lambda segment: segment.body[12])
    icc = icc_profile(b"".join(segment.body[14:] for segment in profile)) if whole else b""
    return [jfif, exif, *_in_segments(icc), adobe], orientation or 1


def _in_segments(icc: bytes) -> list[bytes]:
    parts = [icc[start : start + _ICC_PART] for start in range(0, len(icc), _ICC_PART)]
    return [_written(0xE2, _ICC + bytes([place, len(parts)]) + part) for place, part in enumerate(parts, 1)]


def _written(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
