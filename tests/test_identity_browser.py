"""What only a browser shows: cookies in frames of other sites, storage where there are none, a login."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Frame, Page, expect

from tests.images import rgba_png
from tests.servers import Server, chromium, free_port, opened, profile, serving, wait_until

pytestmark = pytest.mark.browser


class Portal(BaseHTTPRequestHandler):
    """A page of another site that shows an app, whose address is its query, in a frame."""

    def do_GET(self) -> None:
        body = f"<!doctype html><title>portal</title><iframe src='{self.path.partition('?')[2]}'></iframe>".encode()
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(rgba_png(90, 60))
    return path


def app(folder: Path, launch: dict[str, Any] | None = None, **options: Any) -> Any:
    port = free_port()
    arguments = json.dumps(options), json.dumps({"server_port": port, **(launch or {})})
    return serving(folder, "-m", "tests.identity_app", str(folder / "root"), *arguments, port=port)


@pytest.fixture(scope="module")
def portal() -> Iterator[str]:
    """The address of another site: browsers take `localhost` and 127.0.0.1 for two."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/?"
        server.shutdown()


def framed(page: Page, portal: str, server: Server) -> Frame:
    """The app in the portal's frame, once it is ready."""
    opened(page, portal + server.url)
    (frame,) = (each for each in page.frames if each is not page.main_frame)
    frame.locator("#start input[type=file]").wait_for(state="attached")
    return frame


def kept(server: Server) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in server.folder.glob("root/manifests/*/*.json")]


def holds(server: Server, *names: str) -> bool:
    found = [image["source_name"] for manifest in kept(server) for image in manifest["images"].values()]
    return sorted(found) == sorted(names)


def test_in_a_frame_that_gets_no_cookies_a_token_keeps_the_images(
    browser: Browser, portal: str, tmp_path: Path, photo: Path
) -> None:
    with app(tmp_path, identity="browser_state") as server, profile(browser, tmp_path / "profile") as context:
        page = context.new_page()
        frame = framed(page, portal, server)
        assert context.cookies() == []
        frame.set_input_files("#start input[type=file]", photo)
        wait_until(lambda: holds(server, "photo.png"))
        frame.get_by_role("tab", name="Second").click()
        frame.locator("#prompt textarea").fill("a boat")
        wait_until(lambda: kept(server)[0]["state"] == {"prompt": "a boat"})
        expect(frame.get_by_text("photo.png")).to_be_visible()

        frame = framed(page, portal, server)
        expect(frame.locator("#start img")).to_be_visible()
        server.kill()
        server.start()
        frame = framed(page, portal, server)
        expect(frame.locator("#start img")).to_be_visible()
        frame.get_by_role("tab", name="Second").click()
        expect(frame.locator("#prompt textarea")).to_have_value("a boat")

        token = frame.evaluate("Object.values(localStorage).join()")
        assert token
        with profile(browser, tmp_path / "other") as stranger:
            other = framed(stranger.new_page(), portal, server)
            expect(other.locator("#start img")).to_have_count(0)
        frame.locator("#start button[aria-label='Remove Image']").click()
        wait_until(lambda: holds(server))
        assert len(kept(server)) == 1
        assert "Traceback" not in server.log.read_text()


def test_without_it_the_frame_says_that_nothing_is_kept(
    context: BrowserContext, portal: str, tmp_path: Path, photo: Path
) -> None:
    with app(tmp_path) as server:
        frame = framed(context.new_page(), portal, server)
        frame.set_input_files("#start input[type=file]", photo)
        expect(frame.get_by_text("sends no cookie")).to_be_visible()
        expect(frame.locator("#start img")).to_be_visible()
        assert kept(server) == []


def test_an_embedded_app_has_a_cookie_in_the_frame_and_another_site_can_not_spend_it(
    context: BrowserContext, portal: str, tmp_path: Path, photo: Path
) -> None:
    with app(tmp_path, embedded=True) as server:
        page = context.new_page()
        frame = framed(page, portal, server)
        (cookie,) = context.cookies()
        assert cookie["name"].startswith("__Host-async_sessions")
        assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "None")
        assert cookie["partitionKey"] == "http://localhost"
        frame.set_input_files("#start input[type=file]", photo)
        wait_until(lambda: holds(server, "photo.png"))
        frame = framed(page, portal, server)
        expect(frame.locator("#start img")).to_be_visible()
        fetch = "url => fetch(url, {credentials: 'include'}).then(answer => answer.status)"
        assert frame.evaluate(fetch, server.url + "images/start") == 200
        # Gradio lets any origin read its answers, so the portal sees what it gets
        assert page.evaluate(fetch, server.url + "images/start") == 404
        top = opened(context.new_page(), server.url)
        expect(top.locator("#start img")).to_have_count(0)


def test_a_login_takes_along_what_the_browser_kept(context: BrowserContext, tmp_path: Path, photo: Path) -> None:
    with app(tmp_path) as server:
        page = opened(context.new_page(), server.url)
        page.set_input_files("#start input[type=file]", photo)
        wait_until(lambda: holds(server, "photo.png"))
        (anonymous,) = kept(server)
    with app(tmp_path, {"auth": [["carol", "her password"]]}) as server:
        page.goto(server.url)
        page.get_by_label("username").fill("carol")
        page.get_by_label("password").fill("her password")
        page.get_by_role("button", name="Login").click()
        expect(page.locator("#start img")).to_be_visible()
        (user,) = kept(server)
        assert user["key"] != anonymous["key"]
        assert context.request.get(server.url + "images/start").status == 200
        assert "Traceback" not in server.log.read_text()
