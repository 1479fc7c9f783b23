"""`cancel_everywhere`: cancels a coroutine at each of its suspensions, one run per place, and looks what is left.

    async def check(run):
        assert await session.has_image("start")
        assert limiter.borrowed_tokens == 0

    await cancel_everywhere(lambda: session.store_image(image, "start"), check)

For asyncio, on its own loop or on uvloop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import types
from collections.abc import Awaitable, Callable, Collection, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_args

import anyio

T = TypeVar("T")

Means = Literal["task", "scope"]
Moment = Literal["before", "during", "after"]
Ending = Literal["returned", "cancelled"]

_MARGIN: Final = 100  # wake-ups that a cancelled run may have beyond twice those of an undisturbed one


class CancellationError(AssertionError):
    """The coroutine took its cancellation badly."""


class Run(NamedTuple):
    """One run: cancelled by `means`, `moment` its suspension number `point`, which was at the line `where`.

    `point` is `None` where it was not cancelled; `wakeups` counts how often its tasks were resumed.
    """

    means: Means
    moment: Moment
    point: int | None
    where: str
    ending: Ending
    wakeups: int


async def cancel_everywhere(
    factory: Callable[[], Coroutine[Any, Any, object]],
    check: Callable[[Run], Awaitable[object]],
    *,
    prepare: Callable[[], Awaitable[object]] | None = None,
    means: Collection[Means] = get_args(Means),
    moments: Collection[Moment] = get_args(Moment),
    every: int = 1,
    hold: int = 1000,
    patience: float = 10.0,
) -> list[Run]:
    """Run `factory()` undisturbed, then once per place where it can be cancelled; `check` after each. Return the runs.

    A place is every `every`th suspension of the coroutine or of a task that it, or one of those, has started. There the
    coroutine is cancelled, by `task.cancel()` and by an anyio scope around it: *before* it is suspended; *during* the
    suspension, when what is awaited, a worker thread for example, has begun; and *after* what is awaited is done but
    before anybody has the result, which is where locks and files get lost.

    It is a `CancellationError` if the coroutine is told of its cancellation and returns all the same; if it raises
    another `CancelledError` than its scope's; if it goes on for `patience` seconds; if it leaves a task behind; if an
    exception is lost; and if it is woken again and again while it waits: what it has started is held for `hold` turns
    of the loop once it is cancelled, so that this shows. Any other exception of its own, and what `check` raises, comes
    out as it is. Every error names the place in a note.

    `prepare` is awaited before each run and not cancelled. Where threads take part, the number of suspensions may vary
    from run to run.
    """
    runs = [await _run(factory, check, prepare, _Tree(None, "before", hold), "task", math.inf, patience)]
    limit = 2 * runs[0].wakeups + _MARGIN
    for how, moment in itertools.product(means, moments):
        for point in itertools.count(0, every):
            run = await _run(factory, check, prepare, _Tree(point, moment, hold), how, limit, patience)
            if not run.where:
                break  # it ended without so many suspensions
            runs.append(run)
    return runs


async def _run(
    factory: Callable[[], Coroutine[Any, Any, object]],
    check: Callable[[Run], Awaitable[object]],
    prepare: Callable[[], Awaitable[object]] | None,
    tree: _Tree,
    means: Means,
    most_wakeups: float,
    patience: float,
) -> Run:
    if prepare is not None:
        await prepare()
    try:
        ending = await _ending(factory, tree, means, most_wakeups, patience)
        run = Run(means, tree.moment, tree.point, tree.where, ending, tree.wakeups)
        await check(run)
    except BaseException as error:
        if tree.where:
            error.add_note(f"cancelled by its {means} {tree.moment} suspension {tree.point}, at {tree.where}")
        raise
    return run


async def _ending(
    factory: Callable[[], Coroutine[Any, Any, object]], tree: _Tree, means: Means, most_wakeups: float, patience: float
) -> Ending:
    scope = anyio.CancelScope()

    async def victim() -> None:
        with scope:
            await tree.root(factory())

    with _watched() as lost:
        task = asyncio.get_running_loop().create_task(victim())
        tree.cancel = task.cancel if means == "task" else scope.cancel
        try:
            await asyncio.wait({task}, timeout=patience)
            if not task.done():
                raise CancellationError(f"still running {patience:g} s later")
            left = {child for child in tree.tasks if not child.done()}
            if left and (left := (await asyncio.wait(left, timeout=patience))[1]):
                raise CancellationError(f"it left behind: {', '.join(map(repr, left))}")
        finally:
            task.cancel()
    if tree.wakeups > most_wakeups:
        raise CancellationError(f"it was woken {tree.wakeups} times, more often than {most_wakeups}: it spins")
    lost += [repr(child) for child in tree.tasks if getattr(child, "_log_traceback", False)]
    if lost:
        raise CancellationError(f"lost: {'; '.join(lost)}")
    if task.cancelled() if means == "task" else scope.cancelled_caught:
        return "cancelled"
    if task.cancelled():
        raise CancellationError("it raised a CancelledError of its own, which its scope let through")
    task.result()
    if tree.told:
        raise CancellationError("it was told that it is cancelled, and returned")
    return "returned"


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Instrument the tasks that a tree starts, and collect what the event loop complains of."""
    loop = asyncio.get_running_loop()
    factory, handler = loop.get_task_factory(), loop.get_exception_handler()
    complaints: list[str] = []

    def make(loop: asyncio.AbstractEventLoop, coro: Any, /, **options: Any) -> asyncio.Future[Any]:
        if (tree := _tree.get()) is not None:
            coro = tree.branch(coro)
        task = asyncio.Task(coro, loop=loop, **options) if factory is None else factory(loop, coro, **options)
        if tree is not None:
            tree.tasks.append(task)
        return task

    loop.set_task_factory(make)
    loop.set_exception_handler(lambda _, context: complaints.append(f"{context['message']}: {context}"))
    try:
        yield complaints
    finally:
        loop.set_task_factory(factory)
        loop.set_exception_handler(handler)


