"""What only a browser shows of two tabs, of editors, and of the pages of one app."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, expect

from tests.demo_page import expect_size, manifest, upload
from tests.images import rgba_png
from tests.servers import Server, chromium, drawn_size, free_port, opened, serving, tracebacks, wait_until

pytestmark = pytest.mark.browser

LOOK = "window.dispatchEvent(new Event('focus'))"  # headless windows all have the focus all the time


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("tabs"), free_port()
    with serving(folder, "-m", "tests.tabs_app", str(folder / "root"), str(port), port=port) as server:
        yield server


@pytest.fixture
def context(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield context
    context.close()
    assert tracebacks(server.log.read_text()) == []


@pytest.fixture
def photo(tmp_path: Path) -> Callable[[str, int, int], Path]:
    def make(name: str, width: int, height: int) -> Path:
        (tmp_path / name).write_bytes(rgba_png(width, height))
        return tmp_path / name

    return make


def kept(server: Server, context: BrowserContext) -> dict[str, Any]:
    """The images of this browser's session, by slot."""
    return dict(manifest(server, context)["images"])


def holds(server: Server, context: BrowserContext, slot: str, name: str) -> bool:
    return bool(kept(server, context).get(slot, {}).get("source_name") == name)


def says(server: Server, context: BrowserContext, prompt: str) -> bool:
    return bool(manifest(server, context)["state"].get("prompt") == prompt)


def test_a_change_in_one_tab_appears_in_the_other_when_it_is_looked_at(
    context: BrowserContext, server: Server, photo: Any
) -> None:
    page, other = (opened(context.new_page(), server.url) for _ in range(2))
    other.get_by_role("tab", name="Second").click()
    upload(page, "pil", photo("one.png", 300, 200))
    page.fill("#prompt textarea", "a red boat")
    wait_until(lambda: holds(server, context, "pil", "one.png") and says(server, context, "a red boat"))
    other.evaluate(LOOK)
    expect_size(other, "pil", (300, 200))
    expect(other.locator("#prompt textarea")).to_have_value("a red boat")
    expect(other.get_by_text("one.png")).to_be_visible()
    page.click("#pil button[aria-label='Remove Image']")
    wait_until(lambda: "pil" not in kept(server, context))
    other.evaluate(LOOK)
    expect(other.locator("#pil img")).to_have_count(0)


@pytest.mark.parametrize("keep", ["mine", "other"])
def test_an_upload_over_an_unseen_one_shows_both_and_asks(
    context: BrowserContext, server: Server, photo: Any, keep: str
) -> None:
    page, other = (opened(context.new_page(), server.url) for _ in range(2))
    upload(page, "pil", photo("one.png", 300, 200))
    wait_until(lambda: holds(server, context, "pil", "one.png"))
    upload(other, "pil", photo("two.png", 200, 320))
    dialog = other.get_by_role("dialog", name="Which image do you want to keep?")
    expect(dialog).to_be_visible()
    for image in dialog.locator("img").all():
        assert drawn_size(image)
    expect(dialog.get_by_text("one.png")).to_be_visible()
    expect(dialog.get_by_text("two.png")).to_be_visible()
    box = dialog.bounding_box()
    assert box is not None
    assert abs(box["y"] + box["height"] / 2 - 500) < 5
    assert holds(server, context, "pil", "one.png")

    other.keyboard.press("Escape")  # it has to be answered
    expect(dialog).to_be_visible()
    if keep == "other":
        other.keyboard.press("Tab")
    other.keyboard.press("Enter")
    expect(dialog).to_have_count(0)
    name, size = ("two.png", (200, 320)) if keep == "mine" else ("one.png", (300, 200))
    wait_until(lambda: holds(server, context, "pil", name))
    expect_size(other, "pil", size)
    page.evaluate(LOOK)
    expect_size(page, "pil", size)
    upload(page, "pil", photo("three.png", 64, 48))
    wait_until(lambda: holds(server, context, "pil", "three.png"))
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_images_of_every_type_and_an_editor_live_through_a_reload(
    context: BrowserContext, server: Server, photo: Any
) -> None:
    page = opened(context.new_page(), server.url + "kinds")
    for slot in ("array", "pil", "path"):
        upload(page, slot, photo(f"{slot}.png", 300, 200))
    page.wait_for_selector("#editor canvas")
    upload(page, "editor", photo("drawn.png", 400, 300))
    wait_until(lambda: set(kept(server, context)) == {"array", "pil", "path", "drawn"})
    before = kept(server, context)["drawn"]["digest"]
    box = page.locator("#editor canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y + 20, steps=5)
    page.mouse.up()
    page.locator("#editor button[aria-label='Save changes']").first.click()
    wait_until(lambda: bool(kept(server, context)["drawn"]["digest"] != before))
    stored = kept(server, context)

    opened(page, server.url + "kinds")
    for slot in ("array", "pil", "path"):
        expect_size(page, slot, (300, 200))
    told = page.locator("#told textarea")
    page.click("#tell")
    expect(told).to_have_value("ndarray (200, 300, 3)\nImage (300, 200)\nstr \nImage (400, 300)")
    assert kept(server, context) == stored


def test_the_pages_of_an_app_show_the_same_session(context: BrowserContext, server: Server, photo: Any) -> None:
    page = opened(context.new_page(), server.url + "other")
    upload(page, "pil", photo("one.png", 300, 200))
    page.fill("#prompt textarea", "a red boat")
    wait_until(lambda: holds(server, context, "pil", "one.png") and says(server, context, "a red boat"))
    expect(page.get_by_text("one.png")).to_be_visible()
    page.get_by_role("link", name="Home").click()
    expect_size(page, "pil", (300, 200))
    expect(page.locator("#prompt textarea")).to_have_value("a red boat")
    upload(page, "pil", photo("two.png", 200, 320))
    wait_until(lambda: holds(server, context, "pil", "two.png"))
    opened(page, server.url + "other")
    expect_size(page, "pil", (200, 320))


def test_an_example_that_is_chosen_is_kept_with_its_values(context: BrowserContext, server: Server) -> None:
    page = opened(context.new_page(), f"{server.url}other")
    page.locator("#examples tbody tr").first.click()
    expect_size(page, "pil", (260, 130))
    wait_until(lambda: holds(server, context, "pil", "example.png") and says(server, context, "of the example"))
    expect(page.get_by_text("example.png")).to_be_visible()  # in the panel
    page = opened(page, f"{server.url}other")
    expect_size(page, "pil", (260, 130))
    expect(page.locator("#prompt textarea")).to_have_value("of the example")
