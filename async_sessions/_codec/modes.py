"""What becomes of Pillow's image modes: which a PNG holds as they are, and what each looks like as 8-bit RGB."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from PIL import Image, ImageCms

from async_sessions._codec.base import icc_profile
from async_sessions._codec.deep import rounded
from async_sessions.errors import ImageRejectedError

_AS_THEY_ARE: Final = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_CONVERTED: Final = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}
_DEEP: Final = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2"}
_ROWS: Final = 64  # converted at a time
_PROFILE_SPACES: Final = {"1": b"GRAY", "L": b"GRAY", "LA": b"GRAY", "I;16": b"GRAY"}


def storable(image: Image.Image) -> Image.Image:
    """The image in a mode that PNG holds, with its pixels, its transparency and its ICC profile, and no other metadata.

    1, L, LA, P, RGB, RGBA and I;16 stay. I;16B and I;16L become I;16; La becomes LA; PA and RGBa become RGBA; RGBX and
    YCbCr become RGB; CMYK becomes RGB through its ICC profile. Any other mode (F, I, HSV, LAB) is refused by its name.
    The image given is taken over: it may be the one returned, without its metadata.
    """
    mode = image.mode
    if mode in _AS_THEY_ARE:
        stored = image
    elif mode in _CONVERTED:
        stored = image.convert(_CONVERTED[mode])
    elif mode in _DEEP:
        stored = Image.fromarray(_deep(image))
    elif mode == "CMYK":
        stored = _from_cmyk(image)
    else:
        raise ImageRejectedError(
            "unsupported_format", f"A PNG cannot hold Pillow's mode {mode}; convert the image to RGB, RGBA, L or I;16."
        )
    info: dict[str | tuple[int, int], Any] = {}
    if _is_transparency(stored.mode, transparency := image.info.get("transparency")):
        info["transparency"] = transparency
    found = image.info.get("icc_profile") if mode != "CMYK" else None
    if profile := icc_profile(found, _PROFILE_SPACES.get(stored.mode, b"RGB ")):
        info["icc_profile"] = profile
    stored.info = info
    return stored


def displayable(image: Image.Image) -> Image.Image:
    """The image as RGB, as RGBA where any of it can be transparent: 16 bits rounded to 8, CMYK without its profile."""
    if image.mode in _DEEP:
        return _from_deep(image)
    if image.mode == "CMYK":
        return _from_cmyk(image)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _deep(image: Image.Image) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    # Pillow's own conversions from and between the 16-bit modes clip to 255.
    stored = np.frombuffer(image.tobytes(), _DEEP[image.mode]).reshape(image.height, image.width)
    return stored.astype(np.uint16, copy=False)


def _from_deep(image: Image.Image) -> Image.Image:
    transparency = image.info.get("transparency")
    shown = Image.new("RGBA" if isinstance(transparency, int) else "RGB", image.size)
    for top in range(0, image.height, _ROWS):  # arrays of all of it would take three times as much memory
        deep = _deep(image.crop((0, top, image.width, min(top + _ROWS, image.height))))
        strip = Image.fromarray(rounded(deep)).convert("RGB")
        if isinstance(transparency, int):
            strip.putalpha(Image.fromarray((deep != transparency).view(np.uint8) * np.uint8(255)))
        shown.paste(strip, (0, top))
    return shown


def _from_cmyk(image: Image.Image) -> Image.Image:
    if profile := image.info.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, TypeError):
            pass  # a damaged profile, or one of another colour space, says nothing about these pixels
        else:
            if converted is not None:
                # sRGB goes without saying, and its profile tells when it was made: no thumbnail would be like another
                converted.info.pop("icc_profile", None)
                return converted
    return image.convert("RGB")


def _is_transparency(mode: str, value: object) -> bool:
    """Whether PNG can hold `value`, which may come from any format, as the transparency of an image of that mode."""
    match mode, value:
        case "P", bytes():
            return len(value) <= 256
        case (("1" | "L" | "P" | "I;16"), int()):
            return 0 <= value <= (65_535 if mode == "I;16" else 255)
        case "RGB", (int(), int(), int()):
            return min(value) >= 0 and max(value) <= 255
    return False
