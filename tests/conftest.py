from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from async_sessions import open_store

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from tests.pages import App
    from tests.servers import Server

# The files whose tests drive a browser, but for those that take about as long as each of these lots.
BROWSER_LOTS = {
    "test_gradio_browser": "runs",
    "test_gradio_results_browser": "runs",
    "test_tabs_browser": "runs",
    "test_gradio_restarts": "many",
    "test_visitors": "many",
}

pytest_plugins = ["async_sessions.testing.fixtures"]


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    backend: tuple[str, dict[str, bool]] = request.param
    return backend


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A blocking call made by the package on an event loop fails the test."""
    with blockbuster_ctx("async_sessions") as active:
        # coverage's own lock, taken while it measures the package
        active.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", "lock_data")
        yield active


def pytest_configure(config: pytest.Config) -> None:
    """In a process of pytest-xdist, pytest-cov begins to measure twice; `no_cover` would stop only the second.

    What the first has measured is nobody's: the process that started this one has imported the same modules.
    """
    measuring = config.pluginmanager.getplugin("_cov")
    if hasattr(config, "workerinput") and measuring is not None and measuring.cov_controller is not None:
        measuring.cov_controller.cov.stop()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Three browsers at once, and no more: their processes share the cores with all others.

    Coverage is measured on one loop, and not by what takes long anyway, or where another process does the work: it
    doubles the time.
    """
    on_uvloop = getattr(item, "callspec", None) and "uvloop" in item.callspec.id.split("-")  # type: ignore[attr-defined]
    if on_uvloop or item.get_closest_marker("slow") or item.get_closest_marker("browser"):
        item.add_marker(pytest.mark.no_cover)
    if item.get_closest_marker("browser") and item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(f"browser {BROWSER_LOTS.get(item.path.stem, 'pages')}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins early, so that nothing else waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With NO_SKIP set, as in `.ci/run`, a skipped test has failed."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIP"):
        report.outcome = "failed"
        report.longrepr = f"skipped where no skip is allowed: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny Wan2.2 models by name; see `tests.wan`, which takes seconds to import."""
    from tests.wan import save_tiny_models

    return save_tiny_models(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gradio's folder for uploads, and for what it serves."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    return tmp_path / "gradio"


@pytest.fixture
def uploads(cache: Path) -> Callable[[str, bytes], Path]:
    """Puts a file where Gradio puts what a browser sends."""

    def upload(name: str, data: bytes) -> Path:
        folder = cache / f"upload{len(list(cache.glob('upload*')))}"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        return folder / name

    return upload


@pytest.fixture
async def app(cache: Path, tmp_path: Path) -> AsyncIterator[App]:
    """The app of `tests.pages`, which takes seconds to import, with a store on disk."""
    from tests.pages import App

    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with app.running():
        yield app


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for the tests of one file; they are skipped where there is none."""
    from tests.servers import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Server]:
    """`async-sessions demo`, for the tests of one file; see `tests.demo_page.slow_runs`."""
    from tests.demo_page import paced_demo

    with paced_demo(tmp_path_factory.mktemp("demo")) as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser profile: who has another one is another user."""
    from tests.servers import PATIENCE

    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * PATIENCE)
    yield context
    context.close()
