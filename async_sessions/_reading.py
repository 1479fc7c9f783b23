"""Reading what a record names: bytes that are checked against their digest, and decoded images through the cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiofiles
import anyio

from async_sessions import _keys
from async_sessions._budget import in_thread
from async_sessions._cache import ImageCache, name_of_rendition, view
from async_sessions._codec import decode, encode
from async_sessions._tasks import finish_in_thread
from async_sessions.blobs.base import closing
from async_sessions.errors import CorruptBlobError, ImageRejectedError, InvalidOutputError
from async_sessions.records import ImageRecord, Limits, OutputRecord
from async_sessions.renditions import GREY, Colour, Fit, check_fit, draft_size, fit, fit_pixels

if TYPE_CHECKING:
    from io import BufferedReader

    import numpy as np
    from anyio import CapacityLimiter
    from PIL import Image

    from async_sessions._budget import Loan, PixelBudget
    from async_sessions._tasks import Commits
    from async_sessions.blobs.base import BlobStore

_COPIED = ("P", "PA")  # modes of which no view is safe: see `view`
_LARGEST = Limits().max_pixels  # of a rendition
_SUFFIXES = {"image/jpeg": ".jpg", "image/png": ".png", "image/webp": ".webp", "video/mp4": ".mp4"}


class Reader:
    """What the sessions of one store read through."""

    def __init__(
        self, blobs: BlobStore, cache: ImageCache, cpu: CapacityLimiter, budget: PixelBudget, commits: Commits
    ) -> None:
        self._blobs = blobs
        self._budget = budget
        self._commits = commits
        self._cache = cache
        self._cpu = cpu

    async def data(self, record: ImageRecord | OutputRecord) -> bytes:
        return await self._whole(record.blob, record.digest)

    async def image(self, record: ImageRecord) -> Image.Image:
        if record.mode in _COPIED:
            async with self._lent(record, record.pixel_count) as shared:
                return await in_thread(shared.copy, self._cpu)
        if (cached := self._cache.find(record.blob)) is not None:
            return view(cached)
        async with self._lent(record, 0) as shared:
            return view(shared)

    async def array(self, record: ImageRecord) -> np.ndarray:
        async with self._lent(record, 2 * record.pixel_count) as shared:
            return await in_thread(partial(encode.to_array, shared), self._cpu)

    async def rendition(self, record: ImageRecord, size: tuple[int, int], mode: Fit, background: Colour) -> Image.Image:
        check_fit(size, mode)
        if size[0] * size[1] > _LARGEST:
            raise ValueError(f"A rendition has {_LARGEST:,} pixels at most, not {size[0]} x {size[1]}.")
        at_least = draft_size(record.size, size, mode) if record.media_type == "image/jpeg" else None
        plain = record.mode == "RGB" and not record.has_alpha
        pixels = fit_pixels(record.size, size, plain=plain)

        async def make() -> Image.Image:
            async with self._lent(record, pixels, at_least) as source:
                return await in_thread(lambda: self._cache.own(fit(source, size, mode, background)), self._cpu)

        return view(await self._cache.get(name_of_rendition(record.blob, size, mode, background), make))

    async def thumbnail(self, record: ImageRecord) -> bytes:
        return await self._whole(_keys.thumbnail(record.blob), record.thumbnail_digest)

    async def stream(
        self, record: ImageRecord | OutputRecord, start: int, end: int | None
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with closing(self._blobs.stream(record.blob, start=start, end=end)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except FileNotFoundError as error:
            again = "upload the image" if isinstance(record, ImageRecord) else "run the job"
            raise CorruptBlobError(f"The blob {record.blob} is missing; {again} again.") from error

    async def copy(self, record: ImageRecord | OutputRecord, target: Path) -> None:
        """Write the bytes to `target`, a new file, mode 0600. `CorruptBlobError` if they are not as stored."""
        if isinstance(record, ImageRecord):
            await anyio.to_thread.run_sync(_write_new, target, await self.data(record))
            return
        async with aiofiles.open(target, "xb", opener=partial(os.open, mode=0o600)) as file:
            async for chunk in self.stream(record, 0, None):
                await file.write(chunk)
        if await anyio.to_thread.run_sync(_sha256_of_file, target, limiter=self._cpu) != record.digest:
            raise CorruptBlobError(f"The blob {record.blob} is damaged; run the job again.")

    @contextlib.asynccontextmanager
    async def file(self, record: ImageRecord | OutputRecord) -> AsyncIterator[Path]:
        """A private temporary copy, removed on leaving. A copy: who writes to it doesn't write to our blob."""
        folders: list[Path] = []

        async def make() -> Path:
            folders.append(Path(await anyio.to_thread.run_sync(tempfile.mkdtemp, None, "async_sessions-")))
            target = folders[0] / f"{record.digest[:16]}{_SUFFIXES.get(record.media_type, '')}"
            await self.copy(record, target)
            return target

        try:
            yield await self._commits.uninterrupted(make)
        finally:
            for folder in folders:
                await finish_in_thread(partial(shutil.rmtree, folder))

    async def _whole(self, key: str, digest: str) -> bytes:
        """A blob of that digest, or of any where it is empty; else `CorruptBlobError`."""
        blob = await self._blobs.get(key)
        if blob is None:
            raise CorruptBlobError(f"The blob {key} is missing; upload the image again.")
        # a version that is the data's SHA-256 was computed from what was just read: see `Blob`
        proven = digest in ("", blob.version)
        if not proven and await anyio.to_thread.run_sync(_sha256, blob.data, limiter=self._cpu) != digest:
            raise CorruptBlobError(f"The blob {key} is damaged; upload the image again.")
        return blob.data

    @contextlib.asynccontextmanager
    async def _lent(
        self, record: ImageRecord, pixels: int, at_least: tuple[int, int] | None = None
    ) -> AsyncIterator[Image.Image]:
        """The decoded image, never to be drawn on, and `pixels` of the budget for what the body makes of it.

        With `at_least` a JPEG that is not cached may come smaller (see `decode.load`); it is not cached then.
        """
        image: Image.Image | None = None
        async with self._budget.loan() as loan:
            if record.blob in self._cache:
                await loan.ask(pixels)
                # Only now: an image is not to be kept by who waits, while the cache drops it and takes in others.
                if (image := self._cache.find(record.blob)) is None:
                    loan.give_back()
            if image is None:
                load = partial(self._load, record, loan, pixels, at_least)
                image = await (self._cache.get(record.blob, load) if at_least is None else load())
                if not loan.asked:
                    await loan.ask(pixels)  # somebody else has loaded it
            yield image

    async def _load(
        self, record: ImageRecord, loan: Loan, pixels: int, at_least: tuple[int, int] | None
    ) -> Image.Image:
        data = await self.data(record)
        try:
            peak = decode.peak(data, record.media_type, record.pixel_count, record.orientation)
            await loan.ask(max(peak, record.pixel_count + pixels))
            load = partial(decode.load, data, record.media_type, verbatim=record.verbatim, at_least=at_least)
            kept = at_least is None
            return await in_thread(lambda: self._cache.own(load()) if kept else load(), self._cpu, pixels=peak)
        except ImageRejectedError as error:
            raise CorruptBlobError(f"The blob {record.blob} can't be decoded: {error}") from error


