from __future__ import annotations

import json
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image

from async_sessions import (
    CorruptBlobError,
    CorruptManifestError,
    InvalidKeyError,
    JobInfo,
    Limits,
    LockTimeoutError,
    QuotaExceededError,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    StoreClosedError,
    UnknownSchemaError,
    open_store,
)
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, files_below, keys_of

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")


async def test_a_session_is_there_after_a_restart(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root") as store:
        session = await store.create_session(model="i2v-A14B")
        record = await session.store_image(RED, "start")
    assert session.id is not None
    async with open_store(str(tmp_path / "root")) as store:
        again = await store.restore_session(session.id)
        assert (await again.retrieve_image("start")).tobytes() == RED.tobytes()
        info = await again.info()
        assert info.images == {"start": record}
        assert info.state == {"model": "i2v-A14B"}


async def test_a_store_that_is_not_open_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path / "root")
    with pytest.raises(StoreClosedError):
        store.session("x")
    async with store:
        session = await store.create_session()
    for call in (session.info, session.delete, lambda: session.store_image(RED, "start"), store.cleanup):
        with pytest.raises(StoreClosedError):
            await call()


async def test_a_store_can_be_opened_again(tmp_path: Path) -> None:
    store = open_store(tmp_path / "root")
    async with store:
        session = await store.create_session()
    async with store:
        assert (await (await store.open_by_key(session.key)).info()).images == {}


async def test_a_root_that_others_can_write_to_is_refused_at_the_door(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StorageError, match="chmod 700"):
        async with open_store(tmp_path):
            pass


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="memory://"):
        open_store("gopher://x")


async def test_unknown_and_deleted_sessions_are_one_answer(session_store: SessionStore) -> None:
    session = await session_store.create_session()
    assert session.id is not None
    await session_store.delete_session(session.id)
    await session_store.delete_session("never seen")
    messages = set()
    for session_id in (session.id, "never seen", "../../etc/passwd", ""):
        with pytest.raises(SessionNotFoundError) as raised:
            await session_store.restore_session(session_id)
        messages.add(str(raised.value))
    assert len(messages) == 1


async def test_a_key_that_is_none_is_refused(session_store: SessionStore) -> None:
    for key in ("", "../x", "A" * 32, "0" * 31):
        with pytest.raises(InvalidKeyError):
            await session_store.open_by_key(key)


async def test_a_handle_writes_nothing_until_it_stores_something(session_store: SessionStore) -> None:
    session = session_store.session("minted and signed by us")
    with pytest.raises(SessionNotFoundError):
        await session.info()
    with pytest.raises(SessionNotFoundError):
        await session.clear_all_images()
    assert await keys_of(session_store.blobs) == set()
    await session.store_image(RED, "start")
    assert (await session_store.restore_session("minted and signed by us")).key == session.key


async def test_racing_first_writes_make_one_session(session_store: SessionStore) -> None:
    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(session_store.session("id").store_image, RED, f"slot{number}")
    info = await (await session_store.restore_session("id")).info()
    assert len(info.images) == 8
    assert len(await keys_of(session_store.blobs, "blobs/")) == 16


async def test_the_next_life_of_an_id_knows_nothing_of_the_last(session_store: SessionStore) -> None:
    first = session_store.session("id")
    await first.store_image(RED, "start")
    await session_store.delete_session("id")
    second = session_store.session("id")
    await second.update_state(a=1)
    assert (await second.info()).images == {}
    with pytest.raises(SessionNotFoundError):
        await first.store_image(RED, "start")


async def test_a_user_has_one_session_by_name(session_store: SessionStore) -> None:
    first = await session_store.session_for("ada")
    await first.store_image(RED, "start")
    again = await session_store.session_for("ada")
    assert again.key == first.key
    assert await again.has_image("start")
    assert (await session_store.session_for("bob")).key != first.key
    assert {info.key async for info in session_store.sessions()} == {
        first.key,
        (await session_store.session_for("bob")).key,
    }


