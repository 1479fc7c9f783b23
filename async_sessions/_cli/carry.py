"""`export` and `import`: a session as a file, and back."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer
from rich.filesize import decimal

from async_sessions._bundle import Bundle
from async_sessions._cli.options import DEFAULT_ROOT, LOOKING, AsJson, Key, Root, on_store
from async_sessions._cli.terminal import Output, fail, progress
from async_sessions._spool import opened
from async_sessions.bundle import MAX_BYTES, MAX_FILES, export_session, import_session

if TYPE_CHECKING:
    from async_sessions.session import Session
    from async_sessions.store import SessionStore

File = Annotated[Path, typer.Argument(metavar="FILE", help="The bundle, a ZIP.")]


def export_(
    key: Key,
    file: File,
    root: Root = DEFAULT_ROOT,
    jobs: Annotated[bool, typer.Option("--jobs", help="With the finished jobs and what they made.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a session's images and settings to a file, which is replaced where there is one."""
    if os.path.isdir(file):
        fail(f"{file} is a folder; name the file that the bundle is to be.")
    if os.path.islink(file) or (os.path.exists(file) and not os.path.isfile(file)):
        fail(f"{file} is a link or a device, whose place no bundle takes; name a file.")
    if not os.path.isdir(file.absolute().parent):  # unlike Path's, False of a name that is too long
        fail(f"There is no folder {file.parent} for the bundle; make it first.")

    async def write(store: SessionStore) -> None:
        await export_session(await store.open_by_key(key), file, jobs=jobs)

    with progress("exporting"):
        on_store(root, write, ttl=LOOKING)
    size = file.stat().st_size
    if as_json:
        Output().json([{"key": key, "file": str(file), "byte_size": size}])
    else:
        Output().pairs([("session", key), ("bundle", f"{file}, {decimal(size)}")])


def import_(
    file: File,
    root: Root = DEFAULT_ROOT,
    show_id: Annotated[
        bool, typer.Option("--show-id", help="Print the new session's id, too: whoever knows it is that user.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a new session from a bundle.

    Only its id opens it in an app, and only --show-id prints that: it can't be had later.
    """
    if not os.path.isfile(file):
        fail(f"There is no file {file}.")

    async def look() -> None:
        async with opened(file, MAX_BYTES) as bundle:
            await anyio.to_thread.run_sync(partial(Bundle, bundle, max_files=MAX_FILES))

    async def read(store: SessionStore) -> Session:
        return await import_session(store, file)

    with progress("importing"):
        session, _ = on_store(root, read, create=True, before=look)
    known = {"session": session.key}
    if show_id and session.id is not None:
        known["id"] = session.id
    if as_json:
        Output().json([known])
    else:
        Output().pairs(known.items())
