"""How an app is started and stopped; `test_gradio_browser` has a page open meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, free_port

pytestmark = pytest.mark.slow


def run(folder: Path, what: str, name: str) -> list[str]:
    """What the app says until it ends, which it does without an error."""
    environment = {
        **os.environ,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(free_port()),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "tests.launching_app", str(folder / "root"), what, name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return [line.removeprefix("app: ").strip() for line in done.stdout.splitlines() if line.startswith("app: ")]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_while_the_app_is_launched_is_not_lost_and_leaves_the_store(
    tmp_path: Path, name: str
) -> None:
    said = run(tmp_path, "early", name)
    assert "it was lost" not in said
    assert said[0] == "the app's own begins"
    assert said[-2:] == ["the app's own ends", "the script goes on; the store is closed"]


def test_an_app_that_goes_on_after_launch_hears_a_signal_itself_and_after_the_store_was_left(tmp_path: Path) -> None:
    said = run(tmp_path, "early and going on", "SIGTERM")
    assert said[-3:] == ["the app's own ends", "the app heard it", "the script goes on; the store is closed"]


def test_an_app_that_blocks_later_leaves_the_store_too(tmp_path: Path) -> None:
    said = run(tmp_path, "late", "SIGTERM")
    assert said[-2:] == ["the app's own ends", "the script goes on; the store is closed"]


def test_an_app_is_launched_closed_and_launched_again(tmp_path: Path) -> None:
    said = run(tmp_path, "twice", "SIGINT")
    once = ["the app's own begins", "serves 200", "the app's own ends"]
    assert said == [*once, *once, "the script goes on; the store is closed"]
