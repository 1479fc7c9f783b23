"""Images for tests: photographs, files with a known structure, and files that no encoder would write."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from async_sessions._codec import decode
from async_sessions._codec.sniff import sniff
from async_sessions.errors import ImageRejectedError
from async_sessions.records import Limits

if TYPE_CHECKING:
    from async_sessions._codec.base import Rebuilt

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # that PNG holds as they are
_BANDS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}

PLACE = b"north of everything"  # what a GPS tag of `jpeg_with_exif` says
CAMERA = "Box Brownie"

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def photo_path(name: str) -> Path:
    """A file of scikit-image's wheel, such as `astronaut.png`, `rocket.jpg` or `logo.png` (RGBA)."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data" / name


@cache
def photo(name: str) -> bytes:
    return photo_path(name).read_bytes()


@cache
def _opened(name: str) -> Image.Image:
    return Image.open(io.BytesIO(photo(name))).convert("RGB")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A real picture, cut and resampled to that size; another seed is another picture or another cut."""
    chance = np.random.default_rng(seed)
    source = _opened(PHOTOGRAPHS[seed % len(PHOTOGRAPHS)])
    left, top = (int(chance.integers(0, side // 8)) for side in source.size)
    cut = source.crop((left, top, source.width, source.height))
    return ImageOps.fit(cut, (width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def noise(mode: str, width: int, height: int, seed: int = 0, *, colours: int = 256) -> Image.Image:
    """An image of chance that is smooth enough for every filter to matter."""
    chance = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(chance.integers(0, 65536, (height, width)).astype(np.uint16))
    if mode == "1":
        return Image.fromarray(chance.integers(0, 2, (height, width)).astype(bool))
    if mode == "P":
        image = Image.fromarray(chance.integers(0, colours, (height, width)).astype(np.uint8)).convert("P")
        image.putpalette(chance.integers(0, 256, 3 * colours).astype(np.uint8).tobytes())
        return image
    steps = chance.integers(-9, 10, (height, width, _BANDS[mode])).cumsum(1)
    return Image.frombytes(mode, (width, height), steps.astype(np.uint8).tobytes())


def rgba_png(width: int = 320, height: int = 200) -> bytes:
    """A photograph that fades from opaque on the left to transparent on the right."""
    image = photograph(width, height, seed=1)
    image.putalpha(Image.linear_gradient("L").rotate(90).resize((width, height)))
    return encoded(image, "PNG")


def corners(width: int = 48, height: int = 32) -> Image.Image:
    """Four quarters: red, green, blue and white, clockwise from the upper left."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (width // 2, height // 2, width, height))
    return image


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a camera stores it when it writes that EXIF orientation."""
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    return image.copy() if undo is None else image.transpose(undo)


def exif(orientation: int | None = 6, *, gps: bool = True, order: str = ">") -> bytes:
    """An EXIF block as a camera writes it: `Exif`, two zeros, then a TIFF structure in that byte order."""
    tags = Image.Exif()
    tags.endian = order
    tags[0x0110] = CAMERA
    if orientation is not None:
        tags[0x0112] = orientation
    if gps:
        place = tags.get_ifd(0x8825)
        place.update({1: "N", 2: (52.0, 31.0, 12.0), 27: PLACE})
    return tags.tobytes()


def jpeg_with_exif(orientation: int = 6, gps: bool = True, image: Image.Image | None = None, **options: Any) -> bytes:
    """A JPEG of `image` (a photograph), upright for those who read its EXIF, which also tells where it was made."""
    image = photograph(320, 240, seed=5) if image is None else image
    block = exif(orientation, gps=gps)
    return encoded(turned(image, orientation), "JPEG", **{"quality": 90, "exif": block, **options})


def srgb_profile(size: int = 0) -> bytes:
    """With zeros at its end where it is to be larger than it needs to be."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().ljust(size, b"\0")
    return struct.pack(">I", len(profile)) + profile[4:24] + bytes(12) + profile[36:]  # not the second it was made in


def cmyk_profile() -> bytes:
    """A printer profile in which black ink is a medium grey, unlike in Pillow's conversion, and no other ink shows.

    Laid out by hand (ICC.1, lut8Type): Pillow can make no profile of four channels.
    """
    identity = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    ramp = bytes(range(256))
    lightness = [255, 128] * 7 + [255, 0]  # black varies fastest; all inks together are as dark as it gets
    grid = b"".join(bytes([value, 128, 128]) for value in lightness)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + grid + 3 * ramp
    place = 128 + 4 + 12
    header = struct.pack(
        ">I4sI4s4s4s12x4s28xIII48x",
        place + len(table), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp", 0xF6D6, 0x10000, 0xD32D,
    )  # fmt: skip
    return header + struct.pack(">I4sII", 1, b"A2B0", place, len(table)) + table


