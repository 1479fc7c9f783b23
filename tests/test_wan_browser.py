"""A tiny Wan2.2 model behind the demo's page, in a process of its own, as a user in Chromium has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.demo_page import QUICK, choose, kept, manifest, upload
from tests.images import jpeg_with_exif, photograph
from tests.servers import Server, chromium, free_port, opened, serving, wait_until
from tests.videos import comment_of, frames_of

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("wan")]

SLOW = 60_000  # milliseconds: a run on two cores that others use, too


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_wan: Mapping[str, Path], browser: Browser
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("wan_demo")
    port = free_port()
    model = ("--wan", str(tiny_wan["i2v-A14B"]), "--model", "i2v-A14B", "--device", "cpu")
    arguments = ("-m", "async_sessions", "demo", *model, "--port", str(port), "--root", str(folder / "root"))
    with serving(folder, *arguments, port=port) as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, server: Server, tmp_path: Path) -> Page:
    """It has a start image, as a phone writes it, and an end image of another shape."""
    page = opened(context.new_page(), server.url)
    start, end = tmp_path / "start.jpg", tmp_path / "end.jpg"
    start.write_bytes(jpeg_with_exif(6, gps=True, image=photograph(1600, 1200, seed=1)))
    photograph(600, 900, seed=2).save(end)
    upload(page, "start", start)
    upload(page, "end", end)
    wait_until(lambda: kept(server, context, "start.jpg", "end.jpg"))
    choose(page, QUICK)
    page.fill("#prompt textarea", "a dog runs on the beach")
    return page


def ask(page: Page, *, frames: int, steps: int) -> None:
    page.fill("#frames input[type=number]", str(frames))
    page.fill("#steps input[type=number]", str(steps))
    page.click("#generate")


def test_a_model_shows_how_far_it_is_through_a_reload_stops_when_told_and_makes_a_video(
    context: BrowserContext, server: Server, page: Page
) -> None:
    bar = page.locator("#progress")
    ask(page, frames=81, steps=60)  # a long run
    expect(bar).to_contain_text("of 60", timeout=SLOW)
    page.goto(server.url)
    expect(bar).to_contain_text("of 60")
    expect(bar.get_by_role("img")).to_be_visible()  # the latents, looked at
    page.get_by_role("tab", name="Queue").click()
    under_way, history = (page.get_by_role("list", name=name) for name in ("Under way and waiting", "History"))
    expect(under_way.get_by_role("progressbar")).to_be_visible()
    expect(under_way).to_contain_text(re.compile(r"Running.*i2v-A14B.*a dog runs on the beach.*of 60", re.S))
    page.get_by_role("tab", name="Generate").click()
    page.click("#cancel")
    expect(bar).to_contain_text("Cancelled")
    expect(bar.get_by_role("img")).to_have_count(0)

    ask(page, frames=17, steps=2)
    expect(bar).to_contain_text("Done", timeout=SLOW)
    video = page.locator("#video video")
    video.evaluate("video => { video.muted = true; return video.play() }")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.2")
    assert video.evaluate("video => video.readyState") == 4
    made = context.request.get(video.evaluate("video => video.currentSrc")).body()
    assert [frame.shape for frame in frames_of(made)] == [(272, 352, 3)] * 17  # of the start image's shape
    said = json.loads(comment_of(made))
    assert (said["model"], said["steps"], said["seed"]) == ("i2v-A14B", 2, 0)
    (cookie,) = context.cookies()
    assert cookie["value"].partition(".")[0].encode() not in made
    page.get_by_role("tab", name="Queue").click()
    expect(history.get_by_role("listitem")).to_contain_text(["Done", "Cancelled"])
    assert "Traceback" not in server.log.read_text()


def test_an_end_image_that_a_model_would_ignore_is_put_away_and_the_page_says_so(
    context: BrowserContext, server: Server, page: Page
) -> None:
    expect(page.locator("#images")).to_have_text("Needs a start image; an end image is optional.")
    choose(page, "ti2v-5B")
    expect(page.locator("#images")).to_contain_text("takes no end image, which it would ignore")
    expect(page.locator("#end")).to_have_count(0)
    ask(page, frames=17, steps=2)
    expect(page.locator("#progress")).to_contain_text("Done", timeout=SLOW)
    (job,) = manifest(server, context)["jobs"].values()
    assert list(job["inputs"]) == ["start"]
    choose(page, "i2v-A14B")
    expect(page.locator("#end img")).to_be_visible()
    page.click("#start button[aria-label='Remove Image']")
    page.click("#generate")
    expect(page.get_by_text("needs an image as 'start'")).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("Not started")
