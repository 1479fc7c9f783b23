from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from async_sessions.records import MIB
from tests.corpus.base import ARCHIVE, NOTE, PAGE, SCRIPT, XMP, Forgiven, Make, Refused, cuts, tails
from tests.images import (
    PNG_SIGNATURE,
    corners,
    encoded,
    exif,
    photo,
    photograph,
    png_chunk,
    png_chunks,
    png_file,
    rgba_png,
    srgb_profile,
)

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
STREAM = zlib.compress(bytes(4 * 5))
GREY = png_file(4, 4, 8, 0)
_PROFILE = png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(srgb_profile()))
_GAMMA = png_chunk(b"gAMA", struct.pack(">I", 45455))
_TEXT = png_chunk(b"tEXt", b"Comment\0hello")


def _profiled(name: bytes, profile: bytes, behind: bytes = b"") -> bytes:
    return png_chunk(b"iCCP", name + b"\0\0" + zlib.compress(profile) + behind)


def idat(data: bytes) -> bytes:
    return png_chunk(b"IDAT", data)


_IDAT = idat(STREAM)


def with_wrong_crc(data: bytes, kind: bytes) -> bytes:
    place = data.index(kind) - 4
    end = place + 12 + struct.unpack_from(">I", data, place)[0]
    return data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:]


def _coloured(before: bytes = b"", after: bytes = b"") -> bytes:
    """A palette image with these chunks around its pixels, which are in three chunks."""
    pixels = idat(STREAM[:5]) + idat(STREAM[5:9]) + idat(STREAM[9:])
    return png_file(4, 4, 8, 3, before=before, pixels=pixels, after=after)


_GREY_IN_TWO = png_file(4, 4, 8, 0, pixels=idat(STREAM[:5]) + idat(STREAM[5:]))
_PALETTE = png_chunk(b"PLTE", bytes(range(12)))
_TRANSPARENT = png_chunk(b"tRNS", b"\0\x80")
_WHOLE = _coloured(_PROFILE + _GAMMA + _PALETTE + _TRANSPARENT + png_chunk(b"eXIf", exif(6)[6:]) + _TEXT, _TEXT)


def _ends() -> Iterator[tuple[str, int]]:
    yield "in the signature", 4
    position = len(PNG_SIGNATURE)
    for chunk, body in png_chunks(_WHOLE):
        name, end = chunk.decode(), position + 12 + len(body)
        yield f"before {name}", position
        yield f"in the length of {name}", position + 2
        yield f"before the name of {name}", position + 4
        yield f"in the name of {name}", position + 6
        yield f"before the bytes of {name}", position + 8
        if body:
            yield f"in the bytes of {name}", position + 8 + len(body) // 2
            yield f"before the checksum of {name}", end - 4
        yield f"in the checksum of {name}", end - 1
        position = end


