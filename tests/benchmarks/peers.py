"""What else an app could keep its images in, each used as its own documentation or its own callers use it.

None of them looks at what it is given. An image that comes without a file is encoded first where the peer stores
bytes, with Pillow's fastest PNG level, so that no peer is made to look slow by its encoder.
"""

from __future__ import annotations

import asyncio
import io
import os
from functools import partial
from itertools import count
from pathlib import Path
from typing import Self

import diskcache  # type: ignore[import-untyped]
from gradio import processing_utils
from obstore.store import LocalStore
from PIL import Image

from async_sessions import Limits
from async_sessions._codec import encode
from tests.benchmarks.designs import SLOT, Design, Facts, InLoop, InThreads, Package, Source, Threaded, decoded

GRADIO = "Gradio's cache"
DISKCACHE = "diskcache"
OBSTORE = "obstore's `LocalStore`"
BARE = "bare write"
BARE_SYNCED = "bare write, fsync"

_FASTEST = "Pillow, level 1"


class GradioCache(InThreads):
    """`save_pil_to_cache` for images, `save_file_to_cache` for files: what `gr.Image` itself calls.

    PNG is asked for: the default, WebP, loses pixels. An upload is a file already, and how it became one is not
    measured. Where a file went only the page knows.
    """

    facts = Facts(
        GRADIO,
        False,
        "none: the page knows the path",
        "Pillow, level 6",
        "no restart, thumbnail or check; keeps GPS and other metadata",
    )

    def __init__(self, folder: Path, users: int) -> None:
        self._folder = folder
        self._numbers = count()
        self._paths: dict[int, str] = {}

    def given(self, user: int, source: Source) -> Source:
        if not isinstance(source, bytes):
            return super().given(user, source)
        uploads = self._folder / "uploads"
        uploads.mkdir(parents=True, exist_ok=True)
        # a name of its own each time: a file that the cache has is not copied again
        (path := uploads / f"{next(self._numbers)}.jpg").write_bytes(source)
        return path

    def store_here(self, user: int, source: Source) -> int:
        cache = str(self._folder / "cache")
        if isinstance(source, Image.Image):
            self._paths[user] = processing_utils.save_pil_to_cache(source, cache, name=f"{user}", format="png")
        else:
            self._paths[user] = processing_utils.save_file_to_cache(source, cache)
        return Path(self._paths[user]).stat().st_size

    def retrieve_here(self, user: int) -> Image.Image:
        return decoded(Path(self._paths[user]))

    async def restart(self) -> None:
        """It keeps no image in memory."""


class GradioInLoop(InLoop, GradioCache):
    """As Gradio calls it for the image of a `gr.update` and for every file from outside its cache."""


class DiskCache(InThreads):
    facts = Facts(
        DISKCACHE,
        False,
        "SQLite, synced at checkpoints only",
        _FASTEST,
        "no thumbnail or check; keeps metadata; removes images beyond a limit (1 GB, raised here)",
    )

    def __init__(self, folder: Path, users: int) -> None:
        self._folder = folder

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cache.close()

    def store_here(self, user: int, source: Source) -> int:
        data = _encoded(source)
        self._cache.set((user, SLOT), data)
        return len(data)

    def retrieve_here(self, user: int) -> Image.Image:
        return decoded(self._cache[user, SLOT])

    async def restart(self) -> None:
        self._cache.close()
        self._open()

    def _open(self) -> None:
        self._cache = diskcache.Cache(str(self._folder), size_limit=2**40)


class Obstore(Design):
    """Bytes through the async Rust core of `obstore`; only the coding of images is done in threads."""

    facts = Facts(
        OBSTORE, False, "none: the path; replaced by a rename", _FASTEST, "no thumbnail or check; keeps metadata"
    )

    def __init__(self, folder: Path, users: int) -> None:
        self._folder = folder

    async def __aenter__(self) -> Self:
        self._store = LocalStore(self._folder, mkdir=True)
        return self

    async def store(self, user: int, source: Source) -> int:
        data = source if isinstance(source, bytes) else await asyncio.to_thread(_encoded, source)
        await self._store.put_async(f"{user}/{SLOT}", data)
        return len(data)

    async def retrieve(self, user: int) -> Image.Image:
        found = await self._store.get_async(f"{user}/{SLOT}")
        data = await found.bytes_async()
        return await asyncio.to_thread(lambda: decoded(data.to_bytes()))

    async def restart(self) -> None:
        self._store = LocalStore(self._folder)


class BareFiles(InThreads):
    """The limit: bytes that this package has already made are written to a file, and no more."""

    def __init__(self, folder: Path, users: int, *, synced: bool) -> None:
        self.facts = Facts(
            BARE_SYNCED if synced else BARE,
            synced,
            "none: the path; rewritten in place",
            "none: encoded beforehand",
            "everything else",
        )
        self._folder = folder
        self._files: list[tuple[Source, Source]] = []

    async def __aenter__(self) -> Self:
        self._folder.mkdir()
        return self

    def given(self, user: int, source: Source) -> Source:
        """The file that this package would make of `source`; made once for all users that store the same."""
        for known, file in self._files:
            if known is source:
                return file
        file = encode.png(encode.upright_copy(source, Limits())) if isinstance(source, Image.Image) else source
        self._files.append((source, file))
        return file

    def store_here(self, user: int, source: Source) -> int:
        assert isinstance(source, bytes)
        with (self._folder / f"{user}").open("wb", buffering=0) as file:
            file.write(source)
            if self.facts.synced:
                os.fsync(file.fileno())
        if self.facts.synced:
            directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(directory)
            os.close(directory)
        return len(source)

    def retrieve_here(self, user: int) -> Image.Image:
        return decoded((self._folder / f"{user}").read_bytes())

    async def restart(self) -> None:
        """It keeps no image in memory."""


# This package last: anyio's cancel scopes nest, so of the stores that are open only the last one can be restarted.
EVERYBODY = (
    partial(BareFiles, synced=True),
    partial(BareFiles, synced=False),
    Obstore,
    DiskCache,
    GradioCache,
    Threaded,
    partial(Package, synced=False),
    Package,
)


def _encoded(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    written = io.BytesIO()
    decoded(source).save(written, "PNG", compress_level=1)
    return written.getvalue()
