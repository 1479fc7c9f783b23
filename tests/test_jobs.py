from __future__ import annotations

import asyncio
import math
import os
import socket
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    GenerationRequest,
    InvalidRequestError,
    JobCancelledError,
    JobInfo,
    Session,
    SessionStore,
    StorageFullError,
    open_store,
)
from async_sessions.jobs import (
    CancelFlag,
    Cancelled,
    Failed,
    JobContext,
    JobEvent,
    Lane,
    PipelineSpec,
    Progress,
    Started,
    Succeeded,
    event_order,
    run_job,
    terminal_event,
)
from async_sessions.testing.cancellation import Run, cancel_everywhere
from tests.faults import FaultyBlobStore, keys_of
from tests.steps import StepPipeline

if TYPE_CHECKING:
    from async_sessions.jobs import Output

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")


async def accepted(store: SessionStore, session: Session, pipeline: StepPipeline, **params: Any) -> JobInfo:
    """An entry as a dispatcher writes it, with its marker."""
    slots = tuple(pipeline.spec.slots)
    request = await session.generation_request(pipeline.spec.name, slots=slots, params=params)
    entry = pipeline.spec.entry(request, f"{session.key}.{'0' * 16}", owner="tests", now=store.clock())
    await store.blobs.put(f"queue/{entry.id}.json", b"{}")
    assert await session.edit_job(entry.id, lambda current: entry) == entry
    return entry


def marker(entry: JobInfo) -> set[str]:
    return {f"queue/{entry.id}.json"}


# --- the whole run


async def test_a_job_runs_from_its_entry_to_its_end(session_store: SessionStore, session: Session) -> None:
    await session.store_image(RED, "start")
    pipeline = StepPipeline(start=True)
    pipeline.make = lambda params: {
        "picture": Image.new("RGB", (8, 8), params["colour"]),
        "video": pipeline.file(b"film"),
        "text": (b"done", "text/plain"),
    }
    entry = await accepted(session_store, session, pipeline, colour="blue")
    events: list[JobEvent] = []

    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append)

    assert done is not None
    assert (done.status, done.attempt, done.error) == ("succeeded", 1, None)
    assert (await session.info()).jobs == {entry.id: done}
    assert {name: output.media_type for name, output in done.outputs.items()} == {
        "picture": "image/png",
        "video": "video/mp4",
        "text": "text/plain",
        "start": "image/png",
    }
    assert b"".join([chunk async for chunk in session.stream_output(done.outputs["video"])]) == b"film"
    async with session.output_file(done.outputs["start"]) as path:
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (255, 0, 0)
    assert not any(file.exists() for file in pipeline.files)
    assert await keys_of(session_store.blobs, "queue/") == set()
    assert isinstance(events[0], Started)
    assert events[-1] == Succeeded(id="1.999999999", at=events[-1].at, outputs=done.outputs)
    assert [type(event) for event in events[1:-1]] == [Progress] * len(events[1:-1])
    order = [event_order(event.id) for event in events]
    assert order == sorted(set(order))


async def test_the_device_has_one_thread_for_loading_running_and_releasing(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline)
    await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert [what for what, _ in pipeline.calls] == ["load", "prepare", "generate", "release"]
    threads = dict(pipeline.calls)
    assert threads["load"] == threads["generate"] == threads["release"]
    assert threads["prepare"] not in (threads["load"], threading.current_thread().name)
    assert threads["load"] not in [thread.name for thread in threading.enumerate()]


async def test_what_a_pipeline_raises_is_the_jobs_failure(
    session_store: SessionStore, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "async_sessions")  # xdist can't carry the surrogate
    pipeline = StepPipeline()

    def fail(context: JobContext) -> None:
        raise RuntimeError("no \udcff such weights")

    pipeline.before_generate = fail
    entry = await accepted(session_store, session, pipeline)
    events: list[JobEvent] = []
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append)
    assert done is not None
    assert (done.status, done.outputs) == ("failed", {})
    assert done.error is not None
    assert (done.error.kind, done.error.message) == ("RuntimeError", "no ? such weights")
    assert events[-1] == terminal_event(done)
    assert [isinstance(event, Failed) for event in events].count(True) == 1


