from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from PIL import Image

from async_sessions.records import MIB
from tests.corpus.base import ARCHIVE, NOTE, PAGE, SCRIPT, XMP, Forgiven, Make, Refused, cuts, tails
from tests.images import (
    cmyk_profile,
    encoded,
    exif,
    jpeg_in_scans,
    jpeg_of,
    jpeg_segments,
    jpeg_with_exif,
    photo,
    photograph,
    segment,
    srgb_profile,
)

SMALL = encoded(photograph(64, 48), "JPEG")
PROGRESSIVE = encoded(photograph(64, 48), "JPEG", progressive=True)
SCAN = b"\xff\xda"
_WHOLE = encoded(
    photograph(64, 48), "JPEG", exif=exif(6), icc_profile=srgb_profile(), comment=b"hello", restart_marker_rows=1
)


def _frame(change: Callable[[bytearray], object], data: bytes = SMALL) -> bytes:
    """The file with the body of its frame header changed: depth, height, width, count, then three bytes a channel."""
    segments = jpeg_segments(data)
    place = next(place for place, (marker, _) in enumerate(segments) if marker in (0xC0, 0xC1, 0xC2))
    body = bytearray(segments[place][1])
    change(body)
    segments[place] = (segments[place][0], bytes(body))
    return jpeg_of(segments)


def _marked(old: int, new: int) -> bytes:
    return jpeg_of([(new if marker == old else marker, body) for marker, body in jpeg_segments(SMALL)])


def after_soi(extra: bytes, data: bytes = SMALL) -> bytes:
    return data[:2] + extra + data[2:]


def _sized(width: int, height: int, data: bytes = SMALL) -> bytes:
    return _frame(lambda body: struct.pack_into(">HH", body, 1, height, width), data)


def _scanned(header: bytes) -> bytes:
    """The file with another scan in the place of its own."""
    return SMALL[: SMALL.index(SCAN)] + segment(0xDA, header) + bytes(999) + b"\xff\xd9"


def many_scans(count: int, data: bytes = PROGRESSIVE) -> bytes:
    """A progressive file whose last scan, a refinement, is repeated."""
    last = data[data.rindex(SCAN) : -2]
    return data[:-2] + (count - data.count(SCAN)) * last + b"\xff\xd9"


def _without(marker: int) -> bytes:
    return jpeg_of([part for part in jpeg_segments(SMALL) if part[0] != marker])


_BARE = _without(0xE0)


def _ends() -> Iterator[tuple[str, int]]:
    position = 2
    for marker, body in jpeg_segments(_WHOLE):
        name = f"{marker:02X}"
        yield f"before marker {name}", position
        yield f"in marker {name}", position + 1
        yield f"before the length of {name}", position + 2
        yield f"in the length of {name}", position + 3
        if marker == 0xDA:
            break
        yield f"before the bytes of {name}", position + 4
        yield f"in the bytes of {name}", position + 4 + len(body) // 2
        position += 4 + len(body)
    yield "before the pixels", position + 14
    for restart in re.finditer(rb"\xff[\xd0-\xd7]", _WHOLE[position:]):
        yield "before a restart", position + restart.start()
        yield "in a restart", position + restart.start() + 1
        yield "behind a restart", position + restart.end()
    yield "before its end", len(_WHOLE) - 2
    yield "in its end", len(_WHOLE) - 1


def _scan_ends() -> Iterator[tuple[str, int]]:
    for scan in re.finditer(SCAN, PROGRESSIVE):
        yield "before a scan", scan.start()
        yield "in a scan", scan.start() + 20


