from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest

from async_sessions._codec import decode
from async_sessions._codec.encode import to_array
from async_sessions.records import Limits
from tests.corpus.png import STREAM, idat
from tests.images import (
    PLACE,
    PNG_SIGNATURE,
    corners,
    encoded,
    exif,
    photograph,
    png_chunk,
    png_chunks,
    png_file,
    png_pixels,
    refusal,
    srgb_profile,
    take,
    turned,
)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (33, 17), (5, 1)])
@pytest.mark.parametrize("colour", [0, 2, 6])
def test_an_interlaced_png_is_measured_pass_by_pass(size: tuple[int, int], colour: int) -> None:
    # Adam7 by hand: Pillow reads it and does not write it.
    width, height = size
    channels = {0: 1, 2: 3, 6: 4}[colour]
    rows = bytearray()
    for left, top, across, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        columns = len(range(left, width, across))
        for row in range(top, height, down) if columns else ():
            rows += b"\0" + b"".join(bytes([row, column, 7, 255][:channels]) for column in range(left, width, across))
    data = png_file(width, height, 8, colour, bytes(rows), interlaced=1)
    assert take(data)[1].getpixel((width - 1, height - 1)) == (
        (height - 1, width - 1, 7, 255)[:channels] if channels > 1 else height - 1
    )
    assert refusal(png_file(width, height, 8, colour, bytes(rows[:-1]), interlaced=1)) == "truncated"
    assert refusal(png_file(width, height, 8, colour, bytes(rows) + b"\0", interlaced=1)) == "corrupt"


def test_text_exif_xmp_and_trailing_data_are_not_kept() -> None:
    secrets = [b"a comment", b"<x:xmpmeta>", PLACE, b"raw profile", b"trailing", b"private", b"late"]
    before = (
        png_chunk(b"tEXt", b"Comment\0a comment")
        + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta>")
        + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"raw profile"))
        + png_chunk(b"eXIf", exif(1)[6:])
        + png_chunk(b"prVt", b"private")
        + png_chunk(b"tIME", bytes(7))
        + png_chunk(b"pHYs", bytes(9))
    )
    data = png_file(4, 4, 8, 2, before=before, after=png_chunk(b"tEXt", b"a\0late")) + b"trailing"
    rebuilt, _ = take(data)
    assert [kind for kind, _ in png_chunks(rebuilt.data)] == [b"IHDR", b"IDAT", b"IEND"]
    assert not [secret for secret in secrets if secret in rebuilt.data]


def test_what_lies_behind_the_compressed_rows_is_not_kept() -> None:
    data = png_file(4, 4, 8, 0, pixels=idat(STREAM[:5]) + idat(STREAM[5:] + b"hid") + idat(b"den"))
    assert png_pixels(take(data)[0].data) == STREAM


def test_what_is_needed_to_show_the_pixels_is_kept() -> None:
    chunks = [
        (b"cICP", bytes([12, 13, 0, 1])),
        (b"iCCP", b"ICC Profile\0\0" + zlib.compress(srgb_profile())),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"cHRM", bytes(32)),
        (b"sBIT", b"\x08\x08\x08"),
        (b"PLTE", bytes(range(6))),
        (b"tRNS", b"\0\x80"),
    ]
    data = png_file(4, 4, 8, 3, before=b"".join(png_chunk(*chunk) for chunk in chunks), rows=bytes(4 * 5))
    rebuilt, image = take(data)
    assert rebuilt.data == data
    assert image.info["icc_profile"] == srgb_profile()
    assert image.has_transparency_data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_is_upright_by_its_exif_and_keeps_only_the_orientation(orientation: int) -> None:
    data = encoded(turned(corners(), orientation), "PNG", exif=exif(orientation))
    rebuilt, image = take(data)
    assert image.tobytes() == corners().tobytes()
    assert rebuilt.orientation == orientation
    assert PLACE in data
    assert PLACE not in rebuilt.data
    assert (b"eXIf" in rebuilt.data) == (orientation != 1)
    again, same = take(rebuilt.data)
    assert again == rebuilt
    assert same.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [
        (1, 0, b"\0\x40", (1,), [255, 0, 255]),
        (2, 0, b"\0\x18", (1,), [255, 0, 255]),
        (4, 0, b"\0\x05\xa0", (5,), [255, 0, 255]),
        (8, 0, b"\0\x01\x05\x02", (5,), [255, 0, 255]),
        (16, 0, b"\0\x12\x35\x12\x34\xff\xff", (0x1234,), [255, 0, 255]),
        (8, 2, b"\0\1\1\1\5\5\5\2\2\2", (5, 5, 5), [255, 0, 255]),
        (16, 2, b"\0" + b"\x11\x11" * 3 + b"\x12\x34" * 3 + b"\xff\xff" * 3, (0x1234,) * 3, [255, 0, 255]),
    ],
)
def test_a_transparent_sample_is_transparent_at_every_depth(
    depth: int, colour: int, row: bytes, transparent: tuple[int, ...], expected: list[int]
) -> None:
    before = png_chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    _, image = take(png_file(3, 1, depth, colour, row, before=before))
    assert image.has_transparency_data
    assert to_array(image)[0, :, 3].tolist() == expected


@pytest.mark.parametrize(("colour", "channels", "mode"), [(2, 3, "RGB"), (4, 2, "RGBA"), (6, 4, "RGBA")])
def test_samples_of_sixteen_bits_come_out_rounded_to_the_nearest(colour: int, channels: int, mode: str) -> None:
    samples = np.arange(256 * 256).reshape(256, 256, 1) + 257 * np.arange(channels)
    rows = b"".join(b"\0" + row.tobytes() for row in samples.astype(">u2"))
    rebuilt, image = take(png_file(256, 256, 16, colour, rows))
    assert image.mode == mode
    expected = np.rint(samples % 65_536 / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(image), expected[..., [0, 0, 0, 1]] if colour == 4 else expected)
    assert decode.peak(rebuilt.data, "image/png", 100, 1) == 200


def test_a_photograph_of_many_pixel_chunks_is_kept_byte_for_byte() -> None:
    stream = png_pixels(encoded(photograph(640, 480), "PNG"))
    pixels = b"".join(idat(stream[start : start + 8192]) for start in range(0, len(stream), 8192))
    data = png_file(640, 480, 8, 2, pixels=pixels)
    assert take(data)[0].data == data


def test_limits_are_those_that_were_given() -> None:
    data = encoded(photograph(100, 60), "PNG")
    assert refusal(data, Limits(max_pixels=6000, max_side=100)) is None
    assert refusal(data, Limits(max_pixels=5999)) == "too_many_pixels"
    assert refusal(data, Limits(max_side=99)) == "too_many_pixels"
    # Above the number of pixels at which Pillow itself would warn, and raise.
    assert refusal(png_file(20_000, 10_000, 1, 0), Limits(max_pixels=200_000_000, max_side=20_000)) is None


def test_noise_behind_a_signature_is_refused() -> None:
    assert refusal(PNG_SIGNATURE + os.urandom(1000)) in ("corrupt", "truncated")
