"""Reload mode, as `gradio app.py` starts it: a changed file is run anew in the process that serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.demo_page import expect_size, kept, upload
from tests.images import rgba_png
from tests.servers import free_port, opened, serving, tracebacks, wait_until

pytestmark = pytest.mark.browser

APP = """
import gradio as gr

from async_sessions.gradio import GradioSessions


class Model:  # stands where a dispatcher with its models does
    async def __aenter__(self):
        print("Before is held", flush=True)

    async def __aexit__(self, *error):
        print("Before is left", flush=True)


with gr.Blocks(title="App") as demo:
    gr.Markdown("# Before")
    photo = gr.Image(elem_id="photo")
    sessions = GradioSessions({root!r}, dispatcher=Model()).bind(images={{"photo": photo}})
    sessions.panel()

if __name__ == "__main__":
    sessions.launch(demo)
"""


def test_what_is_kept_stays_while_the_app_is_written(
    context: BrowserContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = tmp_path / "app.py"
    app.write_text(APP.format(root=str(tmp_path / "root")))
    (tmp_path / "photo.png").write_bytes(rgba_png(90, 60))
    (tmp_path / "other.png").write_bytes(rgba_png(60, 90))
    monkeypatch.setenv("GRADIO_WATCH_DIRS", str(tmp_path))
    monkeypatch.setenv("GRADIO_WATCH_MODULE_NAME", "app")
    monkeypatch.setenv("GRADIO_WATCH_DEMO_NAME", "demo")
    monkeypatch.setenv("GRADIO_WATCH_DEMO_PATH", str(app))
    with serving(tmp_path, str(app), port=free_port()) as server:
        page = opened(context.new_page(), server.url)
        upload(page, "photo", tmp_path / "photo.png")
        wait_until(lambda: kept(server, context, "photo.png"))
        app.write_text(app.read_text().replace("Before", "After"))
        expect(page.get_by_role("heading", name="After")).to_be_visible()  # nobody reloads it
        opened(page, server.url)
        expect_size(page, "photo", (90, 60))
        wait_until(lambda: "Before is left" in server.log.read_text())
        assert "After is left" not in server.log.read_text()
        upload(page, "photo", tmp_path / "other.png")
        wait_until(lambda: kept(server, context, "other.png"))
        opened(page, server.url)
        expect_size(page, "photo", (60, 90))
        assert tracebacks(server.log.read_text()) == []
        assert server.stop() == 0
        assert "After is left" in server.log.read_text()
