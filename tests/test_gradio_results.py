"""Runs that make images: in one image, in a gallery, in the queue."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from PIL import Image

from async_sessions import open_store
from async_sessions.gradio import GradioSessions
from tests import pages
from tests.images import encoded
from tests.pages import ANN, BOB, SECRET
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.jobs import JobContext, Output

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "blue")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    return tmp_path / "gradio"


class App:
    """A page with a Generate button that shows what `kind` says, and a queue."""

    def __init__(self, kind: str, made: Mapping[str, Output]) -> None:
        self.store = open_store("memory://", cleanup_interval=None)
        self.steps = StepPipeline()
        self.steps.make = lambda params: made
        self.sessions = GradioSessions(self.store, dispatcher=local(self.store, [self.steps]), secret=SECRET)
        with gr.Blocks() as self.demo:
            self.go = gr.Button("Go")
            self.result: Any = gr.Gallery() if kind == "gallery" else gr.Image()
            self.sessions.bind()
            shown: dict[str, Any] = {kind: self.result}
            self.bar = self.sessions.bind_generate(self.go, pipeline="steps", **shown)
            self.sessions.queue()
            self.sessions.panel()
        blocks = list(self.demo.blocks.values())
        self.run = next(block for block in blocks if isinstance(block, gr.Dropdown))
        self.past = next(block for block in blocks if isinstance(block, gr.Gallery) and block is not self.result)
        self.files = next(block for block in blocks if isinstance(block, gr.File))

    def button(self, label: str) -> gr.Button:
        return next(each for each in self.demo.blocks.values() if isinstance(each, gr.Button) and each.value == label)

    async def open(self, cookies: Mapping[str, str] = ANN) -> pages.Page:
        return await pages.Page(self.demo, cookies).load()


@asynccontextmanager
async def running(kind: str, made: Mapping[str, Output]) -> AsyncIterator[App]:
    app = App(kind, made)
    async with app.sessions.launch_options()["app_kwargs"]["lifespan"](None):
        yield app


def made() -> dict[str, Output]:
    return {"words": (b"some words", "text/plain"), "red": RED, "blue": (encoded(BLUE, "PNG"), "image/png")}


async def test_an_image_gets_the_first_image_that_a_run_made_and_a_reload_too(cache: Path) -> None:
    async with running("image", made()) as app:
        page = await app.open()
        assert page.shows(app.result) is None
        await page.fire(app.go, "click")
        assert "Done" in page.shows(app.bar)
        for each in (page, await app.open()):
            shown = each.shows(app.result)
            assert (shown.name, shown.is_relative_to(cache)) == ("red.png", True)
            with Image.open(shown) as image:
                assert (image.size, image.getpixel((0, 0))) == (RED.size, (255, 0, 0))
        assert (await app.open(BOB)).shows(app.result) is None
        await page.fire(app.button("Yes, clear all"), "click")
        assert page.shows(app.result) is None


async def test_a_gallery_gets_every_image_in_the_order_of_the_pipeline(cache: Path) -> None:
    async with running("gallery", made()) as app:
        page = await app.open()
        await page.fire(app.go, "click")
        for each in (page, await app.open()):
            names = [Path(path).name for path in each.shows(app.result)]
            assert names == ["red.png", "blue.png"]
        assert all(Path(path).is_relative_to(cache) for path in page.shows(app.result))
        assert (await app.open(BOB)).shows(app.result) == []


async def test_images_are_stored_as_png_whether_they_came_as_images_paths_or_bytes(tmp_path: Path) -> None:
    RED.save(tmp_path / "file.png")
    images: dict[str, Output] = {
        "image": RED,
        "file": tmp_path / "file.png",
        "bytes": (encoded(RED, "PNG"), "image/png"),
    }
    async with running("gallery", images) as app:
        page = await app.open()
        await page.fire(app.go, "click")
        for path in page.shows(app.result):
            with Image.open(path) as image:
                assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", RED.size, (255, 0, 0))
        assert len(page.shows(app.result)) == 3


async def test_what_may_hold_a_script_is_no_image_but_a_file(tmp_path: Path) -> None:
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    async with running("gallery", {"drawing": (svg, "image/svg+xml"), "red": RED}) as app:
        page = await app.open()
        await page.fire(app.go, "click")
        assert [Path(path).name for path in page.shows(app.result)] == ["red.png"]
        (page.values[app.run._id],) = (value for _, value in page.props[app.run._id]["choices"])
        await page.fire(app.button("Show result"), "click")
        assert [Path(path).name for path in page.shows(app.past)] == ["red.png"]
        assert [Path(path).name for path in page.shows(app.files)] == ["drawing"]


async def test_a_run_that_made_no_image_leaves_what_is_shown() -> None:
    async with running("image", made()) as app:
        page = await app.open()
        await page.fire(app.go, "click")
        before = page.shows(app.result)
        app.steps.make = lambda params: {"words": (b"no image", "text/plain")}
        await page.fire(app.go, "click")
        assert "Done" in page.shows(app.bar)
        assert page.shows(app.result) == before
        assert (await app.open()).shows(app.result) == before


async def test_two_buttons_show_each_the_runs_of_its_own_pipeline() -> None:
    store = open_store("memory://", cleanup_interval=None)
    painters = {colour: StepPipeline(colour) for colour in ("red", "blue")}
    painters["red"].make = lambda params: {"red": RED}
    painters["blue"].make = lambda params: {"blue": BLUE}
    sessions = GradioSessions(store, dispatcher=local(store, painters.values()), secret=SECRET)
    with gr.Blocks() as demo:
        sessions.bind()
        buttons = {colour: gr.Button(colour) for colour in painters}
        images = {colour: gr.Image() for colour in painters}
        bars = {
            colour: sessions.bind_generate(buttons[colour], pipeline=colour, image=images[colour])
            for colour in painters
        }
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        page = await pages.Page(demo, ANN).load()
        await page.fire(buttons["red"], "click")
        assert "Done" in page.shows(bars["red"])
        for each in (page, await pages.Page(demo, ANN).load()):
            assert each.shows(images["red"]).name == "red.png"
            assert not each.shows(images["blue"])
            assert not each.shows(bars["blue"])
        await page.fire(buttons["blue"], "click")
        for each in (page, await pages.Page(demo, ANN).load()):
            assert {colour: each.shows(images[colour]).name for colour in painters} == {
                "red": "red.png",
                "blue": "blue.png",
            }


async def test_a_preview_stays_until_the_next_one_and_goes_with_the_result() -> None:
    async with running("image", made()) as app:
        first, second = (encoded(Image.new("RGB", (8, 8), colour), "PNG") for colour in ("red", "blue"))
        told = {"1 of 1": first, "2 of 2": None, "3 of 3": second}
        seen = {text: threading.Event() for text in told}

        def tell(context: JobContext) -> None:
            for step, (text, preview) in enumerate(told.items(), 1):
                context.report(step, step, preview=preview)
                assert seen[text].wait(30)

        app.steps.before_generate = tell
        page = await app.open()
        pictures = {}
        async for _ in page.run(page.listener(app.go, "click")):
            bar = page.shows(app.bar)
            for text in told:
                if f"Step {text}" in bar:
                    (source,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', bar)
                    pictures[text] = base64.b64decode(source)
                    seen[text].set()
        assert pictures == {"1 of 1": first, "2 of 2": first, "3 of 3": second}
        assert "<img" not in page.shows(app.bar)


async def test_a_result_goes_to_one_component_and_no_other() -> None:
    sessions = App("image", made()).sessions
    with gr.Blocks():
        for given in ({}, {"video": gr.Video(), "image": gr.Image()}, {"image": gr.Image(), "gallery": gr.Gallery()}):
            with pytest.raises(TypeError, match=r"pass video=, image= or gallery="):
                sessions.bind_generate(gr.Button(), pipeline="steps", **given)  # type: ignore[arg-type]
