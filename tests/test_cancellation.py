from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from PIL import Image

from async_sessions import LocalBlobStore, open_store
from async_sessions._codec import decode
from async_sessions._tasks import Commits
from async_sessions.testing.cancellation import Run, cancel_everywhere
from tests.faults import files_below, open_files
from tests.stage import ACTS, cancel_act

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]  # other tests measure it, at half the time

RED = Image.new("RGB", (40, 30), "red")


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


async def test_waiting_for_a_commit_neither_spins_nor_ends_before_it() -> None:
    started: list[str] = []
    done: list[str] = []

    async def commit() -> None:
        started.append("commit")
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        done.append("commit")

    async def check(run: Run) -> None:
        assert done == started

    async with anyio.create_task_group() as group:
        await cancel_everywhere(lambda: Commits(group).uninterrupted(commit), check, hold=4000)


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


async def test_a_call_in_a_thread_is_waited_for_however_its_caller_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, released = threading.Event(), threading.Event()
    events: list[str] = []

    def slow_fsync(fd: int) -> None:
        entered.set()
        released.wait(10)
        events.append("synced")

    blobs = LocalBlobStore(tmp_path)
    await blobs.get("a")
    monkeypatch.setattr(os, "fsync", slow_fsync)
    task = asyncio.get_running_loop().create_task(blobs.put("a", b"x"))
    task.add_done_callback(lambda _: events.append("returned"))
    await anyio.to_thread.run_sync(entered.wait)
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    released.set()
    await asyncio.wait({task})
    assert events == ["synced", "returned"]
    assert task.cancelled()
    assert files_below(tmp_path) == []


async def test_pixels_are_lent_until_their_decode_has_ended_however_it_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, released = threading.Event(), threading.Event()
    free: list[int] = []
    thumbnail = decode.thumbnail

    def slow_thumbnail(image: Image.Image) -> bytes:
        entered.set()
        released.wait(10)
        free.append(budget.free)
        return thumbnail(image)

    monkeypatch.setattr(decode, "thumbnail", slow_thumbnail)
    async with open_store("memory://", cleanup_interval=None) as store:
        budget = store._context().budget
        session = await store.create_session()
        task = asyncio.get_running_loop().create_task(session.store_image(RED, "start"))
        await anyio.to_thread.run_sync(entered.wait)
        task.cancel()
        await asyncio.wait({task}, timeout=0.05)
        released.set()
        await asyncio.wait({task})
        assert task.cancelled()
        assert max(free) <= budget.pixels - RED.width * RED.height
        assert budget.free == budget.pixels


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"new" * 1000


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize(
    "act",
    [
        lambda blobs: blobs.put("a/b", b"new" * 3000),
        lambda blobs: blobs.put("a/b", b"new" * 3000, expect=hashlib.sha256(b"old").hexdigest()),
        lambda blobs: blobs.put("a/b", _chunks()),
        lambda blobs: blobs.delete("a/b"),
        lambda blobs: _drain(blobs.stream("a/b", chunk_size=1)),
        lambda blobs: _drain(blobs.list()),
    ],
    ids=["put", "swap", "put of chunks", "delete", "stream", "list"],
)
async def test_a_cancelled_call_of_a_local_store_has_happened_or_has_not(
    tmp_path: Path, act: Callable[[LocalBlobStore], Coroutine[Any, Any, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prepare() -> None:
        await blobs.put("a/b", b"old")

    async def check(run: Run) -> None:
        found = await blobs.get("a/b")
        assert found is None or found.data in (b"old", b"new" * 3000)
        assert await anyio.to_thread.run_sync(files_below, tmp_path, "tmp") == []
        assert [path for path in await anyio.to_thread.run_sync(open_files) if path.startswith(str(tmp_path))] == []

    monkeypatch.setattr(os, "fsync", lambda fd: None)
    blobs = LocalBlobStore(tmp_path)
    await cancel_everywhere(partial(act, blobs), check, prepare=prepare)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # the proof has both loops
@pytest.mark.parametrize("name", ACTS)
async def test_a_cancelled_call_has_happened_or_has_not_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """Here at some of the places; `python -m tests.proof cancellations` tries them all."""
    runs = await cancel_act(tmp_path, name, every=17)
    assert {run.ending for run in runs} == {"returned", "cancelled"}
