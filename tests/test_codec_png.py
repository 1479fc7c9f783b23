from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from async_sessions._codec.encode import to_array
from async_sessions.records import Limits
from tests.images import (
    PLACE,
    PNG_SIGNATURE,
    corners,
    encoded,
    exif,
    photo,
    photograph,
    png_chunk,
    png_chunks,
    png_file,
    png_pixels,
    refusal,
    rgba_png,
    srgb_profile,
    take,
    turned,
)

_STREAM = zlib.compress(bytes(4 * 5))
_IDAT = png_chunk(b"IDAT", _STREAM)
_GREY = png_file(4, 4, 8, 0)
_TEXT = png_chunk(b"tEXt", b"Comment\0hello")


def _idat(data: bytes) -> bytes:
    return png_chunk(b"IDAT", data)


def _with_wrong_crc(data: bytes, kind: bytes) -> bytes:
    place = data.index(kind) - 4
    end = place + 12 + struct.unpack_from(">I", data, place)[0]
    return data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "only the signature": (lambda: PNG_SIGNATURE, "truncated"),
    "cut in the header": (lambda: _GREY[:20], "truncated"),
    "cut in the pixels": (lambda: photo("astronaut.png")[:200_000], "truncated"),
    "cut before its end": (lambda: _GREY[:-12], "truncated"),
    "without pixels": (lambda: png_file(4, 4, 8, 0, pixels=b""), "truncated"),
    "one row short": (lambda: png_file(4, 4, 8, 0, bytes(3 * 5)), "truncated"),
    "one byte short": (lambda: png_file(4, 4, 8, 0, bytes(4 * 5 - 1)), "truncated"),
    "one byte too long": (lambda: png_file(4, 4, 8, 0, bytes(4 * 5 + 1)), "corrupt"),
    "a compression bomb": (lambda: png_file(4, 4, 8, 0, bytes(50_000_000)), "corrupt"),
    "pixels without their checksum": (lambda: png_file(4, 4, 8, 0, pixels=_idat(_STREAM[:-4])), "truncated"),
    "pixels with a wrong checksum": (lambda: png_file(4, 4, 8, 0, pixels=_idat(_STREAM[:-1] + b"!")), "corrupt"),
    "pixels that are not compressed": (lambda: png_file(4, 4, 8, 0, pixels=_idat(bytes(20))), "corrupt"),
    "an unknown row filter": (lambda: png_file(4, 4, 8, 0, b"\x09\0\0\0\0" * 4), "corrupt"),
    "a wrong CRC of its pixels": (lambda: _with_wrong_crc(_GREY, b"IDAT"), "corrupt"),
    "a wrong CRC of its header": (lambda: _with_wrong_crc(_GREY, b"IHDR"), "corrupt"),
    "a wrong CRC of its profile": (
        lambda: _with_wrong_crc(encoded(photograph(9, 9), "PNG", icc_profile=srgb_profile()), b"iCCP"), "corrupt",
    ),
    "pixels in two places": (
        lambda: png_file(4, 4, 8, 0, pixels=_idat(_STREAM[:5]) + _TEXT + _idat(_STREAM[5:])), "corrupt",
    ),
    "two headers": (lambda: png_file(4, 4, 8, 0, before=_GREY[8:33]), "corrupt"),
    "no header": (lambda: PNG_SIGNATURE + _GREY[33:], "corrupt"),
    "a header of 14 bytes": (lambda: PNG_SIGNATURE + png_chunk(b"IHDR", bytes(14)) + _GREY[33:], "corrupt"),
    "no width": (lambda: png_file(0, 4, 8, 0), "corrupt"),
    "a depth of 3": (lambda: png_file(4, 4, 3, 0), "corrupt"),
    "a depth that its colour type lacks": (lambda: png_file(4, 4, 4, 2), "corrupt"),
    "an unknown interlace method": (lambda: png_file(4, 4, 8, 0, interlaced=2), "corrupt"),
    "no palette": (lambda: png_file(4, 4, 8, 3), "corrupt"),
    "an empty palette": (lambda: png_file(4, 4, 8, 3, before=png_chunk(b"PLTE")), "corrupt"),
    "a palette of 257 colours": (lambda: png_file(4, 4, 8, 3, before=png_chunk(b"PLTE", bytes(771))), "corrupt"),
    "two palettes": (lambda: png_file(4, 4, 8, 3, before=2 * png_chunk(b"PLTE", bytes(6))), "corrupt"),
    "a palette after its pixels": (lambda: png_file(4, 4, 8, 3, after=png_chunk(b"PLTE", bytes(6))), "corrupt"),
    "an unknown critical chunk": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"ABCD")), "corrupt"),
    "a chunk without a name": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"\0\0\0\0")), "corrupt"),
    "a chunk of 4 GB": (lambda: _GREY[:33] + b"\xff\xff\xff\xfftEXt" + _GREY[33:], "corrupt"),
    "a chunk that overruns the file": (lambda: _GREY[:33] + b"\0\1\0\0tEXt" + _GREY[33:], "truncated"),
    "100,000 pixels wide": (lambda: png_file(100_000, 1, 8, 0, pixels=_IDAT), "too_many_pixels"),
    "64 million pixels and some": (lambda: png_file(8001, 8000, 8, 0, pixels=_IDAT), "too_many_pixels"),
    "an animation": (
        lambda: encoded(corners(), "PNG", save_all=True, append_images=[photograph(48, 32)]), "too_many_frames",
    ),
    "2 MB of text": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", bytes(2_000_000))), "metadata_bomb"),
    "2 MB of text behind the pixels": (
        lambda: png_file(4, 4, 8, 0, after=20 * png_chunk(b"tEXt", b"a\0" + bytes(100_000))), "metadata_bomb",
    ),
    "30,000 empty chunks": (lambda: png_file(4, 4, 8, 0, before=30_000 * png_chunk(b"teXt")), "metadata_bomb"),
    "30,000 empty pixel chunks": (lambda: png_file(4, 4, 8, 0, pixels=30_000 * _idat(b"") + _IDAT), "metadata_bomb"),
    "a profile that inflates to 50 MB": (
        lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(50 << 20)))),
        "metadata_bomb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_png_that_is_not_one_whole_still_image_is_refused(case: str) -> None:
    build, reason = REFUSED[case]
    assert refusal(build()) == reason


