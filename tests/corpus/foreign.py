"""What is no JPEG, PNG, WebP, AVIF or HEIC file, or not before its first byte."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from async_sessions.records import MIB
from tests.corpus.base import ARCHIVE, PAGE, SCRIPT, RefusedAny, given
from tests.images import PNG_SIGNATURE, corners, encoded, jpeg_with_exif, photo_path, photograph, png_file, srgb_profile


def ftyp(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1miaf" + bytes(100)


# With what a refusal calls it.
FILES: list[tuple[bytes, str]] = [
    (photo_path("no_time_for_that_tiny.gif").read_bytes(), "a GIF"),
    (encoded(corners(), "GIF"), "a GIF"),
    (encoded(corners(), "GIF", save_all=True, append_images=[photograph(48, 32)], comment=60_000 * b"a"), "a GIF"),
    (b"GIF89a/*" + bytes(50) + SCRIPT, "a GIF"),
    (encoded(corners(), "BMP"), "a BMP"),
    (b"BM=1//" + SCRIPT, "a BMP"),
    (photo_path("multipage.tif").read_bytes(), "a TIFF"),
    (b"MM\0*" + bytes(50), "a TIFF"),
    (ftyp(b"isom"), "an MP4"),
    (ftyp(b"qt  "), "an MP4 or QuickTime"),
    (b"\x1a\x45\xdf\xa3" + bytes(50), "a WebM"),
    (b"\xff\x0a" + bytes(50), "a JPEG XL"),
    (encoded(corners(), "JPEG2000"), "a JPEG 2000"),
    (encoded(corners(), "ICO"), "an icon"),
    (encoded(corners(), "PDF"), "a PDF"),
    (encoded(corners(), "EPS"), "a PostScript"),
    (b"8BPS\0\1" + bytes(50), "a Photoshop"),
    (b"qoif" + bytes(50), "a QOI"),
    (b"PK\x03\x04" + bytes(50), "a ZIP"),
    (ARCHIVE + jpeg_with_exif(), "a ZIP"),
    (b"RIFF\x64\0\0\0WAVEfmt ", "an AVI or WAV"),
    (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG"),
    (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- drawn -->\n<SVG/>', "an SVG"),
    (b"<!DOCTYPE html><html></html>", "an HTML page"),
    (PAGE + png_file(4, 4, 8, 0), "an HTML page"),
    (b"hello", "not an image"),
    (SCRIPT + png_file(4, 4, 8, 0), "not an image"),
    (b"\n" + png_file(4, 4, 8, 0), "not an image"),
    (PNG_SIGNATURE.replace(b"\r\n", b"\n") + png_file(4, 4, 8, 0)[8:], "not an image"),
    (bytes(1000), "not an image"),
    (b"\xff\xff\xff\xff", "not an image"),
]


def _new(mode: str, width: int, height: int) -> Callable[[], Image.Image]:
    return lambda: Image.new(mode, (width, height))


REFUSED: dict[str, RefusedAny] = {
    **{f"{name}, {place}": (given(data), "unsupported_format") for place, (data, name) in enumerate(FILES)},
    "nothing": (given(b""), "empty"),
    "a JPEG of 32 MB and a byte": (lambda: jpeg_with_exif().ljust(32 * MIB + 1, b"\0"), "too_many_bytes"),
    **{f"Pillow's mode {mode}": (_new(mode, 4, 4), "unsupported_format") for mode in ("F", "I", "HSV", "LAB")},
    "a Pillow image of no height": (_new("RGB", 5, 0), "empty"),
    "a Pillow image of 65 million pixels": (_new("1", 8125, 8000), "too_many_pixels"),
    "a Pillow image with 1.1 MB of a profile": (lambda: _with_profile(1_100_000), "metadata_bomb"),
}


def _with_profile(size: int) -> Image.Image:
    image = corners()
    image.info["icc_profile"] = srgb_profile(size)
    return image
