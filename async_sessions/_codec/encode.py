"""From Pillow images and arrays to a PNG, and from images to arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from async_sessions._codec import pngwrite
from async_sessions._codec.base import MAX_METADATA, check_metadata, check_size
from async_sessions._codec.decode import PILLOW_ERRORS, refusal
from async_sessions._codec.modes import displayable, storable
from async_sessions.errors import ImageRejectedError

if TYPE_CHECKING:
    from async_sessions.records import Limits

_ROWS: Final = 64  # copied at a time: Pillow holds the GIL for a copy, and takes three times as long for 12 MP at once
_MODES: Final = {(1, 1): "L", (1, 3): "RGB", (1, 4): "RGBA", (2, 1): "I;16"}  # by bytes a sample, and channels


def upright_copy(source: Image.Image, limits: Limits) -> Image.Image:
    """The image as it will be read back: loaded, upright, in a mode that PNG holds (see `storable`).

    An image that was opened and not yet read is read now, once its size is known to be within the limits; nothing else
    of the source is touched.
    """
    _check(source.width, source.height, limits)
    try:
        source.load()
        try:
            source.getexif()
        except PILLOW_ERRORS:  # which says nothing about the pixels, and is not kept
            return storable(source.copy())
        return storable(ImageOps.exif_transpose(source))
    except ImageRejectedError:
        raise
    except PILLOW_ERRORS as error:
        raise refusal(error, "image") from error


def image_of_array(source: npt.NDArray[Any], limits: Limits) -> Image.Image:
    """A copy of the array as an image: uint8 HxW and HxWx1 as L, HxWx3 as RGB, HxWx4 as RGBA; uint16 HxW as I;16."""
    shape = source.shape[:2] if source.ndim == 3 and source.shape[2] == 1 else source.shape
    channels = shape[2] if len(shape) == 3 else 1
    if len(shape) not in (2, 3) or source.dtype.kind != "u" or (source.dtype.itemsize, channels) not in _MODES:
        raise ImageRejectedError(
            "unsupported_format",
            f"An array of {source.dtype} with shape {source.shape} is not an image here: give uint8 of shape (height, "
            "width), (height, width, 3) or (height, width, 4), or uint16 of shape (height, width).",
        )
    _check(shape[1], shape[0], limits)
    pixels = source.reshape(shape)
    image = Image.new(_MODES[source.dtype.itemsize, channels], (shape[1], shape[0]))
    for top in range(0, image.height, _ROWS):
        rows = np.ascontiguousarray(pixels[top : top + _ROWS], source.dtype.newbyteorder("="))
        image.paste(Image.fromarray(rows), (0, top))
    return image


def png(image: Image.Image) -> bytes:
    """The PNG of an image from `upright_copy` or `image_of_array`, with its transparency and its ICC profile."""
    profile = image.info.get("icc_profile", b"")
    check_metadata(len(profile) + (len(profile) == MAX_METADATA), 0)
    return pngwrite.write(image)


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Height x width x 3 (RGB) or 4 (RGBA, where the image has transparency), 8 bits, and memory of its own."""
    shown = displayable(image)
    pixels = np.empty((shown.height, shown.width, len(shown.getbands())), np.uint8)
    for top in range(0, shown.height, _ROWS):
        end = min(top + _ROWS, shown.height)
        pixels[top:end] = np.asarray(shown.crop((0, top, shown.width, end)))
    return pixels


def _check(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageRejectedError("empty", f"The image is {width} x {height} pixels; there is nothing in it.")
    check_size(width, height, limits)
