"""What the scanners share: the file they hand back, the bounds they keep, and what survives of EXIF and ICC profiles.

A scanner walks the structure of a file without decoding it and writes it again from the parts that an image needs. So a
decoder sees only what was understood. What it copies as it came is tables, compressed pixels and the inside of an ICC
profile. Their structure was checked but not every byte, and some bytes there show nothing (each scanner says which).
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from async_sessions.errors import ImageRejectedError
from async_sessions.records import MIB, Limits

MAX_METADATA: Final = MIB  # bytes of everything that is not pixels, an inflated ICC profile included
MAX_CHUNKS: Final = 20_000

REDUCING_GAP: Final = 2.0  # how much larger than its result an image is at least that was shrunk roughly first

_ORIENTATION_TAG: Final = 0x0112
_SHORT: Final = 3
_PROFILE_HEADER: Final = 128  # bytes


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """A checked file. `width` and `height` are as coded; `orientation` is the EXIF value that `data` still carries.

    `coded` is the pixels of all pictures that make up this one (tiles, transparency), where there can be several.
    """

    data: bytes
    width: int
    height: int
    orientation: int = 1
    coded: int = 0


def check_size(width: int, height: int, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise ImageRejectedError(
            "corrupt", f"The image says that it is {width} x {height} pixels; there is nothing in it."
        )
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageRejectedError(
            "too_many_pixels",
            f"The image is {width} x {height} pixels; at most {limits.max_pixels:,} pixels and {limits.max_side:,} on "
            "a side are taken. Make it smaller first.",
        )


def check_metadata(size: int, chunks: int) -> None:
    if size > MAX_METADATA or chunks > MAX_CHUNKS:
        raise ImageRejectedError(
            "metadata_bomb",
            f"The file holds more than {MAX_METADATA // MIB} MiB beside its pixels, or more than {MAX_CHUNKS:,} parts. "
            "Save it again without metadata.",
        )


def truncated(kind: str) -> ImageRejectedError:
    return ImageRejectedError("truncated", f"The {kind} file ends before its image does. Upload it again.")


def corrupt(kind: str, what: str) -> ImageRejectedError:
    return ImageRejectedError("corrupt", f"The {kind} file is damaged: {what}.")


def icc_profile(found: object, space: bytes = b"") -> bytes:
    """The ICC profile at the start of these bytes, of the size that it states, or nothing where there is none.

    With `space`, such as `b"RGB "`, nothing where it is for pixels of another kind. The layout is that of ICC.1, 7.2.
    """
    if not isinstance(found, bytes) or found[36:40] != b"acsp" or not found[16:20].startswith(space):
        return b""
    size = int.from_bytes(found[:4])
    return found[:size] if _PROFILE_HEADER <= size <= len(found) else b""


def read_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8, that the first directory of an EXIF block states; 1 where it states none."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == _ORIENTATION_TAG:
                return value if kind == _SHORT and values == 1 and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass  # not an EXIF block, or one that ends early: it states nothing
    return 1


def write_orientation(orientation: int) -> bytes:
    """The EXIF block that states the orientation and nothing else."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, _ORIENTATION_TAG, _SHORT, 1, orientation, 0, 0)
