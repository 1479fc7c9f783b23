"""The element by which a page hears that another tab has changed the session, and asks which of two images to keep.

It is not seen but for the question. The browser tells when the page is looked at again; nothing is polled.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import gradio as gr

from async_sessions.errors import RevisionConflictError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from async_sessions.records import ImageRecord

KEEP: Final = ("mine", "other")

# Going to another window and back are several events at once. A dialog that was rendered is not shown yet.
_SCRIPT: Final = """
const block = element.closest('.block') ?? element;  // takes no room
Object.assign(block.style, {position: 'absolute', minHeight: '0', height: '0', border: '0'});
let last = 0;
const look = () => {
  const now = Date.now();
  if (!element.isConnected || document.visibilityState !== 'visible' || now - last < 200) return;
  last = now;
  trigger('focus');
};
document.addEventListener('visibilitychange', look);
window.addEventListener('focus', look);
window.addEventListener('pageshow', event => { if (event.persisted) look(); });
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-keep]');
  if (button) trigger('select', {slot: button.dataset.slot, keep: button.dataset.keep});
});
element.addEventListener('cancel', event => event.preventDefault(), true);
watch('value', () => {
  const dialog = element.querySelector('dialog');
  if (dialog && !dialog.open) dialog.showModal();
});
"""
_DIALOG: Final = (
    "position:fixed;inset:0;margin:auto !important;width:fit-content;height:fit-content;"
    "max-width:min(640px,92vw);max-height:90vh;overflow:auto;padding:var(--spacing-xl);"
    "border:1px solid var(--border-color-primary);border-radius:var(--radius-lg);"
    "background:var(--block-background-fill);color:var(--body-text-color);font-size:var(--text-md)"
)
_SIDE: Final = "flex:1 1 200px;min-width:0;margin:0;display:flex;flex-direction:column;gap:var(--spacing-md)"
_FRAME: Final = (
    "height:180px;display:flex;align-items:center;justify-content:center;border-radius:var(--radius-md);"
    "background:var(--background-fill-secondary)"
)
_BUTTON: Final = (
    "margin-top:auto;padding:var(--button-medium-padding);border-radius:var(--button-medium-radius);cursor:pointer;"
    "border:1px solid var(--button-secondary-border-color);background:var(--button-secondary-background-fill);"
    "color:var(--button-secondary-text-color);font-weight:600"
)


class Conflict(NamedTuple):
    """An upload, as the browser names it, and what another tab has put where it is to go; `thumbnail` is a WebP."""

    slot: str
    mine: dict[str, Any]
    other: ImageRecord
    thumbnail: bytes | None


class UndecidedError(RevisionConflictError):
    """An upload would go over an image that its page has not shown; `question` asks which to keep, as HTML."""

    def __init__(self, question: str) -> None:
        super().__init__("Another tab has put another image there; its user is asked which to keep.")
        self.question = question


class UnseenError(RevisionConflictError):
    """What its page has not shown would be replaced; the page shows it from now on."""

    def __init__(self, slot: str) -> None:
        super().__init__(
            f"Another tab has put another image into {slot!r}, which is shown now. Try again if it may go."
        )


class GoneError(RevisionConflictError):
    """What the page shows is not kept and its file is gone; its slot holds something else."""

    def __init__(self, slot: str) -> None:
        super().__init__(f"Another image has been put into {slot!r} than is shown here. Reload the page to see it.")


def element() -> gr.HTML:
    """Its `focus` is that of the page, its `select` an answer: `{"slot": ..., "keep": one of KEEP}`."""
    return gr.HTML("", js_on_load=_SCRIPT, container=False, padding=False, elem_classes="async-sessions-question")


def question_html(conflicts: Iterable[Conflict], revision: str | None = None) -> str:
    """Nothing to be seen for no conflict; another `revision` of the session is another value, which is a `change`."""
    parts = "".join(map(_part, conflicts))
    news = f'<span hidden data-revision="{revision}"></span>' if revision is not None else ""
    if not parts:
        return news
    return news + (
        f'<dialog style="{_DIALOG}" aria-labelledby="async-sessions-question">'
        '<h2 id="async-sessions-question" style="margin:0 0 var(--spacing-md) 0;font-size:var(--text-lg);'
        'font-weight:600;color:var(--body-text-color)">Which image do you want to keep?</h2>'
        '<p style="margin:0 0 var(--spacing-lg) 0">Another tab or window of yours has changed what you are about to '
        f"replace. Your upload is not kept yet.</p>{parts}</dialog>"
    )


def _part(conflict: Conflict) -> str:
    slot, other = html.escape(conflict.slot), conflict.other
    shown = "" if conflict.thumbnail is None else f"data:image/webp;base64,{_text(conflict.thumbnail)}"
    mine_name, other_name = str(conflict.mine.get("orig_name") or "image"), other.source_name or "image"
    sides = _side(slot, "mine", "Your upload", str(conflict.mine.get("url") or ""), mine_name)
    sides += _side(slot, "other", "The other tab's", shown, other_name)
    return (
        f'<section aria-label="{slot}" style="margin-bottom:var(--spacing-lg)"><div style="display:flex;flex-wrap:wrap;'
        f'gap:var(--spacing-xl)">{sides}</div></section>'
    )


def _side(slot: str, keep: str, whose: str, source: str, name: str) -> str:
    name = html.escape(name)
    picture = f'<img src="{html.escape(source)}" alt="" style="max-width:100%;max-height:100%;object-fit:contain">'
    label = "Keep mine" if keep == "mine" else "Keep the other"
    return (
        f'<figure style="{_SIDE}"><div style="{_FRAME}">{picture if source else "no preview"}</div>'
        f'<figcaption style="overflow-wrap:anywhere">{whose} for <b>{slot}</b>: {name}</figcaption>'
        f'<button type="button" data-slot="{slot}" data-keep="{keep}" style="{_BUTTON}" '
        f'aria-label="{label}: {name} for {slot}">{label}</button></figure>'
    )


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
