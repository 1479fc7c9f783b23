from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import anyio
import pytest

from async_sessions._events import END, WAIT, queued_number
from async_sessions._lane import Latest
from async_sessions._pace import REMEMBERED, Pace, Paces
from async_sessions._pipeline import MAX_PREVIEW
from async_sessions.jobs import Cancelled, JobContext, JobEvent, Progress, Queued, Started, Succeeded, event_order
from async_sessions.testing.fuzz import fuzz
from tests.following import Gate, HeldPipeline, collected, on_device, submit, until
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions import Session, SessionStore
    from async_sessions.dispatch import Job
    from async_sessions.testing.clock import FrozenClock
    from async_sessions.testing.pipeline import FakePipeline

pytestmark = pytest.mark.anyio


def in_order(events: list[JobEvent]) -> bool:
    order = [event_order(event.id) for event in events]
    return order == sorted(set(order))


def ends(events: list[JobEvent]) -> list[JobEvent]:
    return [event for event in events if event_order(event.id)[1] == END]


# --- who follows


async def test_whoever_follows_from_wherever_is_told_the_same_sequence(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    told: dict[str, list[JobEvent]] = {}
    async with local(session_store, [pipeline]) as dispatcher, anyio.create_task_group() as group:

        async def follow(name: str, after: str | None = None) -> None:
            told[name] = await collected(await dispatcher.job(session, job.id), after)

        before = await submit(dispatcher, session, label="before")
        await pipeline.begun("generate before")
        job = await submit(dispatcher, session, label="a")
        first = await until(job, Queued)
        group.start_soon(follow, "early")
        group.start_soon(follow, "again", first.id)
        pipeline.let_go("before")
        await pipeline.begun("generate a")
        for number in range(50):
            group.start_soon(follow, f"late {number}")
        await anyio.wait_all_tasks_blocked()
        pipeline.let_go("a")
        await before.result()
        await job.result()
    assert all(in_order(events) and ends(events) == events[-1:] for events in told.values())
    assert told["again"] == told["early"][1:]
    late = told["late 0"]
    assert [event for event in late if not isinstance(event, Queued)] == [
        event for event in told["early"] if not isinstance(event, Queued)
    ]
    assert all(told[f"late {number}"] == late for number in range(50))
    assert [kind for kind, _ in groupby(late, key=type)] == [Queued, Started, Progress, Succeeded]


async def test_what_is_replayed_after_any_event_is_what_came_after_it(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session)
        await job.result()
        whole = await collected(job)
        for number, event in enumerate(whole):
            assert await collected(job, after=event.id) == whole[number + 1 :]


async def test_ids_go_on_where_another_dispatcher_goes_on(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    """Through a queue that moves, a start, a drain, a restart, and the end."""
    told: list[JobEvent] = []

    async def follow(job: Job, kind: type[JobEvent]) -> None:
        async for event in job.events(told[-1].id if told else None):
            told.append(event)
            if isinstance(event, kind):
                return

    async with local(session_store, [HeldPipeline()], start_paused=True) as dispatcher:
        others = [await submit(dispatcher, session, label=f"o{number}") for number in range(20)]
        job = await submit(dispatcher, session, label="a")
        await follow(job, Queued)
        for other in others:
            await other.cancel()
            await follow(job, Queued)
        assert [event.position for event in told if isinstance(event, Queued)] == list(range(21, 0, -1))
        dispatcher.resume()
        await follow(job, Started)
    for _ in range(2):
        frozen_clock.advance(seconds=1)
        async with local(session_store, [HeldPipeline()], start_paused=True) as dispatcher:
            job = await dispatcher.job(session, job.id)
            await follow(job, Queued)
            dispatcher.resume()
            await follow(job, Started)
    frozen_clock.advance(seconds=1)
    async with local(session_store, [StepPipeline()]) as dispatcher:
        await follow(await dispatcher.job(session, job.id), Succeeded)
        assert await collected(await dispatcher.job(session, job.id), after=told[-1].id) == []
    async with local(session_store, [StepPipeline()]) as dispatcher:
        assert await collected(await dispatcher.job(session, job.id)) == told[-1:]
    assert in_order(told)
    assert ends(told) == told[-1:]
    attempts = [event.attempt for event in told if isinstance(event, Started)]
    assert attempts == [1, 2, 3, 4]


async def test_ids_go_on_where_a_job_is_taken_over_from_a_dispatcher_that_died(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    first, second = HeldPipeline(), StepPipeline()
    lease = timedelta(seconds=15)
    async with local(session_store, [first]) as stalled, local(session_store, [second], lease=lease) as dispatcher:
        job = await submit(stalled, session, label="a")
        await first.begun("generate a")
        await on_device(job)
        started = await until(job, Started)
        frozen_clock.advance(seconds=31)
        await dispatcher._owner.take_over()
        there = await dispatcher.job(session, job.id)
        events = await collected(there, after=started.id)
        first.let_go("a")
        here = await collected(job)
        assert in_order([started, *events])
        assert in_order(here)
        assert ends(here) == ends(events) == events[-1:]


async def test_one_that_is_cancelled_while_nobody_follows_tells_its_end_once(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()], start_paused=True) as dispatcher:
        job = await submit(dispatcher, session)
        for _ in range(3):
            await job.cancel()
        events = await collected(job)
        dispatcher.resume()
        await (await submit(dispatcher, session)).result()
        assert await collected(job) == events
    assert [type(event) for event in events] == [Queued, Cancelled]


def test_a_position_has_a_number_of_its_own_however_fast_the_queue_moves() -> None:
    number = 0
    for tick in range(1, 1000):
        number = queued_number(number, timedelta(milliseconds=10 * tick))
    assert number <= queued_number(0, timedelta(seconds=10))
    assert queued_number(number, timedelta(0)) == number + 1
    assert queued_number(0, -timedelta(hours=1)) < WAIT  # a clock that was set back
    assert queued_number(0, timedelta(days=10_000)) < END


# --- progress


def test_progress_is_told_ten_times_a_second_and_the_last_step_always() -> None:
    async def scenario() -> None:
        received: list[tuple[float, int]] = []
        loop = asyncio.get_running_loop()
        latest: Latest[int] = Latest(lambda step: received.append((loop.time(), step)), interval=0.1)
        for step in range(1, 1001):
            latest.put(step)
            await anyio.sleep(0.002)
        latest.close()
        latest.put(1001)
        took = anyio.current_time()
        await anyio.sleep(1)
        times = [time for time, _ in received]
        assert received[-1][1] == 1000
        assert [step for _, step in received] == sorted({step for _, step in received})
        assert all(later - earlier >= 0.1 - 1e-9 for earlier, later in pairwise(times[:-1]))
        assert len(received) <= took / 0.1 + 2
        assert times[-1] <= took

    fuzz(scenario, seeds=range(20), longest_wait=0.01)


def test_the_last_step_before_a_pause_is_told_without_waiting_for_the_next() -> None:
    async def scenario() -> None:
        received: list[int] = []
        latest: Latest[int] = Latest(received.append, interval=0.1)
        for step in range(1, 6):
            latest.put(step)
        await anyio.sleep(1)
        assert received[-1] == 5
        assert len(received) <= 2

    fuzz(scenario, seeds=range(20))


async def test_the_last_of_many_steps_is_told_and_most_of_the_others_are_not(
    session_store: SessionStore, session: Session
) -> None:
    async with local(session_store, [StepPipeline()]) as dispatcher:
        job = await submit(dispatcher, session, steps=20_000)
        events = await collected(job)
    steps = [event for event in events if isinstance(event, Progress)]
    assert (steps[-1].step, steps[-1].total, steps[-1].note) == (20_000, 20_000, "step 20000")
    assert len(steps) < 2000
    assert in_order(events)


class Sniffio:
    """What anyio asks where `sniffio` is installed. It knows no library in a callback of the loop, which is no task."""

    current_async_library_cvar: ContextVar[str | None] = ContextVar("current_async_library", default=None)

    class AsyncLibraryNotFoundError(RuntimeError):
        pass

    def current_async_library(self) -> str:
        if (known := self.current_async_library_cvar.get()) is not None:
            return known
        with suppress(RuntimeError):
            if asyncio.current_task() is not None:
                return "asyncio"
        raise self.AsyncLibraryNotFoundError


async def test_progress_is_told_at_once_where_sniffio_is_installed(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyio._core._eventloop.sniffio", Sniffio())
    async with local(session_store, [fake_pipeline]) as dispatcher:
        with fake_pipeline.held(), anyio.fail_after(10):
            job = await submit(dispatcher, session, "fake")
            step = await until(job, Progress)
    assert isinstance(step, Progress)
    assert (step.step, step.total) == (1, 3)


async def test_a_preview_has_at_most_64_kib(session_store: SessionStore, session: Session) -> None:
    class Showing(StepPipeline):
        size = 0

        def generate(self, prepared: object, params: object, context: JobContext) -> dict[str, tuple[bytes, str]]:
            context.report(1, 1, preview=bytes(self.size))
            return {}

    pipeline = Showing()
    previews = []
    async with local(session_store, [pipeline]) as dispatcher:
        for pipeline.size in (MAX_PREVIEW, MAX_PREVIEW + 1):
            job = await submit(dispatcher, session)
            step = await until(job, Progress)
            assert isinstance(step, Progress)
            previews.append(step.preview)
    assert MAX_PREVIEW == 64 * 1024
    assert previews == [bytes(MAX_PREVIEW), None]


# --- how long it will take


def test_the_rest_of_a_run_is_told_from_the_steps_that_were_measured() -> None:
    pace = Pace()
    assert pace.remaining(1, 5, now=100.0) is None  # after a warm-up, of which nothing is known
    assert pace.remaining(2, 5, now=102.0) == 6.0
    assert pace.remaining(4, 5, now=106.0) == 2.0
    assert pace.remaining(5, 5, now=108.0) == 0.0
    assert pace.remaining(6, 5, now=110.0) == 0.0
    assert pace.remaining(1, 9, now=111.0) is None  # a second phase
    assert pace.remaining(2, 9, now=112.0) == 7.0


def test_what_a_run_takes_is_learned_of_the_last_ones() -> None:
    paces = Paces()
    assert paces.expected("wan") is None
    paces.note("wan", 10.0)
    assert paces.expected("wan") == 10.0
    paces.note("wan", 20.0)
    assert paces.expected("wan") == pytest.approx(13.0)
    for number in range(REMEMBERED):
        paces.note(str(number), 1.0)
    assert paces.expected("wan") is None


async def test_who_waits_is_told_for_how_long_once_a_run_was_measured(
    session_store: SessionStore, session: Session
) -> None:
    pipeline = HeldPipeline()
    async with local(session_store, [pipeline], start_paused=True) as dispatcher:

        async def waits(job: Job) -> Queued:
            event = await until(job, Queued)
            assert isinstance(event, Queued)
            return event

        first, second = [await submit(dispatcher, session, label=label) for label in "ab"]
        assert (await waits(first)).eta is None  # nobody knows when it is resumed
        dispatcher.resume()
        await pipeline.begun("generate a")
        assert (await waits(second)).eta is None  # nothing was measured yet
        pipeline.let_go("a")
        await first.result()
        third, fourth = [await submit(dispatcher, session, label=label) for label in "cd"]
        etas = [(await waits(job)).eta for job in (third, fourth)]
        assert etas[0] is not None
        assert etas[1] is not None
        assert 0 <= etas[0] < etas[1]
        pipeline.let_go("b", "c", "d")
        for job in (second, third, fourth):
            await job.result()


async def test_who_waited_for_a_resume_is_told_when_it_runs(session_store: SessionStore, session: Session) -> None:
    pipeline, gate = StepPipeline(), Gate()
    async with local(session_store, [pipeline]) as dispatcher:
        await (await submit(dispatcher, session)).result()
        pipeline.before_generate = gate
        dispatcher.pause()
        await submit(dispatcher, session)
        job = await submit(dispatcher, session)
        paused = await until(job, Queued)
        dispatcher.resume()
        await gate.reached.wait()
        async for event in job.events(paused.id):
            if isinstance(event, Queued) and event.eta is not None:
                break
        gate.open()
        await job.result()
    assert isinstance(paused, Queued)
    assert paused.eta is None


async def test_a_run_that_is_slower_than_those_before_it_is_known_by_its_own_steps(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    fake_pipeline.steps = 1
    async with local(session_store, [fake_pipeline]) as dispatcher:
        await (await dispatcher.submit(await session.generation_request("fake"))).result()
        fake_pipeline.steps = 10**12
        running = await dispatcher.submit(await session.generation_request("fake"))
        async for event in running.events():
            if isinstance(event, Progress) and event.eta is not None:
                break
        waiting = await until(await dispatcher.submit(await session.generation_request("fake")), Queued)
        await dispatcher.cancel_session(session)
    assert isinstance(waiting, Queued)
    assert waiting.eta is not None
    assert waiting.eta > 3600
