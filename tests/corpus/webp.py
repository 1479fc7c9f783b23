from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image

from async_sessions.records import MIB
from tests.corpus.base import ARCHIVE, NOTE, PAGE, XMP, Forgiven, Make, Refused, cuts, tails
from tests.images import encoded, exif, photograph, rgba_png, srgb_profile, webp_chunks, webp_file

LOSSY = encoded(photograph(64, 48), "WEBP")
LOSSLESS = encoded(photograph(64, 48), "WEBP", lossless=True)
ALPHA = encoded(Image.open(io.BytesIO(rgba_png(64, 48))), "WEBP")
PICTURE = webp_chunks(LOSSY)[0]


def header(flags: int = 0, width: int = 64, height: int = 48) -> tuple[bytes, bytes]:
    return b"VP8X", struct.pack("<I", flags) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


_WHOLE = webp_file(
    header(0x3C), (b"ICCP", srgb_profile()), *webp_chunks(ALPHA)[1:], (b"EXIF", exif(6)), (b"XMP ", b"<x:xmpmeta/>")
)


def _ends() -> Iterator[tuple[str, int]]:
    position = 12
    for chunk, body in webp_chunks(_WHOLE):
        name = chunk.decode().strip()
        yield f"before {name}", position
        yield f"in the name of {name}", position + 2
        yield f"in the length of {name}", position + 6
        yield f"before the bytes of {name}", position + 8
        yield f"in the bytes of {name}", position + 8 + len(body) // 2
        position += 8 + len(body) + len(body) % 2


REFUSED: dict[str, Refused] = {
    **cuts(_WHOLE, _ends()),
    "only a signature": (lambda: LOSSY[:12], "truncated"),
    "cut in a chunk's name": (lambda: LOSSY[:15], "truncated"),
    "cut in the picture": (lambda: LOSSY[:500], "truncated"),
    "cut by the last byte of an empty chunk": (lambda: webp_file(PICTURE, (b"abcd", b""))[:-1], "truncated"),
    "cut by two bytes": (lambda: LOSSY[:-2], "truncated"),
    "cut and given the right size": (lambda: webp_file((b"VP8 ", PICTURE[1][:500])), "corrupt"),
    "lossless, cut and given the right size": (
        lambda: webp_file((b"VP8L", webp_chunks(LOSSLESS)[0][1][:500])), "corrupt",
    ),
    "a picture that overruns the file": (lambda: LOSSY.replace(LOSSY[16:20], b"\xff\xff\xff\xff", 1), "truncated"),
    "a first partition that overruns the picture": (
        lambda: webp_file((b"VP8 ", b"\xf0\xff\xff" + PICTURE[1][3:])), "truncated",
    ),
    "no picture": (lambda: webp_file(header()), "truncated"),
    "an empty picture": (lambda: webp_file((b"VP8 ", b"")), "truncated"),
    "an empty lossless picture": (lambda: webp_file((b"VP8L", b"")), "truncated"),
    "a picture that is none": (lambda: webp_file((b"VP8 ", b"\0" * 50)), "corrupt"),
    "a lossless picture that is none": (lambda: webp_file((b"VP8L", b"\0" * 50)), "corrupt"),
    "a picture that is not a key frame": (
        lambda: webp_file((b"VP8 ", bytes([PICTURE[1][0] | 1]) + PICTURE[1][1:])), "corrupt",
    ),
    "two pictures": (lambda: webp_file(PICTURE, PICTURE), "corrupt"),
    "two headers": (lambda: webp_file(header(), header(), PICTURE), "corrupt"),
    "a header behind the picture": (lambda: webp_file(PICTURE, header()), "corrupt"),
    "a header of 4 bytes": (lambda: webp_file((b"VP8X", bytes(4)), PICTURE), "corrupt"),
    "a header of another size": (lambda: webp_file(header(0, 65, 48), PICTURE), "corrupt"),
    "a header of 2^48 pixels": (lambda: webp_file(header(0, 1 << 24, 1 << 24), PICTURE), "too_many_pixels"),
    "16,383 pixels a side": (
        lambda: webp_file((b"VP8 ", PICTURE[1][:6] + b"\xff\x3f\xff\x3f" + PICTURE[1][10:])), "too_many_pixels",
    ),
    "lossless, 16,384 pixels a side": (
        lambda: webp_file((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(100))), "too_many_pixels",
    ),
    "no width": (lambda: webp_file((b"VP8 ", PICTURE[1][:6] + bytes(4) + PICTURE[1][10:])), "corrupt"),
    "an animation": (
        lambda: encoded(photograph(64, 48), "WEBP", save_all=True, append_images=[photograph(64, 48, seed=1)]),
        "too_many_frames",
    ),
    "an animation that says it is none": (lambda: webp_file(header(), (b"ANIM", bytes(6))), "too_many_frames"),
    "a still that says it is an animation": (lambda: webp_file(header(2), PICTURE), "too_many_frames"),
    "2 MB of XMP": (lambda: webp_file(header(4), PICTURE, (b"XMP ", bytes(2_000_000))), "metadata_bomb"),
    "2 MB of a profile": (lambda: webp_file(header(32), (b"ICCP", bytes(2_000_000)), PICTURE), "metadata_bomb"),
    "30,000 empty chunks": (lambda: webp_file(PICTURE, *[(b"abcd", b"")] * 30_000), "metadata_bomb"),
    "2 MB of EXIF": (lambda: webp_file(header(8), PICTURE, (b"EXIF", bytes(2_000_000))), "metadata_bomb"),
    "2 MB in a chunk of its own": (lambda: webp_file(PICTURE, (b"abcd", bytes(2_000_000))), "metadata_bomb"),
    "its transparency and no picture": (lambda: webp_file(*webp_chunks(ALPHA)[:2]), "truncated"),
    "a lossless picture that says it is lossy": (lambda: webp_file((b"VP8 ", webp_chunks(LOSSLESS)[0][1])), "corrupt"),
    "a lossy picture that says it is lossless": (lambda: webp_file((b"VP8L", PICTURE[1])), "corrupt"),
    "a picture of each kind": (lambda: webp_file(PICTURE, webp_chunks(LOSSLESS)[0]), "corrupt"),
    "a frame of an animation": (lambda: webp_file(header(), PICTURE, (b"ANMF", bytes(16))), "too_many_frames"),
    "30 MB of a picture that is none": (lambda: webp_file((b"VP8 ", bytes(30 * MIB))), "corrupt"),
    "a chunk of 4 GB": (
        lambda: webp_file(PICTURE, (b"abcd", b"")).replace(b"abcd" + bytes(4), b"abcd\xff\xff\xff\xff"), "truncated",
    ),
    "cut in the signature": (lambda: LOSSY[:8], "unsupported_format"),
    "a length of nothing": (lambda: b"RIFF\0\0\0\0WEBP" + LOSSY[12:], "truncated"),
    "a length of 4 GB": (lambda: b"RIFF\xff\xff\xff\xffWEBP" + LOSSY[12:], "truncated"),
}  # fmt: skip

