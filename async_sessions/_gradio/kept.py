"""What a session keeps: images with thumbnails, until when, how much of what it may. HTML as in `html`."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from async_sessions._gradio.html import BAR, HEAD, ITEM, LIST, SUBDUED, TRACK, box_html, line_html, size_of
from async_sessions._gradio.runs import WORDS, name_of

if TYPE_CHECKING:
    from async_sessions.records import ImageRecord, JobInfo, SessionInfo

_ROW: Final = "display:flex;gap:var(--spacing-lg);align-items:center"
_FRAME: Final = (
    "flex:none;width:72px;height:72px;display:flex;align-items:center;justify-content:center;overflow:hidden;"
    "border-radius:var(--radius-md);background:var(--background-fill-secondary)"
)
_THUMBNAIL: Final = "max-width:100%;max-height:100%;object-fit:contain;margin:0"
_UNITS: Final = ((86_400, "day"), (3600, "hour"), (60, "minute"))  # seconds


def session_info_html(
    info: SessionInfo | None,
    *,
    now: datetime | None = None,
    thumbnails: Mapping[str, bytes] | None = None,
    max_bytes: int | None = None,
    grace: timedelta | None = None,
) -> str:
    """A panel that says what is kept, and until when. `None` for a session that has not begun.

    `now` is the time to tell ages by, the system's by default; `thumbnails` are WebP files by blob; `max_bytes` is what
    the session may keep; `grace` is the store's, in which what was removed can be put back.
    """
    if info is None or not (info.images or info.recent or info.jobs or info.state):
        return box_html(
            line_html("Nothing is kept yet.")
            + line_html("Images and settings that you choose stay here through refresh and restart.", subdued=True)
        )
    now, shown = now or datetime.now(UTC), thumbnails or {}
    needed = _needed(info.jobs.values())
    lines = line_html(f"<b>Your session</b> <code>{info.key[:8]}</code> · {_until(info, now)}")
    lines += _total(info.total_bytes, max_bytes)
    images = [
        _item(record, f"<b>{html.escape(slot)}</b>", f"stored {_ago(record.stored_at, now)}", shown, needed)
        for slot, record in info.images.items()
    ]
    lines += _part("Images", images) if images else line_html("No images.", subdued=True)
    recent = [
        _item(
            each.record,
            f"was in <b>{html.escape(each.slot)}</b>",
            f"removed {_ago(each.removed_at, now)}"
            + ("" if grace is None else f", until {_time(each.removed_at + grace)}"),
            shown,
            needed,
        )
        for each in info.recent
    ]
    lines += _part("Can be put back", recent) if recent else ""
    lines += _part("Kept for runs alone", list(_for_runs_alone(info, now, shown, needed)))
    if info.jobs:
        counts = Counter(WORDS[job.status].lower() for job in info.jobs.values())
        lines += line_html("Runs: " + ", ".join(f"{count} {word}" for word, count in counts.items()), subdued=True)
    return box_html(lines)


def age(seconds: float) -> str:
    """How long ago that is, in the unit that people would say it in."""
    for unit, name in _UNITS:
        if (count := int(seconds // unit)) > 0:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def _until(info: SessionInfo, now: datetime) -> str:
    """A session that something needs is kept whatever its age."""
    why = []
    if any(job.unfinished for job in info.jobs.values()):
        why.append("while a run needs it")
    for owner, until in info.pins.items():
        if until > now:
            why.append(f"for {html.escape(owner)} until {_time(until)}")
    if info.expires_at > now or not why:
        why.insert(0, f"until {_time(info.expires_at)}")
    return f"kept {', and '.join(why)}"


def _total(count: int, most: int | None) -> str:
    if most is None:
        return line_html(f"{size_of(count)} in all", subdued=True)
    percent = min(100 * count / max(most, 1), 100)
    text = f"{size_of(count)} of {size_of(most)}"
    values = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent:.0f}" aria-valuetext="{text}"'
    bar = f'<div style="{TRACK}"><div style="{BAR.format(percent=percent)}"></div></div>'
    meter = f'<div role="meter" aria-label="Room in use" {values}>{line_html(text, subdued=True)}{bar}</div>'
    return f'<div style="margin-bottom:var(--spacing-lg)">{meter}</div>'


def _part(title: str, items: Iterable[str]) -> str:
    inner = "".join(f'<li style="{ITEM};{_ROW}">{item}</li>' for item in items)
    if not inner:
        return ""
    return (
        f'<section style="margin-bottom:var(--spacing-lg)"><h3 style="{HEAD}">{title}</h3>'
        f'<ul style="{LIST}" aria-label="{title}">{inner}</ul></section>'
    )


def _item(
    record: ImageRecord, what: str, when: str, thumbnails: Mapping[str, bytes], needed: Mapping[str, list[JobInfo]]
) -> str:
    data = thumbnails.get(record.blob)
    name = html.escape(record.source_name or "without a name")
    picture = f'<span style="{SUBDUED}" aria-hidden="true">no preview</span>'
    if data:
        source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
        picture = f'<img src="{source}" alt="" style="{_THUMBNAIL}">'  # what it shows is said beside it
    facts = f"{record.width} &times; {record.height} · {size_of(record.byte_size)} · {when}"
    lines = [f"<div>{what} · {name}</div>", f'<div style="{SUBDUED}">{facts}</div>']
    if runs := needed.get(record.blob):
        lines.append(f"<div>needed by {_runs(runs)}</div>")
    return f'<div style="{_FRAME}">{picture}</div><div style="min-width:0">{"".join(lines)}</div>'


def _for_runs_alone(
    info: SessionInfo, now: datetime, thumbnails: Mapping[str, bytes], needed: Mapping[str, list[JobInfo]]
) -> Iterator[str]:
    """Images that were removed for good, but not yet for the runs that were given them."""
    listed = {record.blob for record in info.images.values()} | {recent.record.blob for recent in info.recent}
    for job in info.jobs.values():
        for role, record in job.inputs.items() if job.unfinished else ():
            if record.blob not in listed:
                listed.add(record.blob)
                stored = f"stored {_ago(record.stored_at, now)}"
                yield _item(record, f"<b>{html.escape(role)}</b>", stored, thumbnails, needed)


def _needed(jobs: Iterable[JobInfo]) -> dict[str, list[JobInfo]]:
    """The runs that are not over, by the blobs that they were given."""
    needed: dict[str, list[JobInfo]] = {}
    for job in jobs:
        for record in job.inputs.values() if job.unfinished else ():
            needed.setdefault(record.blob, []).append(job)
    return needed


def _runs(jobs: Iterable[JobInfo]) -> str:
    return ", ".join(f"run <code>{name_of(job)}</code> ({WORDS[job.status].lower()})" for job in jobs)


def _ago(at: datetime, now: datetime) -> str:
    title = f"{at:%d %b %Y, %H:%M} UTC"
    return f'<time datetime="{at.isoformat()}" title="{title}">{age((now - at).total_seconds())}</time>'


def _time(at: datetime) -> str:
    return f'<time datetime="{at.isoformat()}">{at:%d %b %Y, %H:%M} UTC</time>'
