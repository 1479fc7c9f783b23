"""What the page shows as HTML: whatever a user or a file named is escaped, colours are Gradio's theme variables."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from async_sessions.errors import (
    CorruptBlobError,
    LockTimeoutError,
    StorageError,
    StorageFullError,
    UnknownSchemaError,
)

if TYPE_CHECKING:
    from async_sessions.errors import AsyncSessionsError
    from async_sessions.records import ImageRecord, SessionInfo

_BOX = (
    "padding:var(--spacing-lg);border:1px solid var(--border-color-primary);border-radius:var(--radius-md);"
    "background:var(--block-background-fill);color:var(--body-text-color);font-size:var(--text-sm)"
)
SUBDUED = "opacity:0.7"  # the theme's own subdued colour is too pale for small text
_CELL = (
    "border:none;padding:var(--spacing-sm) var(--spacing-lg) var(--spacing-sm) 0;text-align:left;overflow-wrap:anywhere"
)
_TRACK = "height:8px;border-radius:var(--radius-full);background:var(--border-color-primary);overflow:hidden"
_BAR = "height:100%;width:{percent:.0f}%;background:var(--color-accent);transition:width 0.2s"


def sentence(error: AsyncSessionsError | TypeError | ValueError) -> str:
    """What `error` means for whoever looks at the page, as plain text. Where things are stored is not for them."""
    match error:
        case StorageFullError():
            return "The server has no room left for it."
        case LockTimeoutError():
            return "The server's storage is busy; try again in a moment."
        case CorruptBlobError():
            return "The stored file is damaged; upload it again."
        case UnknownSchemaError():
            return "It was stored by a newer version of this app."
        case StorageError():
            return "The server's storage does not answer."
        case _:
            return str(error)


def session_info_html(info: SessionInfo | None) -> str:
    """A panel that says what is kept, and until when. `None` for a session that has not begun."""
    if info is None or not (info.images or info.jobs or info.state):
        return box_html(
            _line("Nothing is kept yet.")
            + _line("Images and settings that you choose stay here through refresh and restart.", subdued=True)
        )
    head = f"<b>Your session</b> <code>{info.key[:8]}</code>"
    until = f'kept until <time datetime="{info.expires_at.isoformat()}">{info.expires_at:%d %b %Y, %H:%M} UTC</time>'
    lines = _line(f"{head} · {until}")
    lines += _images(info.images.items()) if info.images else _line("No images.", subdued=True)
    facts = [f"{_size(info.total_bytes)} in all"]
    if info.jobs:
        counts = Counter(job.status for job in info.jobs.values())
        facts.append("runs: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return box_html(lines + _line(" · ".join(facts), subdued=True))


def progress_html(text: str, fraction: float) -> str:
    """A line of plain text over a bar; `fraction` is from 0 to 1."""
    return box_html(bar_html(text, fraction))


def bar_html(text: str, fraction: float) -> str:
    """`progress_html` without a box."""
    percent = 100 * min(max(fraction, 0.0), 1.0)
    text = html.escape(text)
    bar = f'<div style="{_TRACK}"><div style="{_BAR.format(percent=percent)}"></div></div>'
    values = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}" aria-valuetext="{text}"'
    return f'<div role="progressbar" aria-label="Progress of the run" {values}>{_line(text)}{bar}</div>'


def message_html(text: str) -> str:
    """A line of plain text."""
    return box_html(_line(html.escape(text)))


def _images(images: Iterable[tuple[str, ImageRecord]]) -> str:
    rows = _row("th", ("Slot", "File", "Pixels", "Size", "Stored"), f"{SUBDUED};font-weight:normal")
    for slot, record in images:
        rows += _row(
            "td",
            (
                html.escape(slot),
                html.escape(record.source_name or "-"),
                f"{record.width} &times; {record.height}",
                _size(record.byte_size),
                f"{record.stored_at:%d %b, %H:%M} UTC",
            ),
        )
    return f'<table style="border:none;border-collapse:collapse;width:100%;margin:0">{rows}</table>'


def _row(tag: str, cells: Iterable[str], style: str = "") -> str:
    inner = "".join(f'<{tag} style="{_CELL};{style}">{cell}</{tag}>' for cell in cells)
    return f'<tr style="border:none">{inner}</tr>'


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{max(1, round(count / 2**10)) if count else 0} KB"


def _line(text: str, *, subdued: bool = False) -> str:
    return f'<div style="margin-bottom:var(--spacing-sm);{SUBDUED if subdued else ""}">{text}</div>'


def box_html(content: str) -> str:
    """What is HTML already."""
    return f'<div style="{_BOX}">{content}</div>'
