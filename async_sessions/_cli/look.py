"""`ls`, `show` and `stats`: they look, and change nothing."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.filesize import decimal

from async_sessions._cli.options import (
    DEFAULT_GRACE,
    DEFAULT_ROOT,
    DEFAULT_TTL,
    AsJson,
    Grace,
    Key,
    MaxAge,
    Root,
    Ttl,
    lifetime,
    on_store,
)
from async_sessions._cli.terminal import PROBLEMS, Output, age, at, plain
from async_sessions.records import Limits
from async_sessions.store import SessionStore

if TYPE_CHECKING:
    from async_sessions.records import ImageRecord, SessionInfo
    from async_sessions.stats import StoreStats


class Row(msgspec.Struct, frozen=True):
    """One session in a list."""

    key: str
    images: int
    jobs: int
    total_bytes: int
    created_at: datetime
    updated_at: datetime
    expires_at: datetime


def ls(root: Root = DEFAULT_ROOT, ttl: Ttl = DEFAULT_TTL, max_age: MaxAge = None, as_json: AsJson = False) -> None:
    """List the sessions, the last changed first.

    Those that can't be read are named on stderr; the exit code is 1 then.
    """

    async def rows(store: SessionStore) -> tuple[datetime, list[Row]]:
        found = [row_of(info) async for info in store.sessions()]
        return store.clock(), sorted(found, key=lambda row: row.updated_at, reverse=True)

    (now, found), heard = on_store(root, rows, **lifetime(ttl=ttl, max_age=max_age))
    output = Output()
    if as_json:
        output.json(found)
    else:
        lines = [
            (
                row.key,
                str(row.images),
                decimal(row.total_bytes),
                f"{age(now - row.updated_at)} ago",
                f"in {age(row.expires_at - now)}",
                str(row.jobs),
            )
            for row in found
        ]
        output.table(("session", "images", "size", "changed", "expires", "jobs"), lines)
    Output(stderr=True).pairs(("left out", plain(line)) for line in heard)
    if heard:
        raise typer.Exit(PROBLEMS)


def row_of(info: SessionInfo) -> Row:
    return Row(
        info.key, len(info.images), len(info.jobs), info.total_bytes, info.created_at, info.updated_at, info.expires_at
    )


def show(
    key: Key,
    root: Root = DEFAULT_ROOT,
    ttl: Ttl = DEFAULT_TTL,
    max_age: MaxAge = None,
    grace: Grace = DEFAULT_GRACE,
    as_json: AsJson = False,
) -> None:
    """Show what one session holds."""

    async def look(store: SessionStore) -> tuple[datetime, SessionInfo]:
        return store.clock(), await (await store.open_by_key(key)).info()

    (now, info), _ = on_store(root, look, **lifetime(ttl=ttl, max_age=max_age, grace=grace))
    if as_json:
        Output().json([info])
    else:
        Output().pairs(described(info, now))


def described(info: SessionInfo, now: datetime) -> list[tuple[str, str]]:
    """A session in words; what a user wrote is made plain."""
    lines = [
        ("session", info.key),
        ("created", at(info.created_at, now)),
        ("changed", at(info.updated_at, now)),
        ("expires", at(info.expires_at, now)),
        ("size", decimal(info.total_bytes)),
    ]
    lines += [(f"image {slot}", image_line(record)) for slot, record in sorted(info.images.items())]
    lines += [
        (f"recent {each.slot}", f"{image_line(each.record)}, removed {at(each.removed_at, now)}")
        for each in info.recent
    ]
    for job in sorted(info.jobs.values(), key=lambda job: job.submitted_at):
        error = "" if job.error is None else f": {job.error.kind}: {job.error.message}"
        line = f"{job.id} {job.pipeline}, submitted {at(job.submitted_at, now)}{error}"
        lines.append((f"job {job.status}", plain(line)))
    lines += [(f"pin {plain(owner)}", f"until {at(until, now)}") for owner, until in info.pins.items()]
    if info.state:
        lines.append(("state", plain(msgspec.json.encode(info.state).decode())))
    return lines


def image_line(record: ImageRecord) -> str:
    name = f", {plain(record.source_name)}" if record.source_name else ""
    return f"{record.width} x {record.height} {record.media_type}, {decimal(record.byte_size)}{name}"


def stats(
    root: Root = DEFAULT_ROOT,
    max_total_bytes: Annotated[
        int | None, typer.Option(min=1, envvar="ASYNC_SESSIONS_MAX_TOTAL_BYTES", help="Your app's limit for the store.")
    ] = None,
    max_session_bytes: Annotated[
        int | None,
        typer.Option(min=1, envvar="ASYNC_SESSIONS_MAX_SESSION_BYTES", help="Your app's limit for one session."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count what the store holds, by its sessions. Any that can't be read is exit code 1."""
    limits = Limits(max_total_bytes=max_total_bytes, max_session_bytes=max_session_bytes)
    found, _ = on_store(root, SessionStore.stats, limits=limits)
    output = Output()
    if as_json:
        shares = {name: getattr(found, name) for name in ("total_bytes", "quota_use", "session_quota_use")}
        output.json([msgspec.to_builtins(found) | shares])
    else:
        output.pairs(counted(found))
    if found.unreadable:
        raise typer.Exit(PROBLEMS)


def counted(found: StoreStats) -> list[tuple[str, str]]:
    jobs = ", ".join(f"{count:,} {status}" for status, count in sorted(found.jobs.items()))
    lines = [
        ("sessions", f"{found.sessions:,}"),
        ("images", f"{found.images:,}, {decimal(found.image_bytes)}"),
        ("recent images", decimal(found.recent_bytes)),
        ("thumbnails", decimal(found.thumbnail_bytes)),
        ("results", decimal(found.output_bytes)),
        ("all files", _share(found.total_bytes, found.max_total_bytes)),
        ("largest session", _share(found.largest_session_bytes, found.max_session_bytes)),
        ("state", decimal(found.state_bytes)),
        ("jobs", jobs or "-"),
        ("oldest session", at(found.oldest, found.now)),
        ("newest session", at(found.newest, found.now)),
        ("longest unused", at(found.longest_unused, found.now)),
    ]
    if found.unreadable:
        lines.append(("unreadable", f"{found.unreadable:,} sessions; `async-sessions verify` tells which"))
    return lines


def _share(size: int, limit: int | None) -> str:
    return decimal(size) if limit is None else f"{decimal(size)}, {size / limit:.0%} of {decimal(limit)}"
