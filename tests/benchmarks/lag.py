"""How late the event loop runs what is due, while images are stored and while nothing happens."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.designs import Design, Source, together

BEAT = 0.001  # seconds
VOID = 0.010  # seconds: a p99 of the idle loop above which a run says nothing


class Lag(NamedTuple):
    """Seconds by which a callback that is due at any time is late.

    `busy_cores` is how much of `longest` the loop's thread was ready to run but had no core; 0 where nobody says.
    """

    median: float
    p99: float
    longest: float
    busy_cores: float


class Run(NamedTuple):
    """`idle` is what was heard before and after, together; `users` stored an image each while `busy`."""

    users: int
    idle: Lag
    busy: Lag
    voided: int  # runs that were thrown away before this one
    valid: bool


class Load(NamedTuple):
    """What is stored at once, one picture per user, while the loop is listened to."""

    name: str
    opened: Callable[[Path, int], Design]
    pictures: Sequence[Source]
    users: int


async def lags(loads: Sequence[Load], *, rounds: int, idle: float, reruns: int) -> dict[str, list[Run]]:
    """Runs by load, interleaved; `idle` seconds are listened to before and after each, a void one is repeated."""
    runs: dict[str, list[Run]] = {load.name: [] for load in loads}
    for _ in range(rounds):
        for load in loads:
            runs[load.name].append(await _run(load, idle, reruns))
    return runs


def median_of(lags: Sequence[Lag]) -> Lag:
    return Lag(*map(statistics.median, zip(*lags, strict=True)))


async def _run(load: Load, idle: float, reruns: int) -> Run:
    """A run whose idle loop was quiet before and after; the last one that was not, where `reruns` do not help."""
    sources = [load.pictures[number % len(load.pictures)] for number in range(load.users)]
    voided = 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            async with load.opened(Path(folder, "store"), load.users) as design:
                given = [design.given(user, source) for user, source in enumerate(sources)]
                before = await _idle(idle)
                if lag_of(before).p99 > VOID and voided < reruns:
                    voided += 1
                    continue
                async with listening() as busy:
                    await together(*(design.store(user, source) for user, source in enumerate(given)))
                after = await _idle(idle)
        valid = max(lag_of(before).p99, lag_of(after).p99) <= VOID
        if valid or voided == reruns:
            return Run(load.users, lag_of(before, after), lag_of(busy), voided, valid)
        voided += 1


async def _idle(seconds: float) -> Heard:
    async with listening() as heard:
        await asyncio.sleep(seconds)
    return heard


class Heard(NamedTuple):
    """Of every beat, by how many seconds it was late, and for how many of these the thread waited for a core.

    Arrays: objects by the thousand would set off the garbage collector, and it would be heard.
    """

    late: array[float]
    busy_cores: array[float]


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Heard]:
    """What is heard of every beat that is due while in the block. A stall of 5 ms makes five beats late, not one."""
    heard = Heard(array("d"), array("d"))
    with _scheduler() as waited:
        beating = asyncio.create_task(_beat(heard, waited))
        try:
            yield heard
            await asyncio.sleep(2 * BEAT)  # for the beats that are due and not heard yet
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating


async def _beat(heard: Heard, waited: Callable[[], float]) -> None:
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


def lag_of(*heard: Heard) -> Lag:
    late = sorted(both for one in heard for both in zip(one.late, one.busy_cores, strict=True))
    return Lag(late[len(late) // 2][0], late[int(0.99 * len(late))][0], *late[-1])
