"""How long a device waits between two jobs of a queue, with its images prepared ahead and without."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio.from_thread
import numpy as np
from PIL import Image, ImageOps

from async_sessions import open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import JobContext, Output, PipelineSpec
from tests.benchmarks import pictures
from tests.benchmarks.lag import VOID, Lag, lag_of, listening
from tests.benchmarks.pictures import TWELVE_MEGAPIXELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from async_sessions import StoredImage

JOBS = 20
FRAME = 832, 480
RUN = 1.0  # seconds that a device is at work for one job: more than two such images take to prepare on two cores
AHEAD, IN_TURN = "prepared while the device works", "prepared when it is the job's turn"


class Waits(NamedTuple):
    """Seconds between the end of a run and the start of the next one, and the lag of the loop idle and meanwhile."""

    between: list[float]
    idle: Lag
    busy: Lag
    valid: bool

    @property
    def median(self) -> float:
        return statistics.median(self.between)

    @property
    def p95(self) -> float:
        return sorted(self.between)[int(0.95 * len(self.between))]

    @property
    def used(self) -> float:
        """The share of the time between the first start and the last end in which the device was at work."""
        work = RUN * (len(self.between) + 1)
        return work / (work + sum(self.between))


class Device:
    """A pipeline that lays out two images for a video model; for the rest it lets its device work for `RUN` seconds."""

    def __init__(self, *, ahead: bool) -> None:
        self.spec = PipelineSpec(name="device", slots={"start": True, "end": True})
        self.spans: list[tuple[float, float]] = []
        self._ahead = ahead

    def load(self, device: str) -> None: ...

    def prepare(self, inputs: Mapping[str, StoredImage], params: Mapping[str, Any]) -> Any:
        files = [anyio.from_thread.run(image.data) for image in inputs.values()]
        return [_laid_out(file) for file in files] if self._ahead else files

    def generate(self, prepared: Any, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        if not self._ahead:
            prepared = [_laid_out(file) for file in prepared]
        begun = time.perf_counter()
        time.sleep(RUN)  # without the GIL, as one waits for a GPU
        self.spans.append((begun, time.perf_counter()))
        return {"shape": (str([image.shape for image in prepared]).encode(), "text/plain")}


def _laid_out(file: bytes) -> NDArray[np.float32]:
    with Image.open(io.BytesIO(file)) as image:
        image.draft("RGB", FRAME)
        fitted = ImageOps.fit(image.convert("RGB"), FRAME, Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(255)


async def measure(*, jobs: int = JOBS, idle: float = 1.5, reruns: int = 1) -> dict[str, Waits]:
    """One queue of `jobs` jobs with each way of preparing, every job with two uploads of its own.

    `idle` seconds are listened to before and after; a void run is repeated.
    """
    uploads = [pictures.upload(TWELVE_MEGAPIXELS, seed) for seed in range(4)]
    return {name: await _measure(name == AHEAD, uploads, jobs, idle, reruns) for name in (IN_TURN, AHEAD)}


async def _measure(ahead: bool, uploads: list[bytes], jobs: int, idle: float, reruns: int) -> Waits:
    pipeline = Device(ahead=ahead)
    with tempfile.TemporaryDirectory() as folder:
        async with open_store(Path(folder, "store"), cache_bytes=0, cleanup_interval=None) as store:
            sessions = [await store.create_session() for _ in range(jobs)]
            for number, session in enumerate(sessions):
                pair = {"start": uploads[number % len(uploads)], "end": uploads[(number + 1) % len(uploads)]}
                await session.store_images(pair)
            async with LocalDispatcher(store, [pipeline], start_paused=True, max_queued=jobs) as dispatcher:
                queued = [await dispatcher.submit(await session.generation_request("device")) for session in sessions]
                async with listening() as before:
                    await anyio.sleep(idle)
                async with listening() as busy:
                    dispatcher.resume()
                    for job in queued:
                        await job.result()
                async with listening() as after:
                    await anyio.sleep(idle)
    between = [later - earlier for (_, earlier), (later, _) in pairwise(pipeline.spans)]
    waits = Waits(between, lag_of(before, after), lag_of(busy), max(lag_of(before).p99, lag_of(after).p99) <= VOID)
    return waits if waits.valid or not reruns else await _measure(ahead, uploads, jobs, idle, reruns - 1)
