"""The command line. Mistakes of a user end in one sentence and exit code 2, never in a traceback."""

from __future__ import annotations

import importlib
import importlib.util
import re
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import anyio
import msgspec
import typer
from rich.console import Console

from async_sessions.errors import StorageError
from async_sessions.store import open_store

app = typer.Typer(
    name="async-sessions",
    help="Durable image sessions and jobs for Gradio apps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_errors = Console(stderr=True, soft_wrap=True, highlight=False)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PERIOD = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


@app.callback()
def _root() -> None:
    """Durable image sessions and jobs for Gradio apps."""


@app.command()
def demo(
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 7860,
    root: Annotated[Path, typer.Option(help="Folder that holds the sessions; created if missing.")] = Path(
        "~/sessions"
    ),
    ttl: Annotated[str | None, typer.Option(help="How long an unused session is kept: 90s, 30m, 24h, 7d.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON with max_age_hours, cleanup_interval_minutes, enable_cleanup_thread.")
    ] = None,
) -> None:
    """Serve a Wan2.2-style page whose images, settings and videos survive refresh, restart and kill -9."""
    options = {} if config is None else read_config(config)
    if ttl is not None:
        options["ttl"] = parse_period(ttl)
    _require({"gradio": "gradio", "av": "video"})
    if not _is_free(host, port):
        _fail(f"Port {port} on {host} is taken by another program. Choose another one: --port {port % 65535 + 1}")
    anyio.run(_try_root, root)
    page = importlib.import_module("async_sessions.demo")
    page.serve(open_store(root, **options), host=host, port=port)


class _OldSession(msgspec.Struct, forbid_unknown_fields=True):
    max_age_hours: float = 24
    cleanup_interval_minutes: float = 30
    enable_cleanup_thread: bool = True


def read_config(path: Path) -> dict[str, Any]:
    """The options of `SessionStore` that the threaded version's `config["session"]` stands for."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        old = msgspec.convert(found.get("session", found), _OldSession)
        if old.max_age_hours <= 0 or old.cleanup_interval_minutes <= 0:
            _fail(f"{path}: max_age_hours and cleanup_interval_minutes must be above 0.")
    except OSError as error:
        _fail(f"{path} can't be read: {error.strerror}.")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _fail(f"{path} is not a config of the threaded version: {error}.")
    interval = timedelta(minutes=old.cleanup_interval_minutes)
    return {
        "ttl": timedelta(hours=old.max_age_hours),
        "cleanup_interval": interval if old.enable_cleanup_thread else None,
    }


def parse_period(text: str) -> timedelta:
    """`90s`, `30m`, `24h` or `7d`."""
    match = _PERIOD.fullmatch(text.strip())
    if match is None or not float(match[1]):
        _fail(f"--ttl is a number and a unit, for example 90s, 30m, 24h or 7d; not {text!r}.")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


async def _try_root(root: Path) -> None:
    try:
        async with open_store(root, cleanup_interval=None):
            pass
    except StorageError as error:
        _fail(str(error))


def _require(modules: dict[str, str]) -> None:
    missing = [extra for module, extra in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        _fail(f"The demo needs more than is installed: pip install 'async-sessions[{','.join(missing)}]'")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _fail(sentence: str) -> NoReturn:
    _errors.print(sentence, style="bold red", markup=False)
    raise typer.Exit(2)
