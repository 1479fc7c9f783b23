"""`cleanup` and `verify`."""

from __future__ import annotations

from functools import partial
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
    MaxAge,
    Root,
    Ttl,
    lifetime,
    on_store,
)
from async_sessions._cli.terminal import PROBLEMS, Output, plain, progress
from async_sessions.store import SessionStore

if TYPE_CHECKING:
    from async_sessions.janitor import CleanupReport
    from async_sessions.verify import VerifyReport


def cleanup(
    root: Root = DEFAULT_ROOT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    ttl: Ttl = DEFAULT_TTL,
    max_age: MaxAge = None,
    grace: Grace = DEFAULT_GRACE,
    as_json: AsJson = False,
) -> None:
    """Remove what expired and what crashes left, now.

    --ttl, --max-age and --grace must be what your app opens the store with: with shorter ones this deletes what it
    still needs.
    """
    periods = lifetime(ttl=ttl, max_age=max_age, grace=grace)
    with progress("sweeping"):
        report, _ = on_store(root, partial(SessionStore.cleanup, dry_run=dry_run), **periods)
    output = Output()
    if as_json:
        output.json([{**msgspec.to_builtins(report), "freed_bytes": report.freed_bytes}])
    else:
        output.pairs(swept(report))
    if report.problems:
        raise typer.Exit(PROBLEMS)


def swept(report: CleanupReport) -> list[tuple[str, str]]:
    done = "would go" if report.dry_run else "removed"
    total = f"{len(report.removed):,} {done}, {decimal(report.freed_bytes)}, of {report.sessions:,} sessions looked at"
    return [
        *((removal.kind, f"{removal.key}: {removal.reason}, {decimal(removal.size)}") for removal in report.removed),
        *(("problem", plain(problem)) for problem in report.problems),
        ("total", total),
    ]


def verify(
    root: Root = DEFAULT_ROOT,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is damaged, and what no session names, to quarantine/.")
    ] = False,
    grace: Grace = DEFAULT_GRACE,
    as_json: AsJson = False,
) -> None:
    """Read the whole store and tell what is damaged, missing or left over: exit code 1, repaired or not.

    --grace must be what your app opens the store with: what is younger may be part of a write under way.
    """
    periods = lifetime(grace=grace)
    with progress("verifying") as tell:
        report, _ = on_store(root, partial(SessionStore.verify, repair=repair, progress=tell), **periods)
    output = Output()
    if as_json:
        output.json([report])
    else:
        output.pairs(verified(report))
    if report.findings:
        raise typer.Exit(PROBLEMS)


def verified(report: VerifyReport) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for finding in report.findings:
        session = f"\nsession {finding.session}" if finding.session else ""
        repair = f"\n{finding.repair}" if finding.repair else ""
        lines.append((finding.kind, f"{plain(finding.reason)}\n{finding.key}{session}{repair}"))
    read = f"{report.blobs:,} files of {report.sessions:,} sessions, {decimal(report.bytes)}"
    lines.append(("read", read))
    if report.quarantined:
        held = f"{report.quarantined:,} files, {decimal(report.quarantined_bytes)}; delete them when you have looked"
        lines.append(("quarantine", held))
    repaired = len(report.findings) - len(report.unrepaired)
    lines.append(("findings", f"{len(report.findings):,}" + (f", {repaired:,} of them repaired" if repaired else "")))
    return lines
