"""The command line. Exit code 0 is fine, 1 that something was found or went wrong, 2 a user's mistake: one sentence."""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import socket
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import msgspec
import typer

from async_sessions._cli import jobs
from async_sessions._cli.care import cleanup, verify
from async_sessions._cli.carry import export_, import_
from async_sessions._cli.look import ls, show, stats
from async_sessions._cli.options import DEFAULT_ROOT, parse_period, period
from async_sessions._cli.terminal import fail
from async_sessions.errors import ModelError, StorageError
from async_sessions.pipelines._folder import expect_model, model_in
from async_sessions.pipelines._wan import MODELS
from async_sessions.store import SessionStore, open_store

WAN_NEEDS: Final = dict.fromkeys(("accelerate", "diffusers", "ftfy", "torch", "transformers"), "wan")

app = typer.Typer(
    name="async-sessions",
    help="Durable image sessions and jobs for Gradio apps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"async-sessions {importlib.metadata.version('async-sessions')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Durable image sessions and jobs for Gradio apps."""


@app.command()
def demo(
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.", min=1, max=65535)] = 7860,
    root: Annotated[
        str,
        typer.Option(
            envvar="ASYNC_SESSIONS_ROOT",
            help="The store's folder, created if missing; memory:// keeps all only until the demo ends.",
        ),
    ] = DEFAULT_ROOT,
    ttl: Annotated[
        str | None,
        typer.Option(envvar="ASYNC_SESSIONS_TTL", help="How long an unused session is kept: 90s, 30m, 24h, 7d."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON with max_age_hours, which --ttl overrides, cleanup_interval_minutes, enable_cleanup_thread."
        ),
    ] = None,
    wan: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a Wan2.2 model for diffusers; without it, a preview.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"What --wan holds: {', '.join(MODELS)}. Found out if left.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device for --wan, such as cuda:1; by default a GPU if there is one.")
    ] = None,
    offload: Annotated[
        str, typer.Option(help="What waits in the machine's memory: none, model or sequential.")
    ] = "none",
) -> None:
    """Serve a Wan2.2-style page whose images, settings and videos survive refresh, restart and kill -9."""
    options = {} if config is None else read_config(config)
    if ttl is not None:
        options["ttl"] = parse_period(ttl)
    try:
        store = open_store(root, **options)
    except (ValueError, RuntimeError) as error:  # no such backend, no such home
        fail(str(error))
    if wan is None and (model, device, offload) != (None, None, "none"):
        fail("--model, --device and --offload are about the model of --wan DIR; name its folder.")
    name = None if wan is None else _model(wan, model)
    _require({"gradio": "gradio", "av": "video"} | ({} if wan is None else WAN_NEEDS))
    _check_address(host, port)
    anyio.run(_try, store)
    real: dict[str, Any] = {}
    if wan is not None and name is not None:
        real["device"] = device or _device()
        try:
            real["wan"] = _wan(wan, name, device=real["device"], offload=offload)
        except ValueError as error:
            fail(str(error))
    page = importlib.import_module("async_sessions.demo")
    page.serve(store, host=host, port=port, **real)


class _OldSession(msgspec.Struct, forbid_unknown_fields=True):
    max_age_hours: float = 24
    cleanup_interval_minutes: float = 30
    enable_cleanup_thread: bool = True


def read_config(path: Path) -> dict[str, Any]:
    """The options of `SessionStore` that the threaded design's `config["session"]` stands for."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        old = msgspec.convert(found.get("session", found), _OldSession)
        if old.max_age_hours <= 0 or old.cleanup_interval_minutes <= 0:
            fail(f"{path}: max_age_hours and cleanup_interval_minutes must be above 0.")
    except OSError as error:
        fail(f"{path} can't be read: {error.strerror}.")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        fail(f"{path} is not a config of the threaded design: {error}.")
    interval = period(minutes=old.cleanup_interval_minutes)
    return {
        "ttl": period(hours=old.max_age_hours),
        "cleanup_interval": interval if old.enable_cleanup_thread else None,
    }


async def _try(store: SessionStore) -> None:
    try:
        async with store:
            pass
    except StorageError as error:
        fail(str(error))


def _model(folder: Path, name: str | None) -> str:
    """The name of the model in `folder`, which is `name` where that is given."""
    if name is not None and name not in MODELS:
        fail(f"--model is one of {', '.join(MODELS)}; not {name!r}.")
    try:
        return (model_in(folder.expanduser()) if name is None else expect_model(folder.expanduser(), name)).name
    except ModelError as error:
        fail(str(error))


def _device() -> str:
    return "cuda" if importlib.import_module("torch").cuda.is_available() else "cpu"


def _wan(folder: Path, name: str, **options: Any) -> Any:
    return importlib.import_module("async_sessions.pipelines.wan").WanPipeline(folder, name, **options)


def _require(modules: dict[str, str]) -> None:
    missing = dict.fromkeys(extra for module, extra in modules.items() if importlib.util.find_spec(module) is None)
    if missing:
        fail(f"The demo needs more than is installed: pip install 'async-sessions[{','.join(missing)}]'")


def _check_address(host: str, port: int) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except socket.gaierror:
        fail(f"{host} is no address of this machine. Use 127.0.0.1 for this machine alone, 0.0.0.0 for all.")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            fail(f"Port {port} on {host} is taken by another program. Choose another one: --port {port % 65535 + 1}")
        fail(f"Can't serve on {host}, port {port}: {error.strerror}.")


for command in (ls, show, stats, cleanup, verify, export_, import_):
    app.command(command.__name__.rstrip("_"))(command)
app.add_typer(jobs.app)