REFUSED: dict[str, Refused] = {
    **cuts(_WHOLE, _ends()),
    "only the signature": (lambda: PNG_SIGNATURE, "truncated"),
    "cut in the header": (lambda: GREY[:20], "truncated"),
    "cut in the pixels": (lambda: photo("astronaut.png")[:200_000], "truncated"),
    "cut before its end": (lambda: GREY[:-12], "truncated"),
    "without pixels": (lambda: png_file(4, 4, 8, 0, pixels=b""), "truncated"),
    "one row short": (lambda: png_file(4, 4, 8, 0, bytes(3 * 5)), "truncated"),
    "one byte short": (lambda: png_file(4, 4, 8, 0, bytes(4 * 5 - 1)), "truncated"),
    "one byte too long": (lambda: png_file(4, 4, 8, 0, bytes(4 * 5 + 1)), "corrupt"),
    "a compression bomb": (lambda: png_file(4, 4, 8, 0, bytes(50_000_000)), "corrupt"),
    "pixels without their checksum": (lambda: png_file(4, 4, 8, 0, pixels=idat(STREAM[:-4])), "truncated"),
    "pixels with a wrong checksum": (lambda: png_file(4, 4, 8, 0, pixels=idat(STREAM[:-1] + b"!")), "corrupt"),
    "pixels that are not compressed": (lambda: png_file(4, 4, 8, 0, pixels=idat(bytes(20))), "corrupt"),
    "an unknown row filter": (lambda: png_file(4, 4, 8, 0, b"\x09\0\0\0\0" * 4), "corrupt"),
    "a wrong CRC of its pixels": (lambda: with_wrong_crc(GREY, b"IDAT"), "corrupt"),
    "a wrong CRC of its header": (lambda: with_wrong_crc(GREY, b"IHDR"), "corrupt"),
    "a wrong CRC of its profile": (
        lambda: with_wrong_crc(encoded(photograph(9, 9), "PNG", icc_profile=srgb_profile()), b"iCCP"), "corrupt",
    ),
    "pixels in two places": (
        lambda: png_file(4, 4, 8, 0, pixels=idat(STREAM[:5]) + _TEXT + idat(STREAM[5:])), "corrupt",
    ),
    "two headers": (lambda: png_file(4, 4, 8, 0, before=GREY[8:33]), "corrupt"),
    "no header": (lambda: PNG_SIGNATURE + GREY[33:], "corrupt"),
    "a header of 14 bytes": (lambda: PNG_SIGNATURE + png_chunk(b"IHDR", bytes(14)) + GREY[33:], "corrupt"),
    "no width": (lambda: png_file(0, 4, 8, 0), "corrupt"),
    "a depth of 3": (lambda: png_file(4, 4, 3, 0), "corrupt"),
    "a depth that its colour type lacks": (lambda: png_file(4, 4, 4, 2), "corrupt"),
    "an unknown interlace method": (lambda: png_file(4, 4, 8, 0, interlaced=2), "corrupt"),
    "no palette": (lambda: png_file(4, 4, 8, 3), "corrupt"),
    "an empty palette": (lambda: png_file(4, 4, 8, 3, before=png_chunk(b"PLTE")), "corrupt"),
    "a palette of 257 colours": (lambda: png_file(4, 4, 8, 3, before=png_chunk(b"PLTE", bytes(771))), "corrupt"),
    "two palettes": (lambda: png_file(4, 4, 8, 3, before=2 * png_chunk(b"PLTE", bytes(6))), "corrupt"),
    "a palette after its pixels": (lambda: png_file(4, 4, 8, 3, after=png_chunk(b"PLTE", bytes(6))), "corrupt"),
    "an unknown critical chunk": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"ABCD")), "corrupt"),
    "a chunk without a name": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"\0\0\0\0")), "corrupt"),
    "a chunk of 4 GB": (lambda: GREY[:33] + b"\xff\xff\xff\xfftEXt" + GREY[33:], "corrupt"),
    "a chunk that overruns the file": (lambda: GREY[:33] + b"\0\1\0\0tEXt" + GREY[33:], "truncated"),
    "100,000 pixels wide": (lambda: png_file(100_000, 1, 8, 0, pixels=_IDAT), "too_many_pixels"),
    "64 million pixels and some": (lambda: png_file(8001, 8000, 8, 0, pixels=_IDAT), "too_many_pixels"),
    "an animation": (
        lambda: encoded(corners(), "PNG", save_all=True, append_images=[photograph(48, 32)]), "too_many_frames",
    ),
    "2 MB of text": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", bytes(2_000_000))), "metadata_bomb"),
    "2 MB of text behind the pixels": (
        lambda: png_file(4, 4, 8, 0, after=20 * png_chunk(b"tEXt", b"a\0" + bytes(100_000))), "metadata_bomb",
    ),
    "30,000 empty chunks": (lambda: png_file(4, 4, 8, 0, before=30_000 * png_chunk(b"teXt")), "metadata_bomb"),
    "30,000 empty pixel chunks": (lambda: png_file(4, 4, 8, 0, pixels=30_000 * idat(b"") + _IDAT), "metadata_bomb"),
    "a profile that inflates to 50 MB": (
        lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(50 << 20)))),
        "metadata_bomb",
    ),
    "a wrong CRC of its palette": (lambda: with_wrong_crc(_WHOLE, b"PLTE"), "corrupt"),
    "a wrong CRC of its transparency": (lambda: with_wrong_crc(_WHOLE, b"tRNS"), "corrupt"),
    "a wrong CRC of its gamma": (lambda: with_wrong_crc(_WHOLE, b"gAMA"), "corrupt"),
    "a wrong CRC of its last pixels": (lambda: _GREY_IN_TWO[:-13] + b"!" + _GREY_IN_TWO[-12:], "corrupt"),
    "two headers that differ": (lambda: png_file(4, 4, 8, 0, before=png_file(9, 9, 8, 2)[8:33]), "corrupt"),
    "a header behind its pixels": (lambda: png_file(4, 4, 8, 0, after=GREY[8:33]), "corrupt"),
    "an end and nothing before it": (lambda: PNG_SIGNATURE + png_chunk(b"IEND"), "corrupt"),
    "a header and an end": (lambda: GREY[:33] + png_chunk(b"IEND"), "truncated"),
    "a header that says it is larger": (lambda: png_file(4, 5, 8, 0, bytes(4 * 5)), "truncated"),
    "a header that says it is smaller": (lambda: png_file(4, 3, 8, 0, bytes(4 * 5)), "corrupt"),
    "a header that says grey is RGB": (lambda: png_file(4, 4, 8, 2, bytes(4 * 5)), "truncated"),
    "a header that says RGB is grey": (lambda: png_file(4, 4, 8, 0, bytes(4 * 13)), "corrupt"),
    "a header that says 8 bits are 16": (lambda: png_file(4, 4, 16, 0, bytes(4 * 5)), "truncated"),
    "a header that says it is interlaced": (lambda: png_file(4, 4, 8, 0, bytes(4 * 5), interlaced=1), "truncated"),
    "an unknown compression": (lambda: _headed(struct.pack(">IIBBBBB", 4, 4, 8, 0, 1, 0, 0)), "corrupt"),
    "an unknown set of filters": (lambda: _headed(struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 1, 0)), "corrupt"),
    "a colour type of 5": (lambda: _headed(struct.pack(">IIBBBBB", 4, 4, 8, 5, 0, 0, 0)), "corrupt"),
    "2^62 pixels": (lambda: _headed(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)), "too_many_pixels"),
    "a million frames": (
        lambda: png_file(4, 4, 8, 0, before=png_chunk(b"acTL", struct.pack(">II", 1_000_000, 0))), "too_many_frames",
    ),
    "30 MB of pixels, cut": (lambda: png_file(4, 4, 8, 0, pixels=idat(bytes(30 * MIB)))[:-13], "truncated"),
    "30 MB of pixels and a wrong CRC": (
        lambda: with_wrong_crc(png_file(4, 4, 8, 0, pixels=idat(bytes(30 * MIB))), b"IDAT"), "corrupt",
    ),
    "2 MB of XMP": (
        lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + bytes(2_000_000))),
        "metadata_bomb",
    ),
    "2 MB of EXIF": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"eXIf", bytes(2_000_000))), "metadata_bomb"),
}  # fmt: skip


