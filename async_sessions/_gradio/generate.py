"""The Generate button: submits a job for the session, follows it on the page, and picks it up again after a reload.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import gradio as gr
from cachetools import LRUCache

from async_sessions._gradio.html import message_html, progress_html
from async_sessions._gradio.listeners import QUIET
from async_sessions._gradio.visits import Payload, Visits, warn
from async_sessions.errors import (
    AsyncSessionsError,
    CorruptBlobError,
    JobNotFoundError,
    SessionNotFoundError,
    StorageError,
)
from async_sessions.jobs import Cancelled, Failed, JobEvent, Progress, Queued, Started, Succeeded

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency

    from async_sessions.dispatch.base import Dispatcher, Job
    from async_sessions.records import OutputRecord
    from async_sessions.session import Session

Updates: TypeAlias = "dict[Component, Any]"

_logger = logging.getLogger("async_sessions")

UPDATE_INTERVAL: Final = 0.1  # seconds between two progress messages to a page
MAX_PAGES: Final = 4096


class Generate:
    """One Generate button and what belongs to it. `slots` are the images that a pipeline takes, where not all."""

    def __init__(
        self,
        visits: Visits,
        dispatcher: Dispatcher,
        *,
        images: Mapping[str, Component],
        slots: Mapping[str, Collection[str]],
        button: gr.Button,
        cancel: gr.Button | None,
        video: gr.Video,
        bar: gr.HTML,
    ) -> None:
        self._visits = visits
        self._dispatcher = dispatcher
        self._images = images
        self._slots = slots
        self._button = button
        self._cancel = cancel
        self._video = video
        self._bar = bar
        # by page: the run that it asked for last is the one that it shows; the session of one that sends no cookie
        self._followers: LRUCache[str, object] = LRUCache(MAX_PAGES)
        self._guests: LRUCache[str, Session] = LRUCache(MAX_PAGES)

    def bind(self, page: gr.Blocks, pipeline: Component | str, params: Mapping[str, Component]) -> list[Dependency]:
        """Register the listeners. Returns the events after which the session may hold another result."""
        chooser = [] if isinstance(pipeline, str) else [pipeline]

        async def generate(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            name = pipeline if isinstance(pipeline, str) else str(values[0])
            given, shown = values[len(chooser) :][: len(params)], values[len(chooser) + len(params) :]
            updates = self._generated(
                request,
                name,
                {key: value for key, value in zip(params, given, strict=True) if value is not None},
                {slot: value for slot, value in zip(self._images, shown, strict=True) if value is not None},
            )
            async with aclosing(updates):
                async for update in updates:
                    yield update

        buttons = [self._button] if self._cancel is None else [self._button, self._cancel]
        outputs = [self._bar, self._video, *buttons]
        page.load(self._show_last, None, self._video, **QUIET)
        picked_up = page.load(self._pick_up, None, outputs, **QUIET)
        inputs = [*chooser, *params.values(), *self._images.values()]
        clicked = self._button.click(generate, inputs, outputs, preprocess=False, **QUIET)
        for event in (picked_up, clicked):
            event.then(self._rest, None, buttons, **QUIET)
        if self._cancel is not None:
            self._cancel.click(self._cancel_all, None, None, trigger_mode="multiple", **QUIET)
        return [clicked, picked_up]

    async def _generated(
        self, request: gr.Request, pipeline: str, params: Mapping[str, Any], shown: Mapping[str, Payload]
    ) -> AsyncGenerator[Any, None]:
        wanted = self._slots.get(pipeline, self._images)
        shown = {slot: payload for slot, payload in shown.items() if slot in wanted}
        busy = {self._button: gr.update(interactive=False), **self._cancellable()}
        yield {**busy, self._bar: message_html("Storing the images")}
        guest: Session | None = None
        try:
            if (session := await self._visits.session(request)) is None:
                # without a cookie the run has a session of its own, which ends when it is not followed any more
                session = guest = await self._visits.store.create_session()
                self._guests[str(request.session_hash)] = guest
            await self._visits.keep_shown(session, shown)
            request_ = await session.generation_request(pipeline, slots=shown, params=params)
            job = await self._dispatcher.submit(request_)
        except AsyncSessionsError as error:
            warn("The run was not started", error)
            yield {self._bar: message_html("Not started")}
            return
        updates = self._followed(request, session, job, busy)
        try:
            async with aclosing(updates):
                async for update in updates:
                    yield update
        finally:
            if guest is not None:
                self._guests.pop(str(request.session_hash), None)
                await guest.delete()

    async def _show_last(self, request: gr.Request) -> Any:
        """The last video that the session made."""
        try:
            if (found := await self._visits.found(request)) is None:
                return gr.skip()
            session, _ = found
            for job in reversed(await self._dispatcher.jobs(session)):
                try:
                    if path := await self._video_copy(session, job.outputs):
                        return path
                except StorageError as error:
                    warn("A video can't be shown", error)
        except AsyncSessionsError as error:
            _logger.warning("a session's last video can't be shown: %s", error)  # the page says so already
        return gr.skip()

    async def _pick_up(self, request: gr.Request) -> AsyncGenerator[Any, None]:
        """The run that goes on."""
        yield gr.skip()  # a generator that yields nothing empties its outputs, the buttons' labels too
        try:
            if (found := await self._visits.found(request)) is None:
                return
            session, _ = found
            jobs = await self._dispatcher.jobs(session)
            if not jobs or not jobs[-1].unfinished:
                return
            job = await self._dispatcher.job(session, jobs[-1].id)
        except AsyncSessionsError as error:
            _logger.warning("a session's run can't be followed: %s", error)  # the page says so already
            return
        updates = self._followed(request, session, job, self._cancellable())
        async with aclosing(updates):
            async for update in updates:
                yield update

    async def _followed(
        self, request: gr.Request, session: Session, job: Job, meanwhile: Updates
    ) -> AsyncGenerator[Any, None]:
        """Progress, then the result. The browser may skip an update for the next: each says all, `meanwhile` too."""
        page, me, shown_at = str(request.session_hash), object(), 0.0
        self._followers[page] = me
        events = job.events()
        try:
            async for event in events:
                if self._followers.get(page) is not me:
                    yield gr.skip()  # Gradio repeats the last update at the end
                    return
                if isinstance(event, Progress) and event.step < event.total:
                    if anyio.current_time() - shown_at < UPDATE_INTERVAL:
                        continue
                    shown_at = anyio.current_time()
                if isinstance(event, Succeeded) and (path := await self._result(session, job, event.outputs)):
                    meanwhile = {**meanwhile, self._video: path}
                yield {**meanwhile, self._bar: _told(event)}
        except (SessionNotFoundError, JobNotFoundError):
            yield {**meanwhile, self._bar: message_html("Cleared")}
        except AsyncSessionsError as error:
            warn("The run can't be followed any more", error)
            yield {**meanwhile, self._bar: message_html("Lost sight of the run. Reload the page to look for it.")}
        finally:
            if self._followers.get(page) is me:
                del self._followers[page]
            await _close(events)

    async def _result(self, session: Session, job: Job, outputs: Mapping[str, OutputRecord]) -> str | None:
        try:
            return await self._video_copy(session, outputs)
        except CorruptBlobError:
            await job.info()  # `JobNotFoundError`: it was cleared meanwhile
            raise

    async def _video_copy(self, session: Session, outputs: Mapping[str, OutputRecord]) -> str | None:
        for record in outputs.values():
            if record.media_type.startswith("video/"):
                return await self._visits.copy(session, record, re.sub(r"\.\w+$", "", record.name))
        return None

    async def _cancel_all(self, request: gr.Request) -> None:
        try:
            session = self._guests.get(str(request.session_hash))
            if session is None:
                if (found := await self._visits.found(request)) is None:
                    return
                session, _ = found
            for entry in await self._dispatcher.jobs(session):
                if entry.unfinished:
                    await (await self._dispatcher.job(session, entry.id)).cancel()
        except AsyncSessionsError as error:
            warn("The run was not cancelled", error)

    def _cancellable(self) -> Updates:
        return {} if self._cancel is None else {self._cancel: gr.update(interactive=True)}

    def _rest(self, request: gr.Request) -> Any:
        if str(request.session_hash) in self._followers:
            return gr.skip()
        rested: Any = gr.update(interactive=True)
        return rested if self._cancel is None else (rested, gr.update(interactive=False))


def _told(event: JobEvent) -> str:
    match event:
        case Queued(position=position):
            return progress_html("Waiting: the next to run" if position == 1 else f"Waiting: number {position}", 0.0)
        case Started():
            return progress_html("Started", 0.0)
        case Progress(step=step, total=total, note=note):
            return progress_html(f"{note or 'Running'}: {step} of {total}", step / max(total, 1))
        case Succeeded():
            return progress_html("Done", 1.0)
        case Failed(error=error):
            return message_html(f"Failed: {error.message or error.kind}")
        case Cancelled():
            return message_html("Cancelled")


async def _close(events: AsyncIterator[JobEvent]) -> None:
    if isinstance(events, AsyncGenerator):
        await events.aclose()
