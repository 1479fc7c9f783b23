"""Samples of 16 bits as 8, rounded to the nearest; Pillow cuts the lower half off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngImageFile

_ROWS: Final = 16  # at a time: arrays of all of an image would take several times as much memory

# Of a PNG's colour type: the raw mode in which Pillow takes the lower bytes. Grey with alpha has four bytes a pixel.
_LOWER: Final = {2: "RGB;16L", 4: "RGBA", 6: "RGBA;16L"}


def rounded(samples: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """`samples / 257`, to the nearest."""
    return ((samples.astype(np.uint32) * 255 + 0x807F) >> 16).astype(np.uint8)


def is_deep(png: bytes) -> bool:
    """Whether a PNG has samples of 16 bits that Pillow would cut. Those of plain grey it keeps."""
    return png[24] == 16 and png[25] in _LOWER


def round_samples(image: Image.Image, lower: PngImageFile, colour: int) -> None:
    """Mend `image`, loaded from a deep PNG of that colour type. `lower` is the same file, not loaded yet."""
    lower.tile = [tile._replace(args=_LOWER[colour]) for tile in lower.tile]
    lower.load()
    for top in range(0, image.height, _ROWS):
        box = (0, top, image.width, min(top + _ROWS, image.height))
        halves = np.asarray(image.crop(box)).astype(np.uint32), np.asarray(lower.crop(box))
        if colour == 4:  # the upper and the lower byte of grey, then of alpha
            whole = halves[1].astype(np.uint32)
            halves = whole[..., [0, 0, 0, 2]], whole[..., [1, 1, 1, 3]]
        image.paste(Image.fromarray(rounded(halves[0] << 8 | halves[1])), (0, top))
