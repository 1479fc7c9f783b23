"""Kills a server while a browser uploads a large image, and looks which image is there after the restart."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import NamedTuple

import anyio
import numpy as np
from PIL import Image

from async_sessions import open_store
from tests.demo_page import kept, manifest, upload
from tests.servers import chromium, drawn_size, free_port, leave, opened, serving, wait_until


class Found(NamedTuple):
    """How often which image was there; `within` are the seconds that an upload takes which nobody disturbs."""

    old: int
    new: int
    within: float


def large(number: int) -> bytes:
    """A PNG of 16 MB; another number is another size."""
    pixels = np.random.default_rng(number).integers(0, 256, (2400, 2400 + number, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", compress_level=0)
    return written.getvalue()


def check_kills(folder: Path, *, kills: int, seed: str) -> Found:
    """Each kill comes at a random instant of an upload that replaces the image of the one before."""
    port, rng = free_port(), random.Random(seed)
    arguments = ("-m", "async_sessions", "demo", "--port", str(port), "--root", str(folder / "root"))
    with chromium() as browser, serving(folder, *arguments, port=port) as server:
        context = browser.new_context()
        page = opened(context.new_page(), server.url)

        def send(number: int) -> Path:
            path = folder / f"{number}.png"
            path.write_bytes(large(number))
            upload(page, "start", path)
            return path

        path, began = send(0), time.monotonic()
        wait_until(lambda: kept(server, context, "0.png"), 60)
        within, there = time.monotonic() - began, 0
        path.unlink()
        counts = {False: 0, True: 0}
        for number in range(1, kills + 1):
            path = send(number)
            time.sleep(rng.uniform(0, 1.3 * within))
            server.kill()
            leave(page)
            server.start()
            opened(page, server.url)
            image = page.locator("#start img")
            image.wait_for()
            width, height = drawn_size(image) or (0, 0)
            told = f"seed {seed!r}, kill {number}: {width} x {height} after image {there}"
            assert height == 2400, told
            assert width - 2400 in (there, number), told
            counts[width - 2400 == number] += 1
            there = width - 2400
            record = manifest(server, context)["images"]["start"]
            stored = (server.folder / "root" / record["blob"]).read_bytes()
            assert stored == large(there), told
            path.unlink()
        assert server.stop() == 0
    anyio.run(_check_store, folder / "root")
    return Found(counts[False], counts[True], within)


async def _check_store(root: Path) -> None:
    """What a kill left is nothing that a sweep would not take."""
    async with open_store(root, cleanup_interval=None) as store:
        assert not [finding for finding in (await store.verify()).findings if finding.kind != "orphan"]
