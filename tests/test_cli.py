from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from async_sessions import LocalBlobStore, MemoryBlobStore, SessionStore
from async_sessions._cli.options import parse_period
from async_sessions.cli import app, read_config


def run(*arguments: str | Path, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command line, in an interpreter that has none of the modules `without`."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec; hidden = sys.argv.pop(1).split(',');"
        "u.find_spec = lambda name, *a: None if name in hidden else find(name, *a);"
        "from async_sessions.__main__ import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, ",".join(without), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )


def test_help_names_the_options_of_the_demo() -> None:
    done = run("demo", "--help")
    assert done.returncode == 0
    for option in ("--port", "--root", "--ttl", "--config", "--wan", "--model", "--device", "--offload"):
        assert option in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"async-sessions {version('async-sessions')}\n")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[SessionStore]:
    """The stores that demos were to serve."""
    stores: list[SessionStore] = []
    monkeypatch.setattr("async_sessions.demo.serve", lambda store, **options: stores.append(store))
    return stores


def demo(*arguments: str | Path, **environment: str) -> Result:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return CliRunner().invoke(app, ["demo", "--port", str(port), *map(str, arguments)], env=environment)


def test_the_demo_obeys_the_environment_as_the_other_commands_do(tmp_path: Path, served: list[SessionStore]) -> None:
    (tmp_path / "old.json").write_text('{"max_age_hours": 1}')
    environment = {"ASYNC_SESSIONS_ROOT": str(tmp_path / "root"), "ASYNC_SESSIONS_TTL": "2h"}
    assert demo(**environment).exit_code == 0
    assert demo("--config", tmp_path / "old.json", **environment).exit_code == 0
    assert demo("--root", tmp_path / "other", "--ttl", "3h", **environment).exit_code == 0
    assert [repr(store.blobs) for store in served] == [
        repr(LocalBlobStore(tmp_path / name)) for name in ("root", "root", "other")
    ]
    assert [store._lifetime.ttl for store in served] == [timedelta(hours=hours) for hours in (2, 2, 3)]


def test_the_demo_can_do_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, served: list[SessionStore]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo("--root", "memory://").exit_code == 0
    assert isinstance(served[0].blobs, MemoryBlobStore)
    assert demo("--root", "~nobody-here/sessions").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("demo", "--root", tmp_path, "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"Port {port} on 127.0.0.1 is taken by another program. Choose another one: --port {port + 1}"
    ]


@pytest.mark.parametrize(
    ("without", "named"),
    [
        (("typer",), "async-sessions[cli]"),
        (("gradio",), "async-sessions[gradio]"),
        (("gradio", "av"), "[gradio,video]"),
    ],
)
def test_a_missing_extra_is_one_sentence(without: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = run("demo", "--root", tmp_path, without=without)
    assert done.returncode != 0
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_old_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"session": {"max_age_hours": 2, "cleanup_interval_minutes": 5}, "model": {}}))
    assert read_config(path) == {"ttl": timedelta(hours=2), "cleanup_interval": timedelta(minutes=5)}
    path.write_text(json.dumps({"enable_cleanup_thread": False}))
    assert read_config(path) == {"ttl": timedelta(hours=24), "cleanup_interval": None}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"max_age_hours": "long"}', '{"session": {"typo": 1}}', '{"max_age_hours": 0}', '{"session": 3}'],
)
def test_a_config_that_is_none_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(typer.Exit) as raised:
        read_config(path)
    assert raised.value.exit_code == 2
    assert str(path) in capsys.readouterr().err.replace("\n", "")


def test_a_missing_config_is_one_sentence(tmp_path: Path) -> None:
    done = run("demo", "--config", tmp_path / "none.json")
    assert done.returncode == 2
    assert "can't be read: No such file" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--ttl", "99999999999d"), ("--ttl", "4000000d"), ("--host", "nonsense.invalid"), ("--host", "192.0.2.1")],
)
def test_a_value_that_makes_no_sense_is_one_sentence(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run("demo", "--root", tmp_path, "--port", "17998", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "taken" not in done.stderr


def test_a_root_that_is_unsafe_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run("demo", "--root", tmp_path, "--port", "17999")
    assert done.returncode == 2
    assert "chmod 700" in done.stderr
    assert "Traceback" not in done.stderr


def wan_folder(path: Path, **parts: list[str]) -> Path:
    """All that is looked at before the page is served; of its `parts` there is none."""
    path.mkdir()
    index = {"_class_name": "WanPipeline", "expand_timesteps": True, **parts}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--wan", "nothing"), "'nothing' is no folder of a Wan2.2 model: it has no model_index.json."),
        (("--wan", "model", "--model", "i2v-A14B"), "'model' holds ti2v-5B, not i2v-A14B."),
        (("--wan", "model", "--model", "i2v"), "--model is one of t2v-A14B, i2v-A14B, ti2v-5B; not 'i2v'."),
        (("--wan", "model", "--device", "cpu", "--offload", "sequential"), "nowhere to offload to."),
        (("--offload", "model"), "name its folder."),
        (("--wan", "half"), "'half' is not complete: vae is missing. Download the folder again."),
    ],
)
def test_a_model_that_cant_be_served_is_one_sentence(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    wan_folder(tmp_path / "model")
    wan_folder(tmp_path / "half", vae=["diffusers", "AutoencoderKLWan"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = [tmp_path / each if before == "--wan" else each for before, each in pairwise(["", *arguments])]
    done = run("demo", "--root", tmp_path / "sessions", "--port", str(port), *named)
    assert done.returncode == 2
    assert said in done.stderr
    assert len([line for line in done.stderr.splitlines() if "transformers" not in line]) == 1


@pytest.mark.parametrize("module", ["torch", "diffusers", "transformers", "accelerate", "ftfy"])
def test_a_model_without_its_libraries_is_one_sentence(module: str, tmp_path: Path) -> None:
    done = run("demo", "--wan", wan_folder(tmp_path / "model"), "--root", tmp_path / "sessions", without=(module,))
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["The demo needs more than is installed: pip install 'async-sessions[wan]'"]


@pytest.mark.parametrize(
    ("text", "period"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("1.5h", timedelta(hours=1.5)),
        ("7d", timedelta(7)),
    ],
)
def test_a_period_is_a_number_and_a_unit(text: str, period: timedelta) -> None:
    assert parse_period(text) == period


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "0h", "1y", "1h2"])
def test_a_period_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(typer.Exit):
        parse_period(text)
