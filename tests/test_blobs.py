from __future__ import annotations

import errno
import os
import sqlite3
import stat
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from async_sessions import LocalBlobStore, LockTimeoutError, MemoryBlobStore, StorageError, StorageFullError
from async_sessions.blobs import Expect
from async_sessions.testing.blobs import BlobStoreTests
from examples.sqlite_store import SQLiteBlobStore

pytestmark = pytest.mark.anyio


class TestMemoryBlobStore(BlobStoreTests):
    @pytest.fixture
    def blobs(self) -> MemoryBlobStore:
        return MemoryBlobStore()


class TestLocalBlobStore(BlobStoreTests):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> LocalBlobStore:
        return LocalBlobStore(tmp_path / "root")

    async def raw_get(self, blobs: LocalBlobStore, key: str) -> bytes | None:
        path = anyio.Path(blobs.root / key)
        return await path.read_bytes() if await path.is_file() else None

    async def raw_put(self, blobs: LocalBlobStore, key: str, data: bytes) -> None:
        path = anyio.Path(blobs.root / key)
        await path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        await path.write_bytes(data)


class TestTheExampleOfABlobStore(BlobStoreTests):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> SQLiteBlobStore:
        return SQLiteBlobStore(tmp_path / "blobs.db")

    async def raw_get(self, blobs: SQLiteBlobStore, key: str) -> bytes | None:
        rows = await self._query(blobs, "SELECT data FROM blobs WHERE key = ?", key)
        return rows[0][0] if rows else None

    async def raw_put(self, blobs: SQLiteBlobStore, key: str, data: bytes) -> None:
        await blobs.get(key)  # makes the table
        await self._query(
            blobs,
            "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?, datetime('now') || '+00:00')",
            key,
            data,
            uuid.uuid4().hex,
        )

    async def _query(self, blobs: SQLiteBlobStore, query: str, *values: str | bytes) -> list[tuple[bytes]]:
        def run() -> list[tuple[bytes]]:
            with closing(sqlite3.connect(blobs.path)) as database, database:
                return database.execute(query, values).fetchall()

        return await anyio.to_thread.run_sync(run)


async def test_files_and_folders_are_private(tmp_path: Path) -> None:
    root = tmp_path / "root"
    await LocalBlobStore(root).put("a/b/c", b"x", expect=Expect.ABSENT)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


async def test_a_root_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with pytest.raises(StorageError, match="chmod 700"):
        await LocalBlobStore(tmp_path).get("a")


async def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("x")
    with pytest.raises(StorageError):
        await LocalBlobStore(tmp_path / "root").get("a")


async def test_a_root_that_was_removed_is_made_again(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path / "root")
    await blobs.put("a", b"x")
    (tmp_path / "root").rename(tmp_path / "away")
    with pytest.raises(StorageError):
        await blobs.put("a", b"y")
    await blobs.put("a", b"z")
    found = await blobs.get("a")
    assert found is not None
    assert found.data == b"z"


async def test_a_lock_that_is_never_released_is_a_typed_error_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path, lock_timeout=0.05)
    version = await blobs.put("a", b"x", expect=Expect.ABSENT)
    [lock] = (tmp_path / "locks").iterdir()
    holder = await anyio.open_process(
        ["python3", "-c", f"import fcntl; f = open({str(lock)!r}); fcntl.flock(f, 2); print(flush=True); input()"]
    )
    try:
        assert holder.stdout is not None
        await holder.stdout.receive()
        with pytest.raises(LockTimeoutError, match="stopped process"):
            await blobs.put("a", b"y", expect=version)
        assert os.listdir(tmp_path / "tmp") == []
    finally:
        holder.kill()
        await holder.wait()
    assert await blobs.put("a", b"y", expect=version) != version


async def test_the_temporary_file_of_a_killed_writer_is_listed_below_tmp_only(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    await blobs.put("a", b"x")
    (tmp_path / "tmp" / "0123").write_bytes(b"half")
    assert [info.key async for info in blobs.list()] == ["a"]
    assert [info.key async for info in blobs.list("tmp/")] == ["tmp/0123"]
    await blobs.delete("tmp/0123")
    assert [info.key async for info in blobs.list("tmp/")] == []


async def test_one_store_serves_loops_one_after_the_other(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    await anyio.to_thread.run_sync(lambda: anyio.run(blobs.put, "a", b"x"))
    found = await blobs.get("a")
    assert found is not None
    assert found.data == b"x"


async def test_a_write_is_acknowledged_when_file_and_folders_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may take is what was not synced; a kill can't show it, so the system calls are written down."""
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(("rename", str(target)))
        replace(source, target)

    root = tmp_path / "root"
    blobs = LocalBlobStore(root)
    await blobs.get("a")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    await blobs.put("a/b/c", b"x")
    renamed = calls.index(("rename", str(root / "a" / "b" / "c")))
    before, after = calls[:renamed], calls[renamed:]
    assert ("fsync", str(root)) in before
    assert ("fsync", str(root / "a")) in before
    assert any(name == "fsync" and Path(path).parent == root / "tmp" for name, path in before)
    assert ("fsync", str(root / "a" / "b")) in after
    assert ("fsync", str(root / "tmp")) in after


async def test_a_folder_that_another_process_made_is_synced_before_a_write_below_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted_fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    blobs = LocalBlobStore(tmp_path)
    await blobs.get("a")
    (tmp_path / "a").mkdir(mode=0o700)  # made, and not synced yet, by somebody else
    monkeypatch.setattr(os, "fsync", noted_fsync)
    await blobs.put("a/b", b"x")
    assert str(tmp_path) in synced
    synced.clear()
    await blobs.put("a/c", b"x")
    assert str(tmp_path) not in synced  # known by now


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_delete_that_can_not_be_made_durable_does_not_say_that_nothing_happened(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobStore(tmp_path / "root")
    await blobs.put("a/b/c", b"one")

    def failing_fsync(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(StorageError, match=r"The last removal may be undone in a power cut\.") as caught:
            await blobs.delete("a/b/c")
    assert not isinstance(caught.value, StorageFullError)  # after which it would be certain that it is still there
    assert await blobs.get("a/b/c") is None


async def test_a_stream_of_what_is_deleted_just_before_it_is_opened_finds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobStore(tmp_path / "root")
    await blobs.put("a/b/c", b"one")
    path_open = Path.open

    def deleted_first(path: Path, *args: Any) -> Any:
        path.unlink()
        return path_open(path, *args)

    monkeypatch.setattr(Path, "open", deleted_first)
    with pytest.raises(FileNotFoundError):
        [chunk async for chunk in blobs.stream("a/b/c")]


async def test_a_directory_that_others_remove_and_make_anew_is_made_durable_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobStore(tmp_path / "root")
    await blobs.put("a/b/c", b"one")
    directory = tmp_path / "root" / "a" / "b"
    inode = directory.stat().st_ino

    def make_anew() -> None:
        for _ in range(100):  # until it has the same inode, which file systems such as ext4 use again at once
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()
            directory.mkdir(mode=0o700)
            if directory.stat().st_ino == inode:
                return

    await anyio.to_thread.run_sync(make_anew)
    synced, fsync = [], os.fsync

    def noted_fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    await blobs.put("a/b/c", b"two")
    assert str(directory.parent) in synced
