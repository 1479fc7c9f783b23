"""The house rules that a reader can't see in one file: imports go down only, the public names, the core alone."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import async_sessions

PACKAGE = Path(async_sessions.__file__).parent

FLOORS = [
    {"errors"},
    {
        "records",
        "_manifest",
        "_keys",
        "_tasks",
        "_budget",
        "_events",
        "_lane",
        "_pace",
        "_quota",
        "_plan",
        "_reckoning",
    },
    {"_codec", "blobs", "renditions", "_tensor"},
    {"_ingest", "_cache", "_manifests", "_reading"},
    {"_context", "_life", "_draft", "_merge", "session", "store", "_pipeline"}
    | {"janitor", "_sweep", "stats", "verify", "_verification", "_repair"},
    {"jobs", "_run", "_accept", "_entry", "_outputs", "bundle", "_bundle", "_archive", "_spool"},
    {"asgi", "_serving", "_cookies", "dispatch", "pipelines"},
    {"gradio", "_gradio"},
    {"cli", "_cli", "demo", "__main__"},
]
BESIDE = {"testing", "__init__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor_of(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} is on no floor; put it on one")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name} has a relative import"
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "async_sessions" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room in BESIDE:
        return
    for other in imported_rooms(path):
        assert other != "testing", f"{path.name} imports testing"
        assert floor_of(other) <= floor_of(room), f"{path.name} imports {other}, which is above it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_has_two_jobs(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 320


def test_every_public_name_is_there_once_and_sorted_out() -> None:
    assert len(set(async_sessions.__all__)) == len(async_sessions.__all__)
    for name in async_sessions.__all__:
        assert getattr(async_sessions, name) is not None
    for module in ("blobs", "bundle", "dispatch", "pipelines"):
        for name in getattr(importlib.import_module(f"async_sessions.{module}"), "__all__", ()):
            assert getattr(importlib.import_module(f"async_sessions.{module}"), name) is not None


def test_every_error_is_public() -> None:
    from async_sessions import errors

    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined <= set(async_sessions.__all__)


def test_the_core_needs_the_core_dependencies_only() -> None:
    """Run in an interpreter that refuses every module outside the standard library and the core dependencies."""
    code = """
import sys
from importlib.abc import MetaPathFinder

CORE = {"async_sessions", "aiofiles", "anyio", "cachetools", "itsdangerous", "msgspec", "numpy", "PIL",
        "idna", "sniffio", "typing_extensions", "exceptiongroup", "defusedxml", "olefile", "isal"}

class OnlyCore(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in CORE and top not in sys.stdlib_module_names and not top.startswith("_"):
            raise ModuleNotFoundError(f"{name} is no core dependency", name=name)
        return None

sys.meta_path.insert(0, OnlyCore())
import async_sessions, async_sessions.jobs, async_sessions.dispatch, async_sessions.asgi, async_sessions.renditions
import async_sessions.bundle, async_sessions.testing.faults
assert not {"gradio", "torch", "av", "typer", "starlette"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
