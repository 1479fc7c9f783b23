"""`LoopWatch`: finds what blocks an event loop, and names the line."""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from types import FrameType

_LIBRARIES: Final = ("<frozen ", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


class Stall:
    """A loop that was blocked, for `seconds`, and the `stack` in which it was found, outermost first.

    Its text names the innermost line outside the standard library and what is installed, if there is one.
    """

    def __init__(self, seconds: float, stack: traceback.StackSummary) -> None:
        self.seconds = seconds
        self.stack = stack

    def __str__(self) -> str:
        own = [frame for frame in self.stack if not frame.filename.startswith(_LIBRARIES)]
        at = (own or self.stack)[-1]
        where = f"{at.filename}:{at.lineno}, in {at.name}"
        return f"The event loop was blocked for {self.seconds:.2f} s at {where}:\n{''.join(self.stack.format())}"


class LoopWatch:
    """Knocks at the loop of one thread, from another one, and looks where it is when no answer comes in `threshold`.

    The threshold is in seconds and is met within a quarter of it. A loop that waits for something to do, or that isn't
    running, is not stalled.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int, *, threshold: float) -> None:
        self.stalls: list[Stall] = []
        self._loop = loop
        self._thread = thread
        self._threshold = threshold
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[list[Stall]]:
        """Leaving waits for the thread that watches: not on the loop."""
        watcher = threading.Thread(target=self._watch, name="async_sessions-loop-watch", daemon=True)
        watcher.start()
        try:
            yield self.stalls
        finally:
            self._ended.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._threshold / 4):
            answered = threading.Event()
            try:
                self._loop.call_soon_threadsafe(answered.set)
            except RuntimeError:  # closed
                return
            self._wait(answered)

    def _wait(self, answered: threading.Event) -> None:
        since: float | None = None
        stall: Stall | None = None
        while not answered.wait(self._threshold / 4) and not self._ended.is_set():
            now = time.monotonic()
            if not self._loop.is_running():
                since = stall = None
            elif since is None:
                since = now
            elif stall is not None:
                stall.seconds = now - since
            elif now - since >= self._threshold:
                if stack := self._stack():
                    stall = Stall(now - since, stack)
                    self.stalls.append(stall)
                else:
                    since = now

    def _stack(self) -> traceback.StackSummary | None:
        """What the loop runs at this moment, or `None` where it waits."""
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[self._thread])]  # innermost first
        if _module(frames[0]) == "selectors":  # asyncio's own wait, or somebody's subprocess
            frames = frames[1:]
        running = list(takewhile(lambda frame: _module(frame) not in ("asyncio", "anyio", "uvloop"), frames))
        if not running:
            return None
        return traceback.StackSummary.extract((frame, frame.f_lineno) for frame in reversed(running))


def _module(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]
