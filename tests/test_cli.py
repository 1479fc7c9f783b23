from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import typer

from async_sessions._cli.options import parse_period
from async_sessions.cli import read_config


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
    for option in ("--port", "--root", "--ttl", "--config"):
        assert option in done.stdout


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
