from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.demo_page import (
    QUICK,
    choose,
    expect_size,
    kept,
    manifest,
    paced_demo,
    slow_runs,
    start_runs,
    upload,
)
from tests.faults import files_below
from tests.images import PLACE, jpeg_with_exif, photograph, rgba_png
from tests.servers import Server, leave, opened, pick, wait_until
from tests.videos import frames_of

pytestmark = pytest.mark.browser

WATCH_PROGRESS = """
window.seen = [];
new MutationObserver(() => {
    const bar = document.querySelector('#progress [role=progressbar]');
    if (bar) window.seen.push(Number(bar.getAttribute('aria-valuenow')));
}).observe(document.querySelector('#progress'), {subtree: true, childList: true, attributes: true});
"""


@pytest.fixture
def start_photo(tmp_path: Path) -> Path:
    """As a phone writes it: lying on its side, with the place where it was made."""
    path = tmp_path / "start.jpg"
    path.write_bytes(jpeg_with_exif(6, gps=True, image=photograph(480, 640, seed=1)))
    return path


@pytest.fixture
def end_photo(tmp_path: Path) -> Path:
    path = tmp_path / "end.png"
    path.write_bytes(rgba_png(700, 500))
    return path


def difference(frame: np.ndarray[Any, Any], path: Path) -> float:
    """Mean difference of a frame to the image in the file, upright, cropped alike, on grey; 0 to 255."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGBA")
    fitted = ImageOps.fit(upright, (frame.shape[1], frame.shape[0]), Image.Resampling.LANCZOS)
    flat = Image.alpha_composite(Image.new("RGBA", fitted.size, (128, 128, 128, 255)), fitted).convert("RGB")
    return float(np.abs(np.asarray(flat).astype(int) - frame).mean())


def test_two_photographs_live_through_reload_tabs_and_kill_and_become_a_video(
    browser: Browser, context: BrowserContext, server: Server, start_photo: Path, end_photo: Path
) -> None:
    logged_before = server.log.read_text()
    page = opened(context.new_page(), server.url)
    upload(page, "start", start_photo)
    upload(page, "end", end_photo)
    wait_until(lambda: kept(server, context, "start.jpg", "end.png"))

    opened(page, server.url)
    expect_size(page, "start", (480, 640))
    expect_size(page, "end", (700, 500))
    tab = opened(context.new_page(), server.url)
    expect_size(tab, "start", (480, 640))
    expect_size(tab, "end", (700, 500))
    tab.close()
    stranger = browser.new_context()
    other = opened(stranger.new_page(), server.url)
    expect(other.locator("#start img, #end img")).to_have_count(0)
    stranger.close()

    server.kill()
    leave(page)
    server.start()
    opened(page, server.url)
    expect_size(page, "start", (480, 640))
    expect_size(page, "end", (700, 500))

    choose(page, QUICK)
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("Done")
    video = page.locator("#video video")
    video.evaluate("video => { video.muted = true; return video.play() }")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.2")
    assert video.evaluate("video => [video.readyState, video.duration > 2]") == [4, True]
    source = video.evaluate("video => video.currentSrc")
    first, *_, last = frames_of(context.request.get(source).body())
    assert difference(first, start_photo) < 8
    assert difference(last, end_photo) < 8
    opened(page, server.url)
    expect(page.locator("#video video")).to_be_visible()

    page.click("#start button[aria-label='Remove Image']")
    wait_until(lambda: kept(server, context, "end.png"))
    opened(page, server.url)
    expect(page.locator("#start img")).to_have_count(0)
    expect_size(page, "end", (700, 500))

    written = b"".join(path.read_bytes() for path in files_below(server.folder / "root"))
    assert PLACE not in written
    (cookie,) = context.cookies()
    session_id = cookie["value"].partition(".")[0]
    assert len(session_id) == 43
    assert session_id.encode() not in written
    assert session_id not in "".join(str(path) for path in server.folder.rglob("*"))
    assert session_id not in page.content()
    logged = server.log.read_text().removeprefix(logged_before)
    assert session_id not in logged
    assert "Traceback" not in logged

    incarnation = manifest(server, context)["incarnation"]
    assert files_below(server.folder / "root", "blobs", incarnation)
    page.get_by_role("tab", name="Your session").click()
    page.get_by_role("button", name="Clear all", exact=True).click()
    page.get_by_role("button", name="Yes, clear all").click()
    wait_until(lambda: not files_below(server.folder / "root", "blobs", incarnation))
    expect(page.get_by_text("Nothing is kept yet")).to_be_visible()
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#start img, #end img, #video video")).to_have_count(0)
    opened(page, server.url)
    expect(page.locator("#start img, #end img, #video video")).to_have_count(0)


def test_of_two_quick_uploads_into_one_slot_the_second_wins(
    context: BrowserContext, server: Server, tmp_path: Path
) -> None:
    large, small = tmp_path / "large.jpg", tmp_path / "small.png"
    large.write_bytes(jpeg_with_exif(1, image=photograph(3000, 2000, seed=2)))
    small.write_bytes(rgba_png(64, 48))
    page = opened(context.new_page(), server.url)
    for first, second, size in [(large, small, (64, 48)), (small, large, (3000, 2000)), (large, small, (64, 48))]:
        upload(page, "start", first)
        upload(page, "start", second, at_once=True)
        wait_until(lambda name=second.name: kept(server, context, name))  # type: ignore[misc]
        expect_size(page, "start", size)
        opened(page, server.url)
        expect_size(page, "start", size)


def test_switching_the_model_hides_a_slot_and_never_loses_its_image_or_a_setting(
    context: BrowserContext, server: Server, start_photo: Path, end_photo: Path
) -> None:
    page = opened(context.new_page(), server.url)
    upload(page, "start", start_photo)
    upload(page, "end", end_photo)
    wait_until(lambda: kept(server, context, "start.jpg", "end.png"))
    page.fill("#prompt textarea", "a <b>bold</b> boat")
    choose(page, "t2v-A14B")
    expect(page.locator("#start, #end")).to_have_count(0)
    choose(page, "ti2v-5B")
    expect(page.locator("#end")).to_have_count(0)
    expect_size(page, "start", (480, 640))
    choose(page, "1280 × 704")  # noqa: RUF001 - as the page writes it
    expected = {"prompt": "a <b>bold</b> boat", "model": "ti2v-5B", "resolution": 1280 * 704}
    wait_until(lambda: expected.items() <= manifest(server, context)["state"].items())

    opened(page, server.url)
    expect(page.get_by_label("ti2v-5B")).to_be_checked()
    expect(page.get_by_label("1280 × 704")).to_be_checked()  # noqa: RUF001 - as the page writes it
    expect(page.locator("#prompt textarea")).to_have_value("a <b>bold</b> boat")
    expect(page.locator("#end")).to_have_count(0)
    choose(page, "i2v-A14B")
    expect_size(page, "start", (480, 640))
    expect_size(page, "end", (700, 500))


def without_images(context: BrowserContext, server: Server) -> Page:
    """A page of a model that needs none."""
    page = opened(context.new_page(), server.url)
    choose(page, "t2v-A14B")
    choose(page, QUICK)
    return page


def test_a_run_is_picked_up_after_a_reload_and_can_be_cancelled(context: BrowserContext, server: Server) -> None:
    page = without_images(context, server)
    page.fill("#frames input[type=number]", "121")
    page.press("#frames input[type=number]", "Enter")
    with slow_runs(server):
        page.click("#generate")
        expect(page.locator("#progress [role=progressbar]")).to_be_visible()
        page.goto(server.url)
        expect(page.locator("#progress")).to_contain_text("of 121")
        page.evaluate(WATCH_PROGRESS)
        page.wait_for_function("new Set(window.seen.filter(step => 0 < step && step < 100)).size > 2")
        seen = page.evaluate("window.seen")
        assert seen == sorted(seen)
        page.click("#cancel")
        expect(page.locator("#progress")).to_contain_text("Cancelled")
    expect(page.locator("#cancel")).to_be_disabled()
    expect(page.locator("#generate")).to_be_enabled()


def test_a_hostile_file_name_and_a_file_that_is_no_image_do_nothing_but_show(
    context: BrowserContext, server: Server, tmp_path: Path
) -> None:
    page = opened(context.new_page(), server.url)
    bad = tmp_path / "notes.png"
    bad.write_bytes(b"only words")
    upload(page, "start", bad)
    expect(page.get_by_text("This file is not kept")).to_be_visible()
    expect(page.locator("#start img")).to_have_count(0)
    hostile = tmp_path / "<img src=x onerror=alert(1)>${document.title=1}{{value}}.png"
    hostile.write_bytes(rgba_png())
    upload(page, "start", hostile)
    wait_until(lambda: kept(server, context, hostile.name))
    opened(page, server.url)
    page.get_by_role("tab", name="Your session").click()
    expect(page.get_by_text("onerror")).to_be_visible()
    expect(page.locator("img[src=x]")).to_have_count(0)
    assert page.title() == "async_sessions"


def test_the_page_works_while_the_store_does_not_answer(
    context: BrowserContext, server: Server, start_photo: Path
) -> None:
    page = opened(context.new_page(), server.url)
    root, away = server.folder / "root", server.folder / "away"
    root.rename(away)
    try:
        root.write_text("a file in the way")
        opened(page, server.url)
        expect(page.get_by_text("storage does not answer").first).to_be_visible()
        upload(page, "start", start_photo)
        expect(page.get_by_text("This image is not kept")).to_be_visible()
        expect_size(page, "start", (480, 640))
        page.click("#generate")
        expect(page.locator("#progress")).to_contain_text("Not started")
    finally:
        root.unlink()
        away.rename(root)
    upload(page, "start", start_photo)
    wait_until(lambda: kept(server, context, "start.jpg"))
    opened(page, server.url)
    expect_size(page, "start", (480, 640))


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    with paced_demo(tmp_path) as server:
        yield server


def test_the_server_leaves_the_store_when_it_is_terminated_under_an_open_page(
    context: BrowserContext, own_server: Server
) -> None:
    server = own_server
    with slow_runs(server):
        page = without_images(context, server)
        start_runs(page, 2)
        assert server.stop() == 0
        jobs = manifest(server, context)["jobs"].values()
        assert {job["error"] for job in jobs} == {None}
        assert [job["attempt"] - job["excused"] for job in jobs if job["status"] == "queued"] == [0, 0]
        assert "ERROR" not in (log := server.log.read_text()), log
        assert "Traceback" not in log

        leave(page)
        server.start()
        page.goto(server.url)
        expect(page.locator("#progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#progress")).to_have_text(re.compile(r"^\s*Done\s*$"))
    expect(page.locator("#video video")).to_be_visible()
    assert {job["status"] for job in manifest(server, context)["jobs"].values()} == {"succeeded"}


def test_a_run_that_was_killed_with_its_server_goes_on_after_the_restart(
    context: BrowserContext, own_server: Server
) -> None:
    server = own_server
    with slow_runs(server):
        page = without_images(context, server)
        start_runs(page)
        server.kill()
        leave(page)
        server.start()
        page.goto(server.url)
        expect(page.locator("#progress [role=progressbar]")).to_be_visible()
        page.get_by_role("tab", name="Queue").click()
        waiting, history = (page.get_by_role("list", name=name) for name in ("Under way and waiting", "History"))
        expect(waiting.get_by_text("The server stopped while it was at this")).to_be_visible()
    expect(history.get_by_text("Done")).to_be_visible()
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#progress")).to_contain_text("Done")
    expect(page.locator("#video video")).to_be_visible()


def test_a_queue_shows_several_runs_and_what_came_of_them(context: BrowserContext, server: Server) -> None:
    page = without_images(context, server)
    page.fill("#prompt textarea", "<img src=x onerror=alert(1)>")
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("Done")
    with slow_runs(server):
        start_runs(page, 2)
        page.get_by_role("tab", name="Queue").click()
        waiting, history = (page.get_by_role("list", name=name) for name in ("Under way and waiting", "History"))
        expect(waiting.get_by_role("listitem")).to_have_count(2)
        expect(waiting.get_by_role("progressbar")).to_be_visible()
        expect(history.get_by_role("listitem")).to_have_count(1)
        page.get_by_role("button", name="Cancel all").click()
        expect(history.get_by_role("listitem")).to_have_count(3)
        expect(history.get_by_text("Cancelled")).to_have_count(2)
    pick(page, "Run", "Done")
    page.get_by_role("button", name="Show result").click()
    expect(page.locator("video:visible")).to_have_count(1)
    page.get_by_role("button", name="Retry").click()
    expect(history.get_by_role("listitem")).to_have_count(4)
    expect(page.locator("img[src=x]")).to_have_count(0)


def test_the_panel_clears_puts_back_and_carries_a_session_to_another_browser(
    browser: Browser, context: BrowserContext, server: Server, start_photo: Path, end_photo: Path, tmp_path: Path
) -> None:
    page = opened(context.new_page(), server.url)
    upload(page, "start", start_photo)
    upload(page, "end", end_photo)
    page.fill("#prompt textarea", "a <b>bold</b> boat")
    wait_until(lambda: manifest(server, context)["state"].get("prompt") == "a <b>bold</b> boat")
    wait_until(lambda: kept(server, context, "start.jpg", "end.png"))
    page.get_by_role("tab", name="Your session").click()
    images, recent = (page.get_by_role("list", name=name) for name in ("Images", "Can be put back"))
    expect(images.get_by_role("listitem")).to_have_count(2)
    expect(images.get_by_text("480 × 640")).to_be_visible()  # noqa: RUF001 - as the page writes it
    sizes = images.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert all(0 < size <= 320 for size in sizes)
    expect(page.get_by_role("meter", name="Room in use")).to_be_visible()

    pick(page, "Image to clear", "start.jpg")
    page.get_by_role("button", name="Clear image").click()
    expect(recent.get_by_text("start.jpg")).to_be_visible()
    assert kept(server, context, "end.png")
    pick(page, "Replaced or cleared image", "start.jpg")
    page.get_by_role("button", name="Put back").click()
    expect(images.get_by_role("listitem")).to_have_count(2)

    page.get_by_role("button", name="Download my session (ZIP)").click()
    with page.expect_download() as download:
        page.get_by_text("Save session.zip").click()
    download.value.save_as(tmp_path / "session.zip")
    (cookie,) = context.cookies()
    assert cookie["value"].partition(".")[0].encode() not in (tmp_path / "session.zip").read_bytes()

    page.get_by_role("button", name="Clear all", exact=True).click()
    page.get_by_role("button", name="No, keep it").click()
    expect(page.get_by_role("button", name="Yes, clear all")).to_have_count(0)
    page.get_by_role("button", name="Clear all", exact=True).click()
    expect(page.get_by_role("alert").get_by_text("for good")).to_be_visible()
    page.get_by_role("button", name="Yes, clear all").click()
    expect(page.get_by_text("Nothing is kept yet")).to_be_visible()

    elsewhere = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone = opened(elsewhere.new_page(), server.url)
    phone.get_by_role("tab", name="Your session").click()
    phone.set_input_files("input[type=file][accept*=zip]", tmp_path / "session.zip")
    expect(phone.get_by_role("list", name="Images").get_by_role("listitem")).to_have_count(2)
    assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    phone.get_by_role("tab", name="Generate").click()
    expect_size(phone, "start", (480, 640))
    expect_size(phone, "end", (700, 500))
    expect(phone.locator("#prompt textarea")).to_have_value("a <b>bold</b> boat")
    opened(phone, server.url)
    expect_size(phone, "start", (480, 640))
    expect_size(phone, "end", (700, 500))
    assert kept(server, elsewhere, "start.jpg", "end.png")
    elsewhere.close()