# --- files piece by piece


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_file(
    width: int, height: int, depth: int, colour: int, rows: bytes | None = None, *, interlaced: int = 0,
    before: bytes = b"", pixels: bytes | None = None, after: bytes = b"",
) -> bytes:  # fmt: skip
    """A PNG of these filtered rows (of zeros), or of these `pixels`, which are then whole chunks."""
    if pixels is None:
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        empty = bytes(height * (1 + (width * channels * depth + 7) // 8))
        pixels = png_chunk(b"IDAT", zlib.compress(empty if rows is None else rows))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + before + pixels + after + png_chunk(b"IEND")


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], len(PNG_SIGNATURE)
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def png_pixels(data: bytes) -> bytes:
    return b"".join(body for kind, body in png_chunks(data) if kind == b"IDAT")


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def jpeg_segments(data: bytes) -> list[tuple[int, bytes]]:
    """Markers and bodies up to the first scan, whose body is all from its length to the end."""
    found: list[tuple[int, bytes]] = []
    position = 2
    while True:
        marker, length = struct.unpack_from(">xBH", data, position)
        if marker == 0xDA:
            return [*found, (marker, data[position + 2 :])]
        found.append((marker, data[position + 4 : position + 2 + length]))
        position += 2 + length


def jpeg_of(segments: list[tuple[int, bytes]]) -> bytes:
    """The file of which `jpeg_segments` gave the parts."""
    return b"\xff\xd8" + b"".join(
        b"\xff\xda" + body if marker == 0xDA else segment(marker, body) for marker, body in segments
    )


def jpeg_in_scans(image: Image.Image, **options: Any) -> bytes:
    """A JPEG that is not progressive, of three channels that follow each other; Pillow writes none."""
    channels = [jpeg_segments(encoded(channel, "JPEG", **options)) for channel in image.convert("YCbCr").split()]
    frame = dict(channels[0])[0xC0]
    frame = frame[:5] + b"\3" + b"".join(bytes([name]) + frame[7:] for name in (1, 2, 3))
    tables = [(0xC0, frame) if marker == 0xC0 else (marker, body) for marker, body in channels[0][:-1]]
    scans = [
        segment(0xDA, bytes([1, name, 0, 0, 63, 0])) + parts[-1][1][8:-2] for name, parts in enumerate(channels, 1)
    ]
    return jpeg_of(tables) + b"".join(scans) + b"\xff\xd9"


def webp_file(*chunks: tuple[bytes, bytes]) -> bytes:
    whole = b"".join(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(whole), b"WEBP") + whole


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 12
    while position < len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return found


def payload(data: bytes) -> list[bytes]:
    """The compressed pixels of a file without trailing data, with the tables that they need, piece by piece."""
    if data.startswith(PNG_SIGNATURE):
        return [body for kind, body in png_chunks(data) if kind == b"IDAT"]
    if data.startswith(b"RIFF"):
        return [body for kind, body in webp_chunks(data) if kind in (b"VP8 ", b"VP8L", b"ALPH")]
    segments = jpeg_segments(data.removesuffix(b"\xff\xd9"))
    return [body for marker, body in segments if not 0xE0 <= marker <= 0xFE]


def shown(data: bytes) -> Image.Image:
    """What Pillow shows of a file, upright as browsers have it; of 16-bit colours what OpenCV reads, rounded."""
    if data[24:25] == b"\x10" and data[25] in (2, 4, 6) and data.startswith(PNG_SIGNATURE):
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert samples is not None
        order = [2, 1, 0, 3] if samples.shape[2] == 4 else [2, 1, 0]
        return Image.fromarray(np.rint(samples[..., order] / 257).astype(np.uint8))
    with Image.open(io.BytesIO(data)) as image:
        image.info.pop("xmp", None)
        return image.copy() if image.format == "WEBP" else ImageOps.exif_transpose(image)


# --- what the codec makes of them


def take(data: bytes, limits: Limits | None = None) -> tuple[Rebuilt, Image.Image]:
    limits = limits or Limits()
    form = sniff(data, limits)
    rebuilt = decode.rebuild(data, form, limits)
    return rebuilt, decode.decode(rebuilt, form)


def refusal(data: bytes, limits: Limits | None = None) -> str | None:
    """The reason for which the file is refused; `None` for a file that is taken."""
    try:
        take(data, limits)
    except ImageRejectedError as error:
        rejected = error
    else:
        return None
    assert str(rejected).endswith("."), "a refusal is a sentence for the user"
    return rejected.reason