async def test_an_unused_session_expires_and_a_used_one_does_not() -> None:
    clock = FrozenClock()
    async with open_store("memory://", ttl=timedelta(hours=24), cleanup_interval=None, clock=clock) as store:
        unused, used = await store.create_session(), await store.create_session()
        await used.store_image(RED, "start")
        for _ in range(30):
            clock.advance(hours=1)
            await used.retrieve_image("start")
        with pytest.raises(SessionNotFoundError):
            await unused.info()
        assert used.id is not None
        assert (await (await store.restore_session(used.id)).info()).expires_at > clock.now


async def test_a_session_ends_at_its_maximal_age_however_much_it_is_used() -> None:
    clock = FrozenClock()
    async with open_store("memory://", max_age=timedelta(hours=5), clock=clock) as store:
        session = await store.create_session()
        clock.advance(hours=4)
        await session.touch()
        clock.advance(hours=1)
        with pytest.raises(SessionNotFoundError):
            await session.info()


async def test_a_touch_is_written_rarely() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock) as store:
        session = await store.create_session()
        revision = (await session.info()).revision
        clock.advance(minutes=59)
        await session.touch()
        assert (await session.info()).revision == revision
        clock.advance(minutes=1)
        await session.touch()
        assert (await session.info()).revision != revision


async def test_a_damaged_blob_is_typed_and_harms_no_other_slot(session_store: SessionStore, tmp_path: Path) -> None:
    session = await session_store.create_session()
    for slot, color in (("start", "red"), ("end", "blue"), ("middle", "green")):
        await session.store_image(Image.new("RGB", (50, 50), color), slot)
    images = (await session.info()).images
    root = tmp_path / "sessions"
    (root / images["start"].blob).write_bytes(b"flipped")
    (root / images["end"].blob).unlink()
    async with open_store(root, cleanup_interval=None) as fresh:
        again = await fresh.open_by_key(session.key)
        for slot in ("start", "end"):
            with pytest.raises(CorruptBlobError):
                await again.retrieve_image(slot)
        assert (await again.retrieve_image("middle")).size == (50, 50)
        await again.store_image(RED, "start")
        assert (await again.retrieve_image("start")).size == RED.size


async def test_a_damaged_thumbnail_is_typed_and_the_image_is_still_there(
    session_store: SessionStore, tmp_path: Path
) -> None:
    session = await session_store.create_session()
    record = await session.store_image(RED, "start")
    path = tmp_path / "sessions" / f"{record.blob}.thumb"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    for damage in (lambda: path.write_bytes(flipped), path.unlink):
        damage()
        with pytest.raises(CorruptBlobError):
            await session.retrieve_thumbnail("start")
    assert (await session.retrieve_image("start")).size == RED.size


async def test_a_damaged_manifest_is_typed_and_harms_no_other_session(
    session_store: SessionStore, tmp_path: Path
) -> None:
    damaged, newer, whole = [await session_store.create_session() for _ in range(3)]
    root = tmp_path / "sessions" / "manifests"
    (root / damaged.key[:2] / f"{damaged.key}.json").write_bytes(b'{"schema": 1, "key"')
    path = root / newer.key[:2] / f"{newer.key}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(CorruptManifestError):
        await damaged.info()
    with pytest.raises(CorruptManifestError):
        await damaged.store_image(RED, "start")
    with pytest.raises(UnknownSchemaError, match="Upgrade"):
        await newer.update_state(a=1)
    before = files_below(root)
    assert [info.key async for info in session_store.sessions()] == [whole.key]
    assert len((await session_store.cleanup()).problems) == 2
    assert files_below(root) == before


async def test_no_flipped_bit_of_a_manifest_goes_unnoticed(session_store: SessionStore, tmp_path: Path) -> None:
    session = await session_store.create_session(prompt="a red car")
    path = tmp_path / "sessions" / "manifests" / session.key[:2] / f"{session.key}.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptManifestError):
            await session.info()
    path.write_bytes(whole)
    assert (await session.info()).state == {"prompt": "a red car"}


