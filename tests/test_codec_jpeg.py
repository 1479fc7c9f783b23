from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from PIL import Image

from async_sessions._codec.base import read_orientation, write_orientation
from async_sessions.records import Limits
from tests.images import (
    CAMERA,
    PLACE,
    corners,
    encoded,
    exif,
    jpeg_in_scans,
    jpeg_of,
    jpeg_segments,
    jpeg_with_exif,
    photo,
    photograph,
    refusal,
    segment,
    srgb_profile,
    take,
    turned,
)

_SMALL = encoded(photograph(64, 48), "JPEG")
_PROGRESSIVE = encoded(photograph(64, 48), "JPEG", progressive=True)
_SCAN = b"\xff\xda"


def _frame(change: Callable[[bytearray], object], data: bytes = _SMALL) -> bytes:
    """The file with the body of its frame header changed: depth, height, width, count, then three bytes a channel."""
    segments = jpeg_segments(data)
    place = next(place for place, (marker, _) in enumerate(segments) if marker in (0xC0, 0xC1, 0xC2))
    body = bytearray(segments[place][1])
    change(body)
    segments[place] = (segments[place][0], bytes(body))
    return jpeg_of(segments)


def _marked(old: int, new: int) -> bytes:
    return jpeg_of([(new if marker == old else marker, body) for marker, body in jpeg_segments(_SMALL)])


def _after_soi(extra: bytes, data: bytes = _SMALL) -> bytes:
    return data[:2] + extra + data[2:]


def _sized(width: int, height: int, data: bytes = _SMALL) -> bytes:
    return _frame(lambda body: struct.pack_into(">HH", body, 1, height, width), data)


def _scanned(header: bytes) -> bytes:
    """The file with another scan in the place of its own."""
    return _SMALL[: _SMALL.index(_SCAN)] + segment(0xDA, header) + bytes(999) + b"\xff\xd9"


