"""Gradio's cache, where everybody's files lie side by side: what is removed from it, and what never is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

import fastapi
import gradio as gr
import pytest
from gradio.components.image_editor import EditorDataBlobs

from async_sessions import StoreClosedError, open_store
from async_sessions.dispatch import LocalDispatcher
from async_sessions.gradio import GradioSessions
from tests.images import rgba_png
from tests.over_http import Browser, file_data, index_of
from tests.pages import ANN, SECRET, Page
from tests.steps import StepPipeline

if TYPE_CHECKING:
    from blockbuster import BlockBuster

T = TypeVar("T")

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


def labelled(demo: gr.Blocks, kind: type[T], label: str) -> T:
    kinds = [each for each in demo.blocks.values() if isinstance(each, kind)]
    return next(each for each in kinds if label in (getattr(each, "value", None), getattr(each, "label", None)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
async def test_what_the_app_shows_to_everybody_is_removed_by_nobody(blockbuster: BlockBuster, tmp_path: Path) -> None:
    blockbuster.deactivate()  # Gradio reads files while it mounts
    (tmp_path / "default.png").write_bytes(rgba_png(90, 60))
    store = open_store("memory://", cleanup_interval=None)
    dispatcher = LocalDispatcher(store, [StepPipeline("steps", start=True)])
    sessions = GradioSessions(store, dispatcher=dispatcher, secret=SECRET)
    with gr.Blocks() as demo:
        start = gr.Image(value=str(tmp_path / "default.png"))
        sessions.bind(images={"start": start})
        sessions.panel()
        go, video = gr.Button("Go"), gr.Video()
        sessions.bind_generate(go, pipeline="steps", video=video)
    default = start.value["path"]
    parent = fastapi.FastAPI()
    sessions.mount(parent, demo, path="/app")
    async with parent.router.lifespan_context(parent):
        ann, bob = Browser(parent), Browser(parent)
        await ann.open()
        mine = await ann.upload("mine.png", rgba_png(50, 40))
        page = {"session_hash": "annspage"}
        for shown in (default, mine):
            assert "Submitted" in await ann.fire(index_of(demo, go, "click"), [file_data(shown)], **page)
        assert '"success":true' in await ann.fire(index_of(demo, start, "upload"), [file_data(mine)], **page)
        clear = index_of(demo, labelled(demo, gr.Button, "Yes, clear all"), "click")
        assert '"success":true' in await ann.fire(clear, [], **page)
        assert not Path(mine).exists()
        restore = index_of(demo, labelled(demo, gr.UploadButton, "Restore from ZIP"), "upload")
        assert "The ZIP is not restored" in await ann.fire(restore, [None, None, file_data(default)], **page)
        await bob.open()
        assert (await bob.http.get(f"gradio_api/file={default}")).content == rgba_png(90, 60)
        demo.close(verbose=False)


async def test_what_an_editor_draws_is_one_file_until_all_is_cleared(cache: Path) -> None:
    store = open_store("memory://", cleanup_interval=None)
    sessions = GradioSessions(
        store, dispatcher=LocalDispatcher(store, [StepPipeline("steps", drawn=True)]), secret=SECRET
    )
    with gr.Blocks() as demo:
        editor, go, video = gr.ImageEditor(), gr.Button("Go"), gr.Video()
        sessions.bind(images={"drawn": editor})
        sessions.panel()
        sessions.bind_generate(go, pipeline="steps", video=video)
    drawing = rgba_png(50, 40)

    def draw(page: Page, name: str) -> None:
        """As the browser sends it where an app listens to each stroke."""
        editor.blob_storage[name] = EditorDataBlobs(background=drawing, layers=[], composite=drawing)
        page.values[editor._id] = {"background": None, "layers": [], "composite": None, "id": name}

    app = SimpleNamespace(blocks=demo, state=SimpleNamespace())
    async with sessions.launch_options()["app_kwargs"]["lifespan"](app):
        page = await Page(demo, ANN).load()
        draw(page, "first")
        await page.fire(editor, "apply")
        for name in ("second", "third"):
            draw(page, name)
            await page.fire(go, "click")
        (file,) = cache.rglob("image.png")
        assert file.read_bytes() == drawing
        await page.fire(labelled(demo, gr.Button, "Yes, clear all"), "click")
        assert not list(cache.rglob("image.png"))


async def test_an_app_that_is_reloaded_leaves_what_it_held_before(tmp_path: Path) -> None:
    app = SimpleNamespace(state=SimpleNamespace())
    scope = {"type": "http", "app": app, "path": "/", "query_string": b"", "headers": [], "server": ("test", 80)}
    request = gr.Request(fastapi.Request(scope))
    before, after, beside = (GradioSessions(tmp_path / name) for name in ("root", "root", "beside"))
    app.blocks = gr.Blocks()
    await before.session(request)
    app.blocks = gr.Blocks()
    await after.session(request)
    await beside.session(request)  # another one of the same app
    for sessions in (after, beside):
        await sessions.session(request)
    with pytest.raises(StoreClosedError):
        await before.session(request)
    for sessions in (before, after, beside):
        await sessions._visits.held.close()
