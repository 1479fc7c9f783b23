from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import anyio
import pytest
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    BlobInfo,
    JobInfo,
    LocalBlobStore,
    MemoryBlobStore,
    Session,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    open_store,
)
from async_sessions._manifest import Lifetime, Manifest
from async_sessions.janitor import plan_sweep
from async_sessions.testing.cancellation import Run, cancel_everywhere
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.fuzz import fuzz
from tests.clock import WallClock
from tests.faults import FaultyBlobStore, files_below, keys_of, named_blobs
from tests.proof.soak import soak
from tests.simulation import VirtualBlobStore, VirtualClock

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")
DAY = timedelta(hours=24)
HOUR = timedelta(hours=1)


def queued_job(session: Session, store: SessionStore, **inputs: object) -> JobInfo:
    return JobInfo(
        id=f"{session.key}.{'0' * 16}",
        pipeline="p",
        inputs=inputs,  # type: ignore[arg-type]
        params={},
        submitted_at=store.clock(),
        owner="o",
    )


async def test_an_expired_session_goes_with_its_blobs_and_a_used_one_stays(session_store: SessionStore) -> None:
    old = await session_store.create_session()
    await old.store_image(RED, "start")
    now = session_store.clock()
    report = await session_store.cleanup(now=now + DAY)
    assert report.removed == ()
    report = await session_store.cleanup(now=now + DAY + HOUR + timedelta(seconds=1))
    assert [(removal.kind, removal.key) for removal in report.removed] == [("session", old.key)]
    assert "24:00:00" in report.removed[0].reason or "1 day" in report.removed[0].reason
    assert report.freed_bytes > 0
    assert await keys_of(session_store.blobs) == set()


