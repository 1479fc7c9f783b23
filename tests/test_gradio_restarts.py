"""A server that goes away under a page, and under an upload."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests import uploading
from tests.demo_page import QUICK, choose, expect_size, kept, manifest, upload
from tests.images import rgba_png
from tests.servers import PATIENCE, chromium, free_port, opened, serving, settle, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_a_page_that_was_open_while_the_server_restarted_goes_on_with_its_images(tmp_path: Path) -> None:
    port = free_port()
    arguments = ("-m", "async_sessions", "demo", "--port", str(port), "--root", str(tmp_path / "root"))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(rgba_png(90 + number, 60))
    with chromium() as browser, serving(tmp_path, *arguments, port=port) as server:
        context = browser.new_context()
        page = opened(context.new_page(), server.url)
        upload(page, "start", tmp_path / "0.png")
        wait_until(lambda: kept(server, context, "0.png"))
        for number, noticed in ((1, False), (2, True)):
            settle(page, PATIENCE)
            server.kill()
            if noticed:
                page.fill("#prompt textarea", "nobody hears that")
                with page.expect_event("load", timeout=PATIENCE * 1000):  # Gradio's own, once a server is there again
                    server.start()
            else:
                server.start()
            expect_size(page, "start", (90, 60))
            upload(page, "end", tmp_path / f"{number}.png")
            wait_until(lambda name=f"{number}.png": kept(server, context, "0.png", name))  # type: ignore[misc]
        page.click("#end button[aria-label='Remove Image']")
        wait_until(lambda: kept(server, context, "0.png"))
        choose(page, QUICK)
        page.fill("#frames input[type=number]", "17")
        page.press("#frames input[type=number]", "Enter")
        page.click("#generate")
        expect(page.locator("#progress")).to_contain_text("Done")
        expect(page.locator("#video video")).to_be_visible()
        (job,) = manifest(server, context)["jobs"].values()
        assert list(job["inputs"]) == ["start"]
        opened(page, server.url)
        expect_size(page, "start", (90, 60))
        assert "Traceback" not in server.log.read_text()


def test_a_kill_in_the_middle_of_an_upload_leaves_the_old_image_or_the_new_one(tmp_path: Path) -> None:
    seed = str(random.SystemRandom().random())
    found = uploading.check_kills(tmp_path, kills=3, seed=seed)
    assert found.old + found.new == 3
