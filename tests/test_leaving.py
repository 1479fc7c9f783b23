from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from async_sessions import open_store
from async_sessions.dispatch import _scheduler
from async_sessions.testing.pipeline import DeviceMemoryError
from tests.faults import FaultyBlobStore
from tests.following import HeldPipeline, on_device, submit
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions.dispatch import Job
    from async_sessions.dispatch._scheduled import Scheduled
    from async_sessions.jobs import JobContext

pytestmark = pytest.mark.anyio

UNHEARD = "its pipeline does not stop"
UNSTORED = "the storage does not take what became of it"


async def outcome(job: Job) -> tuple[str, int]:
    """What the entry tells: the status, and how many attempts were charged."""
    entry = await job.info()
    return entry.status, entry.attempt - entry.excused


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The errors that the log tells an operator."""
    return [
        each.getMessage() for each in caplog.records if each.name == "async_sessions" and each.levelno >= logging.ERROR
    ]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which this process would have ended."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    return ended


@pytest.fixture
def on_settle(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """Called once the pipelines have had their time to stop, and the storage's begins."""
    calls: list[Callable[[], object]] = []
    settle = _scheduler.Scheduler.settle

    async def settled(scheduler: _scheduler.Scheduler) -> list[Scheduled]:
        for call in calls:
            call()
        return await settle(scheduler)

    monkeypatch.setattr(_scheduler.Scheduler, "settle", settled)
    return calls


async def test_leaving_goes_on_where_a_job_that_does_not_stop_cant_go_back_to_the_queue() -> None:
    blobs = FaultyBlobStore()
    pipeline = StepPipeline()
    stop = threading.Event()

    def ignore_everybody(context: JobContext) -> None:
        assert stop.wait(30)

    def full(key: str) -> bool:
        stop.set()
        return True

    pipeline.before_generate = ignore_everybody
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        async with local(store, [pipeline]) as dispatcher:
            job = await submit(dispatcher, session)
            await on_device(job)
            blobs.full_for = full
        blobs.full_for = lambda key: False
        async with local(store, [StepPipeline()]) as dispatcher:
            with anyio.fail_after(30):
                await (await dispatcher.job(session, job.id)).result()


@pytest.mark.parametrize("where", ["prepare", "reload", "generate"])
async def test_a_pipeline_that_does_not_stop_is_told_wherever_it_is(
    where: str, on_settle: list[Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    at_it, stop = anyio.Event(), threading.Event()

    def hold(step: str) -> None:
        if step == where:
            anyio.from_thread.run_sync(at_it.set, token=token)
            assert stop.wait(30)

    class Deaf(StepPipeline):
        def load(self, device: str) -> None:
            if self.calls:
                hold("reload")
            super().load(device)

        def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Image.Image]:
            hold("prepare")
            return super().prepare(inputs, params)

    def generate(context: JobContext) -> None:
        hold("generate")
        raise DeviceMemoryError

    pipeline = Deaf()
    pipeline.before_generate = generate
    on_settle.append(stop.set)
    token = anyio.lowlevel.current_token()
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session()
        async with local(store, [pipeline]) as dispatcher:
            job = await submit(dispatcher, session)
            with anyio.fail_after(30):
                await at_it.wait()
        assert told(caplog) == [f"job {job.id} went back to the queue: {UNHEARD}"]
        assert (await job.info()).status == "queued"


@pytest.mark.parametrize("ran", ["stopped", "finished"])
async def test_a_slow_storage_does_not_pass_for_a_pipeline_that_does_not_stop(
    ran: str,
    on_settle: list[Callable[[], object]],
    exits: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_scheduler, "STOP_TIME", 1.5)  # a thread that heeds may have to wait for a core
    blobs, slow = FaultyBlobStore(), anyio.Event()
    on_settle.append(slow.set)
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = HeldPipeline()
        async with local(store, [pipeline], hard_exit=True) as dispatcher:
            jobs = [await submit(dispatcher, session, label=label) for label in ("first", "second")]
            await on_device(jobs[0])
            await pipeline.begun("prepare second")
            blobs.before_put = lambda key: slow
            if ran == "finished":
                pipeline.let_go("first")
                await pipeline.begun("generate second")
                assert (await jobs[0].info()).status == "running"  # it is being stored
        assert (exits, told(caplog)) == ([], [])
        assert await outcome(jobs[0]) == (("succeeded", 1) if ran == "finished" else ("queued", 0))
        assert await outcome(jobs[1]) == ("queued", 0)


async def test_a_pipeline_that_ends_while_another_job_goes_back_has_not_run_in_vain(
    on_settle: list[Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    blobs, slow = FaultyBlobStore(), anyio.Event()
    pipeline = HeldPipeline(deaf=True)
    on_settle.append(lambda: pipeline.let_go("first"))

    def before_put(key: str) -> anyio.Event | None:
        if key.startswith("blobs/"):  # what the second has made
            slow.set()
            return None
        pipeline.let_go("second")
        return slow

    async with open_store(blobs, cleanup_interval=None) as store:
        sessions = [await store.create_session() for _ in range(2)]
        async with local(store, [pipeline], devices=["cpu", "cpu:1"]) as dispatcher:
            first = await submit(dispatcher, sessions[0], label="first")
            await on_device(first)
            second = await submit(dispatcher, sessions[1], label="second", steps=0)
            await on_device(second)
            blobs.before_put = before_put
        assert await outcome(first) == ("queued", 0)
        assert await outcome(second) == ("succeeded", 1)
        assert told(caplog) == [f"job {first.id} went back to the queue: {UNHEARD}"]


@pytest.mark.parametrize("hard_exit", [False, True], ids=["waits", "ends"])
async def test_what_the_storage_does_not_take_in_time_goes_back_to_the_queue(
    hard_exit: bool, exits: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_scheduler, "STORE_TIME", 0.1)
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()
        async with local(store, [pipeline], hard_exit=hard_exit) as dispatcher:
            blobs.before_put = lambda key: anyio.Event() if key.startswith("blobs/") else None
            job = await submit(dispatcher, session)
            with anyio.fail_after(30):
                await blobs.putting.wait()
        blobs.before_put = lambda key: None
        assert await outcome(job) == ("queued", 0)
        ending = ["ending this process: what is under way does not stop"] * hard_exit
        assert told(caplog) == [f"job {job.id} went back to the queue: {UNSTORED}", *ending]
        assert exits == [1] * hard_exit
        async with local(store, [pipeline]) as dispatcher:
            with anyio.fail_after(30):
                await (await dispatcher.job(session, job.id)).result()