@pytest.mark.parametrize("error", [SystemExit(3), StopIteration(), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_no_exception_of_a_pipeline_reaches_the_loop(
    session_store: SessionStore, session: Session, error: BaseException
) -> None:
    pipeline = StepPipeline()

    def fail(context: JobContext) -> None:
        raise error

    pipeline.before_generate = fail
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.status == "failed"


@pytest.mark.parametrize("output", [None, {"Not A Name": (b"x", "text/plain")}, {"video": 7}])
async def test_outputs_that_are_none_fail_the_job(session_store: SessionStore, session: Session, output: Any) -> None:
    pipeline = StepPipeline()
    pipeline.make = lambda params: output
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.status == "failed"


@pytest.mark.parametrize(
    ("name", "media_type", "sentence"),
    [
        ("Not A Name", "text/plain", "named as a slot is"),
        ("a\r\nb", "text/plain", "named as a slot is"),
        ("x" * 100_000, "text/plain", "named as a slot is"),
        ("text", "", "media type"),
        ("text", "plain", "media type"),
        ("text", "text/plain\r\nSet-Cookie: a=b", "media type"),
        ("text", "text/plain\n", "media type"),
        ("text", "text/pl\x1b[2Jain", "media type"),
        ("text", "text/pläin", "media type"),
        ("text", "text/plain; charset", "media type"),
        ("text", f"text/{'x' * 200}", "media type"),
        ("text", None, "media type"),
    ],
)
async def test_an_output_with_a_bad_name_or_media_type_fails_the_job_in_a_sentence(
    session_store: SessionStore, session: Session, name: str, media_type: Any, sentence: str
) -> None:
    pipeline = StepPipeline()
    pipeline.make = lambda params: {name: (b"done", media_type)}
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.error is not None
    assert done.error.kind == "InvalidOutputError"
    assert sentence in done.error.message
    assert done.error.message.isprintable()
    assert len(done.error.message) < 300
    assert await keys_of(session_store.blobs, "blobs/") == set()


@pytest.mark.parametrize("media_type", ["text/plain; charset=utf-8", 'video/x-y.z+a ;codecs="a, b" ; n=1'])
async def test_a_media_type_may_have_parameters(session_store: SessionStore, session: Session, media_type: str) -> None:
    pipeline = StepPipeline()
    pipeline.make = lambda params: {"text": (b"done", media_type)}
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.outputs["text"].media_type == media_type


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a socket": bound,
    "a folder": Path.mkdir,
    "a link to a file": lambda path: path.symlink_to(__file__),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("made", NO_FILES.values(), ids=NO_FILES)
async def test_an_output_that_is_no_file_fails_the_job_and_is_left_where_it_is(
    session_store: SessionStore, session: Session, tmp_path: Path, made: Callable[[Path], object]
) -> None:
    pipeline, path = StepPipeline(), tmp_path / "film.mp4"
    there: list[bool] = []

    def make(params: Any) -> dict[str, Output]:
        made(path)
        there.append(os.path.lexists(path))
        return {"video": path}

    pipeline.make = make
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.error is not None
    assert done.error.kind == "InvalidOutputError"
    assert "'film.mp4'" in done.error.message
    assert "Let the pipeline put out the path of a file." in done.error.message
    assert [os.path.lexists(path)] == there


async def test_a_pipeline_that_cant_be_loaded_fails_its_jobs_with_the_reason(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()

    def fail(device: str) -> None:
        raise FileNotFoundError("no weights here")

    pipeline.on_load = fail
    entry = await accepted(session_store, session, pipeline)
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    assert done is not None
    assert done.error is not None
    assert done.error.kind == "FileNotFoundError"
    assert "no weights here" in done.error.message


async def test_a_job_for_a_pipeline_that_is_not_here_fails(session_store: SessionStore, session: Session) -> None:
    entry = await accepted(session_store, session, StepPipeline("elsewhere"))
    done = await run_job(entry.id, store=session_store, pipelines=[StepPipeline()], emit=lambda event: None)
    assert done is not None
    assert done.error is not None
    assert done.error.kind == "UnknownPipelineError"


async def test_a_job_that_has_ended_is_not_run_again(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline)
    first = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None)
    events: list[JobEvent] = []
    again = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append)
    assert again == first
    assert len(pipeline.ran) == 1
    assert [type(event) for event in events] == [Succeeded]


async def test_an_older_attempt_does_not_overwrite_a_newer_one(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline)
    running, go_on = anyio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(context: JobContext) -> None:
        loop.call_soon_threadsafe(running.set)
        go_on.wait()

    pipeline.before_generate = wait
    events: list[JobEvent] = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append)

        group.start_soon(run)
        await running.wait()
        taken_over = await session.edit_job(entry.id, lambda current: current and replace(current, attempt=2))
        go_on.set()
    assert (await session.info()).jobs[entry.id] == taken_over
    assert not any(isinstance(event, Succeeded | Failed | Cancelled) for event in events)
    assert await keys_of(session_store.blobs, "queue/") == {f"queue/{entry.id}.json"}


