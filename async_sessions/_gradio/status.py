"""What an event of a job means for whoever looks at the page, in a line of text over a bar."""

from __future__ import annotations

import base64
import math
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import TYPE_CHECKING, Final

from async_sessions._gradio.html import bar_html, box_html, message_html
from async_sessions.jobs import Cancelled, Failed, Progress, Queued, Started, Succeeded

if TYPE_CHECKING:
    from async_sessions.dispatch.base import Job
    from async_sessions.jobs import JobEvent

ELSEWHERE: Final = "Another server has this run; if it has stopped, the run goes on here within half a minute"
UNPLACED: Final = "Waiting for its place in the queue"
UNDECIDED: Final = message_html("Not started: say which image you want to keep, then try again")
_PREVIEW: Final = (  # of few pixels, shown larger
    "display:block;height:180px;max-width:100%;object-fit:contain;margin:var(--spacing-lg) auto 0 auto;"
    "border-radius:var(--radius-sm)"
)
_ANNOUNCED: Final = ("", "step")  # notes that say no more than the line does


def status_html(event: JobEvent | None, now: datetime, *, more: int = 0, preview: bytes | None = None) -> str:
    """`event` is the latest of a job, `None` where only its entry is known, which waits; `more` jobs wait behind it.

    `preview` is an image file that shows what is coming.
    """
    text = status_text(event, now)
    if isinstance(event, Failed | Cancelled):
        return message_html(text)
    behind = f" ({more} more waiting)" if more else ""
    return box_html(bar_html(text + behind, fraction(event)) + ("" if preview is None else _picture(preview)))


def _picture(preview: bytes) -> str:
    source = f"data:image/webp;base64,{base64.b64encode(preview).decode()}"  # or PNG or JPEG: browsers look inside
    return f'<img src="{source}" alt="What the run has so far" style="{_PREVIEW}"/>'


def status_text(event: JobEvent | None, now: datetime) -> str:
    """Plain text, to be escaped."""
    match event:
        case None:
            return UNPLACED
        case Queued(position=position):
            place = "the next to run" if position == 1 else f"number {position}"
            return f"Waiting: {place}{_left(event, now)}"
        case Started(elsewhere=elsewhere):
            return ELSEWHERE if elsewhere else "Started"
        case Progress(step=step, total=total, note=note):
            text = f"step {step} of {total}{_left(event, now, ' left')}"
            return text.capitalize() if note.lower() in _ANNOUNCED else f"{note}: {text}"
        case Succeeded():
            return "Done"
        case Failed(error=error):
            return f"Failed: {error.message or error.kind}"
        case Cancelled():
            return "Cancelled"


def fraction(event: JobEvent | None) -> float:
    match event:
        case Progress(step=step, total=total):
            return step / max(total, 1)
        case Succeeded():
            return 1.0
        case _:
            return 0.0


def in_words(seconds: float) -> str:
    """How long that is, in the unit that people would say it in."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{round(seconds / 3600)} h"


def _left(event: Queued | Progress, now: datetime, suffix: str = "") -> str:
    """What is left by now of the time that the event tells; nothing where it tells none, or was wrong."""
    if event.eta is None:
        return ""
    seconds = event.eta - max(0.0, (now - event.at).total_seconds())
    if seconds < 1:
        return ""
    rounded = seconds if seconds < 10 else 5 * math.ceil(seconds / 5)
    return f", about {in_words(math.ceil(rounded))}{suffix}"


async def event_after(job: Job, last: str | None) -> JobEvent | None:
    """The first event after that of the id `last`, of all where that is `None`; `None` where no more will come."""
    events = job.events(last)
    try:
        return await anext(events, None)
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
