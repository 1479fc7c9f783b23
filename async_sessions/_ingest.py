"""`ingest`: whatever an app holds as an image becomes verified bytes to store, pixels to warm the cache, a thumbnail.

Nothing here touches storage. What costs time or reads files is done in a worker thread.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace
from PIL import Image
from PIL.ImageFile import ImageFile

from async_sessions._budget import in_thread
from async_sessions._codec import decode, encode
from async_sessions._codec.base import check_size
from async_sessions._codec.sniff import MEDIA_TYPES, sniff
from async_sessions.errors import ImageRejectedError, StorageError

if TYPE_CHECKING:
    import anyio

    from async_sessions._budget import PixelBudget
    from async_sessions._codec.base import Rebuilt
    from async_sessions.records import Limits

ImageSource: TypeAlias = "Image.Image | bytes | bytearray | memoryview | Path | npt.NDArray[Any] | AsyncIterable[bytes]"

Keep: TypeAlias = Callable[[Image.Image], Image.Image]

NAME_LENGTH: Final = 200

_SMALL: Final = ("1", "L", "P", "I;16")  # modes of one or two bytes a pixel
_READ: Final = {"WEBP": 4, "AVIF": 3, "HEIF": 3}  # what reading takes, where it is more than the pixels; see `peak`


class Ingested(msgspec.Struct, frozen=True, kw_only=True):
    """A verified image. `data` is what is to be stored and `digest` its SHA-256; `image` is upright and loaded,
    or `None` where there was no room to keep it.

    `thumbnail_digest` is the SHA-256 of `thumbnail`. `width` and `height` are those of `image`; `orientation` is the
    EXIF value that `data` still carries. `verbatim`: `data` was checked, but it is still what came, not what a scanner
    wrote.
    """

    data: bytes
    digest: str
    media_type: str
    image: Image.Image | None
    width: int
    height: int
    mode: str
    has_alpha: bool
    orientation: int
    thumbnail: bytes
    thumbnail_digest: str
    source_name: str | None
    verbatim: bool


class _Scanned(NamedTuple):
    """A source whose size is known: `pixels` is what `decode`, which is for a worker thread, takes of the budget."""

    pixels: int
    decode: Callable[[Keep], Ingested]


@asynccontextmanager
async def ingest(
    sources: Mapping[str, ImageSource],
    *,
    name: str | None = None,
    limits: Limits,
    limiter: anyio.CapacityLimiter,
    budget: PixelBudget,
    keep: Keep = lambda image: image,
) -> AsyncIterator[dict[str, Ingested]]:
    """Verify images of any kind that the store takes.

    An encoded image (bytes, a path, chunks) keeps its pixels as they came; of a Pillow image or an array a copy is
    encoded. Raise `ImageRejectedError` for what is not an acceptable image, `StorageError` for a path that cannot be
    read, `OutOfMemoryError`, and `TypeError` for what is no image source, a `str` among it.

    `keep` is called in a worker thread with each decoded image, which it may put elsewhere in memory.

    What this takes counts against `budget` until the body ends: so keep the images no longer. Files are read before it
    is their turn, so those of all who wait are in memory.
    """
    scanned = {slot: await _scan(source, name, limits, limiter) for slot, source in sources.items()}
    wanted = sum(scan.pixels for scan in scanned.values())
    async with budget.lent(wanted):
        ingested = {}
        for slot, scan in scanned.items():
            ingested[slot] = await in_thread(partial(scan.decode, keep), limiter, pixels=scan.pixels)
            if wanted > budget.pixels and len(scanned) > 1:  # so one after the other is all that fits
                ingested[slot] = replace(ingested[slot], image=None)
        yield ingested


async def _scan(source: ImageSource, name: str | None, limits: Limits, limiter: anyio.CapacityLimiter) -> _Scanned:
    if isinstance(source, str):
        raise TypeError("A str is never an image; for the name of a file, give pathlib.Path(...).")
    if name is None and isinstance(source, Path):
        name = source.name
    scan: partial[_Scanned]
    if isinstance(source, Image.Image | np.ndarray):
        width, height = _size_of(source)
        if width and height:
            check_size(width, height, limits)  # what is too large is not to wait for its turn
        return _Scanned(pixels_of(source), partial(_ingest_pixels, source, name, limits))
    if isinstance(source, Path):
        scan = partial(_scan_encoded, partial(_read, source, limits), name, limits)
    elif isinstance(source, bytes | bytearray | memoryview):
        scan = partial(_scan_encoded, partial(_snapshot, source, limits), name, limits)
    elif isinstance(source, AsyncIterable):
        collected = await _collect(source, limits)
        scan = partial(_scan_encoded, lambda: collected, name, limits)
    else:
        raise TypeError(
            "An image is a PIL.Image.Image, bytes, a pathlib.Path, a numpy array or an async iterable of bytes, not "
            f"{type(source).__name__}."
        )
    return await in_thread(scan, limiter)


def pixels_of(source: object) -> int:
    """How many pixels of four bytes the copy of an image or an array and its PNG take; of anything else, none."""
    if not isinstance(source, Image.Image | np.ndarray):
        return 0
    width, height = _size_of(source)
    small = source.ndim < 3 if isinstance(source, np.ndarray) else source.mode in _SMALL
    times = 1 if small else 2
    if isinstance(source, ImageFile):  # which may have yet to be read
        times += 3 if source.info.get("progressive") else _READ.get(source.format or "", 1)
    return times * width * height


def _size_of(source: Image.Image | npt.NDArray[Any]) -> tuple[int, int]:
    if isinstance(source, Image.Image):
        return source.size
    height, width, *_ = (*source.shape, 1, 1)
    return width, height


def _scan_encoded(read: Callable[[], bytes | bytearray], name: str | None, limits: Limits) -> _Scanned:
    data = read()
    if not data:
        raise ImageRejectedError("empty", "The file is empty; choose an image.")
    form = sniff(data, limits)
    rebuilt = decode.rebuild(data, form, limits)
    pixels = max(rebuilt.coded, rebuilt.width * rebuilt.height)
    pixels = decode.peak(rebuilt.data, MEDIA_TYPES.get(form, form), pixels, rebuilt.orientation)
    if form not in MEDIA_TYPES:
        return _Scanned(pixels, partial(_ingest_foreign, rebuilt, form, name))
    stored = bytes(data) if limits.keep_metadata else rebuilt.data
    return _Scanned(pixels, partial(_ingest_rebuilt, rebuilt, stored, form, name))


def _ingest_foreign(rebuilt: Rebuilt, form: str, name: str | None, keep: Keep) -> Ingested:
    """Of a format that browsers or pipelines may not read: it is stored as PNG."""
    image = keep(decode.decode(rebuilt, form))
    return _ingested(encode.png(image), "PNG", image, 1, name)


def _ingest_rebuilt(rebuilt: Rebuilt, stored: bytes, form: str, name: str | None, keep: Keep) -> Ingested:
    image = keep(decode.decode(rebuilt, form))
    return _ingested(stored, form, image, rebuilt.orientation, name, verbatim=stored != rebuilt.data)


def _ingest_pixels(source: Image.Image | npt.NDArray[Any], name: str | None, limits: Limits, keep: Keep) -> Ingested:
    if isinstance(source, Image.Image):
        image = keep(encode.upright_copy(source, limits))
    else:
        image = keep(encode.image_of_array(source, limits))
    return _ingested(encode.png(image), "PNG", image, 1, name)


def _ingested(
    data: bytes, form: str, image: Image.Image, orientation: int, name: str | None, *, verbatim: bool = False
) -> Ingested:
    thumbnail = decode.thumbnail(image)
    return Ingested(
        data=data,
        digest=hashlib.sha256(data).hexdigest(),
        media_type=MEDIA_TYPES[form],
        image=image,
        width=image.width,
        height=image.height,
        mode=image.mode,
        has_alpha=image.has_transparency_data,
        orientation=orientation,
        thumbnail=thumbnail,
        thumbnail_digest=hashlib.sha256(thumbnail).hexdigest(),
        source_name=base_name(name),
        verbatim=verbatim,
    )


def png_of(image: Image.Image, limits: Limits) -> bytes:
    """The PNG as which `ingest` keeps an image; `ImageRejectedError` for one that it refuses."""
    return encode.png(encode.upright_copy(image, limits))


def _snapshot(source: bytes | bytearray | memoryview, limits: Limits) -> bytes:
    size = source.nbytes if isinstance(source, memoryview) else len(source)
    if size > limits.max_bytes:
        raise _too_many_bytes(limits)
    return bytes(source)  # the caller may change a buffer; bytes are not copied


def _read(path: Path, limits: Limits) -> bytes:
    try:
        # Opening a FIFO would wait for its writer; once it is open, what was looked at can't be swapped any more.
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            regular, size = stat.S_ISREG(status.st_mode), status.st_size
            data = file.read(limits.max_bytes + 1) if regular and size <= limits.max_bytes else b""
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} cannot be read: {why}. Check the path and its permissions.") from error
    if not regular:
        raise StorageError(f"{path} is not a regular file; give the path of an image.")
    if max(size, len(data)) > limits.max_bytes:
        raise _too_many_bytes(limits)
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


async def _collect(source: AsyncIterable[bytes], limits: Limits) -> bytearray:
    """All chunks, in memory that never grows beyond the limit. A generator that is not read to its end is closed."""
    held = bytearray()
    try:
        async for chunk in source:
            if not isinstance(chunk, bytes | bytearray | memoryview):
                raise TypeError(f"An async source of an image gives chunks of bytes, not {type(chunk).__name__}.")
            view = memoryview(chunk)
            if len(held) + view.nbytes > limits.max_bytes:
                raise _too_many_bytes(limits)
            held += view if view.contiguous else view.tobytes()
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()
    return held


def _too_many_bytes(limits: Limits) -> ImageRejectedError:
    return ImageRejectedError(
        "too_many_bytes", f"The file is larger than {limits.max_bytes:,} bytes. Make the image smaller first."
    )


def base_name(name: str | None) -> str | None:
    """The last part of a file name that a client gave, printable and short; `None` where nothing is left of it."""
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    kept = "".join(character for character in last if character.isprintable()).strip()[:NAME_LENGTH].rstrip()
    return None if kept in ("", ".", "..") else kept
