from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import pytest

from async_sessions import open_store
from async_sessions.demo import build_demo
from async_sessions.pipelines._wan import MODELS
from async_sessions.pipelines.wan import WanPipeline
from tests.images import rgba_png
from tests.pages import Page
from tests.videos import comment_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import gradio as gr
    from blockbuster import BlockBuster

    from async_sessions.gradio import GradioSessions

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
async def built(blockbuster: BlockBuster) -> tuple[gr.Blocks, GradioSessions]:
    blockbuster.deactivate()  # a page is built before there is a loop; Gradio looks at the disk for it
    built = build_demo(open_store("memory://", cleanup_interval=None))
    blockbuster.activate()
    return built


def part(demo: gr.Blocks, name: str) -> Any:
    return next(block for block in demo.blocks.values() if getattr(block, "elem_id", None) == name)


@pytest.mark.parametrize(
    ("model", "start", "end", "largest"),
    [
        ("t2v-A14B", False, False, 1280 * 720),
        ("i2v-A14B", True, True, 1280 * 720),
        ("ti2v-5B", True, False, 1280 * 704),
    ],
)
async def test_a_model_shows_the_images_and_sizes_that_it_takes(
    built: tuple[gr.Blocks, GradioSessions], model: str, start: bool, end: bool, largest: int
) -> None:
    demo, _ = built
    page = Page(demo, {})
    page.values[part(demo, "resolution")._id] = 7  # not a size of any model
    await page.enter(part(demo, "model"), model)
    assert page.props[part(demo, "start")._id]["visible"] is start
    assert page.props[part(demo, "end")._id]["visible"] is end
    sizes = dict(page.props[part(demo, "resolution")._id]["choices"])
    assert max(sizes.values()) == largest
    assert page.shows(part(demo, "resolution")) in sizes.values()


async def test_every_model_makes_a_video_at_its_own_speed(built: tuple[gr.Blocks, GradioSessions], cache: Path) -> None:
    demo, sessions = built
    photo = cache / "upload" / "photo.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(rgba_png(64, 48))
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        for name, model in MODELS.items():
            page = Page(demo, {})
            for slot in ("start", "end"):
                page.values[part(demo, slot)._id] = {"path": str(photo), "orig_name": "photo.png"}
            for control, value in {"model": name, "frames": 17, "resolution": 64 * 48}.items():
                page.values[part(demo, control)._id] = value
            await page.fire(part(demo, "generate"), "click")
            with av.open(page.shows(part(demo, "video")), "r") as video:
                stream = video.streams.video[0]
                assert (stream.average_rate, stream.frames) == (model.fps, 17)


async def test_a_model_that_is_there_takes_the_place_of_its_preview(
    blockbuster: BlockBuster, tiny_wan: Mapping[str, Path], cache: Path
) -> None:
    blockbuster.deactivate()
    wan = WanPipeline(tiny_wan["i2v-A14B"], device="cpu")
    demo, sessions = build_demo(open_store("memory://", cleanup_interval=None), wan=wan)
    blockbuster.activate()
    photo = cache / "upload" / "photo.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(rgba_png(64, 48))
    page = Page(demo, {})
    assert page.shows(part(demo, "model")) == "i2v-A14B"
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        for slot in ("start", "end"):
            page.values[part(demo, slot)._id] = {"path": str(photo), "orig_name": "photo.png"}
        entered = {"frames": 17, "resolution": 64 * 48, "steps": 2, "seed": None, "prompt": "a dog"}
        for control, value in entered.items():
            page.values[part(demo, control)._id] = value
        await page.fire(part(demo, "generate"), "click")
        made = json.loads(comment_of(page.shows(part(demo, "video"))))
    assert (made["model"], made["prompt"], made["steps"], made["num_frames"]) == ("i2v-A14B", "a dog", 2, 17)
    assert isinstance(made["seed"], int)
