"""`FuzzLoop`: an asyncio event loop that runs a program in an order that a seed chooses, in virtual time.

    def test_no_order_of_events_loses_an_update():
        fuzz(scenario, seeds=range(200))  # fails with the seed in the error's notes

A seed replays: the same program meets the same order of events, the same random numbers and the same names, however
often and on whichever machine, as long as it does not depend on addresses (the order of a set of objects) or, between
processes, on the hashes of strings: for those set PYTHONHASHSEED.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import math
import os
import random
import secrets
import struct
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar, TypeVarTuple
from unittest import mock
from weakref import WeakKeyDictionary

import anyio
import anyio.lowlevel
import anyio.to_thread

if TYPE_CHECKING:
    from concurrent.futures import Executor

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_SHORTEST_WAIT: Final = 1e-6
_PACES: Final = math.log(1e-3), 0.0
_LEAK_PATIENCE: Final = 60.0  # virtual seconds


class StuckError(AssertionError):
    """Every task waits for another, or the program goes round in circles."""


class FuzzLoop(asyncio.SelectorEventLoop):
    """A discrete-event simulation of asyncio.

    Whatever is ready waits for a seeded while before it runs, between a microsecond and `longest_wait` seconds, every
    magnitude as likely as another, and each task has a pace of its own, up to a thousand times that of another: so one
    may take a hundred steps while another takes one. asyncio promises an order, but trio, for one, does not. Time is
    virtual. It begins at 0 and passes from one event to the next at once: a day of `sleep` costs nothing, and a
    program that spins while it waits ends up at the end of its wait all the same.

    No thread is started. What asyncio, anyio or aiofiles send to a worker thread is called by the loop itself, in one
    piece and with no loop running, a seeded while after it was sent, and reports a seeded while later; cancelled or
    not, as in a thread. Such a call can't call back into the loop, and there are no sockets, pipes or subprocesses.

    `StuckError` where nothing is left that could run, and after `max_turns` callbacks.
    """

    def __init__(self, seed: int, *, longest_wait: float = 0.05, max_turns: int = 1_000_000) -> None:
        if longest_wait < _SHORTEST_WAIT:
            raise ValueError(f"`longest_wait` is {_SHORTEST_WAIT} s at least, not {longest_wait}.")
        super().__init__()
        self._random = random.Random(seed)
        self._paces: WeakKeyDictionary[asyncio.Task[Any], float] = WeakKeyDictionary()
        self._magnitudes = math.log(_SHORTEST_WAIT), math.log(longest_wait)
        self._max_turns = max_turns
        self._turns = 0
        self._now = 0.0
        self._thread = threading.get_ident()
        self._history = hashlib.sha256()

    @property
    def fingerprint(self) -> str:
        """Of the order of events up to now: the same for the same run."""
        return self._history.hexdigest()[:16]

    def time(self) -> float:
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        owner = getattr(callback, "__self__", None)
        pace = 1.0
        if isinstance(owner, asyncio.Task) and (pace := self._paces.get(owner, 0.0)) == 0.0:
            self._paces[owner] = pace = math.exp(self._random.uniform(*_PACES))
        wait = pace * math.exp(self._random.uniform(*self._magnitudes))
        return self.call_at(self._now + wait, callback, *args, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if threading.get_ident() != self._thread:
            raise StuckError("A thread of its own reports to a FuzzLoop; then no seed could replay.")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        context = copy_context()

        def run() -> None:
            asyncio._set_running_loop(None)
            try:
                report = partial(future.set_result, context.run(func, *args))
            except StopIteration as error:  # no future takes one
                report = partial(future.set_exception, RuntimeError(f"{func!r} raised {error!r}"))
            except Exception as error:  # noqa: BLE001 - handed to the caller, whatever it is
                report = partial(future.set_exception, error)
            finally:
                asyncio._set_running_loop(self)
            self.call_soon(lambda: future.done() or report())

        self.call_soon(run)
        return future

    def run_forever(self) -> None:
        self._turns = 0
        with mock.patch.object(anyio.to_thread, "run_sync", _run_sync):
            super().run_forever()

    def _run_once(self) -> None:
        """One event instead of a round of them; `BaseEventLoop.call_at` keeps them in a heap, by time."""
        events: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while events and events[0].cancelled():
            heapq.heappop(events)
        if not events:
            raise StuckError("Nothing is left to run: the tasks wait for each other, for a thread or for a socket.")
        self._turns += 1
        if self._turns > self._max_turns:
            raise StuckError(f"Still running after {self._max_turns} callbacks, {self._now:.3f} virtual seconds on.")
        event = heapq.heappop(events)
        self._now = max(self._now, event.when())
        self._history.update(struct.pack("d", self._now))
        event._run()


def fuzz(
    factory: Callable[[], Awaitable[object]], *, seeds: Iterable[int] = range(100), longest_wait: float = 0.05
) -> dict[int, str]:
    """Run `factory()` once per seed, each on a `FuzzLoop` of its own; return the fingerprint of each seed's run.

    The first failure is raised with its seed in a note. A task that is left over, and an exception that nobody took, is
    a failure too. Meanwhile `random`, `secrets.token_*` and `os.urandom` follow the seed.
    """
    fingerprints = {}
    for seed in seeds:
        try:
            fingerprints[seed] = _run(factory, seed, longest_wait)
        except BaseException as error:
            error.add_note(f"with seed {seed}; to replay it: fuzz(..., seeds=[{seed}])")
            raise
    return fingerprints


def _run(factory: Callable[[], Awaitable[object]], seed: int, longest_wait: float) -> str:
    complaints: list[str] = []
    loop = FuzzLoop(seed, longest_wait=longest_wait)
    loop.set_exception_handler(lambda _, context: complaints.append(f"{context['message']}: {context}"))

    async def run() -> None:
        await factory()
        if left := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(left, timeout=_LEAK_PATIENCE)
            complaints.extend(f"left over: {task!r}" for task in left if not task.done())

    with _seeded(seed), asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
        fingerprint = loop.fingerprint
    if complaints:
        raise AssertionError("\n".join(complaints))
    return fingerprint


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let the standard library's random numbers, and the names made of them, follow `seed`."""
    before, names = random.getstate(), random.Random(seed)
    random.seed(seed)
    try:
        with (
            mock.patch.object(os, "urandom", names.randbytes),
            mock.patch.object(secrets, "token_bytes", lambda size=None: names.randbytes(size or 32)),
        ):
            yield
    finally:
        random.setstate(before)


async def _run_sync(  # type: ignore[return]  # the scope is never cancelled, so it swallows nothing
    func: Callable[[*Ts], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
    **_: Any,
) -> T:
    """`anyio.to_thread.run_sync` on a `FuzzLoop`."""
    await anyio.lowlevel.checkpoint()
    call = asyncio.get_running_loop().run_in_executor
    async with limiter or anyio.to_thread.current_default_thread_limiter():
        with anyio.CancelScope(shield=not abandon_on_cancel):
            return await call(None, func, *args)
