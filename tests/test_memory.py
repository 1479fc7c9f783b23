"""What is borrowed from the budget of pixels is what is taken: measured, in a process that does nothing else."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import anyio.lowlevel
import numpy as np
import pytest
from PIL import Image

from async_sessions import AsyncSessionsError, Session, open_store
from async_sessions._budget import Loan
from async_sessions.records import MIB, Limits
from tests.images import encoded, exif, jpeg_in_scans, photograph, png_chunk, png_file

if TYPE_CHECKING:
    from async_sessions._ingest import ImageSource

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status"),
    pytest.mark.timeout(300),  # the first test measures for all,
    pytest.mark.xdist_group("memory"),  # in one process
]

WIDTH: Final = 2000
HEIGHT: Final = 1500
SLACK: Final = 5 * MIB  # of a decoder, an encoder, and the thumbnail


@cache
def _picture(mode: str) -> Image.Image:
    image = photograph(WIDTH, HEIGHT)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def _unread(form: str, **options: object) -> Image.Image:
    return Image.open(io.BytesIO(encoded(_picture("RGB"), form, **options)))


def _file(form: str, mode: str = "RGB", **options: object) -> Callable[[], bytes]:
    return lambda: encoded(_picture(mode), form, **options)


STORED: dict[str, Callable[[], ImageSource]] = {
    "JPEG": _file("JPEG"),
    "JPEG, grey": _file("JPEG", "L"),
    "JPEG, CMYK": _file("JPEG", "CMYK"),
    "JPEG, turned": _file("JPEG", exif=exif(6)),
    "JPEG, progressive": _file("JPEG", progressive=True),
    "JPEG, progressive, turned": _file("JPEG", progressive=True, exif=exif(6)),
    "JPEG, progressive, with all of its colour": _file("JPEG", progressive=True, subsampling=0),
    "JPEG, progressive, CMYK": _file("JPEG", "CMYK", progressive=True),
    "JPEG in three scans": lambda: jpeg_in_scans(_picture("RGB")),
    "PNG, grey": _file("PNG", "L", compress_level=1),
    "PNG, grey with alpha": _file("PNG", "LA", compress_level=1),
    "PNG, palette": _file("PNG", "P", compress_level=1),
    "PNG": _file("PNG", compress_level=1),
    "PNG with alpha": _file("PNG", "RGBA", compress_level=1),
    "PNG with a transparent colour": _file("PNG", compress_level=1, transparency=(1, 1, 1)),
    "PNG, turned": _file("PNG", compress_level=1, exif=exif(6)),
    "PNG, 16 bits of grey": partial(png_file, WIDTH, HEIGHT, 16, 0),
    "PNG, 16 bits of grey with a transparent one": partial(
        png_file, WIDTH, HEIGHT, 16, 0, before=png_chunk(b"tRNS", b"\0\1")
    ),
    "PNG, 16 bits a sample": partial(png_file, WIDTH, HEIGHT, 16, 6),
    "WebP": _file("WEBP", method=0),
    "WebP with alpha": _file("WEBP", "RGBA", method=0),
    "WebP, lossless": _file("WEBP", "RGBA", lossless=True, method=0, quality=0),
    **{
        f"an image in {mode}": partial(_picture, mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
    },
    "an image of 16 bits": lambda: Image.fromarray(np.asarray(_picture("L")).astype("<u2") * 257),
    "an image of 16 bits, the other way round": lambda: Image.frombytes(
        "I;16B", _picture("LA").size, _picture("LA").tobytes()
    ),
    "an image of noise": lambda: Image.frombytes(
        "RGBA", (WIDTH, HEIGHT), random.Random(1).randbytes(4 * WIDTH * HEIGHT)
    ),
    **{f"an image that is a {form} not yet read": partial(_unread, form) for form in ("JPEG", "PNG", "WEBP", "TIFF")},
    "an image that is a progressive JPEG not yet read": partial(_unread, "JPEG", progressive=True, subsampling=0),
    "an array": lambda: np.asarray(_picture("RGB")),
    "an array turned over": lambda: np.asarray(_picture("RGBA"))[::-1, ::-1, :3],
    "an array in grey": lambda: np.asarray(_picture("L")),
    "an array of 16 bits": lambda: np.asarray(_picture("L")).astype(">u2") * 257,
    "AVIF": _file("AVIF", speed=10),
    "AVIF with alpha": _file("AVIF", "RGBA", speed=10, subsampling="4:4:4"),
}


READ = (
    "JPEG", "JPEG, CMYK", "JPEG, progressive", "PNG, grey with alpha", "PNG, palette", "PNG with alpha",
    "PNG with a transparent colour", "PNG, 16 bits of grey with a transparent one", "WebP",
)  # fmt: skip
READS: dict[str, Callable[[Session], Awaitable[object]]] = {
    "image": lambda session: session.retrieve_image("start"),
    "array": lambda session: session.retrieve_array("start"),
    "rendition of half its size": lambda session: session.retrieve_rendition("start", (1000, 750)),
    "large rendition": lambda session: session.retrieve_rendition("start", (2400, 1600), "contain"),
    "long rendition": lambda session: session.retrieve_rendition("start", (4000, 100), "stretch"),
}


async def measure_all() -> None:
    """Print, for every case, the bytes that were taken and those that were borrowed; for a process of its own."""
    taken: dict[str, tuple[int, int]] = {}
    asked: list[int] = []
    ask = Loan.ask

    async def noted(loan: Loan, pixels: int) -> None:
        asked.append(pixels)
        await ask(loan, pixels)

    async def measure(case: str, call: Callable[[], Awaitable[object]], files: int) -> None:
        await anyio.lowlevel.checkpoint()  # until then the loop keeps the last result
        gc.collect()
        asked.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        await call()
        taken[case] = _status("VmHWM") - before - files, 4 * max(asked)

    async with open_store("memory://", cache_bytes=1, limits=Limits(max_bytes=64 * MIB)) as store:
        session = await store.create_session()
        await session.store_image(photograph(64, 48), "start")
        with patch.object(Loan, "ask", noted):
            for case, make in STORED.items():
                source = make()
                # as it was rebuilt, and as the decoder copied it
                files = 2 * len(source) if isinstance(source, bytes) else 0
                await measure(case, partial(session.store_image, source, "start"), files)
                for how in READS if case in READ else ():
                    await measure(f"{case}: {how}", partial(READS[how], session), files)
            output = photograph(WIDTH, HEIGHT)
            await measure("output", lambda: session.store_output(output, name="frame", media_type="image/png"), 0)
    json.dump(taken, sys.stdout)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _run(function: str) -> Any:
    """What a coroutine function of this module prints as JSON in a process of its own."""
    code = f"import anyio; from tests import test_memory; anyio.run(test_memory.{function})"
    # so that what is freed is given back at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    taken: dict[str, tuple[int, int]] = _run("measure_all")
    return taken


@pytest.mark.parametrize("case", [*STORED, "output"])
def test_to_store_an_image_takes_what_is_borrowed(case: str, measured: dict[str, tuple[int, int]]) -> None:
    taken, borrowed = measured[case]
    assert borrowed / 6 < taken < borrowed + SLACK


@pytest.mark.parametrize("how", READS)
@pytest.mark.parametrize("case", READ)
def test_to_read_an_image_takes_no_more_than_is_borrowed(
    case: str, how: str, measured: dict[str, tuple[int, int]]
) -> None:
    taken, borrowed = measured[f"{case}: {how}"]
    assert taken < borrowed + SLACK


# --- where there is none

LARGE: dict[str, Callable[[], ImageSource]] = {
    "JPEG": lambda: encoded(Image.new("RGB", (4000, 3000)), "JPEG"),
    "progressive JPEG": lambda: encoded(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True),
    "PNG": lambda: encoded(Image.new("RGBA", (4000, 3000)), "PNG"),
    "WebP": lambda: encoded(Image.new("RGB", (4000, 3000)), "WEBP", method=0),
    "AVIF": lambda: encoded(Image.new("RGB", (4000, 3000)), "AVIF", speed=10),
    "image": lambda: Image.new("RGB", (4000, 3000)),
    "array": lambda: np.zeros((3000, 4000, 3), np.uint8),
}


async def starve() -> None:
    """Print what becomes of images that are stored and read with 30 MB to spare; for a process of its own."""
    became: dict[str, list[str]] = {}

    async def note(case: str, call: Callable[[], Awaitable[object]]) -> None:
        gc.collect()  # the last case's image may hang on its error, and would be room for this one
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 30_000_000, resource.RLIM_INFINITY))
        try:
            await call()
        except AsyncSessionsError as error:
            became.setdefault(case, []).append(type(error).__name__)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    async with open_store("memory://", cache_bytes=1) as store:
        session = await store.create_session()
        await session.store_image(photograph(64, 48), "start")
        for case, make in LARGE.items():
            source = make()
            await note(case, partial(session.store_image, source, "start"))
            assert (await session.info()).images["start"].size == (64, 48)
        for case, make in LARGE.items():
            await session.store_image(make(), "start")
            for read in (session.retrieve_image, session.retrieve_array):
                await note(case, partial(read, "start"))
        assert store._context().budget.free == store._context().budget.pixels
        assert not store._context().cpu.borrowed_tokens
    json.dump(became, sys.stdout)


def test_without_memory_no_image_is_called_damaged() -> None:
    assert _run("starve") == dict.fromkeys(LARGE, 3 * ["OutOfMemoryError"])
