"""What all commands share: their options, the store that they name, and what may be wrong with it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import anyio
import typer

from async_sessions import _keys
from async_sessions._cli.terminal import MISTAKE, PROBLEMS, fail
from async_sessions.blobs._files import LOCKS
from async_sessions.errors import (
    BundleError,
    DispatchError,
    InvalidKeyError,
    QuotaExceededError,
    RevisionConflictError,
    SessionNotFoundError,
    SlotEmptyError,
    StorageError,
)
from async_sessions.store import SessionStore, open_store

T = TypeVar("T")

Root = Annotated[str, typer.Option("--root", envvar="ASYNC_SESSIONS_ROOT", help="The store's folder.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The session's key, as `ls` prints it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Ttl = Annotated[
    str,
    typer.Option("--ttl", envvar="ASYNC_SESSIONS_TTL", help="How long your app keeps an unused session: 90s, 24h, 7d."),
]
MaxAge = Annotated[
    str | None,
    typer.Option(
        "--max-age", envvar="ASYNC_SESSIONS_MAX_AGE", help="How long your app keeps any session, if that has an end."
    ),
]
Grace = Annotated[
    str,
    typer.Option(
        "--grace", envvar="ASYNC_SESSIONS_GRACE", help="How long your app keeps what was replaced or cleared: 2m, 1h."
    ),
]
DEFAULT_ROOT, DEFAULT_TTL, DEFAULT_GRACE = "~/sessions", "24h", "1h"

# a ttl so long that no look finds a session expired, or records its use: what expired is there until a sweep takes it
LOOKING: Final = timedelta(days=36_500)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_PERIOD = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


def lifetime(**texts: str | None) -> dict[str, Any]:
    """The options of `SessionStore` that were given: `ttl`, `max_age`, `grace`."""
    given = {name: text for name, text in texts.items() if text is not None}
    return {name: parse_period(text, f"--{name.replace('_', '-')}") for name, text in given.items()}


def parse_period(text: str, option: str = "--ttl") -> timedelta:
    """`90s`, `30m`, `24h` or `7d`."""
    match = _PERIOD.fullmatch(text.strip())
    if match is None or not float(match[1]):
        fail(f"{option} is a number and a unit, for example 90s, 30m, 24h or 7d; not {text!r}.")
    return period(**{_UNITS[match[2]]: float(match[1])})


def period(**units: float) -> timedelta:
    try:
        return timedelta(**units)
    except OverflowError:
        fail(f"{' '.join(f'{count:g} {unit}' for unit, count in units.items())} is longer than can be counted.")


def on_store(
    root: str,
    work: Callable[[SessionStore], Awaitable[T]],
    *,
    create: bool = False,
    before: Callable[[], Awaitable[None]] | None = None,
    **options: Any,
) -> tuple[T, list[str]]:
    """What `work` returns of the store at `root`, which is neither swept nor touched, and what was logged meanwhile.

    The errors that are left to a user end here, in a sentence. Without `create` nothing is made where there is no
    store, and neither is where `before`, which is called first, raises.
    """
    store = _store_at(root, create, options)
    opened = False

    async def visit() -> T:
        nonlocal opened
        _wake(asyncio.get_running_loop())
        if before is not None:
            await before()
        async with store:
            opened = True
            return await work(store)

    with _listening() as heard:
        try:
            return anyio.run(visit), heard
        except SessionNotFoundError:
            fail("There is no such session, or it is expired or deleted: see `async-sessions ls`.")
        except (InvalidKeyError, BundleError, QuotaExceededError, DispatchError, SlotEmptyError) as error:
            fail(str(error))
        except (StorageError, RevisionConflictError) as error:
            fail(str(error), PROBLEMS if opened else MISTAKE)


def _wake(loop: asyncio.AbstractEventLoop) -> None:
    """Now and then, so that a Ctrl-C is heard that came just before the loop went to sleep: asyncio alone misses it."""
    loop.call_later(0.5, _wake, loop)


def _store_at(root: str, create: bool, options: dict[str, Any]) -> SessionStore:
    if "://" in root:
        fail(f"{root} is no folder, and no other process has what is in memory. Give your app's folder: --root FOLDER")
    _check_folder(root, create)
    try:
        return open_store(root, cleanup_interval=None, **options)
    except (ValueError, RuntimeError) as error:  # periods that make no sense, no such home
        fail(str(error))


def _check_folder(root: str, create: bool) -> None:
    """Opening a store makes its folders where there are none: a look must not, and nothing does among other files."""
    try:
        folder = Path(root).expanduser()
        ours = any((folder / name).is_dir() for name in (LOCKS, _keys.MANIFESTS))
        found = folder.exists() and not (create and folder.is_dir() and not any(folder.iterdir()))
    except (OSError, RuntimeError) as error:
        fail(f"{root} can't be looked into: {str(getattr(error, 'strerror', None) or error).rstrip('.')}.")
    if not found and not create:
        fail(f"There is no folder {root}. Give the one that holds your sessions: --root FOLDER")
    if found and not ours:
        fail(f"There is no store in {root}, but something else. Give the folder that your app opens: --root FOLDER")


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def _listening() -> Iterator[list[str]]:
    logger, listener = logging.getLogger("async_sessions"), _Listener()
    logger.addHandler(listener)
    try:
        yield listener.heard
    finally:
        logger.removeHandler(listener)
