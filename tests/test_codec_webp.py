from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from PIL import Image

from tests.images import (
    PLACE,
    encoded,
    exif,
    photograph,
    refusal,
    rgba_png,
    srgb_profile,
    take,
    webp_chunks,
    webp_file,
)

_LOSSY = encoded(photograph(64, 48), "WEBP")
_LOSSLESS = encoded(photograph(64, 48), "WEBP", lossless=True)
_ALPHA = encoded(Image.open(io.BytesIO(rgba_png(64, 48))), "WEBP")
_PICTURE = webp_chunks(_LOSSY)[0]


def _header(flags: int = 0, width: int = 64, height: int = 48) -> tuple[bytes, bytes]:
    return b"VP8X", struct.pack("<I", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "only a signature": (lambda: _LOSSY[:12], "truncated"),
    "cut in a chunk's name": (lambda: _LOSSY[:15], "truncated"),
    "cut in the picture": (lambda: _LOSSY[:500], "truncated"),
    "cut by two bytes": (lambda: _LOSSY[:-2], "truncated"),
    "cut and given the right size": (lambda: webp_file((b"VP8 ", _PICTURE[1][:500])), "corrupt"),
    "lossless, cut and given the right size": (
        lambda: webp_file((b"VP8L", webp_chunks(_LOSSLESS)[0][1][:500])), "corrupt",
    ),
    "a picture that overruns the file": (lambda: _LOSSY.replace(_LOSSY[16:20], b"\xff\xff\xff\xff", 1), "truncated"),
    "a first partition that overruns the picture": (
        lambda: webp_file((b"VP8 ", b"\xf0\xff\xff" + _PICTURE[1][3:])), "truncated",
    ),
    "no picture": (lambda: webp_file(_header()), "truncated"),
    "an empty picture": (lambda: webp_file((b"VP8 ", b"")), "truncated"),
    "an empty lossless picture": (lambda: webp_file((b"VP8L", b"")), "truncated"),
    "a picture that is none": (lambda: webp_file((b"VP8 ", b"\0" * 50)), "corrupt"),
    "a lossless picture that is none": (lambda: webp_file((b"VP8L", b"\0" * 50)), "corrupt"),
    "a picture that is not a key frame": (
        lambda: webp_file((b"VP8 ", bytes([_PICTURE[1][0] | 1]) + _PICTURE[1][1:])), "corrupt",
    ),
    "two pictures": (lambda: webp_file(_PICTURE, _PICTURE), "corrupt"),
    "two headers": (lambda: webp_file(_header(), _header(), _PICTURE), "corrupt"),
    "a header behind the picture": (lambda: webp_file(_PICTURE, _header()), "corrupt"),
    "a header of 4 bytes": (lambda: webp_file((b"VP8X", bytes(4)), _PICTURE), "corrupt"),
    "a header of another size": (lambda: webp_file(_header(0, 65, 48), _PICTURE), "corrupt"),
    "a header of 2^48 pixels": (lambda: webp_file(_header(0, 1 << 24, 1 << 24), _PICTURE), "too_many_pixels"),
    "16,383 pixels a side": (
        lambda: webp_file((b"VP8 ", _PICTURE[1][:6] + b"\xff\x3f\xff\x3f" + _PICTURE[1][10:])), "too_many_pixels",
    ),
    "lossless, 16,384 pixels a side": (
        lambda: webp_file((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(100))), "too_many_pixels",
    ),
    "no width": (lambda: webp_file((b"VP8 ", _PICTURE[1][:6] + bytes(4) + _PICTURE[1][10:])), "corrupt"),
    "an animation": (
        lambda: encoded(photograph(64, 48), "WEBP", save_all=True, append_images=[photograph(64, 48, seed=1)]),
        "too_many_frames",
    ),
    "an animation that says it is none": (lambda: webp_file(_header(), (b"ANIM", bytes(6))), "too_many_frames"),
    "a still that says it is an animation": (lambda: webp_file(_header(2), _PICTURE), "too_many_frames"),
    "2 MB of XMP": (lambda: webp_file(_header(4), _PICTURE, (b"XMP ", bytes(2_000_000))), "metadata_bomb"),
    "2 MB of a profile": (lambda: webp_file(_header(32), (b"ICCP", bytes(2_000_000)), _PICTURE), "metadata_bomb"),
    "30,000 empty chunks": (lambda: webp_file(_PICTURE, *[(b"abcd", b"")] * 30_000), "metadata_bomb"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_webp_that_is_not_one_whole_still_image_is_refused(case: str) -> None:
    build, reason = REFUSED[case]
    assert refusal(build()) == reason


TAKEN: dict[str, Callable[[], bytes]] = {
    "lossy": lambda: _LOSSY,
    "lossless": lambda: _LOSSLESS,
    "lossy with alpha": lambda: _ALPHA,
    "lossless with alpha": lambda: encoded(Image.open(io.BytesIO(rgba_png(63, 47))), "WEBP", lossless=True),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), "red"), "WEBP"),
    "16,383 pixels wide": lambda: encoded(Image.new("RGB", (16_383, 1)), "WEBP"),
    "with a profile": lambda: encoded(photograph(64, 48), "WEBP", icc_profile=srgb_profile()),
    "with EXIF and XMP": lambda: encoded(photograph(64, 48), "WEBP", exif=exif(1), xmp=b"<x:xmpmeta/>"),
    "an extended header and nothing else": lambda: webp_file(_header(), _PICTURE),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_good_webp_is_taken_with_its_picture_as_it_came(case: str) -> None:
    data = TAKEN[case]()
    rebuilt, image = take(data)
    with Image.open(io.BytesIO(data)) as expected:
        assert (image.mode, image.size) == (expected.mode, expected.size)
        assert image.tobytes() == expected.tobytes()
        assert image.info.get("icc_profile") == expected.info.get("icc_profile")
    kept = (b"VP8 ", b"VP8L", b"ALPH", b"ICCP")
    assert [part for part in webp_chunks(rebuilt.data) if part[0] in kept] == [
        part for part in webp_chunks(data) if part[0] in kept
    ]


def test_exif_xmp_unknown_chunks_and_trailing_data_are_not_kept_and_the_flags_say_so() -> None:
    profile, alpha = (b"ICCP", srgb_profile()), webp_chunks(_ALPHA)[1:]
    hidden = [(b"EXIF", exif(6)), (b"XMP ", b"<x:xmpmeta/>"), (b"abcd", b"hidden")]
    data = webp_file(_header(0xFFFFFFFD), profile, *alpha, *hidden) + b"trailing"
    rebuilt, image = take(data)
    assert rebuilt.data == webp_file(_header(0x30), profile, *alpha)
    assert PLACE in data
    assert PLACE not in rebuilt.data
    assert image.mode == "RGBA"


def test_a_last_byte_of_padding_may_be_left_out() -> None:
    data = webp_file(_header(), _PICTURE, (b"abcd", b"odd"))[:-1]
    assert take(data)[0].data == webp_file(_header(), _PICTURE)


def test_the_profile_flag_is_cleared_when_there_is_none() -> None:
    assert take(webp_file(_header(0x20), _PICTURE))[0].data == webp_file(_header(), _PICTURE)


def test_a_webp_is_shown_as_browsers_show_it_whatever_its_exif_says() -> None:
    data = encoded(photograph(64, 48), "WEBP", exif=exif(6))
    rebuilt, image = take(data)
    assert rebuilt.orientation == 1
    assert image.size == (64, 48)
