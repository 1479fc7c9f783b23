"""What the designs are measured with."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tests.images import PHOTOGRAPHS, corners, jpeg_with_exif, photo, photograph

HD = 1920, 1080
SMALL = 1280, 720
TWELVE_MEGAPIXELS = 4000, 3000

_STRIP = 296  # pixels; the lowest of the photographs is 300 high


def collage(size: tuple[int, int], seed: int) -> Image.Image:
    """Photographs side by side, each pixel as it was taken.

    Photographs that were scaled up to the size are smoother than real ones: `optimize=True` takes up to three times
    as long on them, which would flatter everything that is compared with it.
    """
    chance = np.random.default_rng(seed)
    sources = [Image.open(io.BytesIO(photo(name))).convert("RGB") for name in PHOTOGRAPHS]
    image = Image.new("RGB", size)
    for top in range(0, image.height, _STRIP):
        left = 0
        while left < image.width:
            source = sources[chance.integers(len(sources))]
            if chance.integers(2):
                source = source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            from_top = int(chance.integers(0, source.height - _STRIP + 1))
            image.paste(source.crop((0, from_top, source.width, from_top + _STRIP)), (left, top))
            left += source.width
    return image


def faded(size: tuple[int, int], seed: int) -> Image.Image:
    """RGBA: a collage that fades out to one side."""
    image = collage(size, seed)
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(size))
    return image


def scaled_up(size: tuple[int, int], seed: int) -> Image.Image:
    """One photograph, resampled to that size."""
    return photograph(*size, seed=seed)


def drawings(size: tuple[int, int]) -> list[Image.Image]:
    """Two flat images: four plain areas, and a gradient."""
    return [corners(*size), Image.merge("RGB", [Image.linear_gradient("L").resize(size)] * 3)]


def upload(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG as a camera writes it, with EXIF and GPS; not turned, as the threaded design ignores orientation."""
    return jpeg_with_exif(orientation=1, image=collage(size, seed))
