from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest
from PIL import Image

from async_sessions import open_store
from async_sessions._tasks import Commits
from tests.faults import FaultyBlobStore, keys_of

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
async def test_a_commit_is_finished_before_its_cancellation_is_raised(native: bool) -> None:
    gate, committing = anyio.Event(), anyio.Event()
    done: list[str] = []

    async def commit() -> None:
        committing.set()
        await gate.wait()
        done.append("committed")

    async with anyio.create_task_group() as group:
        commits = Commits(group)
        scope = anyio.CancelScope()

        async def caller() -> None:
            with scope:
                try:
                    await commits.uninterrupted(commit)
                finally:
                    done.append("returned")

        task = asyncio.get_running_loop().create_task(caller())
        await committing.wait()
        for _ in range(3):
            if native:
                task.cancel()
            else:
                scope.cancel()
            await anyio.lowlevel.checkpoint()
        assert done == []
        gate.set()
        await asyncio.wait({task})
        assert task.cancelled() == native
    assert done == ["committed", "returned"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # uvloop's turns can't be counted
async def test_waiting_for_a_commit_under_a_cancelled_scope_does_not_spin() -> None:
    gate = anyio.Event()
    turns = 0
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal turns
        turns += 1

    async with anyio.create_task_group() as group:
        commits = Commits(group)
        with anyio.CancelScope() as scope:
            scope.cancel()
            loop.call_later(0.05, gate.set)
            original = loop._run_once  # type: ignore[attr-defined]

            def counted() -> None:
                count()
                original()

            loop._run_once = counted  # type: ignore[attr-defined]
            try:
                await commits.uninterrupted(gate.wait)
            finally:
                loop._run_once = original  # type: ignore[attr-defined]
    assert turns < 50


async def test_a_commit_that_hangs_is_given_up_after_its_deadline() -> None:
    async with anyio.create_task_group() as group:
        commits = Commits(group)
        with anyio.move_on_after(0) as scope:
            await commits.uninterrupted(anyio.sleep_forever, deadline=0.01)
        assert scope.cancelled_caught


async def test_an_error_of_a_commit_reaches_its_caller() -> None:
    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise LookupError("x")

    async with anyio.create_task_group() as group:
        with pytest.raises(LookupError, match="x"):
            await Commits(group).uninterrupted(fail)


@pytest.mark.parametrize("turns", range(0, 60, 3))
async def test_a_cancelled_store_has_happened_or_has_not(turns: int) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        red = await session.store_image(RED, "start")
        task = asyncio.get_running_loop().create_task(session.store_image(BLUE, "start"))
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        task.cancel()
        await asyncio.wait({task})
        info = await session.info()
        named = {red.blob, info.images["start"].blob}
        assert await keys_of(blobs, "blobs/") == named | {f"{blob}.thumb" for blob in named}
        assert (await session.retrieve_image("start")).size == info.images["start"].size
        assert store._context()._in_flight == {}
        assert store._context().cpu.borrowed_tokens == 0
