"""Runs that make images, in a browser."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.images import rgba_png
from tests.servers import Server, chromium, drawn_size, free_port, opened, serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1000, "height": 1100})
    yield context
    context.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, "-m", "tests.results_app", str(tmp_path / "root"), port=free_port()) as server:
        yield server


def look(page: Page, name: str) -> None:
    """Keep what the page looks like, where a person who runs the tests asks for it."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def shown(page: Page, part: str) -> list[tuple[int, int] | None]:
    """The sizes of the images that are really drawn."""
    images = page.locator(f"{part} img")
    expect(images.first).to_be_visible()
    return [drawn_size(image) for image in images.all()]


def test_a_run_that_makes_images_is_followed_picked_up_and_shown_in_every_tab(
    browser: Browser, context: BrowserContext, server: Server, tmp_path: Path
) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(rgba_png(240, 160))
    page, idle = (opened(context.new_page(), server.url) for _ in range(2))
    page.set_input_files("#start input[type=file]", photo)
    expect(page.locator("#start img")).to_be_visible()
    page.click("#every")
    expect(page.locator("#progress [role=progressbar]")).to_be_visible()
    assert shown(page, "#progress") == [(48, 32)]
    look(page, "results_preview")
    idle.evaluate("window.dispatchEvent(new Event('focus'))")  # headless windows all have the focus all the time
    assert shown(idle, "#progress") == [(48, 32)]
    page.goto(server.url)
    assert shown(page, "#progress") == [(48, 32)]
    tab = context.new_page()
    tab.goto(server.url)
    tab.locator("#progress img").wait_for()
    page.click("#every")
    expect(page.locator("#progress")).to_contain_text("1 more waiting")
    (server.folder / "open").touch()
    for each in (page, tab, idle):
        expect(each.locator("#progress")).to_have_text(re.compile(r"^\s*Done\s*$"))
        expect(each.get_by_role("list", name="History").get_by_role("listitem")).to_have_count(2)
        expect(each.locator("#gallery img")).to_have_count(4)
        assert shown(each, "#gallery") == [(240, 160)] * 4
        assert shown(each, "#first") == [(240, 160)]
    page.get_by_label("Run", exact=True).click()
    page.get_by_role("option").first.click()
    page.get_by_role("button", name="Show result").click()
    expect(page.get_by_role("tabpanel").locator(".grid-container img")).to_have_count(4)
    look(page, "results_done")
    again = opened(context.new_page(), server.url)
    expect(again.locator("#gallery img")).to_have_count(4)
    stranger = browser.new_context()
    other = opened(stranger.new_page(), server.url)
    expect(other.locator("#gallery img, #first img")).to_have_count(0)
    stranger.close()
    assert "Traceback" not in server.log.read_text()