def _many_scans(count: int) -> bytes:
    """A progressive file whose last scan, a refinement, is repeated."""
    last = _PROGRESSIVE[_PROGRESSIVE.rindex(_SCAN) : -2]
    scans = _PROGRESSIVE.count(_SCAN)
    return _PROGRESSIVE[:-2] + (count - scans) * last + b"\xff\xd9"


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "only a signature": (lambda: b"\xff\xd8\xff", "truncated"),
    "only a start and an end": (lambda: b"\xff\xd8\xff\xd9", "truncated"),
    "cut in a table": (lambda: _SMALL[:50], "truncated"),
    "cut in the scan": (lambda: photo("rocket.jpg")[:50_000], "truncated"),
    "cut by one byte": (lambda: _SMALL[:-1], "truncated"),
    "cut and given an end": (lambda: photo("rocket.jpg")[:2000] + b"\xff\xd9", "truncated"),
    "a progressive file cut in its first scan and given an end": (
        lambda: _PROGRESSIVE[: _PROGRESSIVE.index(_SCAN) + 15] + b"\xff\xd9", "truncated",
    ),
    "a frame without scans": (lambda: _SMALL[: _SMALL.index(_SCAN)] + b"\xff\xd9", "truncated"),
    "a scan without a frame": (lambda: jpeg_of([part for part in jpeg_segments(_SMALL) if part[0] != 0xC0]), "corrupt"),
    "a scan of one of three channels": (
        lambda: _scanned(b"\1\1\0\0\x3f\0"), "truncated",
    ),
    "a scan of an unknown channel": (
        lambda: _scanned(b"\1\x09\0\0\x3f\0"), "corrupt",
    ),
    "a scan of the wrong size": (
        lambda: _scanned(b"\3\1\0\0\x3f\0"), "corrupt",
    ),
    "two frames": (lambda: _after_soi(_SMALL[_SMALL.index(b"\xff\xc0") :][:19]), "corrupt"),
    "a second start": (lambda: _after_soi(b"\xff\xd8"), "corrupt"),
    "a restart marker in the header": (lambda: _after_soi(b"\xff\xd0"), "corrupt"),
    "junk between its parts": (lambda: _after_soi(segment(0xFE, b"a") + b"junk"), "corrupt"),
    "a part without a length": (lambda: _after_soi(b"\xff\xfe\0\1"), "corrupt"),
    "a part that overruns the file": (lambda: _SMALL[:2] + b"\xff\xfe\xff\xff" + _SMALL[2:100], "truncated"),
    "an unknown marker": (lambda: _after_soi(segment(0xF3, b"a")), "corrupt"),
    "megabytes of fill": (lambda: _after_soi(bytes([255]) * 8_000_000), "corrupt"),
    "no quantization tables": (lambda: jpeg_of([part for part in jpeg_segments(_SMALL) if part[0] != 0xDB]), "corrupt"),
    "a Huffman table of rubbish": (lambda: _after_soi(segment(0xC4, b"\0" + bytes([255]) * 16)), "corrupt"),
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
    "arithmetic conditioning": (lambda: _after_soi(segment(0xCC, b"\0\0")), "unsupported_format"),
    "65,535 pixels a side": (lambda: _sized(65_535, 65_535), "too_many_pixels"),
    "20,000 pixels wide": (lambda: _sized(20_000, 8), "too_many_pixels"),
    "64 million pixels in 1 KB": (lambda: _sized(8000, 8000), "truncated"),
    "64 million progressive pixels in 1 KB": (lambda: _sized(8000, 8000, _PROGRESSIVE), "truncated"),
    "101 scans": (lambda: _many_scans(101), "cpu_bomb"),
    "4000 scans": (lambda: _many_scans(4000), "cpu_bomb"),
    "2 MB of comments": (lambda: _after_soi(40 * segment(0xFE, bytes(50_000))), "metadata_bomb"),
    "2 MB of a profile": (lambda: _after_soi(40 * segment(0xE2, b"ICC_PROFILE\0" + bytes(50_000))), "metadata_bomb"),
    "2 MB of comments behind the pixels": (
        lambda: _SMALL[:-2] + 40 * segment(0xFE, bytes(50_000)) + b"\xff\xd9", "metadata_bomb",
    ),
    "30,000 empty comments": (lambda: _after_soi(30_000 * segment(0xFE, b"")), "metadata_bomb"),
    "30,000 empty tables": (lambda: _after_soi(30_000 * segment(0xC4, b"")), "metadata_bomb"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_jpeg_that_is_not_one_whole_image_is_refused(case: str) -> None:
    build, reason = REFUSED[case]
    assert refusal(build()) == reason


def test_the_larger_the_image_the_fewer_scans_it_may_have() -> None:
    limits = Limits(max_pixels=64 * 48)
    assert refusal(_many_scans(20), limits) is None
    assert refusal(_many_scans(21), limits) == "cpu_bomb"


CUT: dict[str, Callable[[], bytes]] = {
    "baseline": lambda: encoded(photograph(653, 477), "JPEG"),
    "no subsampling": lambda: encoded(photograph(653, 477), "JPEG", subsampling=0),
    "a column and a row beyond its blocks": lambda: encoded(photograph(641, 481), "JPEG"),
    "grey": lambda: encoded(photograph(653, 477).convert("L"), "JPEG"),
    "CMYK": lambda: encoded(photograph(653, 477).convert("CMYK"), "JPEG"),
    "RGB without a colour transform": lambda: encoded(photograph(653, 477), "JPEG", keep_rgb=True),
    "restart markers": lambda: encoded(photograph(653, 477), "JPEG", restart_marker_rows=1),
    "turned": lambda: jpeg_with_exif(6, image=photograph(653, 477)),
}


@pytest.mark.parametrize("case", CUT)
def test_a_jpeg_that_was_cut_and_given_an_end_is_truncated(case: str) -> None:
    data = CUT[case]()
    scan = data.index(_SCAN)
    cuts = [scan + (len(data) - scan) * share // 100 for share in (10, 50, 90, 99)]
    cuts += [place for place in (data.rfind(b"\xff\xd3"), data.rfind(b"\xff\xd3") + 2) if place > scan]
    for cut in cuts:
        assert refusal(data[:cut].rstrip(b"\xff") + b"\xff\xd9") == "truncated"


def test_a_jpeg_that_really_ends_in_grey_is_taken() -> None:
    for mode, grey in (("L", 128), ("RGB", (128, 128, 128)), ("CMYK", (127, 127, 127, 127))):
        image = photograph(653, 477).convert(mode)
        for box in ((0, 0, 653, 477), (0, 240, 653, 477), (640, 470, 653, 477)):
            image.paste(grey, box)
            for options in ({}, {"progressive": True}, {"restart_marker_blocks": 5}, {"optimize": True}):
                assert refusal(encoded(image, "JPEG", **options)) is None


def test_what_a_cut_took_from_the_last_block_or_the_last_scan_is_not_missed() -> None:
    """A known limit: libjpeg only warns, Pillow does not pass it on, and what is shown is not wrong but coarse."""
    assert refusal(_SMALL[:-4] + b"\xff\xd9") is None
    assert refusal(_PROGRESSIVE[: _PROGRESSIVE.rindex(_SCAN) + 20] + b"\xff\xd9") is None


TAKEN: dict[str, Callable[[], bytes]] = {
    "a photograph": lambda: photo("rocket.jpg"),
    "another photograph": lambda: photo("retina.jpg"),
    "a photograph with comments": lambda: photo("hubble_deep_field.jpg"),
    "baseline": lambda: _SMALL,
    "progressive": lambda: _PROGRESSIVE,
    "a hundred scans": lambda: _many_scans(100),
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
    "fill bytes before its markers": lambda: _SMALL[:2] + b"\xff\xff\xff" + _SMALL[2:-2] + b"\xff\xff\xff\xd9",
    "its height again behind the scan": lambda: _SMALL[:-2] + segment(0xDC, struct.pack(">H", 48)) + b"\xff\xd9",
    "a profile in three parts": lambda: encoded(photograph(65, 49), "JPEG", icc_profile=srgb_profile() * 300),
    "the standard Huffman tables left out": lambda: jpeg_of(
        [part for part in jpeg_segments(_SMALL) if part[0] != 0xC4]
    ),
    "a scan for each channel": lambda: jpeg_in_scans(photograph(65, 49)),
    "EXIF": jpeg_with_exif,
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_good_jpeg_is_taken_with_its_tables_and_scans_as_they_came(case: str) -> None:
    data = TAKEN[case]()
    rebuilt, image = take(data)
    with Image.open(io.BytesIO(data)) as expected:
        if rebuilt.orientation == 1:
            assert image.tobytes() == expected.tobytes()
        assert (image.mode, image.info.get("icc_profile")) == (expected.mode, expected.info.get("icc_profile"))
    if "behind" not in case and "fill" not in case:
        assert _payload(rebuilt.data) == _payload(data)


def _payload(data: bytes) -> list[tuple[int, bytes]]:
    return [(marker, body) for marker, body in jpeg_segments(data) if not 0xE0 <= marker <= 0xFE]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_upright_by_its_exif_and_keeps_only_the_orientation(orientation: int) -> None:
    data = jpeg_with_exif(orientation, image=corners(), subsampling=0, quality=95)
    rebuilt, image = take(data)
    assert image.size == corners().size
    for place in ((8, 8), (40, 8), (8, 24), (40, 24)):
        expected, found = corners().getpixel(place), image.getpixel(place)
        assert isinstance(expected, tuple)
        assert isinstance(found, tuple)
        assert max(abs(one - other) for one, other in zip(expected, found, strict=True)) < 8
    assert rebuilt.orientation == orientation
    assert (b"Exif" in rebuilt.data) == (orientation != 1)
    for secret in (PLACE, CAMERA.encode()):
        assert secret in data
        assert secret not in rebuilt.data
    again, same = take(rebuilt.data)
    assert again == rebuilt
    assert same.tobytes() == image.tobytes()


def test_xmp_comments_thumbnails_and_trailing_data_are_not_kept() -> None:
    thumbnail = b"\xff\xd8 a smaller picture"
    secrets = [b"http://ns.adobe.com/xap", b"a comment", b"8BIM", b"MPF", b"JFXX", b"second picture", b"pixels of JFIF"]
    extra = (
        segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\1\4" + b"pixels of JFIF")
        + segment(0xE0, b"JFXX\0\x10" + thumbnail)
        + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>")
        + segment(0xE2, b"MPF\0" + bytes(50))
        + segment(0xED, b"Photoshop 3.0\x008BIM")
        + segment(0xFE, b"a comment")
        + segment(0xFE, thumbnail)
    )
    bare = jpeg_of([part for part in jpeg_segments(_SMALL) if part[0] != 0xE0])
    data = _after_soi(extra, bare) + _SMALL + b"second picture"
    rebuilt, _ = take(data)
    assert not [secret for secret in (*secrets, thumbnail) if secret in rebuilt.data]
    assert rebuilt.data == _after_soi(segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\0\0"), bare)


def test_what_lies_between_or_behind_the_scans_is_not_kept() -> None:
    cut = _PROGRESSIVE.rindex(_SCAN)
    data = _PROGRESSIVE[:cut] + segment(0xE1, b"hidden") + _PROGRESSIVE[cut:-2] + segment(0xFE, b"hidden") + b"\xff\xd9"
    assert take(data)[0].data == take(_PROGRESSIVE)[0].data


def test_a_profile_with_a_part_missing_is_not_kept() -> None:
    data = encoded(photograph(65, 49), "JPEG", icc_profile=srgb_profile() * 300)
    segments = jpeg_segments(data)
    part = next(part for part in segments if part[1].startswith(b"ICC_PROFILE\0\2"))
    rebuilt, image = take(jpeg_of([each for each in segments if each != part]))
    assert b"ICC_PROFILE" not in rebuilt.data
    assert "icc_profile" not in image.info


def test_the_first_exif_block_states_the_orientation() -> None:
    blocks = segment(0xE1, exif(3)) + segment(0xE1, exif(6))
    assert take(_after_soi(blocks))[0].orientation == 3


def test_a_rebuilt_file_shows_what_the_original_shows() -> None:
    data = jpeg_with_exif(6, icc_profile=srgb_profile(), comment=b"hello")
    rebuilt, _ = take(data)
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(rebuilt.data)) as other:
        assert one.tobytes() == other.tobytes()
        assert dict(other.getexif()) == {0x0112: 6}
        assert other.info["icc_profile"] == srgb_profile()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_is_read_in_either_byte_order(orientation: int, order: str) -> None:
    assert read_orientation(exif(orientation, order=order)[6:]) == orientation
    assert read_orientation(write_orientation(orientation)) == orientation
    tags = Image.Exif()
    tags.load(b"Exif\0\0" + write_orientation(orientation))
    assert dict(tags) == {0x0112: orientation}


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"MM\0*",
        b"XX" + write_orientation(6)[2:],
        write_orientation(6)[:-8],
        write_orientation(0),
        write_orientation(9),
        b"MM\0*\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        write_orientation(6).replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x04"),
        exif(None)[6:],
    ],
)
def test_exif_that_states_no_valid_orientation_states_1(block: bytes) -> None:
    assert read_orientation(block) == 1


def test_a_camera_picture_is_turned_as_pillow_turns_it() -> None:
    upright = photograph(320, 240)
    data = jpeg_with_exif(6, image=upright, quality=95, subsampling=0)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.size == turned(upright, 6).size == (240, 320)
    assert take(data)[1].size == (320, 240)
