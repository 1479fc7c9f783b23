"""The ways into a slot, in a browser: by dialog, drop, paste and keyboard; upright, large or refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.demo_page import expect_size, kept, manifest, upload
from tests.faults import files_below
from tests.images import corners, encoded, exif, jpeg_with_exif, photograph, png_file, rgba_png, turned
from tests.servers import FLAGS, Server, chromium_path, opened, wait_until

pytestmark = pytest.mark.browser

COPY = """
async data => {
    const image = await (await fetch('data:image/png;base64,' + data)).blob();
    await navigator.clipboard.write([new ClipboardItem({'image/png': image})]);
}
"""
# The colours in the middle of its quarters, from the upper left, in rows.
QUARTERS = """
async image => {
    await image.decode();
    const canvas = document.createElement('canvas');
    const [width, height] = [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const brush = canvas.getContext('2d');
    brush.drawImage(image, 0, 0);
    const at = (x, y) => [...brush.getImageData(width * x, height * y, 1, 1).data.slice(0, 3)];
    return [at(0.25, 0.25), at(0.75, 0.25), at(0.25, 0.75), at(0.75, 0.75)];
}
"""
RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def file(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def drop(page: Page, slot: str, path: Path) -> None:
    """As a user drags a file from the desktop."""
    box = page.locator(f"#{slot} [aria-label^='Drop']").bounding_box()
    assert box is not None
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    devtools.detach()


@contextmanager
def going_back(browser: Browser, *, cached: bool) -> Iterator[BrowserContext]:
    """Windows whose history keeps whole pages, as of users, or does not: Playwright turns that off."""
    if not cached:
        with browser.new_context() as context:
            yield context
        return
    left_out = ["--disable-back-forward-cache"]
    kind = browser.browser_type
    with kind.launch(executable_path=chromium_path(), args=list(FLAGS), ignore_default_args=left_out) as other:
        yield other.new_context()


def test_a_file_comes_by_dialog_by_drop_and_by_paste(context: BrowserContext, server: Server, tmp_path: Path) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url.rstrip("/"))
    page = opened(context.new_page(), server.url)
    with page.expect_file_chooser() as chooser:
        page.click("#start button[aria-label^='Drop']")
    chooser.value.set_files(file(tmp_path, "chosen.png", rgba_png(90, 60)))
    drop(page, "end", file(tmp_path, "dropped.png", rgba_png(91, 60)))
    wait_until(lambda: kept(server, context, "chosen.png", "dropped.png"))
    opened(page, server.url)
    expect_size(page, "start", (90, 60))
    expect_size(page, "end", (91, 60))
    page.evaluate(COPY, base64.b64encode(rgba_png(92, 60)).decode())
    page.click("#start button[aria-label='Paste from clipboard']")
    wait_until(lambda: manifest(server, context)["images"].get("start", {}).get("width") == 92)
    opened(page, server.url)
    expect_size(page, "start", (92, 60))
    expect_size(page, "end", (91, 60))


def test_a_photograph_is_upright_however_the_camera_was_held(
    context: BrowserContext, server: Server, tmp_path: Path
) -> None:
    page = opened(context.new_page(), server.url)
    for orientation in range(1, 9):
        photo = jpeg_with_exif(orientation, image=corners(96, 64), quality=100, subsampling=0)
        upload(page, "start", file(tmp_path, f"{orientation}.jpg", photo))
        drawing = encoded(turned(corners(80, 64), orientation), "PNG", exif=exif(orientation))
        upload(page, "end", file(tmp_path, f"{orientation}.png", drawing))
        wait_until(lambda names=(f"{orientation}.jpg", f"{orientation}.png"): kept(server, context, *names))  # type: ignore[misc]
        for stored in (False, True) if orientation in (3, 6) else (False,):
            if stored:
                opened(page, server.url)
            for slot, size in (("start", (96, 64)), ("end", (80, 64))):
                expect_size(page, slot, size)
                found = page.locator(f"#{slot} img").evaluate(QUARTERS)
                assert np.abs(np.subtract(found, [RED, GREEN, WHITE, BLUE])).max() < 16, (orientation, slot, stored)


def test_a_large_png_is_kept_byte_for_byte(context: BrowserContext, server: Server, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2400, 2400, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG", compress_level=1)
    assert len(data) > 16 * 2**20
    page = opened(context.new_page(), server.url)
    upload(page, "start", file(tmp_path, "large.png", data))
    wait_until(lambda: kept(server, context, "large.png"), 60)
    opened(page, server.url)
    expect_size(page, "start", (2400, 2400))
    session = manifest(server, context)
    stored = files_below(server.folder / "root", "blobs", session["incarnation"])
    assert data in [path.read_bytes() for path in stored]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("notes.png", "not an image"),
        ("cut.jpg", "ends before its image does"),
        ("bomb.png", "pixels"),
        ("wide.png", "pixels"),
        ("moving.webp", "give a still image"),
    ],
)
def test_a_refused_file_says_why_and_leaves_the_image_before_it(
    context: BrowserContext, server: Server, tmp_path: Path, name: str, told: str
) -> None:
    frames = [photograph(40, 30, seed=seed) for seed in range(3)]
    data = {
        "notes.png": b"These are only words.\n" * 100,
        "cut.jpg": jpeg_with_exif(1)[:-4000],
        "bomb.png": png_file(30_000, 30_000, 8, 2, b"\0" * 1000),
        "wide.png": png_file(20_000, 16, 1, 0),
        "moving.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    }[name]
    page = opened(context.new_page(), server.url)
    upload(page, "start", file(tmp_path, "good.png", rgba_png(90, 60)))
    wait_until(lambda: kept(server, context, "good.png"))
    before = manifest(server, context)
    upload(page, "start", file(tmp_path, name, data))
    notice = page.get_by_test_id("toast-body").filter(has_text="This file is not kept")
    expect(notice).to_be_visible()
    expect(notice).to_contain_text(told)
    expect_size(page, "start", (90, 60))
    assert manifest(server, context)["images"] == before["images"]
    opened(page, server.url)
    expect_size(page, "start", (90, 60))
    upload(page, "start", file(tmp_path, "better.png", rgba_png(80, 60)))
    wait_until(lambda: kept(server, context, "better.png"))


@pytest.mark.parametrize("cached", [True, False])
def test_back_and_forward_find_the_images_and_the_page_still_works(
    browser: Browser, server: Server, tmp_path: Path, cached: bool
) -> None:
    with going_back(browser, cached=cached) as context:
        page = context.new_page()
        page.add_init_script("addEventListener('pageshow', event => { window.persisted = event.persisted })")
        opened(page, server.url)
        upload(page, "start", file(tmp_path, "start.png", rgba_png(90, 60)))
        wait_until(lambda: kept(server, context, "start.png"))
        page.goto(server.url + "config")
        page.go_back(wait_until="commit")
        expect_size(page, "start", (90, 60))
        page.wait_for_function("cached => window.persisted === cached", arg=cached)
        page.go_forward(wait_until="commit")  # a page from the cache is not loaded
        page.wait_for_function("location.pathname === '/config' && document.readyState === 'complete'")
        page.go_back(wait_until="commit")
        expect_size(page, "start", (90, 60))
        if cached:  # whose connections are gone, which Gradio takes a moment to find out
            opened(page, server.url)
        upload(page, "end", file(tmp_path, "end.png", rgba_png(91, 60)))
        wait_until(lambda: kept(server, context, "start.png", "end.png"))
        page.click("#start button[aria-label='Remove Image']")
        wait_until(lambda: kept(server, context, "end.png"))
