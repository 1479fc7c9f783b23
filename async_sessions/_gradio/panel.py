"""The panel: what a session keeps, and what its user can do with it: clear, put back, take along, bring back.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import gradio as gr
from gradio.utils import get_upload_folder

from async_sessions._gradio import cache
from async_sessions._gradio.html import message_html, sentence, size_of, warn
from async_sessions._gradio.kept import session_info_html
from async_sessions._gradio.listeners import QUIET, Payload, tab_in_progress
from async_sessions._gradio.values import is_settable
from async_sessions.bundle import MAX_BYTES, restore_bundle
from async_sessions.errors import (
    AsyncSessionsError,
    BundleError,
    InvalidRequestError,
    SessionNotFoundError,
    SlotEmptyError,
)

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency

    from async_sessions._gradio.visits import Visits
    from async_sessions.records import ImageRecord, SessionInfo
    from async_sessions.session import Session

Updates: TypeAlias = "dict[Component, Any]"

MAX_THUMBNAILS: Final = 24  # of a few KB each, sent with every look
_FAST: Final = 8  # thumbnails read at a time
_WHERE_IT_WAS: Final = ""
_SURE: Final = (
    '<div role="alert" style="color:var(--body-text-color)">This removes your images, settings and runs with their '
    "results, for good.</div>"
)


class Panel:
    """The session as it is, and buttons for it. Made inside a Blocks.

    `restored` tells what the page's own components shall show, after what changed the session here.
    """

    def __init__(
        self,
        visits: Visits,
        page: gr.Blocks,
        *,
        images: Mapping[str, Component],
        state: Mapping[str, Component],
        restored: Callable[[gr.Request], Awaitable[Updates]],
    ) -> None:
        self._visits = visits
        self._images = images
        self._state = state
        self._restored = restored
        self.info = gr.HTML(session_info_html(None))
        slots: list[Any] = [("where it was", _WHERE_IT_WAS), *((slot, slot) for slot in images)]
        with gr.Row():
            with gr.Column(scale=2, min_width=260):
                self._held = gr.Dropdown([], value=None, label="Image to clear", filterable=False)
                clear = gr.Button("Clear image", size="sm")
            with gr.Column(scale=3, min_width=260):
                with gr.Row():
                    self._recent = gr.Dropdown(
                        [], value=None, label="Replaced or cleared image", filterable=False, scale=3, min_width=220
                    )
                    self._into = gr.Dropdown(
                        slots, value=_WHERE_IT_WAS, label="Put it", filterable=False, scale=2, min_width=140
                    )
                put_back = gr.Button("Put back", size="sm")
        with gr.Row():
            refresh = gr.Button("Refresh", size="sm", min_width=120)
            download = gr.Button("Download my session (ZIP)", size="sm", min_width=180)
            self._upload = gr.UploadButton("Restore from ZIP", size="sm", file_types=[".zip"], min_width=140)
            ask = gr.Button("Clear all", size="sm", variant="stop", min_width=120)
        self._file = gr.DownloadButton("Save session.zip", size="sm", variant="primary", visible=False)
        with gr.Column(visible=False) as self._sure:
            gr.HTML(_SURE)
            with gr.Row():
                sure = gr.Button("Yes, clear all", size="sm", variant="stop", min_width=140)
                keep = gr.Button("No, keep it", size="sm", min_width=140)

        self._own = [self.info, self._held, self._recent]
        outputs = [*self._own, self._file, self._sure, *images.values(), *state.values()]
        choices = [self._held, self._recent]
        listen = {"preprocess": False, **QUIET}
        page.load(self.show, choices, self._own, **listen)
        if (tab := tab_in_progress()) is not None:
            tab.select(self.show, choices, self._own, trigger_mode="multiple", **listen)
        refresh.click(self._show_all, choices, outputs, **listen)
        clear.click(self._clear, choices, outputs, **listen)
        put_back.click(self._put_back, [*choices, self._into], outputs, **listen)
        download.click(self._download, None, self._file, **QUIET)
        self._upload.upload(self._restore, [*choices, self._upload], outputs, trigger_mode="once", **listen)
        ask.click(_asked, None, self._sure, **QUIET)
        keep.click(_kept, None, self._sure, **QUIET)
        self.cleared = sure.click(self._clear_all, None, outputs, **QUIET)

    def show_after(self, event: Dependency) -> None:
        listen = {"preprocess": False, "trigger_mode": "always_last", **QUIET}
        event.then(self.show, [self._held, self._recent], self._own, **listen)

    async def show(self, held: Any, recent: Any, request: gr.Request) -> Any:
        """`held` and `recent` are what is chosen in this page; it stays while there is such an image."""
        store = self._visits.store
        try:
            found = await self._visits.found(request)
            thumbnails = {} if found is None else await _thumbnails(*found)
        except AsyncSessionsError as error:
            return {self.info: message_html(f"What is kept for you can't be shown now. {sentence(error)}")}
        info, now = None if found is None else found[1], store.clock()
        most, grace = store.limits.max_session_bytes, store.grace
        shown = session_info_html(info, now=now, thumbnails=thumbnails, max_bytes=most, grace=grace)
        images = {} if info is None else {slot: f"{slot} · {_named(record)}" for slot, record in info.images.items()}
        removed = {
            each.record.digest: f"{each.slot} · {_named(each.record)} · until {each.removed_at + grace:%d %b %H:%M} UTC"
            for each in reversed(() if info is None else info.recent)
        }
        return {
            self.info: shown,
            self._held: _choices(images, held),
            self._recent: _choices(dict(reversed(removed.items())), recent),
        }

    async def _show_all(self, held: Any, recent: Any, request: gr.Request) -> Any:
        return {**await self.show(held, recent, request), **await self._restored(request), **self._rest()}

    async def _clear(self, held: Any, recent: Any, request: gr.Request) -> Any:
        try:
            if not isinstance(held, str) or not held:
                raise InvalidRequestError("Choose an image first.")
            self._visits.store.check_slot(held)
            await self._visits.tabs.remove(request, held)
        except SessionNotFoundError:
            pass
        except AsyncSessionsError as error:
            warn("The image is still kept", error)
        return await self._show_all(held, recent, request)

    async def _put_back(self, held: Any, recent: Any, into: Any, request: gr.Request) -> Any:
        try:
            if not isinstance(recent, str) or not recent:
                raise InvalidRequestError("Choose an image first.")
            if not isinstance(into, str) or (into != _WHERE_IT_WAS and into not in self._images):
                raise InvalidRequestError("Choose where to put the image.")
            if (found := await self._visits.found(request)) is None:
                raise SlotEmptyError("That image is not among the recent ones any more; upload it again.")
            session, info = found
            slots = [each.slot for each in info.recent if each.record.digest == recent]
            slot = into or next(iter(slots), next(iter(self._images), ""))
            await self._visits.tabs.put_back(request, session, recent, slot)
        except AsyncSessionsError as error:
            warn("The image is not put back", error)
        return await self._show_all(held, recent, request)

    async def _download(self, request: gr.Request) -> Any:
        try:
            if (found := await self._visits.found(request)) is None:
                raise InvalidRequestError("Nothing is kept yet.")
            path, size = await cache.bundle_of(found[0], folder=get_upload_folder(), key=await self._visits.signer())
        except AsyncSessionsError as error:
            warn("There is no ZIP", error)
            return _hidden()
        return gr.update(value=path, label=f"Save session.zip ({size_of(size)})", visible=True)

    async def _restore(self, held: Any, recent: Any, payload: Payload | None, request: gr.Request) -> Any:
        path = (payload or {}).get("path")
        try:
            if not isinstance(path, str):
                raise BundleError("That is no file; choose a ZIP that was downloaded here.")
            if (session := await self._visits.session(request)) is None:
                gr.Warning("The ZIP is not restored: your browser sends no cookie. Allow cookies for this site.")
                return gr.skip()
            most = self._visits.store.limits.max_session_bytes or 0
            await restore_bundle(
                session,
                Path(path),
                takes_slot=self._images.__contains__,
                takes_value=lambda name, value: is_settable(self._state.get(name), value),
                replaces=self._visits.tabs.seen(request, session, self._images),
                max_bytes=max(MAX_BYTES, most + MAX_BYTES // 8),  # with all that a session may keep, and the rest
            )
            gr.Info("The ZIP is restored.")
        except AsyncSessionsError as error:
            warn("The ZIP is not restored", error)
        finally:
            if isinstance(path, str):
                await self._visits.remove_uploads([path])
        return await self._show_all(held, recent, request)

    async def _clear_all(self, request: gr.Request) -> Any:
        try:
            if (session := await self._visits.session(request)) is not None:
                await self._visits.clear(request)
                await cache.forget_bundle(session, folder=get_upload_folder(), key=await self._visits.signer())
        except AsyncSessionsError as error:
            raise gr.Error(
                html.escape(f"Your session is not cleared. {sentence(error)}"), print_exception=False
            ) from error
        return {**await self.show(None, None, request), **dict.fromkeys(self._images.values()), **self._rest()}

    def _rest(self) -> Updates:
        """Without the ZIP of how it was, and the question."""
        return {self._file: _hidden(), self._sure: gr.update(visible=False)}


def _asked() -> Any:
    return gr.update(visible=True)


def _kept() -> Any:
    return gr.update(visible=False)


def _hidden() -> Any:
    return gr.update(value=None, visible=False)


def _choices(labels: Mapping[str, str], chosen: Any) -> Any:
    """Only a choice that is gone is taken away: where there was none, the user may have made one by now."""
    choices = [(label, value) for value, label in labels.items()]
    gone = bool(chosen) and not (isinstance(chosen, str) and chosen in labels)
    return gr.update(choices=choices, value=None) if gone else gr.update(choices=choices)


def _named(record: ImageRecord) -> str:
    return f"{record.source_name or 'without a name'} · {record.width} × {record.height}"  # noqa: RUF001 - for people


async def _thumbnails(session: Session, info: SessionInfo) -> dict[str, bytes]:
    """By blob; without those that are damaged or can't be read."""
    records = [*info.images.values(), *(each.record for each in info.recent)]
    for job in info.jobs.values():
        records += job.inputs.values() if job.unfinished else ()
    found: dict[str, bytes] = {}
    at_a_time = anyio.CapacityLimiter(_FAST)

    async def read(record: ImageRecord) -> None:
        async with at_a_time:
            try:
                found[record.blob] = await (await session.read_record(record)).thumbnail()
            except AsyncSessionsError:
                return

    async with anyio.create_task_group() as group:
        for record in list({record.blob: record for record in records}.values())[:MAX_THUMBNAILS]:
            group.start_soon(read, record)
    return found
