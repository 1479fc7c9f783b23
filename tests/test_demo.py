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
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


@pytest.fixture
async def built(blockbuster: BlockBuster) -> tuple[gr.Blocks, GradioSessions]:
    blockbuster.deactivate()  # a page is built before there is a loop; Gradio looks at the disk for it
    built = build_demo(open_store("memory://", cleanup_interval=None))
    blockbuster.activate()
    return built


def part(demo: gr.Blocks, name: str) -> Any:
    return next(block for block in demo.blocks.values() if getattr(block, "elem_id", None) == name)


@pytest.mark.parametrize(
    ("model", "start", "end", "largest", "said"),
    [
        ("t2v-A14B", False, False, 1280 * 720, "takes no image"),
        ("i2v-A14B", True, True, 1280 * 720, "Needs a start image"),
        ("ti2v-5B", True, False, 1280 * 704, "takes no end image, which it would ignore; one that you gave is kept"),
    ],
)
async def test_a_model_shows_the_images_and_sizes_that_it_takes(
    built: tuple[gr.Blocks, GradioSessions], model: str, start: bool, end: bool, largest: int, said: str
) -> None:
    demo, _ = built
    page = Page(demo, {})
    page.values[part(demo, "resolution")._id] = 7  # not a size of any model
    await page.enter(part(demo, "model"), model)
    assert page.props[part(demo, "start")._id]["visible"] is start
    assert page.props[part(demo, "end")._id]["visible"] is end
    assert said in page.shows(part(demo, "images"))
    shape = page.props[part(demo, "resolution")._id]["info"]
    assert ("shape of the start image" in shape) is start
    assert ("optional" in page.props[part(demo, "start")._id]["label"]) is (model == "ti2v-5B")
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


@pytest.mark.xdist_group("wan")
@pytest.mark.parametrize(
    ("control", "value", "said"),
    [
        ("model", ["i2v-A14B"], "no pipeline"),
        ("model", {"a": 1}, "no pipeline"),
        ("frames", float("nan"), "NaN and infinity are not JSON"),
        ("frames", -4, "num_frames must be"),
        ("frames", 10**15 + 1, "num_frames must be"),
        ("steps", -1, "steps must be"),
        ("steps", [5], "steps must be"),
        ("seed", "7", "seed must be"),
        ("resolution", 10**12, "area must be"),
        ("resolution", {"path": "/etc/passwd"}, "area must be"),
        ("prompt", {"a": 1}, "prompt must be text"),
        ("prompt", "\ud800", "not JSON"),
        ("prompt", "a" * 2**20, "may take 65536 bytes"),
    ],
)
async def test_what_a_forged_page_sends_starts_nothing_and_is_told_in_a_sentence(
    blockbuster: BlockBuster, tiny_wan: Mapping[str, Path], control: str, value: Any, said: str
) -> None:
    blockbuster.deactivate()
    wan = WanPipeline(tiny_wan["t2v-A14B"], "t2v-A14B", device="cpu")
    store = open_store("memory://", cleanup_interval=None)
    demo, sessions = build_demo(store, wan=wan)
    blockbuster.activate()
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        page = Page(demo, {})
        page.values[part(demo, control)._id] = value
        with pytest.warns(UserWarning, match="The run was not started") as warned:
            await page.fire(part(demo, "generate"), "click")
        assert said in str(warned[0].message)
        assert "Not started" in page.shows(part(demo, "progress"))
        assert [info async for info in store.sessions()] == []


@pytest.mark.xdist_group("wan")
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
    assert page.shows(part(demo, "frames")) == 81  # the model's own
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        for slot in ("start", "end"):
            page.values[part(demo, slot)._id] = {"path": str(photo), "orig_name": "photo.png"}
        entered = {"frames": 17, "resolution": 64 * 48, "steps": 2, "seed": None, "prompt": "a dog"}
        for control, value in entered.items():
            page.values[part(demo, control)._id] = value
        await page.fire(part(demo, "generate"), "click")
        made = json.loads(comment_of(page.shows(part(demo, "video")).read_bytes()))
    assert (made["model"], made["prompt"], made["steps"], made["num_frames"]) == ("i2v-A14B", "a dog", 2, 17)
    assert isinstance(made["seed"], int)