def _headed(header: bytes) -> bytes:
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + GREY[33:]


def _noise(width: int, height: int, depth: int, colour: int) -> bytes:
    """An image of chance; all of its palette is used."""
    length = (width * CHANNELS[colour] * depth + 7) // 8
    rows = np.random.default_rng(depth + colour).integers(0, 256, (height, 1 + length), np.uint8)
    rows[:, 0] = 0
    palette = png_chunk(b"PLTE", bytes(range(255, 255 - 3 * 2 ** min(depth, 6), -1)).ljust(3 * 2**depth, b"\7"))
    return png_file(width, height, depth, colour, rows.tobytes(), before=palette if colour == 3 else b"")


TAKEN: dict[str, Make] = {
    **{
        f"{depth}-bit {name}": lambda depth=depth, colour=colour: _noise(17, 9, depth, colour)  # type: ignore[misc]
        for colour, name, depths in (
            (0, "grey", (1, 2, 4, 8, 16)),
            (2, "RGB", (8, 16)),
            (3, "palette", (1, 2, 4, 8)),
            (4, "grey and alpha", (8, 16)),
            (6, "RGBA", (8, 16)),
        )
        for depth in depths
    },
    "two profiles": lambda: png_file(4, 4, 8, 2, before=2 * _PROFILE),
    "two gammas that differ": lambda: png_file(4, 4, 8, 2, before=_GAMMA + png_chunk(b"gAMA", bytes(4))),
    "two transparencies that differ": lambda: _coloured(_PALETTE + _TRANSPARENT + png_chunk(b"tRNS", b"\xff\0")),
    "a transparency of no colour of its own": lambda: _coloured(_PALETTE + png_chunk(b"tRNS", bytes(200))),
    "64 million grey pixels in 8 KB": lambda: png_file(8000, 8000, 1, 0),
    "one pixel": lambda: png_file(1, 1, 8, 0),
    "16,384 pixels wide": lambda: png_file(16_384, 1, 8, 0),
    "empty pixel chunks": lambda: png_file(4, 4, 8, 0, pixels=idat(b"") + _IDAT + idat(b"")),
    "a pixel chunk for every byte": lambda: png_file(
        4, 4, 8, 0, pixels=b"".join(idat(bytes([byte])) for byte in zlib.compress(bytes(20)))
    ),
    "a suggested palette": lambda: png_file(4, 4, 8, 2, before=_PALETTE),
    "an animation of one frame": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"acTL", struct.pack(">II", 1, 0))),
    "a photograph": lambda: photo("chelsea.png"),
    "a photograph with alpha": rgba_png,
    "a logo with alpha": lambda: photo("logo.png"),
}

