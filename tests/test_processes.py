"""More than one process on one folder, and processes that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from async_sessions import open_store
from async_sessions._tasks import utc_now
from tests.faults import files_below, keys_of, named_blobs

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

WRITER = """
import sys
import anyio
from PIL import Image
from async_sessions import open_store
from async_sessions._tasks import utc_now

async def main(root, key, name, count):
    async with open_store(root, cleanup_interval=None) as store:
        session = await store.open_by_key(key)
        async with anyio.create_task_group() as group:
            for number in range(count):
                if number % 2:
                    group.start_soon(lambda n=number: session.update_state(**{f"{name}{n}": n}))
                else:
                    group.start_soon(session.store_image, Image.new("RGB", (8, 8), (number, 0, 0)), f"{name}{number}")

anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""

VICTIM = """
import itertools, sys
import anyio
from datetime import datetime, timedelta
from PIL import Image
from async_sessions import open_store
from async_sessions._tasks import utc_now
from tests.test_processes import later, step

async def main(root, key, round):
    periods = {"cleanup_interval": timedelta(milliseconds=20), "grace": timedelta(minutes=2)}
    async with open_store(root, clock=later(int(round)), **periods) as store:
        session = await store.open_by_key(key)
        for number in itertools.count(1):
            await session.touch()
            if number % 4 == 0:
                await (await store.create_session()).store_image(Image.new("RGB", (64, 64), "blue"), "start")
            slot, height = step(number)
            if height:
                await session.store_image(Image.new("RGB", (64, height), "red"), slot)
            else:
                await session.clear_image(slot)
            print(number, flush=True)

anyio.run(main, *sys.argv[1:])
"""


async def test_two_processes_lose_no_update_of_one_session(tmp_path: Path) -> None:
    root = tmp_path / "root"
    async with open_store(root) as store:
        key = (await store.create_session()).key
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, root, key, name, "200"]) for name in ("a", "b")]
    assert [writer.wait(100) for writer in writers] == [0, 0]
    async with open_store(root) as store:
        info = await (await store.open_by_key(key)).info()
    for name in ("a", "b"):
        assert {slot for slot in info.images if slot.startswith(name)} == {f"{name}{n}" for n in range(0, 200, 2)}
        assert {field for field in info.state if field.startswith(name)} == {f"{name}{n}" for n in range(1, 200, 2)}


def step(number: int) -> tuple[str, int]:
    """What `VICTIM` does as its `number`th operation: the slot, and the height that it has afterwards (0: empty)."""
    return f"slot{number % 3}", 0 if number % 7 == 0 else 64 + number % 50


def later(rounds: int) -> Callable[[], datetime]:
    """A clock that is two hours further with every round, so that there is something to touch and to sweep in each."""
    return lambda: utc_now() + rounds * timedelta(hours=2)


async def check_kills(root: Path, kills: int, seed: int) -> int:
    """Kill a process that stores, replaces, clears, touches and sweeps. Returns the acknowledged operations.

    After each kill everything that it acknowledged is there, but for the one operation under way, which has happened
    or has not; every image decodes. In the end a sweep leaves nothing but what is named.
    """
    rng = random.Random(seed)
    acknowledged = 0
    held: dict[str, int] = {}
    async with open_store(root, cleanup_interval=None) as store:
        key = (await store.create_session()).key
    for number in range(kills):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, root, key, str(number)], stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None
        lines = [victim.stdout.readline()]
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended by itself, with {victim.wait(rng.uniform(0.005, 0.25))}")
        victim.send_signal(signal.SIGKILL)
        lines += victim.stdout.readlines()
        victim.stdout.close()
        assert victim.wait(10) == -signal.SIGKILL
        done = sum(line.endswith("\n") for line in lines)
        acknowledged += done
        for acted in range(1, done + 1):
            slot, height = step(acted)
            held[slot] = height
        async with open_store(root, cleanup_interval=None, clock=later(number)) as store:
            session = await store.open_by_key(key)
            images = (await session.info()).images
            found = {slot: images[slot].height if slot in images else 0 for slot in held}
            slot, height = step(done + 1)
            assert found in (held, {**held, slot: height})
            held = found
            for slot, record in images.items():
                assert (await session.retrieve_image(slot)).size == record.size
    async with open_store(root, cleanup_interval=None, clock=later(kills)) as store:
        assert (await store.cleanup()).problems == ()
        assert (await (await store.open_by_key(key)).info()).images.keys() == {slot for slot in held if held[slot]}
        assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
        assert files_below(root, "tmp") == []
    return acknowledged


async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    assert await check_kills(tmp_path / "root", kills=6, seed=1) > 6


FIRST = """
import sys, threading
from async_sessions import _manifest

sys.setswitchinterval(1e-6)
ready = threading.Barrier(8)
data = open(sys.argv[2], "rb").read()

def decode():
    ready.wait()
    _manifest.decode(sys.argv[1], data)

threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


async def test_threads_may_be_the_first_to_read_manifests_at_once(tmp_path: Path) -> None:
    """It crashed one process in six, before the decoders were made on import; ten of them, so that it shows."""
    async with open_store(tmp_path / "root") as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8)), "start")
    (manifest,) = files_below(tmp_path / "root", "manifests")
    readers = [subprocess.Popen([sys.executable, "-c", FIRST, session.key, manifest]) for _ in range(10)]
    assert [reader.wait(60) for reader in readers] == [0] * 10
