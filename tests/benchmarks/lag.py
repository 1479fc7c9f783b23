"""How late the event loop runs what is due, while images are stored and while nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.designs import Package, Source, Threaded, stored

BEAT = 0.001  # seconds
VOID = 0.010  # seconds: a p99 of the idle loop above which a run says nothing
RERUNS = 3
PACKAGE = "this package"


class Lag(NamedTuple):
    """Seconds by which a callback that is due at any time is late.

    `busy_cores` is how much of `longest` the loop's thread was ready to run but had no core; 0 where nobody says.
    """

    median: float
    p99: float
    longest: float
    busy_cores: float


class Run(NamedTuple):
    """`idle` is what was heard before and after, together; `stores` images were stored while `busy`."""

    stores: int
    idle: Lag
    busy: Lag
    voided: int  # runs that were thrown away before this one
    valid: bool


class Load(NamedTuple):
    name: str
    stores: int
    opened: Callable[[Path, int], contextlib.AbstractAsyncContextManager[Callable[[int, Source], Awaitable[int]]]]


async def lags(pictures: Sequence[Source], *, others: int, rounds: int, idle: float) -> dict[str, list[Run]]:
    """Runs by design, interleaved. 64 sessions store with this package, `others` with the threaded design."""
    loads = [
        Load(PACKAGE, 64, _package),
        Load("threaded design, in threads", others, _in_threads),
        Load("threaded design, in the loop", others, _in_loop),
    ]
    runs: dict[str, list[Run]] = {load.name: [] for load in loads}
    for _ in range(rounds):
        for load in loads:
            runs[load.name].append(await _run(load, pictures, idle))
    return runs


def median_of(lags: Sequence[Lag]) -> Lag:
    return Lag(*map(statistics.median, zip(*lags, strict=True)))


async def _run(load: Load, pictures: Sequence[Source], idle: float) -> Run:
    """A run whose idle loop was quiet before and after; the last one that was not, where `RERUNS` do not help."""
    sources = [pictures[number % len(pictures)] for number in range(load.stores)]
    voided = 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            async with load.opened(Path(folder), load.stores) as store:
                before = await _idle(idle)
                if _lag(before).p99 > VOID and voided < RERUNS:
                    voided += 1
                    continue
                async with _heard() as busy:
                    await stored(store, sources)
                after = await _idle(idle)
        valid = max(_lag(before).p99, _lag(after).p99) <= VOID
        if valid or voided == RERUNS:
            return Run(load.stores, _lag(before, after), _lag(busy), voided, valid)
        voided += 1


async def _idle(seconds: float) -> _Heard:
    async with _heard() as heard:
        await asyncio.sleep(seconds)
    return heard


class _Heard(NamedTuple):
    """Of every beat, by how many seconds it was late, and for how many of these the thread waited for a core.

    Arrays: objects by the thousand would set off the garbage collector, and it would be heard.
    """

    late: array[float]
    busy_cores: array[float]


@contextlib.asynccontextmanager
async def _heard() -> AsyncIterator[_Heard]:
    """What is heard of every beat that is due while in the block. A stall of 5 ms makes five beats late, not one."""
    heard = _Heard(array("d"), array("d"))
    with _scheduler() as waited:
        beating = asyncio.create_task(_beat(heard, waited))
        try:
            yield heard
            await asyncio.sleep(2 * BEAT)  # for the beats that are due and not heard yet
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating


async def _beat(heard: _Heard, waited: Callable[[], float]) -> None:
    due, before = time.perf_counter() + BEAT, waited()
    while True:
        await asyncio.sleep(due - time.perf_counter())
        now, after = time.perf_counter(), waited()
        while due <= now:
            heard.late.append(now - due)
            heard.busy_cores.append(min(now - due, after - before))
            due += BEAT
        before = after


@contextlib.contextmanager
def _scheduler() -> Iterator[Callable[[], float]]:
    """A function: seconds for which this thread was ready to run, so far, while others had the cores."""
    try:
        file = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115 - closed below
    except OSError:
        yield lambda: 0.0
        return
    with file:
        yield lambda: int(os.pread(file.fileno(), 100, 0).split()[1]) / 1e9


def _lag(*heard: _Heard) -> Lag:
    late = sorted(both for one in heard for both in zip(one.late, one.busy_cores, strict=True))
    return Lag(late[len(late) // 2][0], late[int(0.99 * len(late))][0], *late[-1])


@contextlib.asynccontextmanager
async def _package(folder: Path, users: int) -> AsyncIterator[Callable[[int, Source], Awaitable[int]]]:
    async with Package(folder, users) as package:
        yield package.store


@contextlib.asynccontextmanager
async def _in_threads(folder: Path, users: int) -> AsyncIterator[Callable[[int, Source], Awaitable[int]]]:
    yield Threaded(folder).store


@contextlib.asynccontextmanager
async def _in_loop(folder: Path, users: int) -> AsyncIterator[Callable[[int, Source], Awaitable[int]]]:
    yield Threaded(folder).store_in_loop
