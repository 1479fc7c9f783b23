"""HEIC through pillow-heif (extra `heif`). Imported only once such a file has come and been checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pillow_heif

if TYPE_CHECKING:
    from PIL import Image


def open_heic(data: bytes) -> Image.Image:
    """The primary image, decoded to 8 bits, turned as the file says."""
    return pillow_heif.open_heif(data, convert_hdr_to_8bit=True).to_pillow()
