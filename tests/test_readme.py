"""What the README and the examples show is run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest

from async_sessions import Limits, SessionStore
from async_sessions.records import KIB, MIB
from tests.images import photo_path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TESTS = [block for block in BLOCKS if "pytest" in block]
SCRIPTS = [block for block in BLOCKS if "pytest" not in block]


def run(folder: Path, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_a_script_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(SCRIPTS[number])
    run(tmp_path, "readme.py")


def test_the_first_script_shows_the_restored_image(tmp_path: Path) -> None:
    (tmp_path / "readme.py").write_text(SCRIPTS[0])
    assert "(1280, 720) {'model': 'i2v-A14B'}" in run(tmp_path, "readme.py")


def test_the_tests_of_the_readme_pass(tmp_path: Path) -> None:
    for number, block in enumerate(TESTS):
        name = re.search(r"^# (\w+\.py)$", block, re.MULTILINE)
        (tmp_path / (name[1] if name else f"test_{number}.py")).write_text(block)
    report = run(tmp_path, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider")
    assert re.search(r"\d\d passed", report)
    assert "failed" not in report


def test_the_quickstart_makes_a_video(tmp_path: Path) -> None:
    shown = run(tmp_path, ROOT / "examples" / "quickstart.py", "sessions")
    assert "Succeeded" in shown
    assert (tmp_path / "sessions.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.timeout(300)  # a process of its own, that imports torch and diffusers
@pytest.mark.xdist_group("wan")
def test_a_photograph_becomes_a_video_of_wan(tmp_path: Path, tiny_wan: Mapping[str, Path]) -> None:
    values = ("area=4096", "num_frames=5", "steps=2")
    shown = run(
        tmp_path, ROOT / "examples" / "wan.py", tiny_wan["i2v-A14B"], photo_path("coffee.png"), "steam", *values
    )
    assert shown.splitlines()[-1] == "coffee.mp4"
    assert (tmp_path / "coffee.mp4").read_bytes()[4:8] == b"ftyp"


def test_the_defaults_of_the_readme_are_those_of_the_code() -> None:
    section = README.split("## What is kept, and how long\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"`(\w+)=([^`]+)`[,\s|]", section))
    store = {name: each.default for name, each in inspect.signature(SessionStore).parameters.items()}
    limits = {name: getattr(Limits(), name) for name in Limits.__struct_fields__}
    assert set(limits) - {"keep_metadata"} < set(told)
    for name, value in told.items():
        known = {"timedelta": timedelta, "MIB": MIB, "KIB": KIB}
        assert eval(value, known) == {**store, **limits}[name], name


def test_the_extras_of_the_readme_are_those_of_the_package() -> None:
    section = README.split("## Install\n")[1].split("\n## ")[0]
    told = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(told) == set(extras) - {"test", "dev"}
    floor, ceiling = re.findall(r"\d[\d.]*", extras["gradio"][0])
    assert f"Gradio {floor} or later, below {ceiling}" in section


def test_the_readme_counts_the_lines_of_the_fastapi_app() -> None:
    lines = len((ROOT / "examples" / "fastapi_app.py").read_text().splitlines())
    assert f"in {lines} lines to copy" in README


def test_the_readme_names_the_files_that_there_are() -> None:
    for name in re.findall(r"`((?:examples|tests)/[\w/]+\.(?:py|md))`", README):
        assert (ROOT / name).is_file(), name