async def test_a_dry_run_reports_the_same_and_touches_nothing(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    await session.store_image(RED, "start")
    await session.store_image(BLUE, "start")
    (await session_store.create_session()).key  # noqa: B018
    for later in (2 * HOUR, 2 * DAY):
        now = session_store.clock() + later
        before = await keys_of(session_store.blobs)
        dry = await session_store.cleanup(now=now, dry_run=True)
        assert await keys_of(session_store.blobs) == before
        wet = await session_store.cleanup(now=now)
        assert set(wet.removed) == set(dry.removed)
        assert wet.removed != ()
    assert await keys_of(session_store.blobs) == set()


async def test_a_replaced_image_goes_after_the_grace(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    red = await session.store_image(RED, "start")
    blue = await session.store_image(BLUE, "start")
    now = session_store.clock()
    assert (await session_store.cleanup(now=now + HOUR / 2)).removed == ()
    report = await session_store.cleanup(now=now + 2 * HOUR)
    assert {removal.key for removal in report.removed} == {red.blob, f"{red.blob}.thumb"}
    assert {removal.kind for removal in report.removed} == {"image"}
    assert await keys_of(session_store.blobs, "blobs/") == {blue.blob, f"{blue.blob}.thumb"}
    assert (await session.info()).expires_at < now + DAY + 2 * HOUR  # a sweep is no use


async def test_a_pin_keeps_the_session_and_its_replaced_images(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    red = await session.store_image(RED, "start")
    await session.store_image(BLUE, "start")
    now = session_store.clock()
    await session.pin("me", until=now + 3 * DAY)
    assert (await session_store.cleanup(now=now + 2 * DAY)).removed == ()
    await session.unpin("me")
    assert red.blob in {removal.key for removal in (await session_store.cleanup(now=now + 2 * HOUR)).removed}
    await session.pin("me", until=now + 3 * DAY)
    await session_store.cleanup(now=now + 4 * DAY)
    with pytest.raises(SessionNotFoundError):
        await session.info()


async def test_an_unfinished_job_keeps_its_session_and_its_images(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    red = await session.store_image(RED, "start")
    job = queued_job(session, session_store, start=red)
    await session.edit_job(job.id, lambda _: job)
    await session.clear_image("start")
    now = session_store.clock()
    assert (await session_store.cleanup(now=now + 10 * DAY)).removed == ()
    assert (await (await session.read_record(red)).image()).size == RED.size
    await session.edit_job(job.id, lambda old: replace(old, status="succeeded"))  # type: ignore[type-var]
    report = await session_store.cleanup(now=now + 10 * DAY)
    assert [removal.kind for removal in report.removed] == ["session", "marker"]
    assert await keys_of(session_store.blobs) == set()


async def test_an_unfinished_job_that_lost_its_marker_gets_it_back_and_keeps_it(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    job = queued_job(session, session_store)
    await session.edit_job(job.id, lambda _: job)
    for _ in range(2):
        await session_store.cleanup(now=session_store.clock() + 10 * DAY)
        assert await keys_of(session_store.blobs, "queue/") == {f"queue/{job.id}.json"}


async def test_an_output_that_its_job_has_not_named_yet_survives_a_sweep_from_the_future(
    session_store: SessionStore,
) -> None:
    session = await session_store.create_session()
    job = queued_job(session, session_store)
    await session.edit_job(job.id, lambda _: job)
    output = await session.store_output(b"made", name="text", media_type="text/plain")
    await session_store.cleanup(now=session_store.clock() + 2 * HOUR)
    await session.edit_job(job.id, lambda old: replace(old, status="succeeded", outputs={"text": output}))  # type: ignore[type-var]
    assert [chunk async for chunk in session.stream_output(output)] == [b"made"]


async def test_a_backend_that_raises_what_it_should_not_does_not_end_the_app() -> None:
    class Broken(FaultyBlobStore):
        def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
            listed.set()
            raise RuntimeError("not a StorageError")

    listed = anyio.Event()
    async with open_store(Broken()) as store:
        await listed.wait()
        await anyio.wait_all_tasks_blocked()
        assert (await (await store.create_session()).info()).images == {}


async def test_a_periodic_sweep_obeys_the_maximal_age() -> None:
    clock = FrozenClock()
    async with open_store("memory://", max_age=HOUR / 2, grace=HOUR, cleanup_interval=None, clock=clock) as store:
        await store.create_session()
        janitor = store._open()[1]
        await janitor.sweep(now=clock.now)
        clock.advance(hours=0.6)
        assert [removal.kind for removal in (await janitor.sweep(now=clock.now)).removed] == ["session"]


async def test_images_cleared_under_a_job_go_when_it_ends(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    red = await session.store_image(RED, "start")
    job = queued_job(session, session_store, start=red)
    await session.edit_job(job.id, lambda _: job)
    await session.clear_all_images()
    assert (await session.info()).recent == ()
    assert (await (await session.read_record(red)).image()).size == RED.size
    await session.edit_job(job.id, lambda old: replace(old, status="cancelled"))  # type: ignore[type-var]
    assert await keys_of(session_store.blobs, "blobs/") == set()


async def test_what_a_crash_left_goes_after_the_grace(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with open_store(root, cleanup_interval=None) as store:
        session = await store.create_session()
        record = await session.store_image(RED, "start")
        incarnation = record.blob.split("/")[1]
        await store.blobs.put(f"blobs/{incarnation}/{'1' * 64}.{'2' * 16}", b"never named")
        await store.blobs.put(f"blobs/{'3' * 32}/{'1' * 64}.{'2' * 16}", b"of no session")
        await store.blobs.put(f"queue/{session.key}.{'4' * 16}.json", b"{}")
        (root / "tmp" / "half").write_bytes(b"half")
        now = store.clock()
        assert (await store.cleanup(now=now + HOUR / 2)).removed == ()
        report = await store.cleanup(now=now + 2 * HOUR)
        assert sorted(removal.kind for removal in report.removed) == ["marker", "orphan", "orphan", "temporary"]
        assert await keys_of(store.blobs, "blobs/") == {record.blob, f"{record.blob}.thumb"}
        assert files_below(root, "tmp") == []
        assert (await session.retrieve_image("start")).size == RED.size


async def test_an_unfinished_deletion_is_finished(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    await session.store_image(RED, "start")
    manifests = session_store._context().manifests
    await manifests.edit(session.key, lambda manifest: manifest.as_tombstone() if manifest else None)
    with pytest.raises(SessionNotFoundError):
        await session.info()
    await session_store.cleanup()
    assert await keys_of(session_store.blobs) == set()


async def test_a_damaged_manifest_keeps_every_blob(session_store: SessionStore, tmp_path: Path) -> None:
    session = await session_store.create_session()
    await session.store_image(RED, "start")
    path = tmp_path / "sessions" / "manifests" / session.key[:2] / f"{session.key}.json"
    path.write_bytes(b"{")
    before = await keys_of(session_store.blobs)
    report = await session_store.cleanup(now=session_store.clock() + 10 * DAY)
    assert report.removed == ()
    assert session.key in report.problems[0]
    assert await keys_of(session_store.blobs) == before


async def test_a_blob_that_is_being_committed_survives_a_sweep_from_the_future() -> None:
    blobs = FaultyBlobStore()
    gate = anyio.Event()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        blobs.before_put = lambda key: gate if key.startswith("manifests/") else None
        async with anyio.create_task_group() as group:
            group.start_soon(session.store_image, RED, "start")
            await blobs.putting.wait()
            await store.cleanup(now=store.clock() + 2 * HOUR)
            gate.set()
        async with open_store(blobs.inner, cleanup_interval=None) as fresh:
            assert (await (await fresh.open_by_key(session.key)).retrieve_image("start")).size == RED.size


async def test_a_write_to_disk_survives_a_sweep_from_the_future(session_store: SessionStore, session: Session) -> None:
    gate, started = anyio.Event(), anyio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"half"
        started.set()
        await gate.wait()
        yield b"half"

    async with anyio.create_task_group() as group:
        group.start_soon(session_store.blobs.put, "blobs/a/b", chunks())
        await started.wait()
        await session_store.cleanup(now=session_store.clock() + 2 * HOUR)
        gate.set()
    found = await session_store.blobs.get("blobs/a/b")
    assert found is not None
    assert found.data == b"halfhalf"


async def test_a_cancelled_sweep_has_taken_a_replaced_image_whole_or_not_at_all() -> None:
    async with open_store(FaultyBlobStore(), cleanup_interval=None) as store:
        session = await store.create_session()

        async def prepare() -> None:
            if len(await keys_of(store.blobs, "blobs/")) < 4:
                await session.store_image(RED, "start")
                await session.store_image(BLUE, "start")

        async def check(run: Run) -> None:
            assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)

        later = store.clock() + 2 * HOUR
        await cancel_everywhere(lambda: store.cleanup(now=later), check, prepare=prepare)


async def test_a_session_that_is_used_while_it_is_judged_stays() -> None:
    blobs = FaultyBlobStore()
    clock = FrozenClock()
    gate = anyio.Event()
    async with open_store(blobs, cleanup_interval=None, clock=clock) as store:
        session = await store.create_session()
        clock.advance(days=2)
        blobs.before_put = lambda key: gate
        async with anyio.create_task_group() as group:
            group.start_soon(store.cleanup)
            await blobs.putting.wait()  # the sweep is about to bury it
            blobs.before_put = lambda key: None
            clock.now -= DAY
            await session.update_state(a=1)
            clock.advance(days=1)
            gate.set()
        assert (await session.info()).state == {"a": 1}


async def test_the_first_sweep_runs_at_once_and_does_not_delay_the_opening(tmp_path: Path) -> None:
    clock = FrozenClock()
    async with open_store(tmp_path / "root", cleanup_interval=None) as store:
        await store.create_session()
    gate = anyio.Event()

    class SlowToList(LocalBlobStore):
        async def list(self, prefix=""):  # type: ignore[no-untyped-def]
            await gate.wait()
            async for info in super().list(prefix):
                yield info

    blobs = SlowToList(tmp_path / "root")
    clock.advance(days=2)
    async with open_store(blobs, clock=clock):
        gate.set()
        with anyio.fail_after(10):
            while await keys_of(blobs, "manifests/"):  # noqa: ASYNC110 - the sweep tells nobody
                await anyio.sleep(0.01)


async def test_a_quiet_sweep_reads_no_manifest() -> None:
    blobs = FaultyBlobStore()
    reads: list[str] = []
    get = blobs.inner.get

    async def counted(key: str):  # type: ignore[no-untyped-def]
        reads.append(key)
        return await get(key)

    async with open_store(blobs, cleanup_interval=None) as store:
        for _ in range(5):
            await store.create_session()
        janitor = store._open()[1]
        await janitor.sweep(now=store.clock())
        blobs.inner.get = counted  # type: ignore[method-assign]
        await janitor.sweep(now=store.clock())
        assert reads == []


async def sweeps_under_a_clock_that_is_set() -> None:
    clock = WallClock(VirtualClock())
    await soak(VirtualBlobStore(clock), clock, 8, every=timedelta(milliseconds=100), users=1)


def test_under_a_clock_that_is_set_to_and_fro_nothing_goes_early_and_what_expired_goes_soon() -> None:
    fuzz(sweeps_under_a_clock_that_is_set, seeds=range(3))


async def test_what_a_dry_run_in_the_future_looked_at_goes_when_its_time_has_come() -> None:
    clock = FrozenClock()
    async with open_store("memory://", cleanup_interval=None, clock=clock) as store:
        await store.create_session()
        await store.cleanup(now=clock.now + 2 * DAY, dry_run=True)
        clock.advance(hours=26)
        assert [removal.kind for removal in (await store._open()[1].sweep(now=clock.now)).removed] == ["session"]


async def test_a_file_that_is_no_session_among_the_sessions_ends_no_sweep(tmp_path: Path) -> None:
    clock = FrozenClock()
    async with open_store(tmp_path / "root", cleanup_interval=None, clock=clock) as store:
        session = await store.create_session()
        await store.blobs.put(f"manifests/{session.key[:2]}/copy-of-{session.key}.json", b"{}")
        await store.blobs.put("manifests/note", b"hello")
        clock.advance(hours=26)
        report = await store.cleanup()
        assert [removal.key for removal in report.removed] == [session.key]


def test_a_plan_is_made_from_its_arguments_alone() -> None:
    now = FrozenClock().now
    lifetime = Lifetime(ttl=DAY, max_age=None, grace=HOUR)
    manifest = Manifest.new("0" * 32, "1" * 32, now)
    assert plan_sweep(manifest, now=now, lifetime=lifetime) == (None, ())
    assert plan_sweep(manifest, now=now + 2 * DAY, lifetime=lifetime).expired == f"unused for {DAY}"
    pinned = manifest.with_pin("me", now + 3 * DAY)
    assert plan_sweep(pinned, now=now + 2 * DAY, lifetime=lifetime) == (None, ())
    aged = Lifetime(ttl=DAY, max_age=HOUR, grace=HOUR)
    assert plan_sweep(manifest, now=now + HOUR, lifetime=aged).expired == f"older than {HOUR}"


async def test_what_cannot_be_deleted_ends_no_sweep() -> None:
    class Stubborn(MemoryBlobStore):
        async def delete(self, key: str, **options: object) -> None:
            if key.startswith("tmp/"):
                raise StorageError("It is held fast.")
            await super().delete(key, **options)  # type: ignore[arg-type]

    blobs = Stubborn()
    await blobs.put("tmp/0", b"x")
    await blobs.put("owners/gone.json", b"{}")
    async with open_store(blobs, cleanup_interval=None) as store:
        report = await store.cleanup(now=store.clock() + DAY)
    assert [removal.kind for removal in report.removed] == ["lease"]
    assert report.problems == ("It is held fast.",)
