from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    BlobInfo,
    CorruptBlobError,
    Finding,
    ImageRecord,
    JobInfo,
    Session,
    SessionNotFoundError,
    SessionStore,
    SlotEmptyError,
    StorageError,
    VerifyReport,
    open_store,
)
from async_sessions._manifest import Manifest
from async_sessions.testing.clock import FrozenClock
from async_sessions.verify import claims, still_so
from tests.faults import FaultyBlobStore, files_below, keys_of
from tests.proof.damage import check_damage

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")
HOUR = timedelta(hours=1)

STRANGER = f"blobs/{'3' * 32}/{'1' * 64}.{'2' * 16}"


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FrozenClock) -> AsyncIterator[SessionStore]:
    async with open_store(tmp_path / "root", cleanup_interval=None, clock=clock) as opened:
        yield opened


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in files_below(root)}


def told(report: VerifyReport) -> list[tuple[str, str]]:
    return sorted((finding.kind, finding.key) for finding in report.findings)


def job_of(session: Session, **fields: Any) -> JobInfo:
    values: dict[str, Any] = {
        "inputs": {},
        "params": {},
        "submitted_at": FrozenClock().now,
        "owner": "o",
        "pipeline": "p",
    }
    return JobInfo(id=f"{session.key}.{'0' * 16}", **{**values, **fields})


async def test_a_whole_store_has_no_findings_and_every_byte_of_it_was_read(store: SessionStore) -> None:
    session = await store.create_session()
    for image in (RED, BLUE):
        await session.store_image(image, "start")
    output = await session.store_output(b"made", name="text", media_type="text/plain")
    job = job_of(session, status="succeeded", outputs={"text": output})
    await session.edit_job(job.id, lambda _: job)
    report = await store.verify()
    assert report.findings == ()
    assert (report.sessions, report.blobs, report.bytes) == (1, 5, (await session.info()).total_bytes)


