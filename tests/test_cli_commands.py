"""The commands that look after a store: `ls`, `show`, `stats`, `cleanup`, `verify`, `export`, `import`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from async_sessions import JobError, JobInfo, Session, SessionStore, open_store
from async_sessions._cli.terminal import age
from async_sessions.cli import app
from async_sessions.testing.clock import FrozenClock
from tests.faults import files_below

HOSTILE = "\x1b[2J\x9b31m[bold]red"
COMMANDS = (
    ("ls",),
    ("show", "0" * 32),
    ("stats",),
    ("cleanup",),
    ("verify",),
    ("verify", "--repair"),
    ("export", "0" * 32, "session.zip"),
)


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"NO_COLOR": "1", **environment})


def on(root: Path, work: Callable[[SessionStore], Awaitable[Any]], **options: Any) -> Any:
    """What `work` returns of the store at `root`."""

    async def visit() -> Any:
        async with open_store(root, cleanup_interval=None, **options) as store:
            return await work(store)

    return anyio.run(visit)


def contents(root: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files_below(root)}


async def fill(store: SessionStore) -> Session:
    session = await store.create_session(prompt=HOSTILE)
    for color in ("red", "blue"):
        await session.store_image(Image.new("RGB", (40, 30), color), "start", name="holiday.png")
    job = JobInfo(
        id=f"{session.key}.{'0' * 16}",
        pipeline="preview",
        inputs={},
        params={},
        submitted_at=store.clock(),
        owner="o",
        status="failed",
        error=JobError("ValueError", HOSTILE),
    )
    await session.edit_job(job.id, lambda _: job)
    await session.pin("me", until=store.clock() + timedelta(hours=3))
    return session


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def session(root: Path) -> Session:
    """One session, with everything that a session can have, in a store at `root`."""
    made = on(root, fill)
    assert isinstance(made, Session)
    return made


def test_ls_shows_a_session_a_line_and_the_last_changed_first(root: Path, session: Session) -> None:
    other = on(root, lambda store: store.create_session())
    done = run("ls", "--root", root)
    assert done.exit_code == 0
    heading, *lines = done.stdout.splitlines()
    assert heading.split() == ["session", "images", "size", "changed", "expires", "jobs"]
    assert [line.split()[:2] for line in lines] == [[other.key, "0"], [session.key, "1"]]
    rows = [json.loads(line) for line in run("ls", "--json", ASYNC_SESSIONS_ROOT=str(root)).stdout.splitlines()]
    assert [(row["key"], row["images"], row["jobs"]) for row in rows] == [(other.key, 0, 0), (session.key, 1, 1)]


def test_ls_tells_what_it_can_not_read(root: Path, session: Session) -> None:
    damaged = on(root, lambda store: store.create_session())
    (root / "manifests" / damaged.key[:2] / f"{damaged.key}.json").write_bytes(b"{")
    done = run("ls", "--root", root, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["key"] == session.key
    assert damaged.key in done.stderr


def test_show_shows_what_a_session_holds(root: Path, session: Session) -> None:
    done = run("show", session.key, "--root", root)
    assert done.exit_code == 0
    for shown in (
        session.key,
        "image start",
        "40 x 30 image/png",
        "holiday.png",
        "recent start",
        "job failed",
        "pin me",
    ):
        assert shown in done.stdout
    info = json.loads(run("show", session.key, "--root", root, "--json").stdout)
    assert (info["key"], info["images"]["start"]["width"], info["state"]["prompt"]) == (session.key, 40, HOSTILE)


def test_what_users_wrote_can_not_drive_the_terminal(root: Path, session: Session) -> None:
    for command in (("show", session.key), ("show", session.key, "--json"), ("ls",)):
        shown = run(*command, "--root", root).stdout
        assert all(character.isprintable() or character == "\n" for character in shown)
    assert "[bold]red" in run("show", session.key, "--root", root).stdout


def test_no_command_prints_a_session_id(root: Path, session: Session) -> None:
    assert session.id is not None
    (root / "blobs" / "foreign").write_bytes(b"x")
    for command in (("ls",), ("show", session.key), ("stats",), ("cleanup", "--dry-run"), ("verify",)):
        for form in ((), ("--json",)):
            done = run(*command, "--root", root, *form)
            assert done.stdout
            assert session.id not in done.output


def test_stats_counts_what_the_store_holds(root: Path, session: Session) -> None:
    done = run("stats", "--root", root)
    assert done.exit_code == 0
    assert "1 failed" in done.stdout
    stats = json.loads(run("stats", "--root", root, "--json").stdout)
    assert (stats["sessions"], stats["images"]) == (1, 1)
    assert stats["total_bytes"] == sum(path.stat().st_size for path in files_below(root, "blobs"))
    (root / "manifests" / session.key[:2] / f"{session.key}.json").write_bytes(b"{")
    assert run("stats", "--root", root).exit_code == 1


def test_stats_tells_how_full_the_store_and_its_largest_session_are(root: Path, session: Session) -> None:
    size = json.loads(run("stats", "--root", root, "--json").stdout)["total_bytes"]
    limits = ("--max-total-bytes", str(4 * size), "--max-session-bytes", str(2 * size))
    shown = run("stats", "--root", root, *limits).stdout
    assert "25% of" in shown
    assert "50% of" in shown
    assert "hit" not in shown
    assert "%" not in run("stats", "--root", root).stdout
    stats = json.loads(run("stats", "--root", root, *limits, "--json").stdout)
    assert (stats["quota_use"], stats["session_quota_use"]) == (0.25, 0.5)
    assert run("stats", "--root", root, "--max-total-bytes", "0").exit_code == 2


def test_looking_leaves_every_file_as_it_is(root: Path) -> None:
    clock = FrozenClock()
    clock.advance(days=-3)
    key = on(root, fill, clock=clock).key  # expired, so that a sweep would take it, and overdue for a touch
    before = contents(root)
    for command in (("ls",), ("show", key), ("stats",), ("verify",), ("cleanup", "--dry-run")):
        run(*command, "--root", root, "--ttl", "7d") if command[0] in ("ls", "show") else run(*command, "--root", root)
        assert contents(root) == before


def test_cleanup_removes_what_expired_and_a_dry_run_only_says_so(root: Path) -> None:
    clock = FrozenClock()
    clock.advance(days=-3)
    key = on(root, lambda store: store.create_session(), clock=clock).key
    assert run("cleanup", "--root", root, "--ttl", "7d").stdout.split()[1:3] == ["0", "removed,"]
    done = run("cleanup", "--root", root, "--dry-run")
    assert (done.exit_code, "would go" in done.stdout, key in done.stdout) == (0, True, True)
    report = json.loads(run("cleanup", "--root", root, "--json").stdout)
    assert [(removal["kind"], removal["key"]) for removal in report["removed"]] == [("session", key)]
    assert files_below(root, "manifests") == []


async def replace_an_image(store: SessionStore) -> Session:
    session = await store.create_session()
    for color in ("red", "blue"):
        await session.store_image(Image.new("RGB", (8, 8), color), "start")
    return session


def test_the_periods_of_the_app_are_obeyed_given_as_options_or_in_the_environment(root: Path) -> None:
    clock = FrozenClock()
    clock.advance(hours=-3)
    key = on(root, replace_an_image, clock=clock).key

    def would_go(*options: str, **environment: str) -> list[str]:
        report = json.loads(run("cleanup", "--dry-run", "--json", "--root", root, *options, **environment).stdout)
        return [removal["kind"] for removal in report["removed"]]

    assert would_go() == ["image", "image"]
    assert would_go("--grace", "4h") == would_go(ASYNC_SESSIONS_GRACE="4h") == []
    assert would_go("--max-age", "2h") == would_go(ASYNC_SESSIONS_MAX_AGE="2h") == ["session"]
    assert would_go("--max-age", "2h", "--grace", "4h", ASYNC_SESSIONS_MAX_AGE="1d") == ["session"]
    assert would_go("--ttl", "1h", "--grace", "4h") == would_go(ASYNC_SESSIONS_TTL="1h") == ["session"]
    assert key in run("ls", "--root", root).stdout
    assert key not in run("ls", "--root", root, "--max-age", "2h").stdout
    assert "recent start" not in run("show", key, "--root", root).stdout
    assert "recent start" in run("show", key, "--root", root, "--grace", "4h").stdout
    assert run("show", key, "--root", root, "--max-age", "2h").exit_code == 2


def test_verify_spares_what_is_younger_than_the_grace_of_the_app(root: Path, session: Session) -> None:
    blob = on(root, open_by(session.key)).images["start"].blob
    orphan = root / blob.replace(Path(blob).name, f"{'1' * 64}.{'2' * 16}")
    orphan.write_bytes(b"being written")
    hours_ago = time.time() - 3 * 3600
    os.utime(orphan, (hours_ago, hours_ago))
    assert run("verify", "--repair", "--root", root, "--grace", "4h").exit_code == 0
    assert run("verify", "--repair", "--root", root, ASYNC_SESSIONS_GRACE="4h").exit_code == 0
    assert orphan.exists()
    assert run("verify", "--repair", "--root", root).exit_code == 1
    assert not orphan.exists()


@pytest.mark.parametrize("command", ["cleanup", "verify"])
def test_help_says_that_the_periods_are_the_apps(command: str) -> None:
    assert "must be what your app opens the store with" in " ".join(run(command, "--help").stdout.split())


def test_cleanup_that_could_not_judge_a_session_is_exit_code_1(root: Path, session: Session) -> None:
    (root / "manifests" / session.key[:2] / f"{session.key}.json").write_bytes(b"{")
    done = run("cleanup", "--root", root)
    assert done.exit_code == 1
    assert session.key in done.stdout


def test_verify_finds_and_repairs(root: Path, session: Session) -> None:
    assert run("verify", "--root", root).exit_code == 0
    blob = on(root, open_by(session.key)).images["start"].blob
    (root / blob).write_bytes(b"flipped")
    done = run("verify", "--root", root)
    assert done.exit_code == 1
    for shown in ("damaged", "slot 'start'", blob, session.key):
        assert shown in done.stdout
    report = json.loads(run("verify", "--root", root, "--repair", "--json").stdout)
    assert [(finding["kind"], finding["key"]) for finding in report["findings"]] == [("damaged", blob)]
    assert report["findings"][0]["repair"]
    done = run("verify", "--root", root)
    assert (done.exit_code, "quarantine  2 files" in done.stdout) == (0, True)


def test_a_session_goes_out_and_comes_in_again(root: Path, session: Session, tmp_path: Path) -> None:
    file, other = tmp_path / "session.zip", tmp_path / "other"
    before = contents(root)
    done = run("export", session.key, file, "--root", root)
    assert (done.exit_code, str(file) in done.stdout.replace("\n", ""), contents(root)) == (0, True, before)
    done = run("import", file, "--root", other)
    assert done.exit_code == 0
    key = done.stdout.split()[-1]
    images = on(other, open_by(key)).images
    assert images["start"].digest == on(root, open_by(session.key)).images["start"].digest


def test_an_import_that_is_refused_makes_no_store(root: Path, session: Session, tmp_path: Path) -> None:
    file, other = tmp_path / "session.zip", tmp_path / "other"
    for data in (b"", b"no ZIP", Path(__file__).read_bytes(), b"PK\5\6" + bytes(18)):
        file.write_bytes(data)
        done = run("import", file, "--root", other)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert not other.exists()
    os.unlink(file)
    assert run("export", session.key, file, "--root", root).exit_code == 0
    assert run("import", file, "--root", other).exit_code == 0


def test_only_an_import_that_is_asked_for_it_shows_the_id(root: Path, session: Session, tmp_path: Path) -> None:
    file = tmp_path / "session.zip"
    assert json.loads(run("export", session.key, file, "--root", root, "--json").stdout)["file"] == str(file)
    assert json.loads(run("import", file, "--root", root, "--json").stdout).keys() == {"session"}
    shown = json.loads(run("import", file, "--root", root, "--json", "--show-id").stdout)

    async def restored(store: SessionStore) -> str:
        return (await store.restore_session(shown["id"])).key

    assert on(root, restored) == shown["session"]


def test_what_is_no_bundle_is_one_sentence(root: Path, session: Session, tmp_path: Path) -> None:
    too_deep = "/tmp" + 3000 * "/x"
    link = tmp_path / "stdout"
    link.symlink_to("/dev/null")
    (tmp_path / "text.zip").write_bytes(b"no ZIP")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_bytes(b"x")
    for arguments in (
        ("import", tmp_path / "text.zip", "--root", root),
        ("import", tmp_path / "missing.zip", "--root", root),
        ("import", tmp_path / "text.zip", "--root", tmp_path / "taken"),
        ("export", session.key, tmp_path / "missing" / "session.zip", "--root", root),
        *(("export", session.key, target, "--root", root) for target in ("/", ".", "", tmp_path, too_deep, link)),
        *(("import", source, "--root", root) for source in ("/", "", "x" * 300, too_deep)),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert sorted((tmp_path / "taken").iterdir()) == [tmp_path / "taken" / "file"]


def open_by(key: str) -> Callable[[SessionStore], Awaitable[Any]]:
    async def info(store: SessionStore) -> Any:
        return await (await store.open_by_key(key)).info()

    return info


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_root_that_holds_no_store_is_one_sentence_and_stays_as_it_is(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    for root in ("missing", "empty", "file", "file/below"):
        done = run(*command, "--root", tmp_path / root)
        assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
        assert str(tmp_path / root) in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "mistake",
    [
        ("ls", "--root", "s3://bucket/prefix"),
        ("ls", "--root", "memory://"),
        ("ls", "--root", "~nobody-here/sessions"),
        ("ls", "--root", "a\x00b"),
        ("ls", "--ttl", "soon"),
        ("ls", "--ttl", "99999999999d"),
        ("cleanup", "--grace", "soon"),
        ("cleanup", "--grace", "1s"),
        ("cleanup", "--max-age", "0d"),
        ("ls", "--ttl", "4000000d"),
        ("show", "../../etc/passwd"),
        ("show", "f" * 32),
    ],
    ids=repr,
)
def test_a_mistake_is_one_sentence(mistake: tuple[str, ...], root: Path, session: Session) -> None:
    done = run(*mistake, ASYNC_SESSIONS_ROOT=str(root))
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_a_store_that_others_can_write_to_is_one_sentence(root: Path, session: Session) -> None:
    root.chmod(0o777)
    done = run("ls", "--root", root)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "chmod 700" in done.stderr


def test_what_is_damaged_is_one_sentence_and_exit_code_1(root: Path, session: Session) -> None:
    (root / "manifests" / session.key[:2] / f"{session.key}.json").write_bytes(b"{")
    done = run("show", session.key, "--root", root)
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)


def command_line(*arguments: str | Path, before: str = "") -> list[str]:
    code = f"{before}\nfrom async_sessions.__main__ import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def on_terminal(columns: int, *arguments: str | Path) -> str:
    """What a terminal of that width gets to see."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        command_line(*arguments), stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm", "NO_COLOR": "1"}
    ):
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:  # what Linux says at the end
            pass
    os.close(ours)
    return seen.decode().replace("\r\n", "\n")


