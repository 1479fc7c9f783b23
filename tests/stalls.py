"""What the threads of a process do while its event loop stands still."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from traceback import walk_stack

STALL = 0.05  # seconds
ROOT = Path(__file__).parent.parent
PYTHON = "python"
OURS = frozenset({"async_sessions", "PIL", "numpy", "av", PYTHON})  # and what may work for it

_LOOK = STALL / 5  # seconds between two looks
_WAITS = frozenset({"_worker", "accept", "poll", "select", "wait"})
_MAIN = "block_thread"  # waits for a signal


@asynccontextmanager
async def watching() -> AsyncIterator[list[list[str]]]:
    """A list that gets, for each time that the loop stands for `STALL` seconds, the packages whose code is being run.

    None where no other thread came to look before the loop went on, as where one call of C's held the GIL.
    """
    watch = _Watch()
    watch.start()
    beating = asyncio.create_task(watch.beat())
    try:
        yield watch.stalls
    finally:
        beating.cancel()
        watch.over.set()


class _Watch(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stalls: list[list[str]] = []
        self.over = threading.Event()
        self._beat = time.perf_counter()
        self._looked: tuple[float, set[str]] = (0.0, set())  # at the stall that began with that beat

    async def beat(self) -> None:
        while True:
            before, self._beat = self._beat, time.perf_counter()
            if self._beat - before > STALL + _LOOK:
                beat, packages = self._looked
                self.stalls.append(sorted(packages) if beat == before else [])
            await asyncio.sleep(_LOOK)

    def run(self) -> None:
        while not self.over.wait(_LOOK):
            beat = self._beat
            if beat != self._looked[0] and time.perf_counter() - beat > STALL:
                self._looked = beat, _at_work()


def _at_work() -> set[str]:
    """Of every thread that does not wait, the package of the innermost frame that is neither Python's nor anyio's."""
    packages = set()
    for thread, innermost in sys._current_frames().items():
        code = innermost.f_code
        waits = code.co_name == _MAIN or code.co_filename.endswith("asyncio/runners.py")
        waits = waits or (code.co_name in _WAITS and _package(code.co_filename) is None)
        if thread != threading.get_ident() and not waits:
            named = (_package(frame.f_code.co_filename) for frame, _ in walk_stack(innermost))
            packages.add(next(filter(None, named), PYTHON))
    return packages


def _package(file: str) -> str | None:
    if "site-packages/" in file:
        package = file.rpartition("site-packages/")[2].split("/")[0]
        return None if package == "anyio" else package
    try:
        return Path(file).relative_to(ROOT).parts[0]
    except ValueError:
        return None
