"""Both designs behind the same three calls, and what a call costs."""

from __future__ import annotations

import asyncio
import gc
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from PIL import Image

from async_sessions import Session, open_store
from tests.benchmarks.threaded import ThreadedSessions

T = TypeVar("T")
Source = Image.Image | bytes

_SLOT = "start"


class Cost(NamedTuple):
    """Seconds: on the wall, and of all cores together."""

    wall: float
    cpu: float


class Design(Protocol):
    async def store(self, user: int, source: Source) -> int:
        """Returns the size of the stored file."""

    async def retrieve(self, user: int) -> Image.Image: ...

    async def restart(self) -> None:
        """Forget everything but what is on the disk."""


class Package:
    """This package, with one session per user."""

    def __init__(self, target: Path | str, users: int) -> None:
        self._target = target
        self._users = users
        self._open = AsyncExitStack()
        self.sessions: list[Session] = []

    async def __aenter__(self) -> Self:
        store = await self._open.enter_async_context(open_store(self._target))
        self.sessions = [await store.create_session() for _ in range(self._users)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._open.aclose()

    async def store(self, user: int, source: Source) -> int:
        return (await self.sessions[user].store_image(source, _SLOT)).byte_size

    async def retrieve(self, user: int) -> Image.Image:
        return await self.sessions[user].retrieve_image(_SLOT)

    async def restart(self) -> None:
        await self._open.aclose()
        store = await self._open.enter_async_context(open_store(self._target))
        self.sessions = [await store.restore_session(session.id) for session in self.sessions if session.id]


class Threaded:
    """The threaded design, called in `asyncio.to_thread`, which is how an async app must call it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sessions = ThreadedSessions(folder)

    async def store(self, user: int, source: Source) -> int:
        return await asyncio.to_thread(self.store_here, user, source)

    async def store_in_loop(self, user: int, source: Source) -> int:
        """As it is called by those who do not know better."""
        return self.store_here(user, source)

    def store_here(self, user: int, source: Source) -> int:
        image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        return self._sessions.store_image(image, f"session_{user}", _SLOT).stat().st_size

    async def retrieve(self, user: int) -> Image.Image:
        return await asyncio.to_thread(self.retrieve_here, user)

    def retrieve_here(self, user: int) -> Image.Image:
        return self._sessions.retrieve_image(f"session_{user}", _SLOT)

    async def restart(self) -> None:
        self._sessions = ThreadedSessions(self._folder)
        for folder in self._folder.iterdir():
            self._sessions.restore_from_session_id(folder.name)


async def timed(work: Awaitable[T]) -> tuple[Cost, T]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = await work
    return Cost(time.perf_counter() - wall, time.process_time() - cpu), result


async def stored(store: Callable[[int, Source], Awaitable[int]], sources: Sequence[Source]) -> list[int]:
    """Each source by a user of its own, all at once."""
    return await asyncio.gather(*(store(user, source) for user, source in enumerate(sources)))


async def retrieved(design: Design, users: int) -> list[Image.Image]:
    return await asyncio.gather(*(design.retrieve(user) for user in range(users)))


def check(images: Sequence[Image.Image], sources: Sequence[Source]) -> None:
    """Stop the benchmark unless each image is its source, pixel by pixel."""
    for image, source in zip(images, sources, strict=True):
        wanted = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
        if _pixels(image) != _pixels(wanted):
            raise AssertionError("A design returned other pixels than it was given.")


def _pixels(image: Image.Image) -> tuple[Any, ...]:
    return image.mode, image.size, image.tobytes()