async def test_it_tells_how_far_it_is(store: SessionStore) -> None:
    for _ in range(3):
        await store.create_session()
    seen: list[tuple[int, int]] = []
    await store.verify(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


async def test_looking_changes_nothing(store: SessionStore, root: Path, clock: FrozenClock) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    await store.blobs.put(STRANGER, b"of no session")
    (root / record.blob).write_bytes(b"flipped")
    (root / f"{record.blob}.thumb").unlink()
    damaged = await store.create_session()
    (root / "manifests" / damaged.key[:2] / f"{damaged.key}.json").write_bytes(b"{")
    clock.advance(hours=2)
    before = contents(root)
    report = await store.verify()
    assert [finding.kind for finding in report.findings] == ["damaged", "thumbnail", "orphan", "manifest"]
    assert report.unrepaired == report.findings
    assert contents(root) == before


@pytest.mark.parametrize("kind", ["damaged", "missing"])
async def test_a_lost_image_leaves_its_slot_and_what_is_left_of_it_is_kept(
    kind: str, store: SessionStore, root: Path
) -> None:
    session = await store.create_session()
    lost, whole = await session.store_image(RED, "start"), await session.store_image(BLUE, "end")
    path = root / lost.blob
    path.write_bytes(path.read_bytes()[:-1]) if kind == "damaged" else path.unlink()
    (finding,) = (await store.verify()).findings
    assert (finding.kind, finding.key, finding.session) == (kind, lost.blob, session.key)
    assert "slot 'start'" in finding.reason
    with pytest.raises(CorruptBlobError):
        await session.retrieve_bytes("start")
    report = await store.verify(repair=True)
    assert (told(report), report.unrepaired) == ([(kind, lost.blob)], ())
    with pytest.raises(SlotEmptyError):
        await session.retrieve_bytes("start")
    assert (await session.info()).images == {"end": whole}
    assert await keys_of(store.blobs, "blobs/") == {whole.blob, f"{whole.blob}.thumb"}
    kept = await keys_of(store.blobs, "quarantine/")
    parts = {f"quarantine/{lost.blob}", f"quarantine/{lost.blob}.thumb"} - (
        {f"quarantine/{lost.blob}"} if kind == "missing" else set()
    )
    assert kept == parts | {f"{part}.reason.json" for part in parts}
    for part in parts:
        reason = json.loads((root / f"{part}.reason.json").read_bytes())
        assert (reason["kind"], reason["session"]) == (kind, session.key)
    again = await store.verify()
    assert (again.findings, again.quarantined) == ((), len(parts))


async def test_a_lost_recent_image_can_not_be_put_back_any_more(store: SessionStore, root: Path) -> None:
    session = await store.create_session()
    red = await session.store_image(RED, "start")
    await session.store_image(BLUE, "start")
    (root / red.blob).unlink()
    await store.verify(repair=True)
    assert (await session.info()).recent == ()
    assert (await session.retrieve_image("start")).size == BLUE.size


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x")], ids=["missing", "damaged"])
async def test_a_lost_thumbnail_is_made_anew(
    damage: Callable[[Path], object], store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    thumbnail = await session.retrieve_thumbnail("start")
    expires = (await session.info()).expires_at
    damage(root / f"{record.blob}.thumb")
    clock.advance(minutes=5)
    report = await store.verify(repair=True)
    assert told(report) == [("thumbnail", f"{record.blob}.thumb")]
    assert report.unrepaired == ()
    assert await session.retrieve_thumbnail("start") == thumbnail
    assert (await store.verify()).findings == ()
    assert (await session.info()).expires_at == expires  # a repair is no use


async def test_a_thumbnail_that_comes_out_differently_is_the_recorded_one_from_then_on(
    store: SessionStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    (root / f"{record.blob}.thumb").unlink()
    monkeypatch.setattr("async_sessions._codec.decode._QUALITY", 10)  # as another version of Pillow might
    await store.verify(repair=True)
    made = (await session.info()).images["start"]
    assert made.thumbnail_digest != record.thumbnail_digest
    assert made.thumbnail_size == len(await session.retrieve_thumbnail("start"))
    assert (await store.verify()).findings == ()


async def test_a_job_whose_result_is_lost_has_failed(store: SessionStore, root: Path) -> None:
    session = await store.create_session()
    output = await session.store_output(b"made", name="text", media_type="text/plain")
    job = job_of(session, status="succeeded", outputs={"text": output})
    await session.edit_job(job.id, lambda _: job)
    (root / output.blob).write_bytes(b"fake")
    assert told(await store.verify(repair=True)) == [("damaged", output.blob)]
    entry = (await session.info()).jobs[job.id]
    assert (entry.status, entry.outputs) == ("failed", {})
    assert entry.error is not None
    assert "submit it again" in entry.error.message
    assert (await store.verify()).findings == ()


async def test_a_job_that_is_not_over_keeps_its_lost_image_until_it_is(store: SessionStore, root: Path) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    job = job_of(session, inputs={"start": record})
    await store.blobs.put(f"queue/{job.id}.json", b"{}")
    await session.edit_job(job.id, lambda _: job)
    (root / record.blob).write_bytes(b"flipped")
    (finding,) = (await store.verify(repair=True)).findings
    assert finding.repair == ""
    assert "no slot holds it any more, but a job that is not over names it" in finding.reason
    assert (await session.info()).jobs == {job.id: job}
    assert not await session.has_image("start")
    assert await keys_of(store.blobs, "quarantine/") == set()
    (again,) = (await store.verify(repair=True)).findings
    assert again.reason.endswith("it can't be repaired now: a job that is not over names it.")
    await session.edit_job(job.id, lambda old: replace(old, status="failed") if old else None)
    assert (await store.verify(repair=True)).unrepaired == ()
    assert f"quarantine/{record.blob}" in await keys_of(store.blobs, "quarantine/")
    assert (await session.info()).jobs[job.id].inputs == {}


async def test_blobs_that_no_session_names_are_moved_once_they_are_old(
    store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    beside = f"{Path(record.blob).parent}/{'1' * 64}.{'2' * 16}"
    for blob in (STRANGER, beside):
        await store.blobs.put(blob, b"never named")
    assert (await store.verify(repair=True)).findings == ()
    clock.advance(hours=2)
    report = await store.verify(repair=True)
    assert told(report) == sorted([("orphan", STRANGER), ("orphan", beside)])
    assert report.quarantined_bytes == 2 * len(b"never named")
    assert (root / "quarantine" / STRANGER).read_bytes() == b"never named"
    assert await keys_of(store.blobs, "blobs/") == {record.blob, f"{record.blob}.thumb"}


@pytest.mark.parametrize("kind", ["damaged", "orphan", "manifest"])
async def test_of_what_was_cut_down_to_nothing_none_is_said_to_be_moved(
    kind: str, store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    session = await store.create_session()
    record = await session.store_image(RED, "start")
    key = {"damaged": record.blob, "orphan": STRANGER, "manifest": f"manifests/{session.key[:2]}/{session.key}.json"}[
        kind
    ]
    await store.blobs.put(STRANGER, b"never named")
    (root / key).write_bytes(b"")
    clock.advance(hours=2)
    report = await store.verify(repair=True)
    (finding,) = [each for each in report.findings if each.key == key]
    assert finding.kind == kind
    assert finding.repair.endswith("removed, since it was empty")
    assert not (root / "quarantine" / key).exists()
    assert (root / "quarantine" / f"{key}.reason.json").exists()


async def test_a_session_that_can_not_be_read_is_moved_with_its_blobs(
    store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    session, whole = await store.create_session(), await store.create_session()
    record = await session.store_image(RED, "start")
    manifest = f"manifests/{session.key[:2]}/{session.key}.json"
    (root / manifest).write_bytes((root / manifest).read_bytes()[:-20])
    (finding,) = (await store.verify(repair=True)).findings
    assert (finding.kind, finding.repair) == ("manifest", "")  # its last blobs might not be told from new ones yet
    assert "stays until it is older than 1:00:00" in finding.reason
    clock.advance(hours=2)
    report = await store.verify(repair=True)
    blobs = {record.blob, f"{record.blob}.thumb"}
    assert told(report) == sorted([("manifest", manifest), *(("orphan", blob) for blob in blobs)])
    assert report.unrepaired == ()
    kept = {key for key in await keys_of(store.blobs, "quarantine/") if not key.endswith(".reason.json")}
    assert kept == {f"quarantine/{key}" for key in (manifest, *blobs)}
    with pytest.raises(SessionNotFoundError):
        await session.info()
    assert [info.key async for info in store.sessions()] == [whole.key]


async def test_what_came_into_quarantine_first_is_not_replaced(
    store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    for content in (b"first", b"second"):
        session = await store.session_for("user")
        manifest = f"manifests/{session.key[:2]}/{session.key}.json"
        (root / manifest).write_bytes(content)
        clock.advance(hours=2)
        await store.verify(repair=True)
    kept = {key for key in await keys_of(store.blobs, "quarantine/") if not key.endswith(".reason.json")}
    assert {(root / key).read_bytes() for key in kept} == {b"first", b"second"}


async def test_a_newer_session_is_left_alone_and_so_is_what_it_may_name(
    store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    newer, damaged = await store.create_session(), await store.create_session()
    await newer.store_image(RED, "start")
    path = root / "manifests" / newer.key[:2] / f"{newer.key}.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "schema": 99}))
    (root / "manifests" / damaged.key[:2] / f"{damaged.key}.json").write_bytes(b"{")
    await store.blobs.put(STRANGER, b"whose?")
    clock.advance(hours=2)
    before = contents(root)
    report = await store.verify(repair=True)
    assert sorted(finding.kind for finding in report.findings) == ["manifest", "newer_schema"]
    assert report.unrepaired == report.findings
    assert contents(root) == before


async def test_markers_and_jobs_are_brought_together(store: SessionStore, root: Path, clock: FrozenClock) -> None:
    session = await store.create_session()
    job = job_of(session)
    await session.edit_job(job.id, lambda _: job)
    stale = [f"queue/{session.key}.{'1' * 16}.json", f"queue/{'9' * 32}.{'1' * 16}.json"]
    for marker in stale:
        await store.blobs.put(marker, b"{}")
    marker = f"queue/{job.id}.json"
    assert told(await store.verify()) == [("unmarked_job", marker)]
    clock.advance(hours=2)
    assert (await store.verify(repair=True)).unrepaired == ()
    assert await keys_of(store.blobs, "queue/") == {marker}
    assert json.loads((root / marker).read_bytes()) == {"owner": "o"}
    assert (await store.verify()).findings == ()
    clock.advance(hours=2)
    ended = clock.now
    await session.edit_job(job.id, lambda old: replace(old, status="failed", finished_at=ended) if old else None)
    assert (await store.verify()).findings == ()  # its dispatcher is about to remove the marker
    clock.advance(hours=2)
    assert told(await store.verify(repair=True)) == [("stale_marker", marker)]
    assert await keys_of(store.blobs, "queue/") == set()


async def test_the_lease_of_the_dead_goes_and_what_is_not_ours_stays(store: SessionStore, clock: FrozenClock) -> None:
    foreign = ["README", "manifests/aa/notes.txt", f"manifests/ab/{'0' * 32}.json", "blobs/mine/picture.png"]
    for key in (*foreign, "owners/one.json", "cookie/secret"):
        await store.blobs.put(key, b"x")
    clock.advance(hours=2)
    report = await store.verify(repair=True)
    assert told(report) == sorted([*(("foreign", key) for key in foreign), ("stale_lease", "owners/one.json")])
    assert await keys_of(store.blobs) == {*foreign, "cookie/secret"}


async def test_what_is_in_quarantine_is_no_session_and_no_sweep_takes_it(
    store: SessionStore, root: Path, clock: FrozenClock
) -> None:
    session = await store.create_session()
    await session.store_image(RED, "start")
    (root / "manifests" / session.key[:2] / f"{session.key}.json").write_bytes(b"{")
    clock.advance(hours=2)
    await store.verify(repair=True)
    kept = await keys_of(store.blobs)
    assert kept
    assert all(key.startswith("quarantine/") for key in kept)
    clock.advance(days=400)
    assert (await store.cleanup()).removed == ()
    assert await keys_of(store.blobs) == kept
    report = await store.verify(repair=True)
    assert (report.findings, report.sessions, report.quarantined) == ((), 0, 3)


async def test_a_large_blob_is_not_held_in_memory(store: SessionStore, root: Path) -> None:
    session = await store.create_session()
    large = bytes(5 * 2**20)
    output = await session.store_output(large, name="video", media_type="video/mp4")
    job = job_of(session, status="succeeded", outputs={"video": output})
    await session.edit_job(job.id, lambda _: job)
    read: list[str] = []
    get = store.blobs.get

    async def noted(key: str) -> object:
        read.append(key)
        return await get(key)

    store.blobs.get = noted  # type: ignore[method-assign,assignment]
    report = await store.verify()
    assert (report.findings, report.bytes) == ((), len(large))
    assert output.blob not in read
    (root / output.blob).write_bytes(large[:-1] + b"x")
    assert told(await store.verify(repair=True)) == [("damaged", output.blob)]
    assert output.blob not in read


async def test_a_full_disk_leaves_what_is_damaged_where_it_is() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        record = await session.store_image(RED, "start")
        await blobs.inner.put(record.blob, b"flipped")
        blobs.full_for = lambda key: True
        (finding,) = (await store.verify(repair=True)).findings
        assert finding.repair == ""
        assert "No room is left" in finding.reason
        assert (await session.info()).images == {"start": record}
        blobs.full_for = lambda key: False
        assert (await store.verify(repair=True)).unrepaired == ()


async def test_a_session_that_can_not_be_read_stays_as_long_as_its_blobs_can_not_be_moved(clock: FrozenClock) -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None, clock=clock) as store:
        session = await store.create_session()
        record = await session.store_image(RED, "start")
        manifest = f"manifests/{session.key[:2]}/{session.key}.json"
        await blobs.inner.put(manifest, b"{")
        clock.advance(hours=2)
        blobs.full_for = lambda key: key == f"quarantine/{record.blob}"
        report = await store.verify(repair=True)
        assert {finding.key for finding in report.unrepaired} == {record.blob, manifest}
        await store.cleanup()
        assert {record.blob, manifest} <= await keys_of(blobs)
        blobs.full_for = lambda key: False
        assert (await store.verify(repair=True)).unrepaired == ()
        assert {f"quarantine/{record.blob}", f"quarantine/{manifest}"} <= await keys_of(blobs)


class Meanwhile(FaultyBlobStore):
    """Does something to the store just before a key is read, or just after a folder was listed, once."""

    def __init__(self) -> None:
        super().__init__()
        self.on_get: dict[str, Callable[[], Any]] = {}
        self.after_list: dict[str, Callable[[], Any]] = {}

    async def get(self, key: str) -> Any:
        if act := self.on_get.pop(key, None):
            await act()
        return await super().get(key)

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        async for info in self.inner.list(prefix):
            yield info
        if act := self.after_list.pop(prefix, None):
            await act()


async def test_what_the_storage_does_not_give_is_told_and_left_alone() -> None:
    async def fail() -> None:
        raise StorageError("Input/output error.")

    blobs = Meanwhile()
    async with open_store(blobs, cleanup_interval=None) as store:
        broken, session = await store.create_session(), await store.create_session()
        record = await session.store_image(RED, "start")
        manifest = f"manifests/{broken.key[:2]}/{broken.key}.json"
        blobs.on_get = {record.blob: fail, manifest: fail}
        report = await store.verify(repair=True)
        assert told(report) == sorted([("unreadable", record.blob), ("unreadable", manifest)])
        assert report.unrepaired == report.findings
        assert (await store.verify()).findings == ()


async def test_an_image_that_is_cleared_while_it_is_looked_at_is_no_finding() -> None:
    blobs = Meanwhile()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        record = await session.store_image(RED, "start")
        blobs.on_get[record.blob] = session.clear_all_images
        assert (await store.verify(repair=True)).findings == ()
        assert await keys_of(blobs, "blobs/") == set()


async def test_a_session_that_begins_while_a_long_verification_runs_is_no_orphan() -> None:
    blobs = Meanwhile()
    clock = FrozenClock()

    async def begin() -> None:
        clock.now -= 2 * HOUR
        session = await store.create_session()
        kept.append(await session.store_image(RED, "start"))
        clock.advance(hours=2)

    kept: list[ImageRecord] = []
    async with open_store(blobs, cleanup_interval=None, clock=clock) as store:
        clock.advance(hours=2)
        await store.create_session()
        blobs.after_list["manifests/"] = begin
        assert (await store.verify(repair=True)).findings == ()
        assert await keys_of(blobs, "blobs/") == {kept[0].blob, f"{kept[0].blob}.thumb"}


async def test_an_image_that_is_being_stored_is_no_orphan(clock: FrozenClock) -> None:
    blobs = FaultyBlobStore()
    gate = anyio.Event()
    async with open_store(blobs, cleanup_interval=None, clock=clock) as store:
        session = await store.create_session()
        blobs.before_put = lambda key: gate if key.startswith("manifests/") else None
        async with anyio.create_task_group() as group:
            group.start_soon(session.store_image, RED, "start")
            await blobs.putting.wait()
            clock.advance(hours=2)
            assert (await store.verify(repair=True)).findings == ()
            gate.set()
        assert (await session.retrieve_bytes("start"))[:4] == b"\x89PNG"


async def test_an_image_that_is_cleared_while_it_is_repaired_does_not_stay_in_quarantine() -> None:
    blobs = FaultyBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        record = await session.store_image(RED, "start")
        await blobs.inner.put(record.blob, b"flipped")
        gate = anyio.Event()
        blobs.before_put = lambda key: gate if key.startswith("quarantine/") else None
        reports: list[VerifyReport] = []

        async def repair() -> None:
            reports.append(await store.verify(repair=True))

        async with anyio.create_task_group() as group:
            group.start_soon(repair)
            await blobs.putting.wait()
            await session.clear_all_images()
            gate.set()
        assert [finding.repair for finding in reports[0].findings] == ["removed meanwhile"]
        assert await keys_of(blobs, "quarantine/") == set()


async def test_two_repairs_at_once_agree(store: SessionStore, root: Path, clock: FrozenClock) -> None:
    session = await store.create_session()
    lost, whole = await session.store_image(RED, "start"), await session.store_image(BLUE, "end")
    (root / lost.blob).write_bytes(b"flipped")
    (root / f"{whole.blob}.thumb").unlink()
    await store.blobs.put(STRANGER, b"of no session")
    clock.advance(hours=2)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(lambda: store.verify(repair=True))
    assert (await store.verify()).findings == ()
    assert (await session.retrieve_image("end")).size == BLUE.size
    assert {f"quarantine/{lost.blob}", f"quarantine/{STRANGER}"} <= await keys_of(store.blobs, "quarantine/")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.slow
async def test_every_damage_is_reported_and_harms_nothing_else(tmp_path: Path) -> None:
    done = await check_damage(tmp_path, sessions=2, variants=24, seed=4)
    assert set(done) == {"flip", "truncate", "delete"}


def test_what_a_manifest_claims_is_what_it_names() -> None:
    record = ImageRecord(
        digest="1" * 64,
        media_type="image/png",
        width=1,
        height=1,
        mode="L",
        has_alpha=False,
        orientation=1,
        byte_size=10,
        thumbnail_size=5,
        stored_at=FrozenClock().now,
        blob="blobs/a",
    )
    manifest = Manifest.new("0" * 32, "1" * 32, FrozenClock().now).with_image("start", record, FrozenClock().now)
    claimed = claims(manifest)
    assert claimed.keys() == manifest.named_blobs() == {"blobs/a", "blobs/a.thumb"}
    assert sum(claim.size for claim in claimed.values()) == manifest.total_bytes()
    missing = Finding(kind="missing", key="blobs/a", reason="")
    assert still_so(missing, manifest)
    assert not still_so(missing, manifest.without_image("start", FrozenClock().now).cleared(FrozenClock().now))
