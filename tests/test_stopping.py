from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from msgspec.structs import replace

from async_sessions import (
    JobCancelledError,
    JobFailedError,
    JobInfo,
    MemoryBlobStore,
    OutOfMemoryError,
    Session,
    SessionStore,
    open_store,
)
from async_sessions.jobs import (
    Cancelled,
    JobContext,
    Lane,
    Progress,
    Queued,
    Started,
    Succeeded,
    event_order,
    run_job,
)
from async_sessions.testing.faults import Operation, WrappedBlobStore
from async_sessions.testing.pipeline import DeviceMemoryError
from tests.following import Gate, HeldPipeline, collected, submit, until
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.dispatch import Job

pytestmark = pytest.mark.anyio

TWO = ["cpu", "cpu:1"]


async def failure(job: Job) -> str:
    """The kind of error that `job` ends with."""
    with anyio.fail_after(30), pytest.raises(JobFailedError):
        await job.result()
    error = (await job.info()).error
    assert error is not None
    return error.kind


# --- cancelling


async def test_a_job_that_is_prepared_is_cancelled_at_once(session_store: SessionStore, session: Session) -> None:
    gate = threading.Event()

    class Slow(HeldPipeline):
        def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
            prepared = super().prepare(inputs, params)
            assert params["label"] != "slow" or gate.wait(30)
            return prepared

    pipeline = Slow()
    pipeline.let_go("slow", "next")
    async with local(session_store, [pipeline]) as dispatcher:
        slow, after = [await submit(dispatcher, session, label=label) for label in ("slow", "next")]
        await pipeline.begun("prepare slow")
        assert (await slow.info()).status == "preparing"
        assert (await slow.cancel()).status == "cancelled"
        assert isinstance((await collected(slow))[-1], Cancelled)
        gate.set()
        await after.result()
    assert pipeline.ran == ["next"]


async def test_a_cancelled_pipeline_does_not_one_step_more(session_store: SessionStore, session: Session) -> None:
    steps: list[int] = []
    gate = Gate()

    class Stepping(StepPipeline):
        def generate(self, prepared: Any, params: Mapping[str, Any], context: JobContext) -> Any:
            for step in range(1, 6):
                steps.append(step)
                if step == 3:
                    gate(context)
                context.report(step, 5)
            return {}

    async with local(session_store, [Stepping()]) as dispatcher:
        job = await submit(dispatcher, session)
        await gate.reached.wait()
        await job.cancel()
        gate.open()
        with pytest.raises(JobCancelledError):
            await job.result()
    assert steps == [1, 2, 3]


async def test_all_jobs_of_a_session_are_cancelled_and_none_of_another(
    session_store: SessionStore, session: Session
) -> None:
    other, pipeline = await session_store.create_session(), HeldPipeline()
    async with local(session_store, [pipeline]) as dispatcher:
        done = await submit(dispatcher, session, label="done")
        pipeline.let_go("done", "b")
        await done.result()
        mine = [await submit(dispatcher, session, label=label) for label in ("a0", "a1", "a2")]
        await pipeline.begun("prepare a1")
        theirs = await submit(dispatcher, other, label="b")
        infos = await dispatcher.cancel_session(session)
        assert {info.id for info in infos} == {job.id for job in mine}
        assert all(info.cancel_requested for info in infos)
        await theirs.result()
        for job in mine:
            assert isinstance((await collected(job))[-1], Cancelled)
        assert await dispatcher.cancel_session(session) == []
    assert pipeline.ran == ["done", "b"]


