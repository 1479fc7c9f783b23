"""Processes that run jobs, for `tests.killing`: `python -m tests.workers MODE FOLDER ...`."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import anyio

from async_sessions import JobInfo, Limits, QueueFullError, Session, SessionStore, open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import JobContext, Output, PipelineSpec

LEASE: Final = timedelta(seconds=0.3)
QUEUED: Final = 8
LONG: Final = 3600.0  # seconds that nobody waits for


class Busy:
    """Takes `seconds`; kills its process where the job is `poison`. Tells the attempt that made its output."""

    spec = PipelineSpec(name="busy", defaults={"seconds": 0.0, "poison": False})

    def __init__(self, *, listens: bool = True, loads: float = 0, most: float = LONG) -> None:
        self._listens = listens
        self._loads = loads
        self._most = most

    def load(self, device: str) -> None:
        time.sleep(self._loads)

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        pass

    def generate(self, prepared: None, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        if params["poison"]:
            os.kill(os.getpid(), signal.SIGKILL)
        until = time.monotonic() + min(params["seconds"], self._most)
        while time.monotonic() < until:
            if self._listens:
                context.report(1, 2)
            time.sleep(0.001)
        return {"text": (made_by(context.job_id, context.attempt), "text/plain")}


def made_by(job_id: str, attempt: int) -> bytes:
    return f"{job_id} {attempt}".encode()


def opened(root: Path, **options: Any) -> SessionStore:
    return open_store(root, limits=Limits(keep_jobs=10_000), **{"cleanup_interval": None, **options})


def told(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once, or not at all


async def submit(dispatcher: LocalDispatcher, session: Session, **params: Any) -> str:
    job = await dispatcher.submit(await session.generation_request("busy", slots=(), params=params))
    told(job.id)
    return job.id


async def unfinished(store: SessionStore) -> list[JobInfo]:
    entries = [(await (await store.open_by_key(info.key)).info()).jobs.values() async for info in store.sessions()]
    return [entry for entry in itertools.chain(*entries) if entry.unfinished]


async def crowd(root: Path, name: str, seed: str) -> None:
    """Submit, run and sweep until killed."""
    rng = random.Random(seed)
    async with opened(root, cleanup_interval=timedelta(milliseconds=50)) as store:
        sessions = [await store.session_for(f"{name}.{number}") for number in range(2)]
        dispatcher = LocalDispatcher(
            store, [Busy()], devices=["cpu", "cpu:1"], lease=LEASE, max_queued=QUEUED, max_attempts=100
        )
        async with dispatcher:
            while True:
                try:
                    await submit(dispatcher, rng.choice(sessions), seconds=rng.choice([0, 0, 0.005, 0.03]))
                except QueueFullError:
                    await anyio.sleep(0.002)


async def finish(root: Path, attempts: str) -> None:
    """Run what the others left, and end when all is over."""
    async with opened(root) as store:
        dispatcher = LocalDispatcher(
            store, [Busy(most=0.01)], devices=["cpu", "cpu:1"], lease=LEASE, max_attempts=int(attempts)
        )
        async with dispatcher:
            while await unfinished(store):  # noqa: ASYNC110 - nobody tells when the last of all jobs is over
                await anyio.sleep(0.02)


async def poisoned(root: Path, good: str) -> None:
    """Submit many good jobs with one that kills the process in the middle, then run them."""
    async with opened(root) as store:
        sessions = [await store.session_for(str(number)) for number in range(4)]
        dispatcher = LocalDispatcher(
            store, [Busy()], devices=["cpu", "cpu:1"], lease=LEASE, max_queued=10_000, start_paused=True
        )
        async with dispatcher:
            for number in range(int(good)):
                if number == int(good) // 2:
                    await submit(dispatcher, sessions[0], poison=True)
                await submit(dispatcher, sessions[number % 4], seconds=0.002)
            dispatcher.resume()
            await anyio.sleep(LONG)


async def both_running(store: SessionStore) -> None:
    while [each.status for each in await unfinished(store)].count("running") < 2:  # noqa: ASYNC110
        await anyio.sleep(0.01)


async def serve(root: Path, queued: str, how: str) -> None:
    """Two jobs that take long on two devices, `queued` that wait. Leaves on SIGTERM, as an app does, or is cancelled.

    `how` is a list of words: `ignores` and `loads` are what the pipelines do meanwhile, `cancelled` is how to leave.
    """
    async with opened(root) as store:
        session = await store.session_for("ada")
        pipeline = Busy(listens="ignores" not in how, loads=LONG if "loads" in how else 0)
        dispatcher = LocalDispatcher(
            store, [pipeline], devices=["cpu", "cpu:1"], drain_timeout=timedelta(seconds=1), hard_exit=True
        )
        with anyio.open_signal_receiver(signal.SIGTERM) as signals, anyio.CancelScope() as scope:
            async with dispatcher:
                for _ in range(2 + int(queued)):
                    await submit(dispatcher, session, seconds=LONG)
                if "loads" not in how:
                    await both_running(store)
                told("ready")
                async for _ in signals:
                    break
                if "cancelled" in how:
                    scope.cancel()
                    await anyio.sleep_forever()


if __name__ == "__main__":
    mode, folder, *options = sys.argv[1:]
    modes: dict[str, Callable[..., Awaitable[None]]]
    modes = {"crowd": crowd, "finish": finish, "poisoned": poisoned, "serve": serve}
    anyio.run(modes[mode], Path(folder), *options)
