"""Kills the processes of `tests.workers`, and looks what became of the jobs that they accepted."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio

from tests import workers
from tests.faults import keys_of, named_blobs

if TYPE_CHECKING:
    from async_sessions import JobInfo, SessionStore


class Killed(NamedTuple):
    """What `check_kills` saw: jobs that were acknowledged, attempts that were begun, and those that a kill cut."""

    acknowledged: int
    attempts: int
    interrupted: int


class Left(NamedTuple):
    """How a process left on SIGTERM: after `seconds`, with `status`, having said `stderr`."""

    seconds: float
    status: int
    stderr: str


@contextmanager
def started(mode: str, root: Path, *options: object, stdout: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-m", "tests.workers", mode, str(root), *map(str, options)]
    with (
        nullcontext(subprocess.PIPE) if stdout is None else stdout.open("w") as out,
        subprocess.Popen(arguments, stdout=out, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def finish(root: Path, attempts: int) -> int:
    """Let a process run what is left; returns how it ended."""
    with started("finish", root, attempts) as process:
        _, stderr = process.communicate(timeout=300)
        assert "Traceback" not in stderr, stderr
        return process.returncode


async def jobs_of(store: SessionStore) -> AsyncIterator[JobInfo]:
    async for info in store.sessions():
        for entry in (await (await store.open_by_key(info.key)).info()).jobs.values():
            yield entry


async def entries(root: Path) -> dict[str, JobInfo]:
    async with workers.opened(root) as store:
        return {entry.id: entry async for entry in jobs_of(store)}


async def check_kills(root: Path, kills: int, seed: int, *, processes: int = 1) -> Killed:
    """Kill one of the `processes` that submit and run jobs, again and again; then let one finish them all.

    What was acknowledged succeeds, once: an end is never written again, an output is that of the attempt that the entry
    tells of, and a sweep leaves nothing but what is named.
    """
    rng = random.Random(seed)
    over: dict[str, JobInfo] = {}
    with ExitStack() as stack:
        crowds: list[Crowd] = []
        for number in range(kills):
            while len(crowds) < processes:
                crowds.append(Crowd(stack, root, f"{number}.{len(crowds)}", rng.random()))
                await crowds[-1].began()
            await anyio.sleep(rng.uniform(0.005, 0.8))
            crowds.pop(rng.randrange(processes)).kill()
            found = await entries(root)
            assert all(found[job_id] == entry for job_id, entry in over.items())
            over = {job_id: entry for job_id, entry in found.items() if not entry.unfinished}
        for crowd in crowds:
            crowd.kill()
    assert finish(root, 100) == 0
    acknowledged = {line for told in root.parent.glob("*.told") for line in _lines(told)}
    found = await entries(root)
    assert all(found[job_id] == entry for job_id, entry in over.items())
    assert acknowledged <= set(found)
    await check_over(root)
    interrupted = sum(entry.attempt - entry.excused - 1 for entry in found.values())
    return Killed(len(acknowledged), sum(entry.attempt for entry in found.values()), interrupted)


class Crowd:
    """A process that submits and runs jobs, and tells a file which were accepted."""

    def __init__(self, stack: ExitStack, root: Path, name: str, seed: float) -> None:
        self._told = root.parent / f"{name}.told"
        self._process = stack.enter_context(started("crowd", root, name, seed, stdout=self._told))

    async def began(self) -> None:
        while not _lines(self._told):
            assert self._process.poll() is None, self._process.communicate()[1]
            await anyio.sleep(0.01)

    def kill(self) -> None:
        assert self._process.poll() is None, f"it ended by itself: {self._process.communicate()[1]}"
        self._process.kill()
        self._process.communicate(timeout=10)


def _lines(told: Path) -> list[str]:
    return [line.strip() for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]


async def check_over(root: Path, *, failed: int = 0) -> None:
    """Every job has ended, all but `failed` of them well, and nothing is left over once it was swept."""
    async with workers.opened(root) as store:
        found = [entry async for entry in jobs_of(store)]
        assert [entry.status for entry in found if entry.status != "succeeded"] == ["failed"] * failed
        for entry in found:
            session = await store.open_by_key(entry.id.partition(".")[0])
            for output in entry.outputs.values():
                data = b"".join([chunk async for chunk in session.stream_output(output)])
                assert data == workers.made_by(entry.id, entry.attempt)
            assert list(entry.outputs) == (["text"] if entry.status == "succeeded" else [])
        await store.cleanup(now=store.clock() + timedelta(hours=2))
        assert await keys_of(store.blobs, "queue/") == await keys_of(store.blobs, "owners/") == set()
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
        assert await keys_of(store.blobs, "tmp/") == set()


async def check_poison(root: Path, good: int) -> int:
    """Restart a process that one of its jobs kills until it ends well; returns how often the good jobs were cut short.

    The job that kills is given up after three attempts, the others are interrupted once at most.
    """
    deaths = 1
    with started("poisoned", root, good) as victim:
        victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    while status := finish(root, 3):
        assert status == -signal.SIGKILL
        deaths += 1
    found = await entries(root)
    (poison,) = [entry for entry in found.values() if entry.params["poison"]]
    assert poison.error is not None
    assert (poison.status, poison.error.kind, poison.attempt, deaths) == ("failed", "abandoned", 3, 3)
    others = [entry for entry in found.values() if entry is not poison]
    assert len(others) == good
    cut = [entry.attempt - entry.excused - 1 for entry in others]
    assert max(cut) <= 1, [entry for entry in others if entry.attempt > 2]
    await check_over(root, failed=1)
    return sum(cut)


async def check_sigterm(root: Path, how: str = "", *, queued: int = 50) -> Left:
    """End a process with two jobs that run and `queued` that wait; all wait afterwards, uncharged, and then succeed.

    `how`: see `workers.serve`.
    """
    acknowledged = set()
    with started("serve", root, queued, how) as victim:
        assert victim.stdout is not None
        while (line := victim.stdout.readline().strip()) != "ready":
            assert line, victim.communicate()[1]
            acknowledged.add(line)
        began = time.monotonic()
        victim.send_signal(signal.SIGTERM)
        stderr = victim.communicate(timeout=60)[1]
        seconds = time.monotonic() - began
    found = await entries(root)
    assert set(found) == acknowledged
    assert len(found) == 2 + queued
    assert {(entry.status, entry.attempt - entry.excused, entry.retry) for entry in found.values()} == {
        ("queued", 0, None)
    }
    assert finish(root, 1) == 0
    await check_over(root)
    return Left(seconds, victim.returncode, stderr)
