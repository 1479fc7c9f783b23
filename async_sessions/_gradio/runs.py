"""The runs of a session as a list: those that are not over, then the history. HTML as in `html`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

import msgspec

from async_sessions._gradio.html import HEAD, ITEM, LIST, SPLIT, SUBDUED, bar_html, box_html
from async_sessions._gradio.status import fraction, in_words, status_text
from async_sessions.jobs import JobEvent, Progress, Queued, Started
from async_sessions.records import JobInfo

if TYPE_CHECKING:
    from async_sessions.records import JobStatus

WORDS: Final[dict[JobStatus, str]] = {
    "queued": "Waiting",
    "preparing": "Next",
    "running": "Running",
    "succeeded": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
MAX_PROMPT: Final = 160  # characters of a prompt that are shown


class Shown(msgspec.Struct, frozen=True):
    """A run, and the latest that was told of it."""

    entry: JobInfo
    event: JobEvent | None


def name_of(entry: JobInfo) -> str:
    """What tells a run from the others of its session; nothing can be done by it."""
    return entry.id.rpartition(".")[2][:6]


def choice_of(entry: JobInfo) -> tuple[str, str]:
    return f"{name_of(entry)} · {WORDS[entry.status]} · {entry.pipeline} · {_time(entry.submitted_at)}", entry.id


def ordered(runs: Iterable[Shown]) -> tuple[list[Shown], list[Shown]]:
    """Those that are not over, in the order in which they run; those that are, the newest first."""
    runs = list(runs)
    unfinished = sorted((run for run in runs if run.entry.unfinished), key=_turn)
    return unfinished, sorted((run for run in runs if not run.entry.unfinished), key=_ended, reverse=True)


def runs_html(runs: Iterable[Shown], now: datetime) -> str:
    """The whole list, for a session of few runs or none."""
    unfinished, over = ordered(runs)
    if not (unfinished or over):
        return box_html(f'<div style="{SUBDUED}">No runs yet. What you generate is listed here, and kept.</div>')
    return box_html(
        _part("Under way and waiting", unfinished, now, "Nothing waits.") + _part("History", over, now, "None is over.")
    )


def _part(title: str, runs: Sequence[Shown], now: datetime, none: str) -> str:
    items = "".join(f'<li style="{ITEM}">{_item(run, now)}</li>' for run in runs)
    inner = f'<ul style="{LIST}" aria-label="{title}">{items}</ul>' if runs else f'<div style="{SUBDUED}">{none}</div>'
    return f'<section style="margin-bottom:var(--spacing-lg)"><h3 style="{HEAD}">{title}</h3>{inner}</section>'


def _item(run: Shown, now: datetime) -> str:
    entry = run.entry
    begun = entry.under_way and isinstance(run.event, Started | Progress)  # which its entry tells a moment later
    word = WORDS["running" if begun else entry.status]
    if entry.unfinished and entry.cancel_requested:
        word = "Stopping"
    pipeline, at = html.escape(entry.pipeline), entry.submitted_at
    what = f"<b>{word}</b> · {pipeline} · <code>{name_of(entry)}</code>"
    when = f'<time datetime="{at.isoformat()}">{_time(at)}</time>{_took(entry)}'
    lines = [f'<div style="{SPLIT}"><span>{what}</span><span style="{SUBDUED}">{when}</span></div>']
    if prompt := _prompt(entry):
        lines.append(f'<div style="{SUBDUED}">{html.escape(prompt)}</div>')
    if entry.retry == "interrupted":
        lines.append("<div>The server stopped while it was at this; it is tried again, with nothing beside it.</div>")
    if entry.under_way and not isinstance(run.event, Queued):
        lines.append(bar_html(status_text(run.event, now), fraction(run.event)))
    elif entry.unfinished:
        lines.append(f"<div>{html.escape(status_text(run.event, now))}</div>")
    elif entry.error is not None:
        lines.append(f"<div>{html.escape(entry.error.message or entry.error.kind)}</div>")
    return "".join(lines)


def _prompt(entry: JobInfo) -> str:
    prompt = entry.params.get("prompt")
    if not isinstance(prompt, str):
        return ""
    return prompt if len(prompt) <= MAX_PROMPT else f"{prompt[:MAX_PROMPT]}…"


def _took(entry: JobInfo) -> str:
    if entry.status == "cancelled" or entry.started_at is None or entry.finished_at is None:
        return ""
    return f", took {in_words((entry.finished_at - entry.started_at).total_seconds())}"


def _time(at: datetime) -> str:
    return f"{at:%d %b, %H:%M} UTC"


def _turn(run: Shown) -> tuple[bool, int, datetime]:
    return not run.entry.under_way, -run.entry.priority, run.entry.submitted_at


def _ended(run: Shown) -> datetime:
    return run.entry.finished_at or run.entry.submitted_at
