"""A device's thread, and what crosses between it and the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Generic, Protocol, Self, TypeVar

import anyio
from anyio import AsyncContextManagerMixin

T = TypeVar("T")
Call = Callable[[], object]

_logger = logging.getLogger("async_sessions")


class Loadable(Protocol):
    """What a lane keeps on its device; a `release()`, if there is one, is called when the lane ends."""

    def load(self, device: str) -> None: ...


class Lane(AsyncContextManagerMixin):
    """One thread for one device: `models` are loaded, run and released there, one call after the other.

    `failures` says which of them could not be loaded, and why; `lost` which of those were there and should be
    reloaded for the next job. `turn` is held by the job that the device works for, `storing` by the one whose outputs
    are being stored. Leaving waits until the thread has returned.
    """

    def __init__(self, device: str, models: Mapping[str, Loadable]) -> None:
        self.device = device
        self.failures: dict[str, BaseException] = {}
        self.lost: set[str] = set()
        self._models = models
        self._loaded: list[Loadable] = []

    @asynccontextmanager
    async def __asynccontextmanager__(self) -> AsyncGenerator[Self]:
        self.turn, self.storing = anyio.Lock(), anyio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"async_sessions-{self.device}")
        try:
            yield self
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await self.run(self._release)
                finally:
                    await run_in_worker(self._thread.shutdown)

    async def load(self) -> None:
        """Load everything, once, before anything runs; a failure is noted, not raised."""
        await self.run(self._load)

    async def reload(self, name: str) -> None:
        """Release a model and load it again, so that it lets go of whatever it kept on the device."""

        def reload() -> None:
            model = self._models[name]
            self.failures.pop(name, None)
            if model in self._loaded:
                self._loaded.remove(model)
                self._release_one(model)
                self.lost.add(name)
            self._load_one(name, model)

        await self.run(reload)

    async def run(self, call: Call, *, stop: Callable[[], None] | None = None) -> BaseException | None:
        """Run `call` in this lane's thread and return what it raised.

        A cancellation, of either kind, calls `stop`, waits until `call` has returned and is raised then.
        """

        async def in_lane(call: Call) -> None:
            running = asyncio.wrap_future(self._thread.submit(call))
            while not running.done():
                try:
                    await asyncio.wait({running})
                except asyncio.CancelledError:  # the loop is being torn down; `stop` has been called by then
                    continue

        return await _to_its_end(in_lane, call, stop)

    def _load(self) -> None:
        for name, model in self._models.items():
            self._load_one(name, model)

    def _load_one(self, name: str, model: Loadable) -> None:
        try:
            model.load(self.device)
        except BaseException as error:
            _logger.warning("pipeline %s could not be loaded on %s", name, self.device, exc_info=True)
            self.failures[name] = error
        else:
            self._loaded.append(model)
            self.lost.discard(name)

    def _release(self) -> None:
        while self._loaded:
            self._release_one(self._loaded.pop())

    def _release_one(self, model: Loadable) -> None:
        try:
            getattr(model, "release", lambda: None)()
        except BaseException:
            _logger.exception("a pipeline could not be released from %s", self.device)


async def run_in_worker(call: Call) -> BaseException | None:
    """Like `Lane.run`, in a worker thread that may use `anyio.from_thread`.

    It takes no slot of a limiter that others share: what `call` awaits on the loop may need one itself.
    """

    async def in_worker(call: Call) -> None:
        await anyio.to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))

    return await _to_its_end(in_worker, call, None)


async def _to_its_end(
    hop: Callable[[Call], Awaitable[None]], call: Call, stop: Callable[[], None] | None
) -> BaseException | None:
    """The thread is waited for in a task of its own: a native cancellation would abandon it, an anyio one spin."""
    raised: BaseException | None = None
    returned = anyio.Event()

    def guarded() -> None:  # a future can't carry a StopIteration, and a SystemExit in it would end the loop
        nonlocal raised
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            raised = error

    async def wait() -> None:
        with anyio.CancelScope(shield=True):
            await hop(guarded)
        returned.set()

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        try:
            await returned.wait()
        except asyncio.CancelledError:
            if stop is not None:
                stop()
            raise
    return raised


class Latest(Generic[T]):
    """Hands the latest of many values from a thread to `receive` on the loop, at most once in `interval` seconds.

    Those in between are dropped, but never the last one before a pause. Made on the loop. `put` neither locks nor
    waits: it may be called for every step of a fast pipeline.
    """

    def __init__(self, receive: Callable[[T], None], *, interval: float = 0.0) -> None:
        self._receive = receive
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._value: deque[T] = deque(maxlen=1)
        self._on_its_way = False
        self._open = True
        self._next = self._loop.time()  # not before this

    def put(self, value: T) -> None:
        self._value.append(value)
        if self._open and not self._on_its_way:
            self._on_its_way = True
            self._loop.call_soon_threadsafe(self._arrive)

    def close(self) -> None:
        """To be called on the loop: what was put last is received now, and nothing after it."""
        if self._open:
            self._deliver()
        self._open = False

    def _arrive(self) -> None:
        if (wait := self._next - self._loop.time()) > 0:
            self._loop.call_later(wait, self._deliver)
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._on_its_way = False  # first: a value put from here on sends another call
        if self._open and self._value:
            self._next = self._loop.time() + self._interval
            self._receive(self._value.pop())
