"""Processes that run jobs, to be killed: `python -m tests.workers MODE FOLDER ...`; and what `processes` do with them."""

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

    def __init__(self, *, listens: bool = True, most: float = LONG) -> None:
        self._listens = listens
        self._most = most

    def load(self, device: str) -> None:
        pass

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
            while await unfinished(store):
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


async def serve(root: Path, queued: str, listens: str) -> None:
    """Two jobs that take long on two devices, `queued` that wait; leaves on SIGTERM, as an app does."""
    async with opened(root) as store:
        session = await store.session_for("ada")
        dispatcher = LocalDispatcher(
            store,
            [Busy(listens=bool(int(listens)))],
            devices=["cpu", "cpu:1"],
            drain_timeout=timedelta(seconds=1),
            hard_exit=True,
        )
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async with dispatcher:
                for _ in range(2 + int(queued)):
                    await submit(dispatcher, session, seconds=LONG)
                while [entry.status for entry in await unfinished(store)].count("running") < 2:
                    await anyio.sleep(0.01)
                told("ready")
                async for _ in signals:
                    break


if __name__ == "__main__":
    mode, folder, *options = sys.argv[1:]
    modes: dict[str, Callable[..., Awaitable[None]]]
    modes = {"crowd": crowd, "finish": finish, "poisoned": poisoned, "serve": serve}
    anyio.run(modes[mode], Path(folder), *options)