REFUSED: dict[str, Refused] = {
    **cuts(_WHOLE, _ends()),
    **{f"progressive, {name}": refused for name, refused in cuts(PROGRESSIVE, _scan_ends()).items()},
    "only a signature": (lambda: b"\xff\xd8\xff", "truncated"),
    "only a start and an end": (lambda: b"\xff\xd8\xff\xd9", "truncated"),
    "cut in a table": (lambda: SMALL[:50], "truncated"),
    "cut in the scan": (lambda: photo("rocket.jpg")[:50_000], "truncated"),
    "cut by one byte": (lambda: SMALL[:-1], "truncated"),
    "cut and given an end": (lambda: photo("rocket.jpg")[:2000] + b"\xff\xd9", "truncated"),
    "a progressive file cut in its first scan and given an end": (
        lambda: PROGRESSIVE[: PROGRESSIVE.index(SCAN) + 15] + b"\xff\xd9", "truncated",
    ),
    "cut in half and given an end": (lambda: photo("rocket.jpg")[:50_000] + b"\xff\xd9", "truncated"),
    "a frame without scans": (lambda: SMALL[: SMALL.index(SCAN)] + b"\xff\xd9", "truncated"),
    "a scan without a frame": (lambda: jpeg_of([part for part in jpeg_segments(SMALL) if part[0] != 0xC0]), "corrupt"),
    "a scan of one of three channels": (
        lambda: _scanned(b"\1\1\0\0\x3f\0"), "truncated",
    ),
    "a scan of an unknown channel": (
        lambda: _scanned(b"\1\x09\0\0\x3f\0"), "corrupt",
    ),
    "a scan of the wrong size": (
        lambda: _scanned(b"\3\1\0\0\x3f\0"), "corrupt",
    ),
    "two frames": (lambda: after_soi(SMALL[SMALL.index(b"\xff\xc0") :][:19]), "corrupt"),
    "a second start": (lambda: after_soi(b"\xff\xd8"), "corrupt"),
    "a restart marker in the header": (lambda: after_soi(b"\xff\xd0"), "corrupt"),
    "junk between its parts": (lambda: after_soi(segment(0xFE, b"a") + b"junk"), "corrupt"),
    "a part without a length": (lambda: after_soi(b"\xff\xfe\0\1"), "corrupt"),
    "a part that overruns the file": (lambda: SMALL[:2] + b"\xff\xfe\xff\xff" + SMALL[2:100], "truncated"),
    "an unknown marker": (lambda: after_soi(segment(0xF3, b"a")), "corrupt"),
    "megabytes of fill": (lambda: after_soi(bytes([255]) * 8_000_000), "corrupt"),
    "no quantization tables": (lambda: jpeg_of([part for part in jpeg_segments(SMALL) if part[0] != 0xDB]), "corrupt"),
    "a Huffman table of rubbish": (lambda: after_soi(segment(0xC4, b"\0" + bytes([255]) * 16)), "corrupt"),
    "no width": (lambda: _sized(0, 48), "corrupt"),
    "a height that follows later": (lambda: _sized(64, 0), "corrupt"),
    "a frame of the wrong size": (lambda: _frame(lambda body: body.append(0)), "corrupt"),
    "an empty frame": (lambda: _frame(bytearray.clear), "corrupt"),
    "a channel that is described twice": (lambda: _frame(lambda body: body.__setitem__(9, body[6])), "corrupt"),
    "a sampling factor of 0": (lambda: _frame(lambda body: body.__setitem__(7, 0x20)), "corrupt"),
    "a sampling factor of 5": (lambda: _frame(lambda body: body.__setitem__(7, 0x51)), "corrupt"),
    "12 bits": (lambda: _frame(lambda body: body.__setitem__(0, 12)), "unsupported_format"),
    "two channels": (
        lambda: _frame(lambda body: body.__setitem__(slice(5, 15), b"\2" + body[6:12])), "unsupported_format",
    ),
    "lossless": (lambda: _marked(0xC0, 0xC3), "unsupported_format"),
    "arithmetic coding": (lambda: _marked(0xC0, 0xC9), "unsupported_format"),
    "arithmetic conditioning": (lambda: after_soi(segment(0xCC, b"\0\0")), "unsupported_format"),
    "65,535 pixels a side": (lambda: _sized(65_535, 65_535), "too_many_pixels"),
    "20,000 pixels wide": (lambda: _sized(20_000, 8), "too_many_pixels"),
    "64 million pixels in 1 KB": (lambda: _sized(8000, 8000), "truncated"),
    "64 million progressive pixels in 1 KB": (lambda: _sized(8000, 8000, PROGRESSIVE), "truncated"),
    "101 scans": (lambda: many_scans(101), "cpu_bomb"),
    "4000 scans": (lambda: many_scans(4000), "cpu_bomb"),
    "2 MB of comments": (lambda: after_soi(40 * segment(0xFE, bytes(50_000))), "metadata_bomb"),
    "2 MB of a profile": (lambda: after_soi(40 * segment(0xE2, b"ICC_PROFILE\0" + bytes(50_000))), "metadata_bomb"),
    "2 MB of comments behind the pixels": (
        lambda: SMALL[:-2] + 40 * segment(0xFE, bytes(50_000)) + b"\xff\xd9", "metadata_bomb",
    ),
    "30,000 empty comments": (lambda: after_soi(30_000 * segment(0xFE, b"")), "metadata_bomb"),
    "30,000 empty tables": (lambda: after_soi(30_000 * segment(0xC4, b"")), "metadata_bomb"),
    "64 million pixels and 21 scans": (lambda: many_scans(21, _large()), "cpu_bomb"),
    "2 MB of EXIF": (lambda: after_soi(40 * segment(0xE1, b"Exif\0\0" + bytes(50_000))), "metadata_bomb"),
    "2 MB of XMP": (
        lambda: after_soi(40 * segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(50_000))), "metadata_bomb",
    ),
    "2 MB between its scans": (
        lambda: PROGRESSIVE.replace(SCAN, 40 * segment(0xE5, bytes(50_000)) + SCAN), "metadata_bomb",
    ),
    "65,535 empty parts": (lambda: after_soi(65_535 * segment(0xE3, b"")), "metadata_bomb"),
    "30 MB of a scan without an end": (lambda: SMALL[:-2] + bytes(30 * MIB), "truncated"),
    "30 MB of restarts without an end": (lambda: SMALL[:-2] + b"\xff\xd0" * 15 * MIB, "truncated"),
    "no frame": (lambda: _without(0xC0), "corrupt"),
    "no Huffman tables and a progressive frame": (
        lambda: jpeg_of([part for part in jpeg_segments(PROGRESSIVE) if part[0] != 0xC4]), "corrupt",
    ),
    "a frame that says it is taller": (lambda: _sized(64, 16_000), "truncated"),
    "a frame that says it has one channel": (
        lambda: _frame(lambda body: body.__setitem__(slice(5, 15), b"\1" + body[6:9])), "corrupt",
    ),
    "a frame that says it has four channels": (lambda: _frame(lambda body: body.__setitem__(5, 4)), "corrupt"),
    "a quantization table that is not there": (lambda: _frame(lambda body: body.__setitem__(8, 3)), "corrupt"),
    "a frame behind its scan": (lambda: SMALL[:-2] + segment(0xC0, _frame_body()) + b"\xff\xd9", "corrupt"),
}  # fmt: skip