async def test_a_manifest_of_the_first_format_is_read_and_sealed_by_the_next_write(
    session_store: SessionStore, tmp_path: Path
) -> None:
    session = await session_store.create_session(prompt="a red car")
    path = tmp_path / "sessions" / "manifests" / session.key[:2] / f"{session.key}.json"
    unsealed = {**json.loads(path.read_bytes()), "schema": 1}
    del unsealed["seal"]
    path.write_text(json.dumps(unsealed))
    assert (await session.info()).state == {"prompt": "a red car"}
    await session.update_state(seed=7)
    written = json.loads(path.read_bytes())
    assert (written["schema"], len(written["seal"])) == (2, 64)
    assert (await session.info()).state == {"prompt": "a red car", "seed": 7}


async def test_closing_deletes_what_this_store_made_where_it_was_asked_to(tmp_path: Path) -> None:
    async with open_store(tmp_path / "root") as store:
        kept = await store.create_session()
    async with open_store(tmp_path / "root", delete_on_close=True) as store:
        await (await store.open_by_key(kept.key)).store_image(RED, "start")
        made, busy = await store.create_session(), await store.create_session()
        await made.store_image(RED, "start")
        job = JobInfo(
            id=f"{busy.key}.{'0' * 16}", pipeline="p", inputs={}, params={}, submitted_at=store.clock(), owner="o"
        )
        await busy.edit_job(job.id, lambda _: job)
    async with open_store(tmp_path / "root") as store:
        assert {info.key async for info in store.sessions()} == {kept.key, busy.key}


async def test_a_failure_to_delete_on_close_comes_out_as_it_is() -> None:
    blobs = FaultyBlobStore()
    store = open_store(blobs, delete_on_close=True, cleanup_interval=None)
    await store.__aenter__()
    await store.create_session()
    blobs.full_for, blobs.error = (lambda key: True), LockTimeoutError
    with pytest.raises(LockTimeoutError):
        await store.__aexit__(None, None, None)


async def test_closing_waits_for_what_is_being_committed() -> None:
    blobs = FaultyBlobStore()
    gate = anyio.Event()
    store = open_store(blobs, cleanup_interval=None)
    async with anyio.create_task_group() as group:

        async def open_and_leave() -> None:
            async with store:
                session = await store.create_session()
                keys.append(session.key)
                blobs.before_put = lambda key: gate
                group.start_soon(session.store_image, RED, "start")
                await blobs.putting.wait()
            closed.set()

        keys: list[str] = []
        closed = anyio.Event()
        group.start_soon(open_and_leave)
        await blobs.putting.wait()
        await anyio.wait_all_tasks_blocked()
        assert not closed.is_set()
        gate.set()
    async with store:
        assert (await (await store.open_by_key(keys[0])).info()).images["start"].size == RED.size


async def test_an_error_in_the_body_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(SessionNotFoundError):
        async with open_store(tmp_path / "root") as store:
            await store.restore_session("unknown")


async def test_a_session_made_while_the_store_closes_is_deleted_or_refused(tmp_path: Path) -> None:
    async def keep_creating(store: SessionStore) -> None:
        with suppress(StoreClosedError):
            while True:
                await store.create_session()

    store = open_store(tmp_path / "root", delete_on_close=True, cleanup_interval=None)
    async with anyio.create_task_group() as group, store:
        for _ in range(4):
            group.start_soon(keep_creating, store)
        for _ in range(20):
            await store.create_session()
    assert files_below(tmp_path / "root", "manifests") == []