CLEANED: dict[str, Make] = {
    **tails(GREY),
    "every kind of chunk": lambda: _WHOLE,
    "GPS": lambda: encoded(corners(), "PNG", exif=exif(6)),
    "GPS behind the pixels": lambda: png_file(4, 4, 8, 0, after=png_chunk(b"eXIf", exif(1)[6:])),
    "XMP": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "text": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", b"Comment\0" + NOTE)),
    "text behind the pixels": lambda: png_file(4, 4, 8, 0, after=png_chunk(b"tEXt", b"Comment\0" + NOTE)),
    "text of many kinds and a profile": lambda: png_file(
        4, 4, 8, 2, before=_PROFILE + 3 * png_chunk(b"tEXt", b"Comment\0" + NOTE) + png_chunk(b"prVt", NOTE)
    ),
    "an HTML page as text": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", b"Comment\0" + PAGE)),
    "JavaScript as text": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"tEXt", b"Comment\0" + SCRIPT)),
    "a ZIP archive in a chunk of its own": lambda: png_file(4, 4, 8, 0, before=png_chunk(b"ziPa", ARCHIVE)),
    "an HTML page as a suggested palette": lambda: png_file(4, 4, 8, 2, before=png_chunk(b"PLTE", PAGE[:66])),
    "an HTML page behind the compressed rows": lambda: png_file(4, 4, 8, 0, pixels=idat(STREAM + PAGE)),
    "a second image behind it": lambda: GREY + encoded(corners(), "PNG", exif=exif(6)),
}

FORGIVEN: dict[str, Forgiven] = {
    "a note for a profile": (lambda: png_file(4, 4, 8, 2, before=_profiled(b"p", 99 * NOTE)), png_file(4, 4, 8, 2)),
    **{
        name: (lambda chunk=chunk: png_file(4, 4, 8, 2, before=chunk), png_file(4, 4, 8, 2, before=_PROFILE))  # type: ignore[misc]
        for name, chunk in (
            ("a note for the name of its profile", _profiled(NOTE, srgb_profile())),
            ("a note in its profile, behind what it says is its size", _profiled(b"p", srgb_profile() + NOTE)),
            ("a note behind its profile", _profiled(b"p", srgb_profile(), NOTE)),
        )
    },
    "a profile that is none": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"no profile")), GREY),
    "a profile that can't be inflated": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"iCCP", b"p\0\0no")), GREY),
    "a gamma of three bytes": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"gAMA", b"abc")), GREY),
    "EXIF that is none": (lambda: png_file(4, 4, 8, 0, before=png_chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")), GREY),
    "text with a wrong CRC": (lambda: with_wrong_crc(png_file(4, 4, 8, 0, before=_TEXT), b"tEXt"), GREY),
    "an end with a wrong CRC": (lambda: with_wrong_crc(GREY, b"IEND"), GREY),
    "text that would inflate to 100 MB": (
        lambda: png_file(4, 4, 8, 0, before=png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20), 1))),
        GREY,
    ),
}
