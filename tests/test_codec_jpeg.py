from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image

from async_sessions._codec.base import read_orientation, write_orientation
from async_sessions.records import Limits
from tests.corpus.jpeg import PROGRESSIVE, SCAN, SMALL, after_soi, many_scans
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
    photograph,
    refusal,
    segment,
    srgb_profile,
    take,
    turned,
)


def test_the_larger_the_image_the_fewer_scans_it_may_have() -> None:
    limits = Limits(max_pixels=64 * 48)
    assert refusal(many_scans(20), limits) is None
    assert refusal(many_scans(21), limits) == "cpu_bomb"


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
    scan = data.index(SCAN)
    cuts = [scan + (len(data) - scan) * share // 100 for share in (10, 50, 90, 99)]
    cuts += [place for place in (data.rfind(b"\xff\xd3"), data.rfind(b"\xff\xd3") + 2) if place > scan]
    for cut in cuts:
        assert refusal(data[:cut].rstrip(b"\xff") + b"\xff\xd9") == "truncated"


def test_a_jpeg_in_several_scans_that_lacks_some_of_its_last_colour_is_truncated() -> None:
    data = jpeg_in_scans(photograph(653, 477))
    last = data.rindex(SCAN)
    assert refusal(data) is None
    for share in (50, 70, 90, 97):
        cut = last + (len(data) - last) * share // 100
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
    assert refusal(SMALL[:-4] + b"\xff\xd9") is None
    assert refusal(PROGRESSIVE[: PROGRESSIVE.rindex(SCAN) + 20] + b"\xff\xd9") is None


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
    bare = jpeg_of([part for part in jpeg_segments(SMALL) if part[0] != 0xE0])
    data = after_soi(extra, bare) + SMALL + b"second picture"
    rebuilt, _ = take(data)
    assert not [secret for secret in (*secrets, thumbnail) if secret in rebuilt.data]
    assert rebuilt.data == after_soi(segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\0\0"), bare)


def test_what_lies_between_or_behind_the_scans_is_not_kept() -> None:
    cut = PROGRESSIVE.rindex(SCAN)
    data = PROGRESSIVE[:cut] + segment(0xE1, b"hidden") + PROGRESSIVE[cut:-2] + segment(0xFE, b"hidden") + b"\xff\xd9"
    assert take(data)[0].data == take(PROGRESSIVE)[0].data


def test_a_profile_with_a_part_missing_is_not_kept() -> None:
    data = encoded(photograph(65, 49), "JPEG", icc_profile=srgb_profile(180_000))
    segments = jpeg_segments(data)
    part = next(part for part in segments if part[1].startswith(b"ICC_PROFILE\0\2"))
    rebuilt, image = take(jpeg_of([each for each in segments if each != part]))
    assert b"ICC_PROFILE" not in rebuilt.data
    assert "icc_profile" not in image.info


def test_the_first_exif_block_states_the_orientation() -> None:
    blocks = segment(0xE1, exif(3)) + segment(0xE1, exif(6))
    assert take(after_soi(blocks))[0].orientation == 3


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