async def test_a_beginning_that_another_process_overtook_is_none() -> None:
    """Both would have been the same attempt, and both could have written its end."""
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store, open_store(blobs.inner) as other:
        session = await store.create_session()
        pipeline = StepPipeline()
        entry = await accepted(store, session, pipeline)
        overtaken = anyio.Event()
        blobs.before_put = lambda key: overtaken if key.startswith("manifests/") else None
        async with anyio.create_task_group() as group:

            async def run() -> None:
                await run_job(entry.id, store=store, pipelines=[pipeline], emit=lambda event: None, owner="tests")

            group.start_soon(run)
            await blobs.putting.wait()
            blobs.before_put = lambda key: None
            there = await other.open_by_key(session.key)
            begun = await there.edit_job(
                entry.id, lambda current: current and replace(current, owner="other", status="preparing", attempt=1)
            )
            overtaken.set()
        assert (await session.info()).jobs[entry.id] == begun
        assert pipeline.ran == []


async def test_a_job_whose_session_is_gone_counts_as_cancelled(session_store: SessionStore, session: Session) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline)
    await session.delete()
    events: list[JobEvent] = []
    assert await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append) is None
    assert [type(event) for event in events] == [Cancelled]
    assert pipeline.ran == []


async def test_a_session_that_is_deleted_while_its_job_is_prepared_is_no_error(
    session_store: SessionStore, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    preparing, go_on = anyio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    class Late(StepPipeline):
        def prepare(self, inputs: Any, params: Any) -> Any:
            loop.call_soon_threadsafe(preparing.set)
            assert go_on.wait(30)
            return super().prepare(inputs, params)

    pipeline = Late(start=True)
    await session.store_image(RED, "start")
    entry = await accepted(session_store, session, pipeline)
    events: list[JobEvent] = []
    async with anyio.create_task_group() as group:

        async def run() -> None:
            assert await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=events.append) is None

        group.start_soon(run)
        await preparing.wait()
        await session.delete()
        go_on.set()
    assert [type(event) for event in events] == [Cancelled]
    assert pipeline.ran == []
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
async def test_a_cancelled_run_waits_for_its_thread_and_returns_the_job_to_the_queue(
    session_store: SessionStore, session: Session, native: bool
) -> None:
    pipeline = StepPipeline()
    pipeline.make = lambda params: {"video": pipeline.file(b"film")}
    entry = await accepted(session_store, session, pipeline, endless=True)
    running = anyio.Event()
    events: list[JobEvent] = []
    scope = anyio.CancelScope()

    def follow(event: JobEvent) -> None:
        events.append(event)
        if isinstance(event, Progress):
            running.set()

    async def run() -> None:
        with scope:
            await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=follow)

    task = asyncio.get_running_loop().create_task(run())
    await running.wait()
    for _ in range(3):
        if native:
            task.cancel()
        else:
            scope.cancel()
        await anyio.lowlevel.checkpoint()
    await asyncio.wait({task})
    assert task.cancelled() == native
    assert not any(thread.name.startswith("async_sessions-") for thread in threading.enumerate())
    left = (await session.info()).jobs[entry.id]
    assert (left.status, left.attempt, left.excused, left.retry) == ("queued", 1, 1, None)
    assert all(isinstance(event, Started | Progress) for event in events)
    assert await keys_of(session_store.blobs, "queue/") == {f"queue/{entry.id}.json"}


async def test_a_run_that_is_cancelled_at_any_point_ends_its_job_or_returns_it_to_the_queue() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()
        pipeline.make = lambda params: {"video": pipeline.file(b"film")}
        events: list[JobEvent] = []
        entries: list[JobInfo] = []
        statuses: list[str] = []

        async def prepare() -> None:
            nonlocal session
            for left in await keys_of(store.blobs, "queue/"):
                await store.blobs.delete(left)
            await session.delete()  # and the last run's job
            session = await store.create_session()
            entries.append(await accepted(store, session, pipeline))
            events.clear()

        async def check(run: Run) -> None:
            done = (await session.info()).jobs[entries[-1].id]
            statuses.append(done.status)
            told = [each for each in events if not isinstance(each, Started | Progress)]
            assert told == ([] if done.unfinished else [terminal_event(done)])
            assert await keys_of(store.blobs, "queue/") == (marker(done) if done.unfinished else set())
            assert done.attempt - done.excused == (0 if done.unfinished else 1)
            assert [file for file in pipeline.files if await anyio.Path(file).exists()] == []
            assert not any(thread.name.startswith("async_sessions-") for thread in threading.enumerate())

        await cancel_everywhere(
            lambda: run_job(entries[-1].id, store=store, pipelines=[pipeline], emit=events.append),
            check,
            prepare=prepare,
            every=3,
        )
        assert set(statuses) == {"succeeded", "queued"}


async def test_a_flag_that_is_set_before_the_start_keeps_the_pipeline_from_running(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline)
    flag = CancelFlag()
    flag.set()
    done = await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: None, flag=flag)
    assert done is not None
    assert done.status == "cancelled"
    assert pipeline.ran == []


