"""Many sessions in one store: opening it, restoring one of them, sweeping them all. Each size in a fresh process."""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from async_sessions import _keys, _manifest, open_store
from tests.benchmarks.designs import Cost, timed
from tests.benchmarks.lag import lag_of, listening
from tests.benchmarks.memory import resident
from tests.benchmarks.threaded import ThreadedSessions
from tests.images import corners

if TYPE_CHECKING:
    from async_sessions import SessionStore

INTERVAL = timedelta(minutes=30)
MAX_AGE = timedelta(hours=24)
OPENED = 5
RESTORED = 200
_SHARED_MEMORY = Path("/dev/shm")
_EACH = 16 * 1024  # bytes that a session takes there, for both designs


class Scale(NamedTuple):
    """Seconds; of this package unless it says otherwise. `scans` are the threaded design's, between the sweeps.

    `stall` is the longest lag of the event loop in a sweep with nothing due, `remembered` the bytes of memory that the
    sweeps keep.
    """

    sessions: int
    opening: float
    restoring: float
    restoring_while_sweeping: float
    restoring_threaded: float
    sweeps: list[Cost]
    scans: list[Cost]
    stall: float
    full: Cost | None
    remembered: int


def measure(sessions: int, rounds: int, full: bool) -> Scale:
    """To be called in a fresh process. `full`: measure a pass over everything too, the slowest of all."""
    with tempfile.TemporaryDirectory(dir=place(sessions)) as folder:
        return asyncio.run(_measure(Path(folder), sessions, rounds, full))


def place(sessions: int) -> Path:
    """A folder in memory where there is room: 100,000 directories take a disk minutes to make and to remove.

    On a disk too both designs would find what they read in memory, where it has just been written.
    """
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > sessions * _EACH:
        return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


async def _measure(folder: Path, sessions: int, rounds: int, full: bool) -> Scale:
    root = folder / "package"
    ids = random.Random(sessions).sample(await _fill(root, sessions), RESTORED)
    threaded = _threaded(folder / "threaded", sessions)

    opening = []
    for _ in range(OPENED):
        started = time.perf_counter()
        async with open_store(root, cleanup_interval=None):
            opening.append(time.perf_counter() - started)
    async with open_store(root, cleanup_interval=None) as store:
        restoring = await _restoring(store, ids)
    async with open_store(root) as store:  # a pass over everything begins now, and ends with the block
        busy = await _restoring(store, ids)

    async with open_store(root, cleanup_interval=None) as store:
        janitor = store._open()[1]
        before, _ = resident()
        everything, report = await timed(janitor.sweep(now=store.clock(), full=full))
        if (report.sessions, report.removed, report.problems) != (sessions, (), ()):
            raise AssertionError("The sweep found something else than was written.")
        sweeps, scans, stalls = [], [], []
        for _ in range(rounds):
            sweeps.append((await timed(janitor.sweep(now=store.clock() + INTERVAL)))[0])
            scans.append((await timed(asyncio.to_thread(threaded.cleanup, MAX_AGE)))[0])
            async with listening() as heard:
                await janitor.sweep(now=store.clock() + INTERVAL)
            stalls.append(lag_of(heard).longest)
        remembered = resident()[0] - before
    return Scale(
        sessions=sessions,
        opening=statistics.median(opening),
        restoring=restoring,
        restoring_while_sweeping=busy,
        restoring_threaded=_restoring_threaded(threaded, sessions),
        sweeps=sweeps,
        scans=scans,
        stall=statistics.median(stalls),
        full=everything if full else None,
        remembered=remembered,
    )


async def _restoring(store: SessionStore, ids: list[str]) -> float:
    spent = []
    for session_id in ids:
        started = time.perf_counter()
        await store.restore_session(session_id)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def _restoring_threaded(threaded: ThreadedSessions, sessions: int) -> float:
    spent = []
    for number in random.Random(sessions).sample(range(sessions), RESTORED):
        started = time.perf_counter()
        threaded.restore_from_session_id(f"session_{number}")
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


async def _fill(root: Path, sessions: int) -> list[str]:
    """Write sessions and return their ids: the first through the public door, the others as its clones, unsynced.

    There are no files of images: neither design looks at them when it restores, or sweeps with nothing due.
    """
    async with open_store(root, cleanup_interval=None) as store:
        session = await store.create_session(model="i2v", prompt="a train arrives at a station")
        await session.store_image(corners(), "start")
        manifest = await store._open()[0].manifests.read(session.key)
    if manifest is None:
        raise AssertionError("What was stored is not there.")
    shutil.rmtree(root / _keys.MANIFESTS)
    shutil.rmtree(root / _keys.BLOBS)
    for shard in range(256):
        (root / _keys.MANIFESTS / f"{shard:02x}").mkdir(mode=0o700, parents=True)
    ids = [_keys.new_session_id() for _ in range(sessions)]
    for session_id in ids:
        key, incarnation = _keys.key_of_id(session_id), _keys.new_incarnation()
        images = {
            slot: replace(record, blob=_keys.new_blob(incarnation, record.digest))
            for slot, record in manifest.images.items()
        }
        clone = replace(manifest, key=key, incarnation=incarnation, revision=_keys.new_revision(), images=images)
        (root / _keys.manifest(key)).write_bytes(_manifest.encode(clone))
    return ids


def _threaded(folder: Path, sessions: int) -> ThreadedSessions:
    threaded = ThreadedSessions(folder)
    metadata = threaded.store_image(corners(), "session_0", "start").with_name("metadata.json")
    data = metadata.read_bytes()
    for number in range(1, sessions):
        (clone := folder / f"session_{number}").mkdir()
        (clone / metadata.name).write_bytes(data)
    return threaded
