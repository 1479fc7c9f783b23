"""Opening and closing a store with a Gradio app, however that app is started, reloaded and stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import anyio

from async_sessions.errors import AsyncSessionsError, StorageError, StoreClosedError

LEAVE_WITHIN: float = 30.0  # seconds that a stopping app waits for what is in flight, beside the jobs that run
_START_WITHIN = 3.0  # seconds; Gradio gives up on an app that takes more than 5 to start

_HELD = "async_sessions_held"  # of the app's state

_logger = logging.getLogger("async_sessions")

Lifespan: TypeAlias = Callable[[Any], AbstractAsyncContextManager[Any]]


class Held:
    """Context managers that are entered by whoever needs them first, and left together.

    They live in a task of their own: a task group has to be left by the task that entered it, and a request's task ends
    with the request. Reload mode runs no lifespan, so a request may well be that first need.
    """

    def __init__(self, managers: Sequence[AbstractAsyncContextManager[Any]]) -> None:
        self._managers = managers
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._leave = asyncio.Event()
        self._closed = False

    async def ensure_started(self) -> None:
        """Return once all are entered. `StorageError` says why they can't be; the next call tries again."""
        if self._closed:
            raise StoreClosedError("The app is stopping.")
        if self._opened is None or self._task is None or self._task.done():
            loop = asyncio.get_running_loop()
            self._opened, self._leave = loop.create_future(), asyncio.Event()
            self._task = loop.create_task(self._hold(self._opened, self._leave))
        opened = self._opened  # a caller that comes meanwhile may try anew
        await asyncio.wait({opened})
        try:
            opened.result()
        except AsyncSessionsError:
            raise
        except Exception as error:
            raise StorageError(f"The store can't be opened: {error}") from error

    def leave(self) -> None:
        """Begin to leave them. From now on `ensure_started` refuses, until `reopen`."""
        self._closed = True
        self._leave.set()

    async def close(self) -> None:
        """`leave`, and wait for it."""
        self.leave()
        if self._task is not None:
            await asyncio.wait({self._task})

    def close_from_thread(self) -> None:
        """`close`, from outside the loop, if that still runs; `LEAVE_WITHIN` more than the `drain_timeout`s at most."""
        if self._task is None or not (loop := self._task.get_loop()).is_running():
            return
        draining = (getattr(each, "drain_timeout", timedelta()) for each in self._managers)
        timeout = LEAVE_WITHIN + sum(draining, timedelta()).total_seconds()
        try:
            asyncio.run_coroutine_threadsafe(self.close(), loop).result(timeout)
        except TimeoutError:
            _logger.warning("the store was not left within %g s", timeout)

    def reopen(self) -> None:
        """Let `ensure_started` start anew: the app was started again."""
        self._closed = False

    async def _hold(self, opened: asyncio.Future[None], leave: asyncio.Event) -> None:
        try:
            async with AsyncExitStack() as stack:
                for manager in self._managers:
                    await stack.enter_async_context(manager)
                opened.set_result(None)
                await leave.wait()
        except Exception as error:
            if opened.done():
                _logger.exception("the store was not left cleanly")
            else:
                opened.set_exception(error)
        finally:
            if not opened.done():
                opened.set_exception(StoreClosedError("The app is stopping."))
            opened.exception()  # seen, so that asyncio doesn't report it as lost


def take_over(app: Any, held: Held) -> None:
    """Where the app has been reloaded, leave what its earlier version holds: GPUs are not there twice."""
    blocks, all_held = getattr(app.state, _HELD, (None, []))
    if blocks is not app.blocks:
        for each in all_held:
            each.leave()
        all_held = []
    setattr(app.state, _HELD, (app.blocks, [*all_held, held]))


def composed(held: Held, inner: Lifespan | None, noted: Callable[[Any], None] = lambda app: None) -> Lifespan:
    """A lifespan that holds `held` around the app's own, `inner`. A store that can't be opened stops nothing.

    `noted` is told the app.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        noted(app)
        held.reopen()
        try:
            with anyio.move_on_after(_START_WITHIN):
                await held.ensure_started()
        except AsyncSessionsError:
            _logger.warning("the store can't be opened yet; pages work without it", exc_info=True)
        try:
            async with AsyncExitStack() as stack:
                yield None if inner is None else await stack.enter_async_context(inner(app))
        finally:
            await held.close()

    return lifespan