class _Tree:
    """A coroutine with all the tasks that it starts; counts their suspensions and calls `cancel` at number `point`."""

    def __init__(self, point: int | None, moment: Moment, hold: int) -> None:
        self.point = point
        self.moment = moment
        self.where = ""
        self.wakeups = 0
        self.told = False
        self.tasks: list[asyncio.Future[Any]] = []
        self.cancel: Callable[[], object] = lambda: None
        self._hold = hold
        self._suspensions = 0

    async def root(self, coro: Coroutine[Any, Any, object]) -> None:
        _tree.set(self)
        await self._drive(coro, is_root=True)

    async def branch(self, coro: Coroutine[Any, Any, T]) -> T:
        return await self._drive(coro, is_root=False)

    @types.coroutine
    def _drive(self, coro: Coroutine[Any, Any, T], is_root: bool) -> Generator[Any, Any, T]:
        """Run `coro` step by step, as a task does; whatever it yields to the loop is a suspension."""
        step: Callable[[], Any] = partial(coro.send, None)
        while True:
            try:
                awaited = step()
            except StopIteration as end:
                result: T = end.value
                return result
            self._suspended(coro, awaited)
            try:
                step = partial(coro.send, (yield awaited))
                if self.where and not is_root:
                    hold, self._hold = self._hold, 0
                    for _ in range(hold):
                        yield  # a turn of the loop: unlike seconds, as many on a machine that is busy
            except BaseException as error:  # noqa: BLE001 - passed on to the coroutine that it is meant for
                self.told |= is_root and bool(self.where) and isinstance(error, asyncio.CancelledError)
                step = partial(coro.throw, error)
            self.wakeups += 1

    def _suspended(self, coro: Coroutine[Any, Any, object], awaited: asyncio.Future[Any] | None) -> None:
        point, self._suspensions = self._suspensions, self._suspensions + 1
        if point != self.point:
            return
        self.where = _lines(coro)
        if self.moment == "before":
            self.cancel()
        elif self.moment == "after" and awaited is not None:
            awaited.add_done_callback(lambda _: self.cancel())  # called before the task's own, which comes later
        else:
            asyncio.get_running_loop().call_soon(self.cancel)


_tree: ContextVar[_Tree | None] = ContextVar("async_sessions.testing.cancellation", default=None)


def _lines(awaited: Any) -> str:
    """Where a suspended coroutine waits: the lines, the innermost first."""
    lines: list[str] = []
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)) is not None:
        lines.insert(0, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return " < ".join(lines)
