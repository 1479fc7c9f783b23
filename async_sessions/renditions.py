"""Images in the size that a pipeline wants: which size that is, and how an image gets there. Sync, for a thread.

`Session.retrieve_rendition` and `StoredImage.rendition` do it for stored images, and keep the result.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

from PIL import Image

from async_sessions._codec.base import REDUCING_GAP, icc_profile
from async_sessions._codec.modes import displayable

if TYPE_CHECKING:
    import torch

Fit: TypeAlias = Literal["cover", "contain", "stretch"]
Colour: TypeAlias = tuple[int, int, int]

GREY: Final[Colour] = (128, 128, 128)  # neutral: neither a hole nor a light in what a model makes of it


def fit(image: Image.Image, size: tuple[int, int], mode: Fit = "cover", background: Colour = GREY) -> Image.Image:
    """`image` as 8-bit RGB of exactly `size` (width, height), resampled with Lanczos; `image` itself is left alone.

    "cover" keeps the ratio and cuts off evenly what is too much, "contain" keeps the ratio and fills what is missing
    with `background`, "stretch" keeps neither. What is transparent becomes `background`. An ICC profile of
    RGB stays in `info`; the samples are not converted. `ValueError` for a size without pixels or an unknown mode.
    """
    check_fit(size, mode)
    shown = displayable(image)
    box: tuple[float, float, float, float] = 0, 0, shown.width, shown.height
    inner = size
    if mode == "cover":
        scale = max(size[0] / shown.width, size[1] / shown.height)
        left, top = (shown.width - size[0] / scale) / 2, (shown.height - size[1] / scale) / 2
        box = max(left, 0), max(top, 0), min(shown.width - left, shown.width), min(shown.height - top, shown.height)
    elif mode == "contain":
        inner = least_size(shown.size, size, mode)
    small = shown.resize(inner, Image.Resampling.LANCZOS, box=box, reducing_gap=REDUCING_GAP)
    if inner != size or small.mode == "RGBA":
        canvas = Image.new("RGB", size, background)
        corner = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
        canvas.paste(small, corner, small if small.mode == "RGBA" else None)
        small = canvas
    profile = icc_profile(image.info.get("icc_profile"), b"RGB ")
    small.info = {"icc_profile": profile} if profile else {}
    return small


def area_size(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    """Width and height of about `max_area` pixels with the ratio of `width` x `height`, for a Wan2.2 pipeline.

    Each side is rounded down to a multiple of `multiple` (VAE stride times patch: 16 for A14B, 32 for TI2V-5B) and is
    one multiple at least. The arithmetic is that of the model cards: 1280 x 720 as area gives 1280 x 720 for 16:9.
    """
    if min(width, height, max_area, multiple) < 1:
        raise ValueError(f"Sizes are positive: {width} x {height} within {max_area} by {multiple} has no answer.")
    ratio = height / width
    sides = math.sqrt(max_area / ratio), math.sqrt(max_area * ratio)
    across, down = (max(multiple, round(side) // multiple * multiple) for side in sides)
    return across, down


def to_tensor(image: Image.Image, *, pin_memory: bool = False) -> torch.Tensor:
    """`image` for a pipeline: float32 in [0, 1] of shape (1, 3, height, width), contiguous, its own memory.

    Of any mode; what is transparent becomes grey, see `fit`. With `pin_memory` it lies in page-locked memory, where
    there is an accelerator, so that `tensor.to(device, non_blocking=True)` copies while the device works. Needs torch,
    which the extra `wan` brings.
    """
    from async_sessions import _tensor  # needs an extra

    if image.mode != "RGB" or image.has_transparency_data:
        image = fit(image, image.size)
    return _tensor.of_rgb(image, pinned=pin_memory)


def least_size(source: tuple[int, int], size: tuple[int, int], mode: Fit) -> tuple[int, int]:
    """The size that all of a `source` image takes on its way to `size`."""
    across, down = size[0] / source[0], size[1] / source[1]
    if mode != "stretch":
        across = down = max(across, down) if mode == "cover" else min(across, down)
    return max(1, round(source[0] * across)), max(1, round(source[1] * down))


def draft_size(source: tuple[int, int], size: tuple[int, int], mode: Fit) -> tuple[int, int]:
    """The least size that a decoder may shrink a `source` image to before `fit`, so that nothing is seen of it."""
    width, height = least_size(source, size, mode)
    return math.ceil(width * REDUCING_GAP), math.ceil(height * REDUCING_GAP)


def fit_pixels(source: tuple[int, int], size: tuple[int, int], *, plain: bool) -> int:
    """How many pixels, of four bytes each, `fit` takes beside its source at its worst; `plain`: it is RGB, opaque."""
    width, height = source
    shown = 0 if plain else 2 * width * height  # converted, and weighed by alpha
    return shown + max(width, size[0]) * height + 2 * size[0] * size[1]


def check_fit(size: tuple[int, int], mode: Fit) -> None:
    if min(size) < 1:
        raise ValueError(f"A size is at least 1 x 1 pixel, not {size[0]} x {size[1]}.")
    if mode not in get_args(Fit):
        raise ValueError(f"A mode is one of {', '.join(get_args(Fit))}; not {mode!r}.")