_PALETTE = png_chunk(b"PLTE", bytes(range(12)))

TAKEN: dict[str, Callable[[], bytes]] = {
    **{
        f"{depth}-bit {name}": lambda depth=depth, colour=colour: png_file(  # type: ignore[misc]
            7, 5, depth, colour, before=_PALETTE if colour == 3 else b""
        )
        for colour, name, depths in (
            (0, "grey", (1, 2, 4, 8, 16)),
            (2, "RGB", (8, 16)),
            (3, "palette", (1, 2, 4, 8)),
            (4, "grey and alpha", (8, 16)),
            (6, "RGBA", (8, 16)),
        )
        for depth in depths
    },
    "one pixel": lambda: png_file(1, 1, 8, 0),
    "16,384 pixels wide": lambda: png_file(16_384, 1, 8, 0),
    "empty pixel chunks": lambda: png_file(4, 4, 8, 0, pixels=_idat(b"") + _IDAT + _idat(b"")),
    "a pixel chunk for every byte": lambda: png_file(
        4, 4, 8, 0, pixels=b"".join(_idat(bytes([byte])) for byte in zlib.compress(bytes(20)))
    ),
    "a suggested palette": lambda: png_file(4, 4, 8, 2, before=_PALETTE),
    "an animation of one frame": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"acTL", struct.pack(">II", 1, 0))),
    "a photograph": lambda: photo("chelsea.png"),
    "a photograph with alpha": rgba_png,
    "a logo with alpha": lambda: photo("logo.png"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_good_png_is_taken_with_its_pixels_as_they_came(case: str) -> None:
    data = TAKEN[case]()
    rebuilt, image = take(data)
    with Image.open(io.BytesIO(data)) as expected:
        assert (image.mode, image.size) == (expected.mode, expected.size)
        assert image.tobytes() == expected.tobytes()
    assert png_pixels(rebuilt.data) == png_pixels(data)


# What Pillow alone would not open, and every browser shows.
FORGIVEN: dict[str, Callable[[], bytes]] = {
    "a profile that is none": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"no profile")),
    "a profile that can't be inflated": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"p\0\0no")),
    "a gamma of three bytes": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"gAMA", b"abc")),
    "EXIF that is none": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "text with a wrong CRC": lambda: _with_wrong_crc(png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", b"a\0b")), b"tEXt"),
}


@pytest.mark.parametrize("case", FORGIVEN)
def test_a_png_whose_only_fault_is_in_what_is_dropped_is_taken(case: str) -> None:
    assert take(FORGIVEN[case]())[0].data == _GREY


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
    stream = zlib.compress(bytes(20))
    data = png_file(4, 4, 8, 0, pixels=_idat(stream[:5]) + _idat(stream[5:] + b"hid") + _idat(b"den"))
    assert png_pixels(take(data)[0].data) == stream


def test_what_is_needed_to_show_the_pixels_is_kept() -> None:
    chunks = [
        (b"cICP", bytes([12, 13, 0, 1])),
        (b"iCCP", b"profile\0\0" + zlib.compress(srgb_profile())),
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


def test_a_photograph_of_many_pixel_chunks_is_kept_byte_for_byte() -> None:
    stream = png_pixels(encoded(photograph(640, 480), "PNG"))
    pixels = b"".join(_idat(stream[start : start + 8192]) for start in range(0, len(stream), 8192))
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