TAKEN: dict[str, Make] = {
    "lossy": lambda: LOSSY,
    "lossless": lambda: LOSSLESS,
    "lossy with alpha": lambda: ALPHA,
    "lossless with alpha": lambda: encoded(Image.open(io.BytesIO(rgba_png(63, 47))), "WEBP", lossless=True),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), "red"), "WEBP"),
    "16,383 pixels wide": lambda: encoded(Image.new("RGB", (16_383, 1)), "WEBP"),
    "with a profile": lambda: encoded(photograph(64, 48), "WEBP", icc_profile=srgb_profile()),
    "an extended header and nothing else": lambda: webp_file(header(), PICTURE),
    "transparency that its header does not announce": lambda: webp_file(header(), *webp_chunks(ALPHA)[1:]),
    "two profiles": lambda: webp_file(header(0x20), *2 * [(b"ICCP", srgb_profile())], PICTURE),
}

CLEANED: dict[str, Make] = {
    **tails(LOSSY),
    "every kind of chunk": lambda: _WHOLE,
    "GPS": lambda: encoded(photograph(64, 48), "WEBP", exif=exif(6)),
    "GPS in a lossless file": lambda: encoded(photograph(64, 48), "WEBP", exif=exif(6), lossless=True),
    "GPS and a profile": lambda: encoded(photograph(64, 48), "WEBP", exif=exif(1), icc_profile=srgb_profile()),
    "GPS before the picture": lambda: webp_file(header(8), (b"EXIF", exif(6)), PICTURE),
    "XMP": lambda: encoded(photograph(64, 48), "WEBP", xmp=XMP),
    "a chunk of its own": lambda: webp_file(header(), (b"note", NOTE), PICTURE),
    "an HTML page in a chunk of its own": lambda: webp_file(PICTURE, (b"page", PAGE)),
    "a ZIP archive in a chunk of its own": lambda: webp_file(PICTURE, (b"zip ", ARCHIVE)),
}

FORGIVEN: dict[str, Forgiven] = {
    "a note for a profile": (
        lambda: webp_file(header(0x20), (b"ICCP", 99 * NOTE), PICTURE), webp_file(header(), PICTURE),
    ),
    "a note behind its profile and a second one": (
        lambda: webp_file(header(0x20), (b"ICCP", srgb_profile() + NOTE), (b"ICCP", srgb_profile(9999)), PICTURE),
        webp_file(header(0x20), (b"ICCP", srgb_profile()), PICTURE),
    ),
    "an HTML page in the rest of its header": (
        lambda: webp_file((b"VP8X", header()[1] + PAGE), PICTURE), webp_file(header(), PICTURE),
    ),
}  # fmt: skip
