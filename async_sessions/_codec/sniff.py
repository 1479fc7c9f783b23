"""What a file is, by its first bytes; never by its name or by what the client says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from async_sessions._codec.base import truncated
from async_sessions.errors import ImageRejectedError

if TYPE_CHECKING:
    from async_sessions.records import Limits

MEDIA_TYPES: Final = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}  # of what is stored

_SIGNATURES: Final = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}
_OTHERS: Final = (
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"II+\0", "a TIFF image"),
    (b"MM\0+", "a TIFF image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\1\0", "an icon"),
    (b"qoif", "a QOI image"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "a PostScript file"),
    (b"\x1a\x45\xdf\xa3", "a WebM or Matroska video"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"RIFF", "an AVI or WAV file"),
)
_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIC"),
}
_GENERAL_BRANDS: Final = (b"mif1", b"msf1")  # which of the two it is, the brands behind it tell
HEIF_EXTRA: Final = "pip install 'async-sessions[heif]'"

_TEXT_HEAD: Final = 1024  # bytes of a text file that are searched for its root element


def sniff(data: bytes | bytearray, limits: Limits) -> str:
    """The file's format, one of `records.FORMATS`. Anything else is refused by its name, where it has one."""
    head = bytes(data[:_TEXT_HEAD])
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        found, name = "WEBP", "a WebP image"
    elif head.startswith(_SIGNATURES["JPEG"]):
        found, name = "JPEG", "a JPEG image"
    elif head.startswith(_SIGNATURES["PNG"]):
        found, name = "PNG", "a PNG image"
    elif form := _brand(head):
        found, name = form, f"{'an' if form == 'AVIF' else 'a'} {form} image"
    else:
        for form, signature in _SIGNATURES.items():
            if signature.startswith(head):
                raise truncated(form)
        found, name = "", _name_of(head)
    if found not in limits.formats:
        how = f" HEIC needs {HEIF_EXTRA}, and to be among `Limits.formats`." if found == "HEIC" else ""
        raise ImageRejectedError("unsupported_format", f"This is {name}; it must be {_listed(limits.formats)}.{how}")
    return found


def _brand(head: bytes) -> str | None:
    if head[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(head[:4]), len(head))
    brands = [head[8:12], *(head[place : place + 4] for place in range(16, end, 4))]
    if brands[0] in _GENERAL_BRANDS:
        return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "HEIC")
    return _BRANDS.get(brands[0])


def _name_of(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "an MP4 or QuickTime video"
    for signature, name in _OTHERS:
        if head.startswith(signature):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith(b"<") and b"<svg" in text:
        return "an SVG drawing"
    return "not an image that is known here"


def _listed(formats: tuple[str, ...]) -> str:
    return " or ".join([", ".join(formats[:-1]), formats[-1]] if len(formats) > 1 else formats)
