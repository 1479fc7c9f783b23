from __future__ import annotations

import asyncio
import io
import json
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from PIL import Image

from async_sessions import (
    BundleError,
    Limits,
    MemoryBlobStore,
    QuotaExceededError,
    Session,
    SessionStore,
    StorageError,
    StorageFullError,
    open_store,
)
from async_sessions._archive import ZipReader
from async_sessions.bundle import export_session, import_session, stream_session
from tests.faults import FaultyBlobStore, files_below, keys_of
from tests.images import encoded, photograph
from tests.test_bundle import bundle_of, essence, finished_job, full, open_below

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
RED = Image.new("RGB", (40, 30), "red")
PNG = encoded(RED, "PNG")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see what is left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
async def bundle(session: Session) -> bytes:
    await session.store_image(RED, "start", name="red.png")
    await session.store_image(photograph(64, 48), "end")
    await finished_job(session)
    return await bundle_of(session, jobs=True)


async def in_pieces(data: bytes, size: int = 1000) -> AsyncGenerator[bytes]:
    for start in range(0, len(data), size):
        await anyio.lowlevel.checkpoint()
        yield data[start : start + size]


# --- where a bundle comes from


async def test_a_bundle_comes_as_a_path_as_bytes_or_in_chunks(
    bundle: bytes, session: Session, session_store: SessionStore, tmp_path: Path, temporary: Path
) -> None:
    path = tmp_path / "session.zip"
    path.write_bytes(bundle)
    path.chmod(0o400)
    before = path.stat()
    for source in (path, bundle, in_pieces(bundle), stream_session(session, jobs=True)):
        again = await import_session(session_store, source)
        assert essence(await again.info()) == essence(await session.info())
    assert path.read_bytes() == bundle
    after = path.stat()
    assert (after.st_mtime_ns, after.st_mode, after.st_ino) == (before.st_mtime_ns, before.st_mode, before.st_ino)
    assert list(temporary.iterdir()) == []
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("source", ["session.zip", 1, None])
async def test_what_is_no_source_is_a_type_error(source: Any, session_store: SessionStore) -> None:
    with pytest.raises(TypeError, match=r"not (str|int|NoneType)\."):
        await import_session(session_store, source)


async def test_a_chunk_that_is_no_bytes_is_a_type_error(session_store: SessionStore) -> None:
    async def chunks() -> AsyncIterator[Any]:
        yield "PK"

    with pytest.raises(TypeError, match="chunks of bytes, not str"):
        await import_session(session_store, chunks())


