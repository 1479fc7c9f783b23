"""Pillow, with one format open to it and every failure translated."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from async_sessions._codec import bmff, deep, jpeg, png, webp
from async_sessions._codec.base import REDUCING_GAP, icc_profile, truncated
from async_sessions._codec.modes import displayable, storable
from async_sessions._codec.sniff import HEIF_EXTRA, MEDIA_TYPES
from async_sessions.errors import ImageRejectedError
from async_sessions.records import KIB, MIB, Limits

if TYPE_CHECKING:
    from async_sessions._codec.base import Rebuilt

THUMBNAIL_SIDE: Final = 320

# Decoders by format, not `Image.open`: no other format is ever tried, and what limits the pixels are ours, not Pillow's
# module-wide limit and its warning.
_DECODERS: Final = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile, "AVIF": AvifImageFile}
_SCANNERS: Final[dict[str, Callable[[bytes | bytearray, Limits], Rebuilt]]] = {
    "JPEG": jpeg.rebuild,
    "PNG": png.rebuild,
    "WEBP": webp.rebuild,
    "AVIF": partial(bmff.rebuild, form="AVIF"),
    "HEIC": partial(bmff.rebuild, form="HEIC"),
}
_TAKEN: Final = Limits(max_pixels=sys.maxsize, max_side=sys.maxsize)  # what is stored is within the limits of its time
_QUALITY: Final = 80
_EFFORT: Final = 2  # of WebP's 0 to 6; 4, its default, takes 4 ms longer for 2 % fewer bytes
_STRIP: Final = MIB  # bytes that are converted at a time
_PROFILE_BYTES: Final = 16 * KIB  # a larger colour profile is not worth its place in a thumbnail

_START_OF_SCAN: Final = b"\xff\xda"

# Blocks of rubbish for whichever restart interval the decoder is in.
_RUBBISH: Final = hashlib.sha512(b"rubbish").digest().replace(b"\xff", b"\xfe")
_MORE: Final = b"".join([_RUBBISH, *(bytes([0xFF, 0xD0 + number]) + _RUBBISH for number in range(8))])

# What Pillow's decoders were seen to raise on damaged files; the last, where an application makes errors of warnings.
PILLOW_ERRORS: Final = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError, RuntimeError, UserWarning,
)  # fmt: skip


def rebuild(data: bytes | bytearray, form: str, limits: Limits) -> Rebuilt:
    """Check the structure of a file of that format, and write it again without what must not be stored.

    A HEIC file is refused where pillow-heif is not installed.
    """
    if form == "HEIC" and importlib.util.find_spec("pillow_heif") is None:
        raise ImageRejectedError(
            "unsupported_format", f"This is a HEIC image, which needs {HEIF_EXTRA}. Give it as JPEG, or install that."
        )
    return _SCANNERS[form](data, limits)


def decode(rebuilt: Rebuilt, form: str) -> Image.Image:
    """Every pixel of a checked file, upright.

    Known limit: of a JPEG that was cut and given an end, what is missing is missed where it is less than a block, or
    only makes finer what a scan of a progressive file has drawn before. Whatever one scan of a channel draws first is
    asked for, which costs two drafts of an eighth of the size where the image ends in mid-grey or comes channel by
    channel.
    """
    image = _decode(rebuilt.data, form, check_end=True)
    if form not in MEDIA_TYPES:  # turned or cut as its container says, so it may be smaller but not larger
        if max(image.size) > max(rebuilt.width, rebuilt.height) or min(image.size) > min(rebuilt.width, rebuilt.height):
            raise ImageRejectedError("corrupt", f"The {form} file is damaged: its parts disagree about its size.")
        return storable(image)
    coded = (rebuilt.height, rebuilt.width) if rebuilt.orientation >= 5 else (rebuilt.width, rebuilt.height)
    if image.size != coded:
        raise ImageRejectedError("corrupt", f"The {form} file is damaged: its parts disagree about its size.")
    return image


def peak(data: bytes, media_type: str, pixels: int, orientation: int) -> int:
    """How many pixels, of four bytes each, decoding these takes at its worst; measured at 20 and 64 MP.

    Pillow's WebP decoder holds canvases and a copy beside the image (15 bytes a pixel in all), AVIF and HEIC their
    planes and samples (9, more with transparency), and a JPEG in several scans its coefficients (up to 8 beside the
    image, 3 as most are coded). What is turned is there twice, and so is a PNG of 16 bits a sample.
    """
    if media_type == MEDIA_TYPES["WEBP"]:
        return 4 * pixels
    if media_type not in MEDIA_TYPES.values():
        return 3 * pixels
    beside = pixels if orientation > 1 else 0
    if media_type == MEDIA_TYPES["JPEG"]:
        beside = max(beside, -(-jpeg.coefficients(data, pixels) // 4))
    elif deep.is_deep(data):
        beside = max(beside, pixels)
    return pixels + beside


def load(
    data: bytes, media_type: str, *, verbatim: bool = False, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """Every pixel, upright, of bytes that were checked when they were stored and have not changed since.

    A `verbatim` file is rebuilt once more, so that a decoder never sees what no scanner looked at. With `at_least` a
    JPEG may come in a half, a quarter or an eighth of its size, which is faster, but not smaller than that.
    """
    for form, known in MEDIA_TYPES.items():
        if known == media_type:
            return _decode(rebuild(data, form, _TAKEN).data if verbatim else data, form, at_least)
    raise ImageRejectedError("unsupported_format", f"Images of type {media_type} cannot be decoded here.")


def thumbnail(image: Image.Image) -> bytes:
    """A WebP whose longest side is at most 320 pixels; the ratio of the sides is kept, within a pixel."""
    size = _fitted(image.size, THUMBNAIL_SIDE)
    if image.mode in ("1", "P", "PA"):  # these take four bytes a pixel once they are converted
        image = displayable(image.resize(_fitted(image.size, 4 * THUMBNAIL_SIDE), Image.Resampling.NEAREST))
    if image.mode in ("L", "RGB", "CMYK") and not image.has_transparency_data:
        small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    else:
        factor = max(1, int(max(image.size) / THUMBNAIL_SIDE / REDUCING_GAP))
        box = 0, 0, image.width / factor, image.height / factor
        small = _reduced(image, factor).resize(size, Image.Resampling.LANCZOS, box)
    if small.mode == "CMYK":
        small = displayable(small)
    profile = icc_profile(image.info.get("icc_profile"), b"RGB ")
    if len(profile) > _PROFILE_BYTES:
        profile = b""
    written = io.BytesIO()
    small.save(written, "WEBP", quality=_QUALITY, method=_EFFORT, icc_profile=profile)
    return written.getvalue()


def refusal(error: Exception, what: str) -> ImageRejectedError:
    """The error of ours that says what one of `PILLOW_ERRORS` says about the image."""
    if isinstance(error, Image.DecompressionBombError):
        return ImageRejectedError("too_many_pixels", f"The {what} has more pixels than Pillow decodes.")
    if "truncat" in str(error).lower():
        return ImageRejectedError("truncated", f"The {what} ends before its image does.")
    return ImageRejectedError("corrupt", f"The {what} is damaged and cannot be decoded: {str(error).rstrip('.')}.")


def _decode(data: bytes, form: str, at_least: tuple[int, int] | None = None, *, check_end: bool = False) -> Image.Image:
    try:
        image = _opened(data, form)
        if at_least is not None and form == "JPEG":
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            image.draft(None, at_least[::-1] if turned else at_least)
        image.load()
        if check_end and form == "JPEG" and _is_cut(data, image):
            raise truncated(form)
        if form == "PNG" and deep.is_deep(data):
            deep.round_samples(image, PngImageFile(io.BytesIO(data)), data[25])
        if form == "PNG":
            _mend_transparency(image, depth=data[24])
        ImageOps.exif_transpose(image, in_place=True)
    except ImageRejectedError:
        raise
    except PILLOW_ERRORS as error:
        raise refusal(error, f"{form} file") from error
    image.info.pop("exif", None)  # it is upright now
    # Not the decoder's own object: it keeps the file, and for WebP two more canvases, as long as it lives.
    return image._new(image.im)


def _opened(data: bytes, form: str) -> Image.Image:
    if form == "HEIC":
        from async_sessions._codec import heif  # needs an extra

        image = heif.open_heic(data)
        image.info.pop("exif", None)  # it was turned already
    else:
        image = _DECODERS[form](io.BytesIO(data))
    image.info.pop("xmp", None)  # Pillow would turn the image by it; browsers do not
    return image


def _is_cut(data: bytes, image: Image.Image) -> bool:
    """Whether the last scan of a checked JPEG lacks blocks, for which libjpeg puts mid-grey and does no more than warn.

    A whole scan has no room for more: what follows it is ignored, else it is taken for blocks.
    """
    start = data.rindex(_START_OF_SCAN) + 4
    channels = data[start]
    first, _, approximation = data[start + 1 + 2 * channels : start + 4 + 2 * channels]
    if first or approximation >> 4:
        return False  # it only makes finer what other scans have drawn
    if channels == len(image.getbands()) and not _ends_in_grey(image):
        return False
    try:
        more = _drafted(data[:-2].rstrip(b"\xff") + _MORE + data[-2:])
    except PILLOW_ERRORS:
        return False  # the fault is ours: without rubbish it was decoded
    return more != _drafted(data)


def _ends_in_grey(image: Image.Image) -> bool:
    corner = image.crop(((image.width - 1) // 8 * 8, (image.height - 1) // 8 * 8, *image.size))
    shades = corner.tobytes() if image.mode == "CMYK" else corner.convert("L").tobytes()  # the colour may have bled in
    return min(shades) >= 126 and max(shades) <= 129


def _drafted(data: bytes) -> bytes:
    image = JpegImageFile(io.BytesIO(data))
    image.draft(None, (1, 1))
    return image.tobytes()


def _mend_transparency(image: Image.Image, *, depth: int) -> None:
    """Pillow scales samples to 8 bits, but not the transparent sample that it is to compare them with.

    Known limit: of RGB with 16 bits a sample, whatever is the transparent colour in 8 bits is transparent.
    """
    match image.mode, image.info.get("transparency"):
        case "L", int(grey) if depth in (2, 4):
            image.info["transparency"] = grey * 255 // (2**depth - 1)
        case "RGB", tuple(colour) if depth == 16:
            image.info["transparency"] = tuple(deep.rounded(np.array(colour)).tolist())


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """The image as it is shown, each `factor` pixels across and down made one.

    Strip by strip: to convert it and to weigh its colours by their alpha, Pillow makes two more of it.
    """
    rows = factor * max(1, _STRIP // (4 * image.width * factor))
    strips = (image.crop((0, top, image.width, min(top + rows, image.height))) for top in range(0, image.height, rows))
    reduced = [displayable(strip).reduce(factor) for strip in strips]
    small = Image.new(reduced[0].mode, (reduced[0].width, sum(strip.height for strip in reduced)))
    for number, strip in enumerate(reduced):
        small.paste(strip, (0, number * reduced[0].height))
    return small


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