class StoredImage:
    """An image that a record names, whatever its slot holds by now."""

    def __init__(self, record: ImageRecord, reader: Reader) -> None:
        self.record = record
        self._reader = reader

    def __repr__(self) -> str:
        return f"StoredImage({self.record.blob!r})"

    async def image(self) -> Image.Image:
        """Upright, loaded, yours to draw on. `CorruptBlobError` where the bytes are gone or damaged."""
        return await self._reader.image(self.record)

    async def array(self) -> np.ndarray:
        """HxWxC uint8, RGB or RGBA, upright, your own copy."""
        return await self._reader.array(self.record)

    async def rendition(self, size: tuple[int, int], mode: Fit = "cover", background: Colour = GREY) -> Image.Image:
        """The image as RGB of exactly that size (see `renditions.fit`), yours to draw on; kept as `image()` is."""
        return await self._reader.rendition(self.record, size, mode, background)

    async def data(self) -> bytes:
        """The stored file, as it is."""
        return await self._reader.data(self.record)

    async def thumbnail(self) -> bytes:
        """A WebP file; see `Session.retrieve_thumbnail`."""
        return await self._reader.thumbnail(self.record)

    def stream(self, *, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """The stored file from `start` up to but not including `end`, in chunks, unlike `data` not checked."""
        return self._reader.stream(self.record, start, end)


def measure(data: bytes | Path) -> tuple[str, int]:
    """SHA-256 and size in bytes. `InvalidOutputError` for a path that does not name a file, as links don't."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest(), len(data)
    if not isinstance(data, Path):
        raise InvalidOutputError(
            f"An output is an image, the Path of a file, or bytes with their media type; not {type(data).__name__}."
        )
    try:
        with _open_regular(data) as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidOutputError(
            f"The output {data.name!r} can't be read: {why}. Let the pipeline put out the path of a file."
        ) from error


def _open_regular(path: Path) -> BufferedReader:
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a FIFO would wait for its writer, for ever
        raise OSError(errno.EINVAL, "it is a link, a folder, a device or the like")
    return path.open("rb")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_new(target: Path, data: bytes) -> None:
    with open(target, "xb", opener=partial(os.open, mode=0o600)) as file:
        file.write(data)
