"""Many large images at once where no call may block the loop: `python -m tests.proof.stores ROOT`."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import anyio
import numpy as np
from blockbuster import blockbuster_ctx

from async_sessions import ImageSource, open_store
from tests.images import encoded, photograph

COUNT = 32


def stores(folder: Path) -> str:
    command = [sys.executable, "-m", "tests.proof.stores", str(folder / "root")]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip()


def sources(width: int, height: int) -> list[ImageSource]:
    """A photograph in every way to give one."""
    image = photograph(width, height)
    return [encoded(image, "JPEG"), encoded(image, "PNG", compress_level=1), image, np.asarray(image)]


async def store_at_once(root: Path, given: list[ImageSource], count: int) -> None:
    """That many images are stored, each to be read again, at the same time."""
    async with open_store(root, cleanup_interval=None) as store, anyio.create_task_group() as group:
        session = await store.create_session()

        async def keep(source: ImageSource, slot: str) -> None:
            record = await session.store_image(source, slot)
            assert (await session.retrieve_image(slot)).size == record.size

        for number in range(count):
            group.start_soon(keep, given[number % len(given)], f"slot{number}")


def _main(root: Path) -> None:
    given, began = sources(4000, 3000), time.perf_counter()
    with blockbuster_ctx():
        anyio.run(store_at_once, root, given, COUNT)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{COUNT} concurrent 12 MP stores under blockbuster: 0 blocking calls, {seconds:.0f} s, {peak:,} MiB")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