def _ending_in_grey() -> Image.Image:
    image = photograph(64, 48)
    image.paste((128, 128, 128), (0, 24, 64, 48))
    return image


def _large() -> bytes:
    return encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)


def _frame_body() -> bytes:
    return dict(jpeg_segments(SMALL))[0xC0]


TAKEN: dict[str, Make] = {
    "a photograph": lambda: photo("rocket.jpg"),
    "another photograph": lambda: photo("retina.jpg"),
    "a photograph with comments": lambda: photo("hubble_deep_field.jpg"),
    "baseline": lambda: SMALL,
    "progressive": lambda: PROGRESSIVE,
    "a hundred scans": lambda: many_scans(100),
    "restart markers": lambda: encoded(photograph(300, 200), "JPEG", restart_marker_rows=1),
    "progressive with restart markers": lambda: encoded(
        photograph(300, 200), "JPEG", progressive=True, restart_marker_blocks=3
    ),
    "no subsampling": lambda: encoded(photograph(65, 49), "JPEG", subsampling=0),
    "half the colour": lambda: encoded(photograph(65, 49), "JPEG", subsampling=1),
    "a quarter of the colour": lambda: encoded(photograph(65, 49), "JPEG", subsampling=2),
    "optimized tables": lambda: encoded(photograph(65, 49), "JPEG", optimize=True),
    "one flat colour": lambda: encoded(Image.new("RGB", (4000, 3000), "teal"), "JPEG", optimize=True),
    "one flat colour, progressive": lambda: encoded(Image.new("RGB", (4000, 3000), "teal"), "JPEG", progressive=True),
    "one flat grey, progressive": lambda: encoded(Image.new("L", (4001, 3001), 9), "JPEG", progressive=True),
    "the worst quality": lambda: encoded(photograph(640, 480), "JPEG", quality=1, optimize=True, progressive=True),
    "grey": lambda: encoded(photograph(65, 49).convert("L"), "JPEG"),
    "CMYK": lambda: encoded(photograph(65, 49).convert("CMYK"), "JPEG"),
    "RGB without a colour transform": lambda: encoded(photograph(65, 49), "JPEG", keep_rgb=True),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), "red"), "JPEG"),
    "16,384 pixels wide": lambda: encoded(Image.new("L", (16_384, 1)), "JPEG"),
    "fill bytes before its markers": lambda: SMALL[:2] + b"\xff\xff\xff" + SMALL[2:-2] + b"\xff\xff\xff\xd9",
    "its height again behind the scan": lambda: SMALL[:-2] + segment(0xDC, struct.pack(">H", 48)) + b"\xff\xd9",
    "a profile in three parts": lambda: encoded(photograph(65, 49), "JPEG", icc_profile=srgb_profile(180_000)),
    "the standard Huffman tables left out": lambda: jpeg_of([part for part in jpeg_segments(SMALL) if part[0] != 0xC4]),
    "grey at its end and fill bytes behind": lambda: encoded(_ending_in_grey(), "JPEG")[:-2] + b"\xff\xff\xff\xd9",
    "grey at its end, progressive, and fill bytes behind": lambda: (
        encoded(_ending_in_grey(), "JPEG", progressive=True)[:-2] + b"\xff\xff\xd9"
    ),
    "grey and a scan for each channel": lambda: jpeg_in_scans(photograph(65, 49).convert("L")),
    "a scan for each channel": lambda: jpeg_in_scans(photograph(65, 49)),
    "CMYK through its profile": lambda: encoded(photograph(65, 49).convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
    "CMYK as YCCK": lambda: encoded(photograph(65, 49).convert("CMYK"), "JPEG").replace(
        b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"
    ),
    "EXIF that is a loop": lambda: after_soi(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08")),
    "a thumbnail that is not there": lambda: after_soi(
        segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\xff\xff"), _without(0xE0)
    ),
    "a profile that says it is the third part of two": lambda: after_soi(
        segment(0xE2, b"ICC_PROFILE\0\3\2" + srgb_profile())
    ),
}

CLEANED: dict[str, Make] = {
    **tails(SMALL),
    "every kind of part": lambda: _WHOLE,
    "GPS": lambda: jpeg_with_exif(6),
    "GPS in a second block": lambda: after_soi(segment(0xE1, exif(1, gps=False)) + segment(0xE1, exif(6))),
    "GPS and a profile": lambda: jpeg_with_exif(8, icc_profile=srgb_profile()),
    "GPS in a progressive file": lambda: jpeg_with_exif(3, progressive=True),
    "GPS in its second picture": lambda: encoded(
        photograph(64, 48), "MPO", save_all=True, append_images=[photograph(64, 48, 1)], exif=exif(1)
    ),
    "GPS behind its pixels": lambda: SMALL[:-2] + segment(0xE1, exif(1)) + b"\xff\xd9",
    "XMP": lambda: after_soi(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
    "IPTC": lambda: after_soi(segment(0xED, b"Photoshop 3.0\08BIM\4\4\0\0" + NOTE)),
    "a comment": lambda: encoded(photograph(64, 48), "JPEG", comment=NOTE),
    "an HTML page as a comment": lambda: encoded(photograph(64, 48), "JPEG", comment=PAGE),
    "a ZIP archive as a comment": lambda: encoded(photograph(64, 48), "JPEG", comment=ARCHIVE),
    "JavaScript from its first byte": lambda: (
        # FF D8 FF E0 is a name, 2F 2A, the length, begins a comment, which ends in the next part
        b"\xff\xd8\xff\xe0/*" + bytes(0x2F2A - 2) + segment(0xFE, SCRIPT) + SMALL[2:]
    ),
}

FORGIVEN: dict[str, Forgiven] = {
    "a note for a profile": (lambda: after_soi(segment(0xE2, b"ICC_PROFILE\0\1\1" + 99 * NOTE)), SMALL),
    "a note behind its profile": (
        lambda: after_soi(segment(0xE2, b"ICC_PROFILE\0\1\1" + srgb_profile() + NOTE), _BARE),
        after_soi(segment(0xE2, b"ICC_PROFILE\0\1\1" + srgb_profile()), _BARE),
    ),
    "EXIF of 65,535 entries": (lambda: after_soi(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")), SMALL),
}
