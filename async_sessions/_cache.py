"""Decoded images, kept in memory by blob name. Blobs are immutable, so nothing is ever invalidated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

import anyio
from cachetools import LRUCache

from async_sessions.records import MIB

if TYPE_CHECKING:
    from PIL import Image


_MADE: Final = "#"  # in no blob's name
# What is as large is not worth the copy. It comes from the heaps, too: Pillow allocates it in blocks of 16 MiB.
_LARGE: Final = 32 * MIB


def name_of_rendition(blob: str, *how: object) -> str:
    """The name under which an image is cached that was made from `blob`."""
    return f"{blob}{_MADE}{how!r}"


def _blob_of(name: str) -> str:
    return name.partition(_MADE)[0]


def decoded_size(image: Image.Image) -> int:
    """Bytes that the pixels take; Pillow keeps most modes at four bytes a pixel."""
    return image.width * image.height * 4


def view(image: Image.Image) -> Image.Image:
    """An image of its own that shares `image`'s pixels until it is drawn on; 2 µs instead of a copy.

    Copy-on-write is Pillow's `readonly` flag, which `Image.open` sets for memory-mapped files; `_new` is private, and
    tests pin both on each Pillow line. Not for palette images: `putpalette` writes through to the shared palette.
    """
    shared = image._new(image.im)
    shared.readonly = 1
    return shared


class _Images(LRUCache[str, "Image.Image"]):
    """Finds what was made of a blob without a look at all the others."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, getsizeof=decoded_size)
        self._names: dict[str, set[str]] = {}  # by blob

    def names_of(self, blob: str) -> tuple[str, ...]:
        return tuple(self._names.get(blob, ()))

    def __setitem__(self, name: str, image: Image.Image) -> None:
        super().__setitem__(name, image)
        self._names.setdefault(_blob_of(name), set()).add(name)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        blob = _blob_of(name)
        self._names[blob].discard(name)
        if not self._names[blob]:
            del self._names[blob]

    def clear(self) -> None:
        super().clear()
        self._names.clear()


class ImageCache:
    """Least recently used first out, bounded by `max_bytes` of pixels; one load per image however many ask for it.

    To be closed: it has a thread, once something is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._images = _Images(max_bytes)
        self._loading: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="async_sessions-cache")
        self.hits = 0
        self.misses = 0

    def close(self) -> None:
        """Let go of all images: who still has a session of the store should not hold them."""
        self._keeper.shutdown(wait=False)
        self._images.clear()

    @property
    def size(self) -> int:
        """Bytes of pixels that are kept."""
        return int(self._images.currsize)

    @property
    def max_size(self) -> int:
        return int(self._images.maxsize)

    def own(self, image: Image.Image) -> Image.Image:
        """`image`, which is to be kept, in the heap of all that is kept; for a worker thread.

        Each thread allocates from a heap of its own, which gives back no more than what is free at its end. An image
        that stays where it was decoded holds all that was freed there before it: three times what the cache is to take.
        """
        if not decoded_size(image) < min(_LARGE, self._images.maxsize + 1):
            return image
        try:
            return self._keeper.submit(image.copy).result()
        except RuntimeError:  # it was closed meanwhile
            return image

    def put(self, blob: str, image: Image.Image) -> None:
        """Keep `image`, which its caller gives away, see `own`. One larger than the whole cache is not kept."""
        if decoded_size(image) <= self._images.maxsize:
            self._images[blob] = image

    def drop(self, blob: str) -> None:
        """Forget an image whose blob is deleted, and what was made of it; what is being loaded is not kept."""
        for name in self._images.names_of(blob):
            del self._images[name]
        for name in [name for name in self._loading if _blob_of(name) == blob]:
            self._loading.pop(name, None)

    def __contains__(self, blob: str) -> bool:
        return blob in self._images

    def find(self, blob: str) -> Image.Image | None:
        """The cached image; shared, so never to be drawn on."""
        image = self._images.get(blob)
        self.hits += image is not None
        return image

    async def get(self, blob: str, load: Callable[[], Awaitable[Image.Image]]) -> Image.Image:
        """The cached image, or what `load()` returns; shared with everybody, so never to be drawn on.

        Whoever waits for another's load tries itself if that one failed or was cancelled, so every waiter gets an
        exception of its own.
        """
        if (image := self.find(blob)) is not None:
            return image
        loading = self._loading.get(blob)
        if loading is None:
            # guards one load of this blob; it lives as long as somebody waits for it
            self._loading[blob] = loading = anyio.Lock(fast_acquire=True)
        async with loading:
            if (image := self.find(blob)) is not None:
                return image
            self.misses += 1
            image = await load()
            if self._loading.get(blob) is loading:  # else it was dropped meanwhile
                self.put(blob, image)
            return image
