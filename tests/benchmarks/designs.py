"""What every design can do, this package and the threaded design behind it, and what a call costs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import os
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar
from unittest import mock

from PIL import Image

from async_sessions import Session, open_store
from tests.benchmarks.threaded import ThreadedSessions

T = TypeVar("T")
Source = Image.Image | bytes | Path

PACKAGE = "this package"
UNSYNCED = "this package, fsync turned off"
THREADED = "threaded design"
SLOT = "start"


class Cost(NamedTuple):
    """Seconds: on the wall, and of all cores together."""

    wall: float
    cpu: float


class Facts(NamedTuple):
    """What a design does with an image, in words, for the report. `synced`: a power cut takes nothing it returned."""

    name: str
    synced: bool
    found_by: str
    encoder: str
    lacks: str


class Design(Protocol):
    """A place for one image per user. It can be used inside `async with`."""

    facts: Facts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        return None

    def given(self, user: int, source: Source) -> Source:
        """What `store` takes for `source`, an image or the bytes of an upload; made before the clock starts.

        Each user has an image of its own: Pillow keeps the options of a save on the image while it lasts, and saves of
        one image at one time would be done with each other's.
        """
        return source.copy() if isinstance(source, Image.Image) else source

    async def store(self, user: int, source: Source) -> int:
        """Returns the size of the stored file."""
        ...

    async def retrieve(self, user: int) -> Image.Image: ...

    async def restart(self) -> None:
        """Forget everything but what is on the disk."""


class InThreads(Design, Protocol):
    """A design whose calls block: an async app has to make them in `asyncio.to_thread`."""

    async def store(self, user: int, source: Source) -> int:
        return await asyncio.to_thread(self.store_here, user, source)

    async def retrieve(self, user: int) -> Image.Image:
        return await asyncio.to_thread(self.retrieve_here, user)

    def store_here(self, user: int, source: Source) -> int: ...

    def retrieve_here(self, user: int) -> Image.Image: ...


class InLoop(InThreads, Protocol):
    """The same design where its blocking calls are made on the event loop."""

    async def store(self, user: int, source: Source) -> int:
        return self.store_here(user, source)


class Package(Design):
    """This package, with one session per user. Its sweep is off: it is measured by itself."""

    def __init__(self, target: Path | str, users: int, *, synced: bool = True, **options: Any) -> None:
        self.facts = Facts(
            PACKAGE if synced else UNSYNCED,
            synced,
            "manifest, replaced by a synced rename" if synced else "manifest, replaced by a rename",
            "its own",
            "nothing: verifies, removes private metadata, makes a thumbnail, checks a digest at each read",
        )
        self._target = target
        self._users = users
        self._options = {"cleanup_interval": None, **options}
        self._open = contextlib.AsyncExitStack()
        self.sessions: list[Session] = []

    async def __aenter__(self) -> Self:
        store = await self._open.enter_async_context(open_store(self._target, **self._options))
        self.sessions = [await store.create_session() for _ in range(self._users)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._open.aclose()

    async def store(self, user: int, source: Source) -> int:
        return (await self.sessions[user].store_image(source, SLOT)).byte_size

    async def retrieve(self, user: int) -> Image.Image:
        return await self.sessions[user].retrieve_image(SLOT)

    async def restart(self) -> None:
        await self._open.aclose()
        store = await self._open.enter_async_context(open_store(self._target, **self._options))
        self.sessions = [await store.restore_session(session.id) for session in self.sessions if session.id]


class Threaded(InThreads):
    facts = Facts(
        THREADED,
        False,
        "`metadata.json`, rewritten in place",
        "Pillow, `optimize=True`",
        "one image at a time (a lock); uploads become PNG; no thumbnail, no check of what is read",
    )

    def __init__(self, folder: Path, users: int) -> None:
        self._folder = folder
        self._sessions = ThreadedSessions(folder)

    def store_here(self, user: int, source: Source) -> int:
        return self._sessions.store_image(decoded(source), f"session_{user}", SLOT).stat().st_size

    def retrieve_here(self, user: int) -> Image.Image:
        return self._sessions.retrieve_image(f"session_{user}", SLOT)

    async def restart(self) -> None:
        self._sessions = ThreadedSessions(self._folder)
        for folder in self._folder.iterdir():
            self._sessions.restore_from_session_id(folder.name)


class ThreadedInLoop(InLoop, Threaded):
    """As it is called by those who do not know better."""


def decoded(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    image.load()
    return image


async def timed(work: Awaitable[T]) -> tuple[Cost, T]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = await work
    return Cost(time.perf_counter() - wall, time.process_time() - cpu), result


async def stored(design: Design, sources: Sequence[Source]) -> tuple[Cost, list[int]]:
    """Each source by a user of its own, all at once. What others wrote before is on the disk when the clock starts."""
    given = [design.given(user, source) for user, source in enumerate(sources)]
    await asyncio.to_thread(os.sync)
    with contextlib.nullcontext() if design.facts.synced else unsynced():
        return await timed(together(*(design.store(user, source) for user, source in enumerate(given))))


async def retrieved(design: Design, users: int) -> tuple[Cost, list[Image.Image]]:
    return await timed(together(*(design.retrieve(user) for user in range(users))))


async def together(*work: Awaitable[T]) -> list[T]:
    return await asyncio.gather(*work)


def check(images: Sequence[Image.Image], sources: Sequence[Source]) -> None:
    """Stop the benchmark unless each image is its source, pixel by pixel."""
    wanted = {id(source): _pixels(decoded(source)) for source in sources}
    for image, source in zip(images, sources, strict=True):
        if _pixels(image) != wanted[id(source)]:
            raise AssertionError("A design returned other pixels than it was given.")


def _pixels(image: Image.Image) -> tuple[Any, ...]:
    return image.mode, image.size, image.tobytes()


def unsynced() -> contextlib.AbstractContextManager[Any]:
    """Of the designs that are not synced only this package calls `os.fsync` at all."""
    return mock.patch.object(os, "fsync", return_value=None)
