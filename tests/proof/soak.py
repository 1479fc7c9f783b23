"""A store for a while under everything at once: sweeps, readers, writers, pins, processes that hold its locks."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import anyio
import numpy as np
from PIL import Image

from async_sessions import ImageRecord, LocalBlobStore, LockTimeoutError, Session, SessionStore, open_store
from tests.faults import keys_of

TTL = timedelta(seconds=2)
COLOURS = [(value, 255 - value, value // 2) for value in range(256)]


async def sweeps(root: Path, seconds: float = 60) -> str:
    """Sweep every millisecond while eight tasks read and write, four sessions are pinned and others are left alone."""
    async with open_store(root, ttl=TTL, cleanup_interval=timedelta(milliseconds=1)) as store:
        pinned = [await _pinned(store) for _ in range(4)]
        done, left = [0], [0]
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(_use, store, number, done)
                group.start_soon(_leave, store, left)
        for session, records in pinned:
            for record, colour in records:
                image = await (await session.read_record(record)).image()
                assert image.getpixel((0, 0)) == colour
        await anyio.sleep((TTL + TTL / 24).total_seconds())
        expired = time.monotonic()
        kept = {f"manifests/{session.key[:2]}/{session.key}.json" for session, _ in pinned}
        with anyio.fail_after(60):
            while await keys_of(store.blobs, "manifests/") != kept:  # noqa: ASYNC110 - the sweep tells nobody
                await anyio.sleep(0.01)
        late = time.monotonic() - expired
        assert len(await keys_of(store.blobs, "blobs/")) == sum(2 * len(records) for _, records in pinned)
    return (
        f"a sweep every millisecond for {seconds:g} s, 8 readers and writers, 4 pins: {done[0]} operations, 0 images "
        f"that were in use gone; {left[0]} of {left[0]} sessions left alone gone, the last {late:.2f} s after its time"
    )


async def _pinned(store: SessionStore) -> tuple[Session, list[tuple[ImageRecord, tuple[int, int, int]]]]:
    session = await store.create_session()
    await session.pin("soak", until=store.clock() + timedelta(days=365))
    return session, [
        (await session.store_image(Image.new("RGB", (16, 16), colour), "start"), colour) for colour in COLOURS[:3]
    ]


async def _use(store: SessionStore, number: int, done: list[int]) -> None:
    """Store, read back, replace, clear and put back in a session that is used all the time."""
    rng = random.Random(number)
    session = await store.create_session()
    held: dict[str, tuple[int, int, int]] = {}
    while True:
        slot, colour = rng.choice(["start", "end"]), rng.choice(COLOURS)
        match rng.randrange(4):
            case 0:
                await session.clear_image(slot)
                held.pop(slot, None)
            case 1 if slot in held:
                assert (await session.retrieve_image(slot)).getpixel((0, 0)) == held[slot]
            case 2 if slot in held:
                record = (await session.info()).images[slot]
                await session.store_image(Image.new("RGB", (16, 16), colour), slot)
                await session.restore_recent(record.digest, slot)
            case _:
                await session.store_image(Image.new("RGB", (16, 16), colour), slot)
                held[slot] = colour
        done[0] += 1
        await anyio.sleep(rng.uniform(0, 0.01))


async def _leave(store: SessionStore, left: list[int]) -> None:
    while True:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (16, 16), "red"), "start")
        left[0] += 1
        await anyio.sleep(0.1)


HOLDER = """
import fcntl, os, sys
from pathlib import Path
held = [os.open(path, os.O_RDWR) for path in Path(sys.argv[1], "locks").iterdir()]
for fd in held:
    fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


async def locks(root: Path) -> str:
    """Write while another process holds every lock: until it is killed, and while it is stopped."""
    async with open_store(LocalBlobStore(root, lock_timeout=1), cleanup_interval=None) as store:
        session = await store.create_session()
        for name in range(256):
            (root / "locks" / f"{name:02x}").touch(mode=0o600)
        delays: list[float] = []
        for _ in range(20):
            holder = _hold(root)
            ended: list[float] = []

            async def write(ended: list[float] = ended) -> None:
                await session.update_state(number=len(delays))
                ended.append(time.monotonic())

            async with anyio.create_task_group() as group:
                group.start_soon(write)
                await anyio.sleep(0.2)
                assert not ended
                holder.kill()
                holder.wait()
                killed = time.monotonic()
            delays.append(ended[0] - killed)
        holder = _hold(root)
        holder.send_signal(signal.SIGSTOP)
        try:
            await session.update_state(number=-1)
        except LockTimeoutError as error:
            told = str(error).partition(". ")[2]
        else:
            raise AssertionError("a stopped process held nothing up")
        finally:
            holder.kill()
            holder.wait()
        await session.update_state(number=-1)
    worst = 1000 * max(delays)
    assert worst < 50, f"{worst} ms"
    return f"20 killed lock holders: others wait {worst:.0f} ms more at most; a stopped one: {told}"


def _hold(root: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def memory(root: Path) -> str:
    """In a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, "-m", "tests.proof.soak", str(root)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip()


async def _fill(root: Path) -> None:
    count, cache, page = 5000, 64 * 2**20, resource.getpagesize()
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (1000, 1000, 3), np.uint8)) for seed in range(4)
    ]
    held: list[int] = []
    async with open_store(root, cache_bytes=cache, cleanup_interval=None) as store:
        numbers = iter(range(count))

        async def work() -> None:
            session = await store.create_session()
            for number in numbers:
                await session.store_image(images[number % len(images)], "start")
                await session.clear_all_images() if number % 8 == 0 else None
                held.append(page * int(Path("/proc/self/statm").read_text().split()[1]))

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(work)
    half = held[: count // 2]
    grown = max(held[count // 2 :]) - max(half)
    assert max(held) < cache + 150 * 2**20, f"{max(held) / 2**20:.0f} MiB"
    assert grown < 8 * 2**20, f"{grown / 2**20:.0f} MiB"
    print(
        f"{count} stores of 1 MP, cache 64 MiB: {max(held) / 2**20:.0f} MiB at most, "
        f"{grown / 2**20:+.1f} MiB in the second half"
    )


if __name__ == "__main__":
    anyio.run(_fill, Path(sys.argv[1]))