async def test_a_path_that_cannot_be_read_is_said_without_it(session_store: SessionStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing.zip", ".", "fifo", "session\0.zip"):
        with pytest.raises(StorageError, match="The bundle cannot be read") as raised:
            await import_session(session_store, tmp_path / name)
        assert str(tmp_path) not in str(raised.value)


async def test_a_bundle_that_is_too_large_is_refused_at_the_first_byte_too_many(
    bundle: bytes, session_store: SessionStore, tmp_path: Path
) -> None:
    (tmp_path / "session.zip").write_bytes(bundle)
    chunks = in_pieces(bundle)
    for source in (tmp_path / "session.zip", bundle, chunks):
        with pytest.raises(BundleError, match="larger than 2,000 bytes"):
            await import_session(session_store, source, max_bytes=2000)
    with pytest.raises(StopAsyncIteration):  # it was closed
        await anext(chunks)
    await import_session(session_store, bundle, max_bytes=len(bundle))


async def test_a_bundle_of_too_many_files_is_refused(bundle: bytes, session_store: SessionStore) -> None:
    with pytest.raises(BundleError, match="more than 4 files"):
        await import_session(session_store, bundle, max_files=4)
    await import_session(session_store, bundle, max_files=5)


# --- all or nothing


@pytest.mark.parametrize("fatal", range(7), ids=lambda put: f"put {put}")
async def test_a_disk_that_fills_up_leaves_nothing_of_an_import(fatal: int, bundle: bytes) -> None:
    blobs = FaultyBlobStore()
    puts: list[str] = []

    def is_full(key: str) -> bool:
        puts.append(key)
        return len(puts) > fatal

    async with open_store(blobs, cleanup_interval=None) as store:
        blobs.full_for = is_full
        with pytest.raises(StorageFullError):
            await import_session(store, bundle)
        assert await keys_of(blobs) == set()
        blobs.full_for = lambda key: False
        await import_session(store, bundle)


async def test_a_temporary_folder_that_is_full_is_a_typed_error(
    bundle: bytes, session_store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageFullError, match="No room is left for the bundle"):
        await import_session(session_store, in_pieces(bundle))


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
@pytest.mark.parametrize("fatal", range(7), ids=lambda put: f"put {put}")
async def test_a_cancelled_import_has_happened_or_has_not(fatal: int, native: bool, bundle: bytes) -> None:
    blobs = FaultyBlobStore()
    puts: list[str] = []
    scope = anyio.CancelScope()

    def cancel_at(key: str) -> None:
        puts.append(key)
        if len(puts) == fatal + 1:
            if native:
                task.cancel()
            else:
                scope.cancel()

    async def load() -> None:
        with scope:
            await import_session(store, in_pieces(bundle))

    async with open_store(blobs, cleanup_interval=None) as store:
        blobs.before_put = cancel_at
        task = asyncio.get_running_loop().create_task(load())
        await asyncio.wait({task})
        assert task.cancelled() == native
        assert len(puts) == fatal + 1
        sessions = [info async for info in store.sessions()]
        assert len(sessions) == (1 if fatal == 6 else 0)
        assert len(await keys_of(blobs, "blobs/")) == 6 * len(sessions)
        assert store._context()._in_flight == {}


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
async def test_a_bundle_that_stops_coming_is_given_up_without_a_trace(
    native: bool, bundle: bytes, session_store: SessionStore, temporary: Path
) -> None:
    stalled, closed = anyio.Event(), anyio.Event()
    scope = anyio.CancelScope()
    before = await keys_of(session_store.blobs)

    async def chunks() -> AsyncIterator[bytes]:
        try:
            yield bundle[:1000]
            stalled.set()
            await anyio.sleep_forever()
        finally:
            closed.set()

    async def load() -> None:
        with scope:
            await import_session(session_store, chunks())

    task = asyncio.get_running_loop().create_task(load())
    await stalled.wait()
    if native:
        task.cancel()
    else:
        scope.cancel()
    await asyncio.wait({task})
    assert task.cancelled() == native
    assert closed.is_set()
    assert await keys_of(session_store.blobs) == before
    assert list(temporary.iterdir()) == []
    assert open_below(temporary) == []


@pytest.mark.parametrize("native", [True, False], ids=["task.cancel", "anyio scope"])
@pytest.mark.parametrize("fatal", range(5), ids=lambda get: f"read {get}")
async def test_a_cancelled_export_leaves_no_file(fatal: int, native: bool, tmp_path: Path, bundle: bytes) -> None:
    folder = tmp_path / "exports"
    folder.mkdir()
    scope = anyio.CancelScope()

    class Cancelling(MemoryBlobStore):
        reads = 0

        async def stream(self, key: str, **options: Any) -> AsyncIterator[bytes]:
            async for chunk in super().stream(key, **options):
                self.reads += 1
                if self.reads == fatal + 1:
                    if native:
                        task.cancel()
                    else:
                        scope.cancel()
                yield chunk

    async def save(session: Session) -> None:
        with scope:
            await export_session(session, folder / "session.zip", jobs=True)

    async with open_store(Cancelling(), cleanup_interval=None) as store:
        session = await import_session(store, bundle)
        task = asyncio.get_running_loop().create_task(save(session))
        await asyncio.wait({task})
        assert task.cancelled() == (native and fatal < 4)
        assert [path.name for path in folder.iterdir()] == (["session.zip"] if fatal == 4 else [])
        assert open_below(tmp_path) == []


# --- hostile ones


def manifest_of(bundle: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        manifest: dict[str, Any] = json.loads(archive.read("manifest.json"))
        return manifest


def described(data: bytes, **changes: Any) -> dict[str, Any]:
    said = {"digest": sha256(data).hexdigest(), "byte_size": len(data), "media_type": "image/png", "name": "red.png"}
    return {**said, **changes}


def manifest(**changes: Any) -> bytes:
    """The manifest of a session with a red image in `start`, but for `changes`."""
    said = {
        "format": "async-sessions bundle",
        "schema": 1,
        "state": {},
        "images": {"start": "images/start.png"},
        "jobs": {},
        "files": {"images/start.png": described(PNG)},
    }
    return json.dumps({**said, **changes}).encode()


def job(**changes: Any) -> dict[str, dict[str, Any]]:
    said: dict[str, Any] = {
        "pipeline": "preview",
        "inputs": {},
        "outputs": {},
        "params": {},
        "status": "succeeded",
        "submitted_at": "2026-01-01T00:00:00Z",
        "started_at": None,
        "finished_at": None,
        "priority": 0,
        "attempt": 1,
        "cancel_requested": False,
        "error": None,
    }
    return {"0" * 16: {**said, **changes}}


Entry = tuple[str | zipfile.ZipInfo, bytes]


def zipped(*entries: Entry, compression: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", compression) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in entries:
            archive.writestr(name, data)
    return written.getvalue()


def red(said: bytes | None = None, *more: Entry, name: str = "images/start.png", data: bytes = PNG) -> bytes:
    return zipped(("manifest.json", said or manifest()), (name, data), *more)


def kind(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def patched(bundle: bytes, at: bytes, offset: int, form: str, *values: int) -> bytes:
    """The last structure that begins with `at`, with other values in it."""
    changed = bytearray(bundle)
    struct.pack_into(form, changed, bundle.rindex(at) + offset, *values)
    return bytes(changed)


def crowded(entries: int) -> bytes:
    """A ZIP whose directory has so many lines, all for one and the same file."""
    bundle = red()
    start, end = bundle.index(DIRECTORY), bundle.index(END)
    lines = bundle[start:end] * (entries // 2)
    return patched(bundle[:start] + lines + bundle[end:], END, 8, "<HHL", 0xFFFF, 0xFFFF, len(lines))


LOCAL, DIRECTORY, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"

NAMES = (
    "../start.png", "/start.png", "images/../../start.png", "C:\\start.png", "images//start.png", "images\\start.png",
    ".start.png", "images/st\nart.png", "images/start.png\n", "manifest.json",
)  # fmt: skip
SLOTS = ("../start", "", "START", "x" * 33, "x" * 1_000_000, "start\n")
OUTPUTS = ("../video", "", "Video", "vid\r\neo", "video\n", "x" * 1_000_000)
MEDIA_TYPES = ("", "video", "video/mp4\r\nSet-Cookie: x", "video/mp4\n", "video/m p4", f"video/{'x' * 1_000_000}")
JOBS = ("../x", "0" * 15, "0" * 32 + "." + "0" * 16, "0" * 16 + "\n")


def named(name: str) -> bytes:
    return red(manifest(images={"start": name}, files={name: described(PNG)}), name=name)


def slotted(slot: str) -> bytes:
    return red(manifest(images={slot: "images/start.png"}))


def with_job(name: str) -> bytes:
    return red(manifest(jobs={name: job()["0" * 16]}))


def with_output(key: str = "video", **changes: Any) -> bytes:
    """With a job that made a film, called `key` in its entry."""
    files = {"images/start.png": described(PNG), "film": described(b"film", **{"name": "video", **changes})}
    return red(manifest(jobs=job(outputs={key: "film"}), files=files), ("film", b"film"))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no ZIP": lambda: PNG,
    "half a ZIP": lambda: red()[: len(red()) // 2],
    "an empty ZIP": lambda: zipped(),
    "no manifest": lambda: zipped(("images/start.png", PNG)),
    "an empty manifest": lambda: zipped(("manifest.json", b"")),
    "a manifest that is no JSON": lambda: red(b"\xff{"),
    "a manifest that is no object": lambda: red(b"[]"),
    "a manifest of a hundred thousand brackets": lambda: red(b'{"state":' + b"[" * 100_000),
    "a huge manifest": lambda: red(manifest(state={"x": "x" * 5_000_000})),
    "another format": lambda: red(manifest(format="something else")),
    "a newer schema": lambda: red(manifest(schema=2)),
    "an older schema": lambda: red(manifest(schema=0)),
    # files beside those that are named
    "a file that nobody names": lambda: red(None, ("../../etc/cron.d/x", b"x")),
    "a folder": lambda: red(None, ("images/", b"")),
    "a file that is not there": lambda: zipped(("manifest.json", manifest())),
    "a file that nothing uses": lambda: red(manifest(images={})),
    "an image that is a result too": lambda: red(manifest(jobs=job(outputs={"video": "images/start.png"}))),
    "one file in two slots": lambda: red(manifest(images={"start": "images/start.png", "end": "images/start.png"})),
    "a slot of a file that is not named": lambda: red(manifest(images={"start": "images/end.png"})),
    # names
    **{f"the name {name!r}": partial(named, name) for name in NAMES},
    **{f"the slot {slot[:40]!r}": partial(slotted, slot) for slot in SLOTS},
    **{f"the job {name!r}": partial(with_job, name) for name in JOBS},
    **{f"the output {name[:40]!r}": partial(with_output, name) for name in OUTPUTS},
    **{f"the output's own name {name[:40]!r}": partial(with_output, name=name) for name in OUTPUTS},
    "an output without a name of its own": lambda: with_output(name=None),
    **{f"the media type {each[:40]!r}": partial(with_output, media_type=each) for each in MEDIA_TYPES},
    # sizes and digests
    "another digest": lambda: red(manifest(files={"images/start.png": described(PNG, digest="0" * 64)})),
    "a digest that is none": lambda: red(manifest(files={"images/start.png": described(PNG, digest="../x")})),
    "another size": lambda: red(manifest(files={"images/start.png": described(PNG, byte_size=len(PNG) - 1)})),
    "a file that is empty": lambda: red(manifest(files={"images/start.png": described(b"")}), data=b""),
    "a file that claims to be larger": lambda: patched(red(), DIRECTORY, 20, "<LL", 10**9, 10**9),
    "a file that is larger than it claims": lambda: patched(red(), DIRECTORY, 20, "<LL", 10, 10),
    "another checksum": lambda: patched(red(), DIRECTORY, 16, "<L", 1),
    "another local name": lambda: patched(red(), LOCAL, 30, "<L", 0x7878_7878),
    # ways of storing
    "a file compressed a thousand times": lambda: zipped(
        ("manifest.json", manifest(files={"images/start.png": described(bytes(10_000_000))})),
        ("images/start.png", bytes(10_000_000)),
        compression=zipfile.ZIP_DEFLATED,
    ),
    "a compressed manifest": lambda: zipped(("manifest.json", manifest()), compression=zipfile.ZIP_DEFLATED),
    "a file stored in fewer bytes than it has": lambda: patched(red(), DIRECTORY, 20, "<L", 10),
    "an unknown compression": lambda: patched(red(), DIRECTORY, 10, "<H", 99),
    "a newer kind of ZIP": lambda: patched(red(), DIRECTORY, 6, "<H", 99),
    "encryption": lambda: patched(red(), DIRECTORY, 8, "<H", 1),
    "strong encryption": lambda: patched(red(), DIRECTORY, 8, "<H", 1 << 6),
    # places
    "one name twice": lambda: red(None, ("images/start.png", PNG)),
    "one name in two ways": lambda: red(None, ("images/start.png\0../../x", PNG)),
    "two files in one place": lambda: patched(red(None, ("images/end.png", PNG)), DIRECTORY, 42, "<L", 0),
    "a file in the directory": lambda: patched(red(), DIRECTORY, 42, "<L", len(red()) - 100),
    "a file behind the end": lambda: patched(red(), DIRECTORY, 42, "<L", 2**32 - 2),
    "a directory of four gigabytes": lambda: patched(red(), END, 12, "<L", 2**32 - 2),
    "a directory before the beginning": lambda: patched(red(), END, 12, "<L", len(red())),
    "a directory that is shorter": lambda: patched(red(), END, 12, "<L", 50),
    "a hundred thousand files": lambda: crowded(100_000),
    # kinds
    "a link": lambda: zipped(("manifest.json", manifest()), (kind("images/start.png", stat.S_IFLNK | 0o777), PNG)),
    "a linked manifest": lambda: zipped((kind("manifest.json", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "a device": lambda: zipped(("manifest.json", manifest()), (kind("images/start.png", stat.S_IFCHR), PNG)),
    # images
    "an image that is none": lambda: red(manifest(files={"images/start.png": described(b"x")}), data=b"x"),
    "an image of another kind": lambda: red(
        manifest(files={"images/start.png": described(PNG, media_type="image/webp")})
    ),
    "a JPEG that says PNG": lambda: red(
        manifest(files={"images/start.png": described(encoded(RED, "JPEG"))}), data=encoded(RED, "JPEG")
    ),
    "a picture that is no image": lambda: red(
        manifest(files={"images/start.png": described(PNG, media_type="text/html")})
    ),
    "a media type with a header in it": lambda: red(
        manifest(files={"images/start.png": described(PNG, media_type="image/png\r\nSet-Cookie: x")})
    ),
    # values
    "a deep state": lambda: red(manifest(state={"x": json.loads("[" * 40 + "]" * 40)})),
    "a huge integer": lambda: red(manifest(state={"x": 10**30})),
    "infinity": lambda: red(manifest().replace(b'"state": {}', b'"state": {"x": 1e999}')),
    "no number": lambda: red(manifest().replace(b'"state": {}', b'"state": {"x": NaN}')),
    "half a surrogate pair": lambda: red(manifest().replace(b'"state": {}', b'"state": {"x": "\\ud800"}')),
    "a state that is no object": lambda: red(manifest(state=[])),
    "a running job": lambda: red(manifest(jobs=job(status="running"))),
    "a time without a zone": lambda: red(manifest(jobs=job(submitted_at="2026-01-01T00:00:00"))),
    "a job's deep parameters": lambda: red(manifest(jobs=job(params={"x": json.loads("[" * 40 + "]" * 40)}))),
    "a priority beyond bounds": lambda: red(manifest(jobs=job(priority=10**30))),
    "an input that is not there": lambda: red(manifest(jobs=job(inputs={"start": "images/end.png"}))),
}


@pytest.mark.parametrize("bundle", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_bundle_is_refused_and_nothing_of_it_is_kept(
    bundle: Callable[[], bytes], temporary: Path
) -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        with pytest.raises(BundleError) as raised:
            await import_session(store, in_pieces(bundle(), 2**20))
        message = str(raised.value)
        assert message.endswith(".")
        assert message.isprintable()
        assert len(message) < 400
        assert await keys_of(store.blobs) == set()
        assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("encryption", "it is encrypted"),
        ("a file compressed a thousand times", "it is compressed"),
        ("a file stored in fewer bytes than it has", "it is compressed"),
        ("a link", "it holds a link"),
        ("one name twice", "the same name"),
        ("two files in one place", "its files overlap"),
        ("a file in the directory", "its files overlap"),
        ("a hundred thousand files", "more than 2,000 files"),
        ("a newer schema", "format 2; .* upgrade async-sessions"),
        ("another digest", "another digest"),
        ("another checksum", "damaged"),
    ],
)
async def test_a_refusal_says_what_is_wrong(name: str, reason: str, session_store: SessionStore) -> None:
    with pytest.raises(BundleError, match=reason):
        await import_session(session_store, HOSTILE[name]())


def test_no_more_is_read_of_a_directory_than_the_files_that_are_taken_need() -> None:
    class Counted(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.total += len(data)
            return data

    file = Counted(crowded(100_000))
    with pytest.raises(BundleError, match="more than 100 files"):
        ZipReader(file, max_entries=100)
    assert file.total < 100_000
    file = Counted(crowded(200))
    with pytest.raises(BundleError, match="more than 100 files"):
        ZipReader(file, max_entries=100)


async def test_a_red_image_packed_by_hand_is_taken(session_store: SessionStore) -> None:
    """Else the hostile ones would be refused for nothing."""
    packed = red(manifest(jobs=job(inputs={"start": "images/start.png"}), state={"x": 2**63}))
    session = await import_session(session_store, packed)
    assert (await session.retrieve_image("start")).getpixel((0, 0)) == (255, 0, 0)
    assert (await session.info()).images["start"].source_name == "red.png"
    session = await import_session(session_store, with_output(media_type="video/mp4"))
    assert [list(entry.outputs) for entry in (await session.info()).jobs.values()] == [["video"]]


async def test_a_store_takes_no_slots_state_or_images_beyond_its_own_limits() -> None:
    async with open_store("memory://", slots=["end"]) as store:
        with pytest.raises(BundleError, match="slots are end"):
            await import_session(store, red())
    async with open_store("memory://", limits=Limits(max_pixels=100)) as store:
        with pytest.raises(BundleError, match="100 pixels"):
            await import_session(store, red())
    async with open_store("memory://", limits=Limits(max_state_bytes=10)) as store:
        with pytest.raises(QuotaExceededError):
            await import_session(store, red(manifest(state={"prompt": "a fox in the snow"})))
        assert await keys_of(store.blobs) == set()


START = {"start": "images/start.png"}


@pytest.mark.parametrize(
    "jobs",
    [
        {f"{number:016x}": job(inputs=START)["0" * 16] for number in range(21)},
        job(inputs=START, params={"x": [1] * 100_000}),
        job(inputs={f"role{number}": START["start"] for number in range(5000)}),
    ],
    ids=["many", "parameters", "roles"],
)
async def test_no_import_makes_a_session_of_which_every_read_costs_all_others(
    jobs: dict[str, Any], session_store: SessionStore
) -> None:
    with pytest.raises(QuotaExceededError, match="Leave"):
        await import_session(session_store, red(manifest(jobs=jobs)))
    assert await keys_of(session_store.blobs) == set()


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "C:\\x.png", "a\nb\x1b[31m.png", "n" * 500])
async def test_a_source_name_is_made_harmless(name: str, session_store: SessionStore) -> None:
    packed = red(manifest(files={"images/start.png": described(PNG, name=name)}))
    shown = (await (await import_session(session_store, packed)).info()).images["start"].source_name
    assert shown is not None
    assert shown.isprintable()
    assert not set(shown) & set("/\\")
    assert len(shown) <= 200


async def test_damage_anywhere_is_refused_or_harmless(bundle: bytes) -> None:
    """Bytes flipped, cut out and put in; what is still taken holds the very images."""
    chance = random.Random(4)
    taken = 0
    async with open_store("memory://", cleanup_interval=None) as store:
        whole = essence(await (await import_session(store, bundle)).info())
        for _ in range(300):
            damaged = bytearray(bundle)
            place = chance.choice([chance.randrange(len(bundle)), -chance.randrange(1, 800)])
            match chance.randrange(4):
                case 0:
                    damaged[place] ^= 1 << chance.randrange(8)
                case 1:
                    del damaged[place : place + chance.randrange(1, 20) or None]
                case 2:
                    damaged[place:place] = chance.randbytes(chance.randrange(1, 20))
                case 3:
                    damaged[place:] = damaged[place:].replace(b"\0\0", b"\xff\xff", 1)
            before = await keys_of(store.blobs)
            try:
                session = await import_session(store, bytes(damaged))
            except BundleError:
                assert await keys_of(store.blobs) == before
            else:
                taken += 1
                info = essence(await session.info())
                assert {record["digest"] for record in info["images"].values()} <= {
                    record["digest"] for record in whole["images"].values()
                }
    assert taken < 150


WATCHED = """
import asyncio, sys, tempfile
from pathlib import Path
from async_sessions import BundleError, open_store
from async_sessions.bundle import import_session
from tests.test_bundle_import import HOSTILE, red
from tests.watch import Watch

root, temporary, watch = Path(sys.argv[1]), sys.argv[2], Watch()
tempfile.tempdir = temporary

async def main():
    async with open_store(root) as store:
        await import_session(store, red())  # from here on all modules are loaded
        watch.on = True
        for name, bundle in HOSTILE.items():
            (root.parent / "bundle.zip").write_bytes(bundle())
            try:
                await import_session(store, root.parent / "bundle.zip")
            except BundleError:
                print("refused", name)
        await import_session(store, red())

asyncio.run(main())
allowed = str(root), temporary, str(root.parent / "bundle.zip")
outside = [path for path in watch.touched if not path.startswith(allowed)]
print(len(watch.touched), "paths, outside:", outside)
"""


def test_no_file_outside_the_store_is_touched_by_a_hostile_bundle(tmp_path: Path, temporary: Path) -> None:
    shown = run(WATCHED, tmp_path / "sessions", temporary)
    assert shown.count("refused") == len(HOSTILE)
    assert shown.endswith(" paths, outside: []\n")
    assert not shown.splitlines()[-1].startswith("0 ")
    assert len(files_below(tmp_path / "sessions", "blobs")) == 2 * 2  # two good ones, of an image and its thumbnail
    assert files_below(tmp_path / "sessions", "tmp") == []
    assert list(temporary.iterdir()) == []


MEASURED = """
import asyncio, resource, sys
from datetime import UTC, datetime
from pathlib import Path
from async_sessions import JobInfo, open_store
from async_sessions.bundle import export_session, import_session

folder, size = Path(sys.argv[1]), int(sys.argv[2])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def there_and_back(store, size):
    with open(folder / "film", "wb") as film:
        film.truncate(size)
    session = await store.create_session()
    output = await session.store_output(folder / "film", name="film", media_type="video/mp4")
    job = JobInfo(id=session.key + "." + 16 * "0", pipeline="x", inputs={}, params={}, submitted_at=datetime.now(UTC),
                  owner="", status="succeeded", outputs={"film": output})
    await session.edit_job(job.id, lambda old: job)
    await export_session(session, folder / "session.zip", jobs=True)
    again = await import_session(store, folder / "session.zip")
    assert (await again.info()).total_bytes == size
    await session.delete()
    await again.delete()

async def main():
    async with open_store(folder / "sessions", cleanup_interval=None) as store:
        await there_and_back(store, 5_000_000)
        before = peak()
        await there_and_back(store, size)
        print(peak() - before)

asyncio.run(main())
"""


def test_a_long_film_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    grown = int(run(MEASURED, tmp_path, 150_000_000))
    assert grown < 15_000_000


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
