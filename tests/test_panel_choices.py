"""What is chosen in the panel's lists while they are refreshed."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_sessions import open_store
from tests.images import rgba_png
from tests.pages import App
from tests.test_gradio_panel import choices, choose, click, component

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    (tmp_path / "gradio").mkdir()
    return tmp_path / "gradio"


async def test_a_refresh_takes_no_choice_away_that_was_made_meanwhile(cache: Path, tmp_path: Path) -> None:
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with app.running():
        page = await app.open()
        for number in range(2):  # the first can be put back
            path = cache / f"{number}.png"
            path.write_bytes(rgba_png(90 + number, 60))
            await page.choose_file(app.start, path)
        lists = [component(app, label) for label in ("Image to clear", "Replaced or cleared image")]
        await click(page, app, "Refresh")
        for each in lists:
            assert len(choices(page, each)) == 1
            assert "value" not in page.props[each._id]  # nothing was chosen when it was asked for
        await choose(page, app, "Image to clear", "start")
        await click(page, app, "Clear image")
        assert page.props[lists[0]._id]["value"] is None  # what was chosen is gone
