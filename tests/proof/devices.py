"""Devices that are full, read-only or somebody else's. Needs root, for `mount` and `setpriv`."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from async_sessions import Session, StorageError, StorageFullError, open_store
from tests.benchmarks.pictures import collage
from tests.faults import files_below

STORES = 40


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run(["mount", *options, folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


async def tmpfs(root: Path, options: str) -> str:
    """Fill a small device, then make room on it again."""
    with mounted(root, "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs"):
        async with open_store(root / "store", cleanup_interval=None) as store:
            sessions: list[tuple[Session, Image.Image]] = []
            refused = 0
            for number in range(STORES):
                image = collage((200, 150), number)
                try:
                    session = await store.create_session()
                    await session.store_image(image, "start")
                except StorageFullError as error:
                    assert "Free some space" in str(error)  # noqa: PT017 - one of two outcomes
                    refused += 1
                else:
                    sessions.append((session, image))
            assert refused
            assert files_below(root, "store", "tmp") == []
            for session, image in sessions:
                assert (await session.retrieve_image("start")).tobytes() == image.tobytes()
            for session, _ in sessions[: len(sessions) // 2]:
                await session.delete()
            await (await store.create_session()).store_image(collage((200, 150), 0), "start")
    return (
        f"{options}: {refused} of {STORES} stores refused, the other {len(sessions)} read, 1 of 1 stored after deletes"
    )


async def read_only(root: Path) -> str:
    async with open_store(root / "store") as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8), "red"), "start")
    with mounted(root / "mount", "--bind", str(root / "store")):
        subprocess.run(["mount", "-o", "remount,bind,ro", root / "mount"], check=True)
        async with open_store(root / "mount", cleanup_interval=None) as store:
            session = await store.open_by_key(session.key)
            assert (await session.retrieve_image("start")).size == (8, 8)
            told = await _told(session)
        subprocess.run(["mount", "-o", "remount,bind,rw", root / "mount"], check=True)
        async with open_store(root / "mount", cleanup_interval=None) as store:
            await (await store.open_by_key(session.key)).store_image(Image.new("RGB", (8, 8)), "end")
    return f"read-only mount: reads go on; a write says: {told}"


async def few_files(root: Path) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_store(root) as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8), "red"), "start")
        hogs: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    hogs.append(os.open("/dev/null", os.O_RDONLY))
            told = await _told(session)
        finally:
            for hog in hogs:
                os.close(hog)
        await session.store_image(Image.new("RGB", (8, 8)), "end")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return f"64 files, all open: {told}; then it goes on"


async def somebody_elses(root: Path) -> str:
    """Root may do everything, so another user tries."""
    told = []
    for name, mode, owner in (("theirs", 0o755, 0), ("shared", 0o777, 65534)):
        folder = root / name
        folder.mkdir(parents=True)
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        for parent in (root, *root.parents):
            parent.chmod(parent.stat().st_mode | 0o711)
        code = (
            "import anyio, sys\nfrom async_sessions import StorageError, open_store\n"
            "async def main():\n  try:\n    async with open_store(sys.argv[1]): pass\n"
            "  except StorageError as error: print(error)\nanyio.run(main)"
        )
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*user, sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd="/"
        )
        assert done.stdout, "nothing was refused"
        told.append(done.stdout.strip().replace(str(root), "..."))
    return f"somebody else's folder: {told[0]} | a folder that others can write to: {told[1]}"


async def _told(session: Session) -> str:
    try:
        await session.store_image(Image.new("RGB", (8, 8)), "end")
    except StorageError as error:
        return str(error).partition(": ")[2]
    raise AssertionError("nothing was refused")
