from __future__ import annotations

import asyncio
import os
import random
import secrets
import subprocess
import sys
import threading
from pathlib import Path

import aiofiles
import anyio
import anyio.to_thread
import pytest

from async_sessions.testing.fuzz import FuzzLoop, StuckError, fuzz


class CacheWithARace:
    """Checks, awaits, then acts on what it saw."""

    def __init__(self) -> None:
        self.disk = {"a": 1}
        self.memory: dict[str, int | None] = {}

    async def get(self, key: str) -> int | None:
        if key not in self.memory:
            value = self.disk.get(key)
            await asyncio.sleep(0)
            self.memory[key] = value
        return self.memory[key]

    async def delete(self, key: str) -> None:
        del self.disk[key]
        await asyncio.sleep(0)
        self.memory.pop(key, None)


async def race() -> None:
    cache = CacheWithARace()
    await asyncio.gather(cache.get("a"), cache.delete("a"))
    assert await cache.get("a") is None


def failing_seeds() -> list[int]:
    failing = []
    for seed in range(50):
        try:
            fuzz(race, seeds=[seed])
        except AssertionError:
            failing.append(seed)
    return failing


def test_a_race_that_the_default_loop_never_shows_is_found() -> None:
    for _ in range(50):
        asyncio.run(race())
    assert failing_seeds() != []


def test_a_seed_replays() -> None:
    assert failing_seeds() == failing_seeds()


def test_the_failing_seed_is_named() -> None:
    with pytest.raises(AssertionError) as caught:
        fuzz(race)
    assert caught.value.__notes__ == [
        f"with seed {failing_seeds()[0]}; to replay it: fuzz(..., seeds=[{failing_seeds()[0]}])"
    ]


def test_other_seeds_are_other_runs_and_the_same_seed_the_same() -> None:
    async def scenario() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(anyio.to_thread.run_sync, list)

    runs = fuzz(scenario, seeds=range(20))
    assert len(set(runs.values())) == 20
    assert fuzz(scenario, seeds=range(20)) == runs


def test_a_day_passes_at_once() -> None:
    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3600):
                await anyio.sleep(86_400)
        assert asyncio.get_running_loop().time() == pytest.approx(3600, abs=1)

    fuzz(scenario, seeds=[0])


def test_a_wait_is_not_longer_for_who_spins_meanwhile() -> None:
    async def scenario() -> None:
        waiting = asyncio.ensure_future(anyio.sleep(10))
        while not waiting.done():  # noqa: ASYNC110 - that is what is looked at
            await asyncio.sleep(0)

    fuzz(scenario, seeds=[0])


def test_tasks_that_wait_for_each_other_are_stuck() -> None:
    async def scenario() -> None:
        await anyio.Event().wait()

    with pytest.raises(StuckError, match="wait for each other"):
        fuzz(scenario, seeds=[0])


def test_a_program_that_never_ends_is_stuck() -> None:
    async def scenario() -> None:
        while True:  # noqa: ASYNC110 - that is what is looked at
            await anyio.sleep(3600)

    loop = FuzzLoop(0, max_turns=1000)
    with asyncio.Runner(loop_factory=lambda: loop) as runner, pytest.raises(StuckError, match="1000 callbacks"):
        runner.run(scenario())


def test_a_task_that_is_left_over_is_a_failure() -> None:
    async def scenario() -> None:
        tasks.append(asyncio.ensure_future(anyio.sleep(3600)))

    tasks: list[asyncio.Future[None]] = []
    with pytest.raises(AssertionError, match="left over"):
        fuzz(scenario, seeds=[0])


def test_an_exception_that_nobody_took_is_a_failure() -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)
        await anyio.sleep(1)

    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        fuzz(scenario, seeds=[0])


def test_calls_for_worker_threads_are_made_without_one_and_finish_in_any_order(tmp_path: Path) -> None:
    orders = set()

    def work(number: int) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        assert threading.current_thread() is threading.main_thread()
        done.append(number)

    async def scenario() -> None:
        done.clear()
        await asyncio.gather(asyncio.to_thread(work, 0), anyio.to_thread.run_sync(work, 1))
        async with aiofiles.open(tmp_path / "a", "wb") as file:
            await file.write(b"x")
        with pytest.raises(ZeroDivisionError):
            await anyio.to_thread.run_sync(lambda: 1 // 0)
        orders.add(tuple(done))

    done: list[int] = []
    fuzz(scenario, seeds=range(20))
    assert orders == {(0, 1), (1, 0)}


def test_a_call_is_made_although_its_caller_was_cancelled() -> None:
    async def scenario() -> None:
        calls: list[int] = []
        asyncio.get_running_loop().run_in_executor(None, calls.append, 1).cancel()
        await anyio.sleep(1)
        assert calls == [1]

    fuzz(scenario, seeds=range(5))


def test_a_cancelled_scope_waits_for_its_call() -> None:
    async def scenario() -> None:
        calls: list[str] = []
        limiter = anyio.CapacityLimiter(1)
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await anyio.to_thread.run_sync(calls.append, "made", limiter=limiter)
            calls.append("returned")
        assert calls in ([], ["made", "returned"])
        assert limiter.borrowed_tokens == 0
        ends.add(len(calls))

    ends: set[int] = set()
    fuzz(scenario, seeds=range(20))
    assert ends == {0, 2}


def test_a_thread_that_the_loop_did_not_start_is_refused() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        refused: list[BaseException] = []

        def report() -> None:
            try:
                loop.call_soon_threadsafe(list)
            except StuckError as error:
                refused.append(error)

        thread = threading.Thread(target=report)
        thread.start()
        thread.join()
        assert len(refused) == 1

    fuzz(scenario, seeds=[0])


def test_random_numbers_and_names_follow_the_seed_and_do_not_afterwards() -> None:
    async def scenario() -> None:
        drawn.append((random.random(), secrets.token_hex(8), secrets.token_urlsafe(), os.urandom(4)))

    drawn: list[tuple[object, ...]] = []
    state = random.getstate()
    fuzz(scenario, seeds=[1, 1, 2])
    assert drawn[0] == drawn[1] != drawn[2]
    assert random.getstate() == state
    assert len(secrets.token_hex(8)) == 16
    assert secrets.token_hex(8) != drawn[0][1]


PROGRAM = """
import anyio, sys
from PIL import Image
from async_sessions import open_store
from async_sessions.testing.fuzz import fuzz

async def scenario():
    async with open_store(sys.argv[1], cleanup_interval=None) as store:
        session = store.session("x")
        async with anyio.create_task_group() as group:
            for width in range(1, 5):
                group.start_soon(session.store_image, Image.new("RGB", (width, 1)), "start")
            group.start_soon(store.cleanup)

print(fuzz(scenario, seeds=range(3)))
"""


def test_a_seed_replays_in_another_process(tmp_path: Path) -> None:
    shown = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path / number],
            env={**os.environ, "PYTHONHASHSEED": number},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for number in ("1", "2")
    }
    assert len(shown) == 1
