"""Many jobs at once: cancelled at random, refused by a full queue, in sessions that expire meanwhile."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.from_thread
from PIL import Image

from async_sessions import (
    BlobStore,
    JobCancelledError,
    Limits,
    MemoryBlobStore,
    QueueFullError,
    open_store,
)
from async_sessions.jobs import JobContext, Output, PipelineSpec
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.faults import CountingBlobStore
from tests import workers
from tests.faults import keys_of, named_blobs
from tests.job_acts import followers, lanes
from tests.steps import local

if TYPE_CHECKING:
    from async_sessions import Session

LANES = 8


class Meeting:
    """Every `generate` waits for seven others: it takes eight lanes that work."""

    spec = PipelineSpec(name="meeting")

    def __init__(self) -> None:
        self._all = threading.Barrier(LANES, timeout=30)

    def load(self, device: str) -> None:
        pass

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        pass

    def generate(self, prepared: None, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        self._all.wait()
        return {}


async def check_cancels(blobs: BlobStore, *, cancels: int, seed: int) -> Counter[str]:
    """Run jobs on eight lanes and cancel `cancels` of them, each at a random moment; says where the wishes met them.

    Only those that somebody wanted cancelled are, the others succeed with what is theirs, and nothing is left.
    """
    rng = random.Random(seed)
    met: Counter[str] = Counter()
    devices = ["cpu", *(f"cpu:{number}" for number in range(1, LANES))]
    async with open_store(blobs, cleanup_interval=None, limits=Limits(keep_jobs=10_000)) as store:
        sessions = [await store.create_session() for _ in range(8)]
        left = iter(range(cancels))
        dispatcher = local(store, [workers.Busy(), Meeting()], devices=devices, max_queued=10_000)

        async def cancel(session: Session, job_id: str, delay: float) -> None:
            await anyio.sleep(delay)
            job = await dispatcher.job(session, job_id)
            met[(await job.info()).status] += 1
            await job.cancel()

        async def user(session: Session) -> None:
            """One in three of its jobs is left alone."""
            for number in left:
                for wanted in (False, True)[: 1 + number % 2]:
                    params = {"seconds": rng.choice([0.01, 0.05, 0.1])}
                    job = await dispatcher.submit(
                        await session.generation_request(
                            "busy", slots=(), params=params, priority=rng.choice([0, 0, 1])
                        )
                    )
                    async with anyio.create_task_group() as group:
                        if not wanted:
                            group.start_soon(cancel, session, job.id, rng.uniform(0, 0.3))
                        try:
                            outputs = await job.result()
                        except JobCancelledError:
                            assert not wanted, "a job was cancelled that nobody wanted to be"
                            continue
                        (text,) = outputs.values()
                        made = b"".join([chunk async for chunk in session.stream_output(text)])
                        assert made == workers.made_by(job.id, (await job.info()).attempt)

        async with dispatcher:
            async with anyio.create_task_group() as group:
                for number in range(2 * LANES):
                    group.start_soon(user, sessions[number % len(sessions)])
            meeting = [
                await dispatcher.submit(await sessions[0].generation_request("meeting", slots=())) for _ in devices
            ]
            for job in meeting:
                await job.result()
            scheduler = dispatcher._scheduler
            assert [*scheduler._jobs, *scheduler._under_way, *scheduler._line.order()] == []
            assert scheduler._ahead.free == scheduler._ahead.pixels
            assert followers(scheduler) == 0
            assert lanes() == LANES
        assert lanes() == 0
        assert await keys_of(store.blobs, "queue/") == await keys_of(store.blobs, "owners/") == set()
    async with open_store(blobs, cleanup_interval=None) as store:  # the other one still spares what was made in vain
        await store.cleanup(now=store.clock() + timedelta(hours=2))
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
    return met


class Flood(NamedTuple):
    accepted: int
    refused: int
    grown: int  # bytes, from the first tenth of the submits to the last


async def check_flood(submits: int, *, max_queued: int) -> Flood:
    """Submit far more than may wait: the rest is refused, typed, with a place, and leaves nothing in memory."""
    accepted, refused, after_tenth = 0, 0, 0
    async with open_store("memory://", cleanup_interval=None, limits=Limits(keep_jobs=10_000)) as store:
        session = await store.create_session()
        async with local(store, [workers.Busy()], max_queued=max_queued, start_paused=True) as dispatcher:
            request = await session.generation_request("busy", slots=())
            tracemalloc.start()
            try:
                for number in range(submits):
                    if number == submits // 10:
                        after_tenth = tracemalloc.get_traced_memory()[0]
                    try:
                        await dispatcher.submit(request)
                    except QueueFullError as error:
                        assert error.position == max_queued + 1  # noqa: PT017
                        refused += 1
                    else:
                        accepted += 1
                grown = tracemalloc.get_traced_memory()[0] - after_tenth
            finally:
                tracemalloc.stop()
            assert len(await keys_of(store.blobs, "queue/")) == accepted
            dispatcher.resume()
            for entry in await dispatcher.jobs(session):
                await (await dispatcher.job(session, entry.id)).result()
    return Flood(accepted, refused, grown)


class Painter:
    """Puts out the image that it was given."""

    spec = PipelineSpec(name="painter", slots={"start": True})

    def load(self, device: str) -> None:
        pass

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
        return anyio.from_thread.run(inputs["start"].image)

    def generate(self, prepared: Any, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        return {"image": prepared}


async def check_sweeps(jobs: int) -> int:
    """Sweep every millisecond while jobs wait in sessions that have long expired; returns how often it was.

    Every job finds its image, and once it is over its session goes.
    """
    clock, blobs = FrozenClock(), CountingBlobStore(MemoryBlobStore())
    options: dict[str, Any] = {"ttl": timedelta(seconds=1), "clock": clock}
    async with (
        open_store(blobs, cleanup_interval=timedelta(milliseconds=1), **options) as store,
        local(store, [Painter()], start_paused=True) as dispatcher,
    ):
        waiting = []
        for number in range(jobs):
            session = await store.create_session()
            await session.store_image(Image.new("RGB", (8, 8), (number, 0, 0)), "start")
            request = await session.generation_request("painter", slots=["start"])
            waiting.append((session, await dispatcher.submit(request)))
            await session.clear_all_images()
        clock.advance(hours=100)
        await _swept(blobs, 20)
        dispatcher.resume()
        for number, (session, job) in enumerate(waiting):
            (image,) = (await job.result()).values()
            async with session.output_file(image) as path:
                with Image.open(path) as found:
                    assert found.getpixel((0, 0)) == (number, 0, 0)
        clock.advance(hours=100)
        await _swept(blobs, 20)
        for prefix in ("manifests/", "blobs/", "queue/"):
            assert await keys_of(blobs, prefix) == set()
    return blobs.count("list", prefix="manifests/")


async def _swept(blobs: CountingBlobStore, times: int) -> None:
    until = blobs.count("list", prefix="manifests/") + times
    with anyio.fail_after(60):
        while blobs.count("list", prefix="manifests/") < until:  # noqa: ASYNC110 - the sweep tells nobody
            await anyio.sleep(0.001)
