from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.images import rgba_png
from tests.servers import ROOT, chromium, opened, serving, wait_until

EXAMPLE = ROOT / "examples" / "gradio_app.py"


def written(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in home.rglob("manifests/*/*.json"))


def test_the_example_is_an_ordinary_app_and_three_lines() -> None:
    lines = EXAMPLE.read_text().splitlines()
    added = [line for line in lines if "# added" in line]
    assert len(added) == 3
    ordinary = [line for line in lines if line not in added] + ["    demo.launch()"]
    assert "sessions" not in "\n".join(ordinary).lower()
    ast.parse("\n".join(ordinary))
    assert len([line for line in ordinary if line.strip()]) <= 25


@pytest.mark.browser
def test_the_example_remembers_photo_and_levels(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(rgba_png())
    with chromium() as browser, serving(tmp_path, str(EXAMPLE)) as server:
        page = opened(browser.new_page(), server.url)
        page.set_input_files("#photo input[type=file]", photo)
        page.fill("#levels input[type=number]", "7")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Make the poster").click()
        expect(page.locator("#poster img")).to_be_visible()
        wait_until(lambda: all(text in written(tmp_path) for text in (b'"levels":7', b'"photo.png"')))
        opened(page, server.url)
        expect(page.locator("#photo img")).to_be_visible()
        expect(page.locator("#levels input[type=number]")).to_have_value("7")
        page.get_by_role("button", name="Make the poster").click()
        expect(page.locator("#poster img")).to_be_visible()


def applied(folder: Path) -> tuple[Path, list[str]]:
    """The plain app with the README's diff, and the lines that it adds."""
    (diff,) = re.findall(
        r"^```diff\n(--- a/examples.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    app = folder / "examples" / "plain_app.py"
    app.parent.mkdir()
    shutil.copy(ROOT / "examples" / "plain_app.py", app)
    subprocess.run(["git", "apply"], cwd=folder, input=diff, text=True, check=True)
    return app, re.findall(r"^\+(?!\+)(.*)", diff, re.MULTILINE)


@pytest.mark.browser
def test_three_lines_of_the_readme_make_an_ordinary_app_keep_its_image(tmp_path: Path) -> None:
    assert "sessions." not in (ROOT / "examples" / "plain_app.py").read_text()
    app, added = applied(tmp_path)
    assert len(added) == 3
    photo = tmp_path / "photo.png"
    photo.write_bytes(rgba_png())
    with chromium() as browser, serving(tmp_path, str(app)) as server:
        page = opened(browser.new_page(), server.url)
        images = page.locator(".image-frame img")
        page.set_input_files("input[type=file]", photo)
        expect(images).to_have_count(1)
        page.get_by_role("button", name="Mirror").click()
        expect(images).to_have_count(2)
        wait_until(lambda: b'"photo.png"' in written(tmp_path))
        opened(page, server.url)
        expect(images).to_have_count(1)
        page.get_by_role("button", name="Mirror").click()
        expect(images).to_have_count(2)
