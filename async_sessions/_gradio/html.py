"""What the page shows as HTML: whatever a user or a file named is escaped, colours are Gradio's theme variables."""

from __future__ import annotations

import html
import logging
from typing import TYPE_CHECKING

import gradio as gr

from async_sessions.errors import (
    CorruptBlobError,
    LockTimeoutError,
    StorageError,
    StorageFullError,
    UnknownSchemaError,
)

if TYPE_CHECKING:
    from async_sessions.errors import AsyncSessionsError

_BOX = (
    "padding:var(--spacing-lg);border:1px solid var(--border-color-primary);border-radius:var(--radius-md);"
    "background:var(--block-background-fill);color:var(--body-text-color);font-size:var(--text-sm)"
)
SUBDUED = "opacity:0.7"  # the theme's own subdued colour is too pale for small text
HEAD = "margin:0 0 var(--spacing-sm) 0;font-size:var(--text-md);font-weight:600;color:var(--body-text-color)"
LIST = "list-style:none;margin:0;padding:0"
ITEM = "margin:0;padding:var(--spacing-md) 0;border-top:1px solid var(--border-color-primary);overflow-wrap:anywhere"
SPLIT = "display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 var(--spacing-lg)"
TRACK = "height:8px;border-radius:var(--radius-full);background:var(--border-color-primary);overflow:hidden"
BAR = "height:100%;width:{percent:.0f}%;background:var(--color-accent);transition:width 0.2s"


_logger = logging.getLogger("async_sessions")


def warn(what: str, error: AsyncSessionsError | TypeError | ValueError) -> None:
    """Tell whoever looks at the page what does not work and why, and the log where it is the server's fault."""
    if isinstance(error, StorageError):
        _logger.warning("%s: %s", what, error)
    gr.Warning(html.escape(f"{what}. {sentence(error)}"))


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


def bar_html(text: str, fraction: float) -> str:
    """A line of plain text over a bar; `fraction` is from 0 to 1."""
    percent = 100 * min(max(fraction, 0.0), 1.0)
    text = html.escape(text)
    bar = f'<div style="{TRACK}"><div style="{BAR.format(percent=percent)}"></div></div>'
    values = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}" aria-valuetext="{text}"'
    return f'<div role="progressbar" aria-label="Progress of the run" {values}>{line_html(text)}{bar}</div>'


def message_html(text: str) -> str:
    """A line of plain text."""
    return box_html(line_html(html.escape(text)))


def size_of(count: int) -> str:
    """Bytes, in the unit that people would say it in."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GB"
    return f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{max(1, round(count / 2**10)) if count else 0} KB"


def line_html(text: str, *, subdued: bool = False) -> str:
    """What is HTML already."""
    return f'<div style="margin-bottom:var(--spacing-sm);{SUBDUED if subdued else ""}">{text}</div>'


def box_html(content: str) -> str:
    """What is HTML already."""
    return f'<div style="{_BOX}">{content}</div>'
