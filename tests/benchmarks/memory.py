"""What a process holds in memory once many sessions have stored an image; each design in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import resource
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from async_sessions.records import KIB, MIB
from tests.benchmarks.designs import Design, Package, Threaded, together
from tests.benchmarks.pictures import HD
from tests.images import corners

T = TypeVar("T")

CACHE_BYTES = 64 * MIB
AT_ONCE = 8


class Memory(NamedTuple):
    """Bytes that were resident beyond those of the open, empty design: `held` with so many sessions, `peak` ever."""

    sessions: Sequence[int]
    held: Sequence[int]
    peak: int

    def per_session(self) -> float:
        """What a session adds, once the first ones have filled whatever is bounded."""
        return (self.held[-1] - self.held[0]) / (self.sessions[-1] - self.sessions[0])


def of_package(sessions: Sequence[int]) -> Memory:
    return asyncio.run(_measure(lambda folder, users: Package(folder, users, cache_bytes=CACHE_BYTES), sessions))


def of_threaded(sessions: Sequence[int]) -> Memory:
    return asyncio.run(_measure(Threaded, sessions))


async def in_fresh_process(call: Callable[..., T], *arguments: object) -> T:
    """`call` is a function of a module that imports no more than it needs."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return await asyncio.get_running_loop().run_in_executor(process, call, *arguments)


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has now, and the most that it ever had; both that without /proc."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept is nobody's
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,) * 2
    sizes = {
        name: int(size.split()[0]) * KIB for name, _, size in (line.partition(":") for line in lines) if "kB" in size
    }
    return sizes["VmRSS"], sizes["VmHWM"]


async def _measure(opened: Callable[[Path, int], Design], sessions: Sequence[int]) -> Memory:
    """Flat images: how much memory a picture takes depends on its size alone."""
    with tempfile.TemporaryDirectory() as folder:
        async with opened(Path(folder, "store"), sessions[-1]) as design:
            empty, held = resident()[0], []
            for first, last in zip((0, *sessions), sessions, strict=False):
                for user in range(first, last, AT_ONCE):
                    await together(
                        *(design.store(each, corners(*HD)) for each in range(user, min(user + AT_ONCE, last)))
                    )
                held.append(resident()[0] - empty)
    return Memory(sessions, held, resident()[1] - empty)