async def test_a_pipeline_that_does_not_heed_a_cancel_is_waited_for_and_told_to_the_log(
    session_store: SessionStore, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("async_sessions._run.PATIENCE", 0.0)
    deaf, other = HeldPipeline(deaf=True), StepPipeline("other")
    async with local(session_store, [deaf, other], devices=TWO) as dispatcher:
        job = await submit(dispatcher, session, label="a")
        await deaf.begun("generate a")
        behind = await submit(dispatcher, session, label="b")
        await deaf.begun("generate b")
        await job.cancel()
        while "goes on with job" not in caplog.text:  # noqa: ASYNC110 - a log can't be waited for
            await anyio.sleep(0.001)
        assert "which was to stop" in caplog.text
        assert job.id in caplog.text
        deaf.let_go("a", "b")
        with pytest.raises(JobCancelledError):
            await job.result()
        await behind.result()
        assert (await job.info()).outputs == {}
        await (await submit(dispatcher, session, "other")).result()


async def test_a_job_that_is_cancelled_while_it_waits_to_be_tried_again_is_not(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    pipeline.let_go("a")
    pipeline.before_generate = raise_once(DeviceMemoryError())
    async with local(session_store, [pipeline], devices=TWO) as dispatcher:
        beside = await submit(dispatcher, session, label="beside")
        await pipeline.begun("generate beside")
        job = await submit(dispatcher, session, label="a")
        while (await job.info()).retry is None:  # noqa: ASYNC110 - as a page does
            await anyio.sleep(0.001)
        assert (await job.cancel()).status == "cancelled"
        pipeline.let_go("beside", "after")
        await beside.result()
        await (await submit(dispatcher, session, label="after")).result()
    assert pipeline.done.count("generate a") == 1


# --- a run that takes too long


async def test_a_run_that_takes_too_long_has_failed_and_its_device_goes_on(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    pipeline.spec = replace(pipeline.spec, timeout=0.01)
    async with local(session_store, [pipeline]) as dispatcher:
        assert await failure(await submit(dispatcher, session, endless=True)) == "timeout"
        pipeline.spec = replace(pipeline.spec, timeout=None)
        await (await submit(dispatcher, session)).result()


async def test_what_comes_although_the_time_is_over_is_kept(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    pipeline.spec = replace(pipeline.spec, timeout=0.01)
    over = threading.Event()

    def outlast(context: JobContext) -> None:
        while not context.cancelled:
            over.wait(0.001)

    pipeline.before_generate = outlast
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session, steps=0)
        assert (await job.result())["text"].byte_size == 4


async def test_a_wish_to_cancel_counts_more_than_the_time_that_is_over(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline(deaf=True)
    pipeline.spec = replace(pipeline.spec, timeout=0.01)
    reasons: list[str | None] = []
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session, label="a")
        await pipeline.begun("generate a")
        flag = dispatcher._scheduler._jobs[job.id].flag
        await flag.wait()
        reasons.append(flag.reason)
        await job.cancel()
        pipeline.let_go("a")
        assert isinstance((await collected(job))[-1], Cancelled)
    assert reasons == ["timeout"]


# --- a device without memory


def raise_once(error: Exception) -> Any:
    errors = [error]

    def before_generate(context: JobContext) -> None:
        if errors:
            raise errors.pop()

    return before_generate


async def test_a_job_for_which_the_device_had_no_memory_is_tried_once_more_alone(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    pipeline.let_go("greedy")
    pipeline.before_generate = raise_once(DeviceMemoryError())
    beside: list[int] = []
    async with local(session_store, [pipeline], devices=TWO) as dispatcher:
        running = await submit(dispatcher, session, label="running")
        await pipeline.begun("generate running")
        greedy = await submit(dispatcher, session, label="greedy")
        await until(greedy, Started)
        after = [await submit(dispatcher, session, label=label) for label in "abc"]
        while (await greedy.info()).retry is None:  # noqa: ASYNC110 - as a page does
            await anyio.sleep(0.001)
        pipeline.before_generate = lambda context: beside.append(len(dispatcher._scheduler._under_way))
        pipeline.let_go("running", "a", "b", "c")
        events = await collected(greedy)
        for job in (running, *after):
            await job.result()
        info = await greedy.info()
    assert (info.status, info.attempt, info.excused, info.retry) == ("succeeded", 2, 0, None)
    kinds = [kind for kind, _ in groupby(events, key=type)]
    assert kinds == [Queued, Started, Queued, Started, Progress, Succeeded]
    order = [event_order(event.id) for event in events]
    assert order == sorted(set(order))
    assert 1 in beside
    second = [number for number, what in enumerate(pipeline.done) if what == "generate greedy"][1]
    calls = [what for what, _ in pipeline.calls]
    assert calls.count("release") == calls.count("load") == 3
    assert pipeline.done[second - 1] == "prepare greedy"


async def test_a_job_for_which_the_device_has_no_memory_has_failed_at_the_second_time(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()

    def full(context: JobContext) -> None:
        raise DeviceMemoryError

    pipeline.before_generate = full
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session, label="greedy")
        assert await failure(job) == "OutOfMemoryError"
        assert (await job.info()).attempt == 2
        pipeline.before_generate = lambda context: None
        await (await submit(dispatcher, session, label="small")).result()
    assert pipeline.ran == ["greedy", "greedy", "small"]
    assert [what for what, _ in pipeline.calls].count("load") == 2


async def test_a_job_for_which_the_machine_has_no_memory_is_not_tried_again(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    pipeline.before_generate = raise_once(OutOfMemoryError("There is no memory for this image now."))
    async with local(session_store, [pipeline]) as dispatcher:
        job = await submit(dispatcher, session, label="greedy")
        assert await failure(job) == "OutOfMemoryError"
        assert (await job.info()).attempt == 1
    assert [what for what, _ in pipeline.calls] == ["load", "prepare", "generate", "release"]


async def test_a_pipeline_that_can_not_be_loaded_again_fails_its_jobs_and_no_other(
    session_store: SessionStore, session: Session
) -> None:
    pipeline, other = StepPipeline(), StepPipeline("other")

    def full(context: JobContext) -> None:
        def gone(device: str) -> None:
            raise OSError("the disk is gone")

        pipeline.on_load = gone
        raise DeviceMemoryError

    pipeline.before_generate = full
    async with local(session_store, [pipeline, other]) as dispatcher:
        assert await failure(await submit(dispatcher, session)) == "OSError"
        await (await submit(dispatcher, session, "other")).result()
    assert [what for what, _ in pipeline.calls] == ["load", "prepare", "generate", "release", "load"]


async def test_a_pipeline_that_could_not_be_loaded_again_is_loaded_for_the_next_job(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    full: list[Exception] = [DeviceMemoryError(), DeviceMemoryError()]  # the device, for the run and for the load

    def fill(_: object) -> None:
        if len(full) == 2:
            pipeline.on_load = fill
        if full:
            raise full.pop()

    pipeline.before_generate = fill
    async with local(session_store, [pipeline]) as dispatcher:
        assert await failure(await submit(dispatcher, session, label="greedy")) == "OutOfMemoryError"
        for label in "ab":
            await (await submit(dispatcher, session, label=label)).result()
    assert pipeline.ran == ["greedy", "a", "b"]
    calls = [what for what, _ in pipeline.calls if what in ("load", "release")]
    assert calls == ["load", "release", "load", "load", "release"]


async def test_a_job_never_runs_on_a_pipeline_that_was_not_loaded_again(
    session_store: SessionStore, session: Session
) -> None:
    """One that shares its lane with a job that is tried again, and was prepared while that had it loaded."""
    pipeline = HeldPipeline()
    pipeline.let_go("again", "beside")
    request = await session.generation_request("steps", slots=(), params={"label": "again"})
    again = pipeline.spec.entry(request, f"{session.key}.{1:016x}", "tests", session_store.clock())
    again = replace(again, retry="out_of_memory")
    request = replace(request, params={"label": "beside"})
    beside = pipeline.spec.entry(request, f"{session.key}.{2:016x}", "tests", session_store.clock())
    await session.edit_job(again.id, lambda _: again)
    await session.edit_job(beside.id, lambda _: beside)
    done: dict[str, str] = {}

    async with Lane("cpu", {"steps": pipeline}) as lane, anyio.create_task_group() as group:
        await lane.load()

        def full(device: str) -> None:
            raise DeviceMemoryError

        pipeline.on_load = full

        async def run(entry: JobInfo) -> None:
            ended = await run_job(
                entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None, lane=lane
            )
            assert ended is not None
            assert ended.error is not None
            done[entry.params["label"]] = ended.error.kind

        async with lane.turn:
            group.start_soon(run, again)
            await anyio.wait_all_tasks_blocked()  # it waits to have the pipeline loaded
            group.start_soon(run, beside)
            await pipeline.begun("prepare beside")
    assert done == {"again": "OutOfMemoryError", "beside": "OutOfMemoryError"}
    assert pipeline.ran == []


# --- a storage that misbehaves


class Raising(WrappedBlobStore):
    """Raises what no blob store should, for the keys that the test says."""

    def __init__(self) -> None:
        super().__init__(MemoryBlobStore())
        self.bad = ""
        self.broke = anyio.Event()

    @asynccontextmanager
    async def around(self, operation: Operation, key: str) -> AsyncGenerator[None]:
        if self.bad and operation == "put" and key.startswith(self.bad):
            self.broke.set()
            raise OSError("the backend is broken")
        yield


async def test_a_backend_that_breaks_during_a_run_does_not_stop_the_run() -> None:
    blobs = Raising()
    pipeline = HeldPipeline()
    async with open_store(blobs, cleanup_interval=None) as store, local(store, [pipeline]) as dispatcher:
        session = await store.create_session()
        job = await submit(dispatcher, session, label="a")
        await pipeline.begun("prepare a")
        blobs.bad = "manifests/"  # that the device has the job can't be written
        await pipeline.begun("generate a")
        await blobs.broke.wait()
        await anyio.wait_all_tasks_blocked()
        blobs.bad = ""
        pipeline.let_go("a")
        assert (await job.result())["text"].byte_size == 4
        assert (await job.info()).attempt == 1
