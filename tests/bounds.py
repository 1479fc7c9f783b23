"""What it costs to refuse an input, against what it may cost: `python -m tests.bounds`, a process of its own.

It prints a line of JSON for each. The memory is that of the whole process at its peak, which only Linux can tell.
"""

from __future__ import annotations

import gc
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
import msgspec

from async_sessions import ImageRejectedError, open_store
from async_sessions._codec import encode
from async_sessions.records import MIB
from tests import corpus
from tests.images import encoded, photograph, png_chunk, webp_chunks, webp_file

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions import Session

# Buffers go back to the system at once; else the next input would find memory that it does not seem to take.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Cost(msgspec.Struct, frozen=True):
    """CPU seconds, since others may keep the cores busy, and bytes beyond the input; with what may be taken of each."""

    name: str
    fault: Literal["structure", "pixels"]
    seconds: float
    memory: int
    most_seconds: float = 0.1
    most_memory: int = 32 * MIB


def costs(*, tries: int = 1) -> list[Cost]:
    """The costs of all refused inputs, and of 12 MP images with damaged pixels; of some tries the least.

    A fault of the structure may take 0.1 s and 32 MB, one of the pixels what the whole image takes.
    """
    command = [sys.executable, "-m", "tests.bounds", str(tries)]
    done = subprocess.run(command, env={**os.environ, **_ENVIRONMENT}, stdout=subprocess.PIPE, check=True)
    return [msgspec.json.decode(line, type=Cost) for line in done.stdout.splitlines()]


def _damaged() -> Iterator[tuple[str, bytes, bytes]]:
    """Large images, and the same with the last of their pixels missing."""
    image = photograph(4000, 3000)
    png = encode.png(image)
    size = struct.pack(">II", image.width, image.height + 1)
    yield "a PNG that says it is a row taller", png, png[:8] + png_chunk(b"IHDR", size + png[24:29]) + png[33:]
    for name, lossless in (("a lossy WebP", False), ("a lossless WebP", True)):
        webp = encoded(image, "WEBP", method=0, quality=50, lossless=lossless)
        kind, body = webp_chunks(webp)[0]
        yield name, webp, webp_file((kind, body[: len(body) * 9 // 10]))


async def _cost(session: Session, source: bytes | Image.Image, tries: int) -> tuple[float, int]:
    seconds, memory = float("inf"), 0
    for _ in range(tries):
        gc.collect()  # a refusal's frames are a cycle, which holds the input before
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        before, began = _held("VmRSS"), time.process_time()
        with suppress(ImageRejectedError):
            await session.store_image(source, "start")
        seconds, memory = min(seconds, time.process_time() - began), max(memory, _held("VmHWM") - before)
    return seconds, memory


def _held(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


async def _main(tries: int) -> None:
    async with open_store("memory://", limits=corpus.LIMITS, cleanup_interval=None) as store:
        session = await store.create_session()
        for form in ("JPEG", "PNG", "WEBP", "AVIF"):  # whatever is loaded once
            await session.store_image(encoded(photograph(64, 48), form), "start")
        gc.freeze()  # so that a collection looks at what comes from now on
        for name, (make, _) in corpus.REFUSED.items():
            _print(Cost(name, "structure", *await _cost(session, make(), tries)))
        for name, whole, damaged in _damaged():
            _print(Cost(name, "pixels", *await _cost(session, damaged, tries), *await _cost(session, whole, tries)))


def _print(cost: Cost) -> None:
    sys.stdout.write(msgspec.json.encode(cost).decode() + "\n")


if __name__ == "__main__":
    anyio.run(_main, int(sys.argv[1]))