def test_a_narrow_terminal_gets_whole_keys_and_no_broken_lines(root: Path, session: Session) -> None:
    shown = on_terminal(42, "ls", "--root", root)
    assert "images" in shown
    assert "size" not in shown
    assert session.key in shown
    for line in on_terminal(60, "show", session.key, "--root", root).splitlines():
        assert len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) <= 60


def test_a_verification_shows_a_bar_on_a_terminal_only(root: Path, session: Session) -> None:
    assert "1/1" in on_terminal(80, "verify", "--root", root)
    assert run("verify", "--root", root).stderr == ""


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_reader_that_stops_reading_is_no_error(form: tuple[str, ...], root: Path, session: Session) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command_line("show", session.key, "--root", root, *form), stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_output_that_can_not_be_written_is_one_sentence(root: Path, session: Session) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command_line("ls", "--root", root), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "No space left" in done.stderr


def test_ctrl_c_ends_a_command_without_a_traceback(root: Path, session: Session) -> None:
    endless = """
import anyio, signal
from async_sessions import SessionStore

async def verify(*arguments, **options):
    print("started", flush=True)
    await anyio.sleep_forever()

SessionStore.verify = verify
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background does not have
"""
    with subprocess.Popen(
        command_line("verify", "--root", root, before=endless),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (130, "", "")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (-5, "0 s"), (119, "119 s"), (120, "2 min"), (25 * 3600, "25 h"), (7 * 86400, "7 d")],
)
def test_an_age_is_told_in_its_largest_unit(seconds: int, said: str) -> None:
    assert age(timedelta(seconds=seconds)) == said