async def test_a_wish_to_cancel_that_only_the_entry_holds_is_seen_while_the_job_reports(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = StepPipeline()
    entry = await accepted(session_store, session, pipeline, endless=True)
    started = anyio.Event()
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await run_job(entry.id, store=session_store, pipelines=[pipeline], emit=lambda event: started.set())

        group.start_soon(run)
        await started.wait()
        await session.edit_job(entry.id, lambda current: current and replace(current, cancel_requested=True))
    assert (await session.info()).jobs[entry.id].status == "cancelled"


async def test_an_end_that_can_not_be_stored_is_raised_and_not_told() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()

        def fill_the_disk(context: JobContext) -> None:
            blobs.full_for = lambda key: True

        pipeline.before_generate = fill_the_disk
        entry = await accepted(store, session, pipeline)
        events: list[JobEvent] = []
        with pytest.raises(StorageFullError):
            await run_job(entry.id, store=store, pipelines=[pipeline], emit=events.append)
        assert all(isinstance(event, Started | Progress) for event in events)
        assert (await session.info()).jobs[entry.id].under_way
        assert await keys_of(blobs, "queue/") == {f"queue/{entry.id}.json"}


async def test_outputs_that_cant_be_stored_fail_the_job() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        pipeline = StepPipeline()
        pipeline.make = lambda params: {"video": pipeline.file(b"film")}
        entry = await accepted(store, session, pipeline)
        blobs.full_for = lambda key: key.startswith("blobs/")
        done = await run_job(entry.id, store=store, pipelines=[pipeline], emit=lambda event: None)
        assert done is not None
        assert done.error is not None
        assert done.error.kind == "StorageFullError"
        assert not any(file.exists() for file in pipeline.files)


# --- what a request must be


def entry_for(spec: PipelineSpec, params: Any, **images: Any) -> JobInfo:
    request = GenerationRequest(session_key="0" * 32, pipeline=spec.name, inputs=images, params=params)
    return spec.entry(request, "job", owner="tests", now=datetime.now(UTC))


SPEC = PipelineSpec(name="wan", slots={"start": True, "end": False}, defaults={"prompt": "", "steps": 40})


def test_an_entry_holds_every_parameter_of_its_pipeline() -> None:
    entry = entry_for(SPEC, {"steps": 4}, start=object())
    assert entry.params == {"prompt": "", "steps": 4}


@pytest.mark.parametrize(
    ("params", "images", "sentence"),
    [
        ({}, {}, "needs an image as 'start'"),
        ({}, {"start": object(), "mask": object()}, "takes no image as 'mask'"),
        ({"cfg": 5}, {"start": object()}, "has no parameter 'cfg'"),
        ({"steps": math.nan}, {"start": object()}, "not JSON"),
        ({"steps": {1, 2}}, {"start": object()}, "not JSON"),
        ({"prompt": "\ud800"}, {"start": object()}, "not JSON"),
        ({"prompt": "x" * 70_000}, {"start": object()}, "65536 bytes"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_in_a_sentence(
    params: dict[str, Any], images: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        entry_for(SPEC, params, **images)


# --- contexts, lanes, event ids


def test_a_context_raises_once_its_job_is_cancelled() -> None:
    flag = CancelFlag()
    told: list[Any] = []
    context = JobContext("job", 1, "cpu", flag=flag, tell=told.append)
    context.report(1, 2, preview=b"x" * 70_000)
    assert told == [(1, 2, "", None)]
    flag.set()
    with pytest.raises(JobCancelledError):
        context.report(2, 2)


@pytest.mark.parametrize(
    ("note", "kept"),
    [
        ("step 1: Schön 🦊", "step 1: Schön 🦊"),
        ("x" * 1_000_000, "x" * 200),
        ("a\r\nb\x1b[2J\u202ec\ud800", "a  b [2J c "),
    ],
)
def test_a_note_is_short_and_holds_nothing_that_a_terminal_would_obey(note: str, kept: str) -> None:
    told: list[Any] = []
    JobContext("job", 1, "cpu", tell=told.append).report(1, 2, note)
    assert told == [(1, 2, kept, None)]


async def test_a_lane_goes_on_after_a_call_that_raised() -> None:
    async with Lane("cpu", {}) as lane:
        raised = await lane.run(lambda: 1 // 0)
        assert isinstance(raised, ZeroDivisionError)
        assert await lane.run(lambda: None) is None


def test_event_ids_sort_by_attempt_and_number() -> None:
    ids = ["0.1", "0.999999999", "1.1", "1.2", "1.10", "1.999999999", "2.1"]
    assert sorted(ids, key=event_order) == ids
    assert event_order(None) < event_order("0.0")


@pytest.mark.parametrize("bad", ["", "1", "1.", "a.b", "-1.2", "1.2.3", "1" * 40 + ".1"])
def test_a_text_that_is_no_events_id_is_refused(bad: str) -> None:
    with pytest.raises(InvalidRequestError):
        event_order(bad)
