"""A store for a while under everything at once: sweeps, readers, writers, pins, processes that hold its locks."""

from __future__ import annotations

import itertools
import math
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import anyio
import numpy as np
from PIL import Image

from async_sessions import (
    Blob,
    BlobInfo,
    BlobStore,
    Expect,
    ImageRecord,
    LocalBlobStore,
    LockTimeoutError,
    Session,
    SessionStore,
    open_store,
)
from async_sessions.blobs.base import CHUNK_SIZE, BlobData, Expectation
from tests.clock import WallClock
from tests.faults import keys_of

TTL = timedelta(seconds=2)
JUMPS = timedelta(days=-10 * 365), timedelta(days=5 * 365)
COLOURS = [(value, 255 - value, value // 2) for value in range(256)]


async def sweeps(root: Path, seconds: float = 60) -> str:
    return await soak(LocalBlobStore(root), WallClock(), seconds, every=timedelta(milliseconds=1))


async def soak(blobs: BlobStore, clock: WallClock, seconds: float, *, every: timedelta, users: int = 8) -> str:
    """Sweep all the time while `users` tasks read and write, four sessions are pinned, others are left alone and the
    clock is set to and fro. What is left alone must not go early, and not after the second sweep after its time.
    """
    watched = Watched(blobs, clock)
    async with open_store(watched, ttl=TTL, cleanup_interval=every, clock=clock) as store:
        pinned = [await _pinned(store) for _ in range(4)]
        done, jumps = [0], [0]
        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as group:
                for number in range(users):
                    group.start_soon(_use, store, number, done, watched, clock)
                group.start_soon(_leave, store, watched, clock)
                group.start_soon(_set, clock, jumps)
        for session, records in pinned:
            for record, colour in records:
                image = await (await session.read_record(record)).image()
                assert image.getpixel((0, 0)) == colour
        with anyio.fail_after(60):
            while watched.left:  # noqa: ASYNC110 - the sweep tells nobody
                await anyio.sleep(0.01)
        assert not watched.early
        assert not watched.late
        kept = {f"manifests/{session.key[:2]}/{session.key}.json" for session, _ in pinned}
        assert await keys_of(blobs, "manifests/") == kept
        assert len(await keys_of(blobs, "blobs/")) == sum(2 * len(records) for _, records in pinned)
    assert jumps[0] > 1
    return (
        f"{len(watched.begun)} sweeps in {seconds:g} s, {users} readers and writers, 4 pins, a clock set by -10 or +5 "
        f"years and back {jumps[0]} times: {done[0]} operations, 0 images that were in use gone; {watched.gone} of "
        f"{watched.gone} sessions left alone gone, 0 early, sweep {watched.latest} after their time took the last"
    )


@dataclass
class Left:
    """A session that nobody uses any more: last used between `before` and `since`, in seconds of the loop.

    `waits` are how long from then until a sweep has to have listed it, read it and taken it, one after the other.
    """

    manifest: str
    before: float
    since: float
    waits: list[float]


class Watched(BlobStore):
    """Looks, whenever a sweep begins, for what went early, and for what two sweeps have not taken.

    A sweep while the clock is behind does not count: nobody knows then what is over.
    """

    def __init__(self, inner: BlobStore, clock: WallClock) -> None:
        self._inner = inner
        self._clock = clock
        self.begun: list[float] = []  # when, in seconds of the loop
        self.left: list[Left] = []
        self.early: list[Left] = []
        self.late: list[Left] = []
        self.gone = 0
        self.latest = 0

    def leave(self, session: Session, before: float, ahead: timedelta) -> None:
        """`ahead` is that of the clock when it was used: what is used in the future goes once it was seen for `TTL`."""
        expires = (TTL + TTL / 24).total_seconds()
        waits = [0.0, TTL.total_seconds(), expires] if ahead > timedelta() else [expires]
        manifest = f"manifests/{session.key[:2]}/{session.key}.json"
        self.left.append(Left(manifest, before, anyio.current_time(), waits))

    async def list(self, prefix: str = "") -> AsyncIterator[BlobInfo]:
        began = anyio.current_time()
        if prefix == "manifests/" and self._clock.ahead >= timedelta():
            self.begun.append(began)
        listed = [info async for info in self._inner.list(prefix)]
        if prefix == "manifests/":
            await self._look({info.key for info in listed}, began)
        for info in listed:
            yield info

    async def _look(self, listed: set[str], began: float) -> None:
        for left in tuple(self.left):
            # a directory that is written to while it is listed may hide an entry
            if left.manifest not in listed and await self._inner.get(left.manifest) is None:
                self._settle(left, began)
            elif len(self.begun) > 2 and self.begun[-3] >= left.since + left.waits[0]:
                left.since = began
                if len(left.waits) > 1:
                    left.waits.pop(0)
                else:
                    self.late.append(left)
                    self.left.remove(left)

    def _settle(self, left: Left, began: float) -> None:
        self.left.remove(left)
        self.gone += 1
        if began < left.before + TTL.total_seconds():
            self.early.append(left)
        due = left.since + left.waits[0]
        self.latest = max(self.latest, sum(due <= begun < began for begun in self.begun[-10:]))

    async def get(self, key: str) -> Blob | None:
        return await self._inner.get(key)

    def stream(
        self, key: str, *, start: int = 0, end: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> AsyncIterator[bytes]:
        return self._inner.stream(key, start=start, end=end, chunk_size=chunk_size)

    async def put(self, key: str, data: BlobData, *, expect: Expectation = Expect.ANY) -> str:
        return await self._inner.put(key, data, expect=expect)

    async def delete(self, key: str, *, expect: Expectation = Expect.ANY) -> None:
        await self._inner.delete(key, expect=expect)


async def _set(clock: WallClock, jumps: list[int]) -> None:
    rng = random.Random(0)
    try:
        for ahead in itertools.cycle(JUMPS):
            await anyio.sleep(rng.uniform(0.2, 1.5) * TTL.total_seconds())
            clock.ahead = ahead
            jumps[0] += 1
            await anyio.sleep(rng.uniform(0.2, 1.5) * TTL.total_seconds())
            clock.ahead = timedelta()
    finally:
        clock.ahead = timedelta()


async def _pinned(store: SessionStore) -> tuple[Session, list[tuple[ImageRecord, tuple[int, int, int]]]]:
    session = await store.create_session()
    await session.pin("soak", until=store.clock() + timedelta(days=365))
    return session, [
        (await session.store_image(Image.new("RGB", (16, 16), colour), "start"), colour) for colour in COLOURS[:3]
    ]


async def _use(store: SessionStore, number: int, done: list[int], watched: Watched, clock: WallClock) -> None:
    """Store, read back, replace, clear and put back in a session that is used all the time."""
    session = await store.create_session()
    try:
        await _go_on(session, random.Random(number), done)
    finally:
        watched.leave(session, -math.inf, JUMPS[-1])  # its last recorded use may lie in the future


async def _go_on(session: Session, rng: random.Random, done: list[int]) -> None:
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


async def _leave(store: SessionStore, watched: Watched, clock: WallClock) -> None:
    while True:
        ahead = clock.ahead
        session = await store.create_session()
        before, ahead = anyio.current_time(), max(ahead, clock.ahead)
        try:
            await session.store_image(Image.new("RGB", (16, 16), "red"), "start")
        finally:
            watched.leave(session, before, max(ahead, clock.ahead))
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