async def test_files_that_are_not_ours_disturb_nothing(session_store: SessionStore, tmp_path: Path) -> None:
    session = await session_store.create_session()
    record = await session.store_image(RED, "start")
    root = tmp_path / "sessions"
    for path in (
        root / "manifests" / ".DS_Store",
        root / "manifests" / session.key[:2] / ".nfs0001",
        root / "manifests" / "README",
        root / "tmp" / ".nfs0001",
        (root / record.blob).parent / ".nfs0001",
        root / "queue" / "x.json",
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    assert [info.key async for info in session_store.sessions()] == [session.key]
    report = await session_store.cleanup(now=session_store.clock() + timedelta(hours=2))
    assert report.removed == ()
    assert await session.has_image("start")


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": timedelta(0)},
        {"ttl": timedelta(days=4_000_000)},
        {"grace": timedelta(seconds=119)},
        {"cleanup_interval": timedelta(0)},
        {"max_age": timedelta(hours=-1)},
    ],
)
def test_a_period_that_makes_no_sense_is_refused(options: dict[str, timedelta]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        open_store("memory://", **options)


@pytest.mark.parametrize("name", ["ttl", "max_age", "cleanup_interval", "grace"])
def test_a_period_that_is_no_timedelta_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^`{name}` is a timedelta, for example timedelta\(hours=24\); not 3600\.$"):
        open_store("memory://", **{name: 3600})


@pytest.mark.parametrize("name", ["ttl", "grace"])
def test_a_period_that_has_to_be_there_is_refused_where_it_is_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"`{name}` is a timedelta"):
        open_store("memory://", **{name: None})


def test_what_is_no_blob_store_is_refused_with_what_to_call_instead() -> None:
    nones: list[Any] = ["folder", Path("folder"), 5, None, {}]
    for blobs in nones:
        with pytest.raises(TypeError, match=r"SessionStore takes a BlobStore.*open_store\('folder'\)\.$"):
            SessionStore(blobs)
    for target in nones[2:]:
        with pytest.raises(TypeError, match="BlobStore"):
            open_store(target)


def test_a_cache_smaller_than_none_is_refused() -> None:
    with pytest.raises(ValueError, match="`cache_bytes`"):
        open_store("memory://", cache_bytes=-1)


async def test_a_store_without_a_cache_keeps_no_image_in_memory() -> None:
    async with open_store("memory://", cache_bytes=0) as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8), "red"), "start")
        for _ in range(2):
            assert (await session.retrieve_image("start")).size == (8, 8)
        assert (await store.stats()).cache.bytes == 0


async def test_a_value_may_have_any_name(session_store: SessionStore) -> None:
    session = await session_store.create_session(**{"self": 1, "values": 2})
    await session.update_state(**{"self": 3, "state": 4})
    assert (await session.info()).state == {"self": 3, "values": 2, "state": 4}


# --- limits


@pytest.mark.parametrize(
    "name",
    [
        "max_bytes",
        "max_pixels",
        "max_side",
        "max_state_bytes",
        "max_session_bytes",
        "max_session_images",
        "max_total_bytes",
    ],
)
def test_a_limit_that_lets_nothing_in_is_refused(name: str) -> None:
    for number in (0, -1, "many"):
        with pytest.raises(ValueError, match=f"^`{name}` must be a whole number and at least [12]"):
            Limits(**{name: number})  # type: ignore[arg-type]
    assert getattr(Limits(**{name: 2}), name) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("formats", ["PNG", [], (), ("png",), ("PNG", "GIF"), ["PNG"]])
def test_formats_that_nobody_knows_are_refused(formats: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="`formats` is a tuple of one or more of JPEG, PNG, WEBP, AVIF, HEIC; not"):
        Limits(formats=formats)
    assert Limits(formats=("HEIC",)).formats == ("HEIC",)


async def test_the_smallest_limit_of_the_state_lets_a_session_begin() -> None:
    async with open_store("memory://", limits=Limits(max_state_bytes=2)) as store:
        session = await store.create_session()
        with pytest.raises(QuotaExceededError):
            await session.update_state(a=1)
