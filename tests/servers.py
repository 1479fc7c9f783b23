"""Pages served by a process of their own, and a Chromium to look at them with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, Request, expect, sync_playwright

START_WITHIN = 60  # seconds
PATIENCE = 60  # seconds that a test waits for what a page shows: tests share the cores
ROOT = Path(__file__).parent.parent
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """`python ARGUMENTS` with a folder of its own as HOME and for Gradio's cache; can be killed and started again."""

    def __init__(self, folder: Path, *arguments: str, port: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}/"
        self.log = folder / "server.log"
        self.uploads = folder / "gradio"
        self._command = [sys.executable, *arguments]
        self._environment = {
            **os.environ,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": str(self.uploads),
            "HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        wait_until(self._answers, START_WITHIN)

    def kill(self) -> None:
        """As by `kill -9`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """As a service manager does; returns the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(START_WITHIN)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(self.url, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, port: int | None = None) -> Iterator[Server]:
    server = Server(folder, *arguments, port=port or free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()


def chromium_path() -> str:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium on PATH")
    return path


@contextlib.contextmanager
def profile(browser: Browser, folder: Path) -> Iterator[BrowserContext]:
    """Windows in which a frame of another site has storage, as in Firefox and Safari; `new_context` blocks it."""
    preferences = folder / "Default" / "Preferences"
    preferences.parent.mkdir(parents=True)
    preferences.write_text(json.dumps({"profile": {"cookie_controls_mode": 0}}))
    context = browser.browser_type.launch_persistent_context(folder, executable_path=chromium_path(), args=list(FLAGS))
    try:
        yield context
    finally:
        context.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Skips where no Chromium is installed."""
    path = chromium_path()
    expect.set_options(timeout=PATIENCE * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class _Events:
    """What a page has asked its server for: how often it was answered, and since when it asks for nothing."""

    def __init__(self, page: Page) -> None:
        self.answers = 0
        self.quiet_since = time.monotonic()
        self._awaited: set[Request] = set()
        page.on("request", self._ask)
        page.on("requestfinished", self._end)
        page.on("requestfailed", self._end)  # the page itself hangs up after the last answer

    def quiet(self, seconds: float) -> bool:
        return not self._awaited and time.monotonic() - self.quiet_since > seconds

    def _ask(self, request: Request) -> None:
        if "/queue/" in request.url or "/upload" in request.url:
            self._awaited.add(request)

    def _end(self, request: Request) -> None:
        if request in self._awaited:
            self._awaited.discard(request)
            self.quiet_since = time.monotonic()
            self.answers += "queue/data" in request.url


_EVENTS: WeakKeyDictionary[Page, _Events] = WeakKeyDictionary()


def opened(page: Page, url: str) -> Page:
    """The page once everything that it asks for when it opens was answered."""
    if page not in _EVENTS:
        _EVENTS[page] = _Events(page)
    events = _EVENTS[page]
    page.goto(url, wait_until="commit")
    events.answers = 0  # those of the page before
    deadline = time.monotonic() + PATIENCE
    while not events.answers:
        assert time.monotonic() < deadline, f"{url} did not open in time"
        page.wait_for_timeout(20)
    return page


def leave(page: Page) -> None:
    """Leave a page while its server is down: once that is back, Gradio's page loads itself anew.

    Where that meets a `goto`, Playwright may wait for one that is never over.
    """
    page.goto("about:blank")


def settle(page: Page, seconds: float = 3) -> None:
    """Wait until a page that was `opened` awaits no answer; not for ever, since it may follow a run.

    Gradio's page misses the answer to what it asks for in the instant in which its server answers the one before.
    """
    deadline = time.monotonic() + seconds
    while page in _EVENTS and not _EVENTS[page].quiet(0.2) and time.monotonic() < deadline:
        page.wait_for_timeout(20)


def pick(page: Page, label: str, text: str) -> None:
    """Choose what says `text` in a dropdown, in its own list: that of another may still be fading out."""
    box = page.get_by_label(label, exact=True)
    box.click()
    page.locator(f"#{box.get_attribute('aria-controls')}").get_by_role("option").filter(has_text=text).click()


def drawn_size(image: Locator) -> tuple[int, int] | None:
    """Width and height of an image as the browser draws it; None where it can not, as when another replaces it."""
    try:
        size = image.evaluate("i => i.decode().then(() => [i.naturalWidth, i.naturalHeight], () => null)")
    except Error as error:
        if "context was destroyed" not in str(error):
            raise
        return None  # the page is loaded anew
    return size and (size[0], size[1])


def tracebacks(log: str) -> list[str]:
    """Those in a server's log; not Gradio's own of a browser that left in the middle of a request."""
    return [each for each in log.split("Traceback")[1:] if "ClientDisconnect" not in each]


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """For what happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
