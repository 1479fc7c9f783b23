"""The Generate button: submits a job for the session, follows it on the page, and picks it up again after a reload.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio
import gradio as gr
from cachetools import LRUCache
from msgspec.structs import replace

from async_sessions._gradio.buttons import Buttons
from async_sessions._gradio.html import message_html, warn
from async_sessions._gradio.listeners import QUIET, Payload
from async_sessions._gradio.payloads import file_of
from async_sessions._gradio.question import UndecidedError
from async_sessions._gradio.status import UNDECIDED, event_after, status_html
from async_sessions.errors import (
    AsyncSessionsError,
    CorruptBlobError,
    JobNotFoundError,
    SessionNotFoundError,
    StoreClosedError,
)
from async_sessions.jobs import Progress, Succeeded

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency

    from async_sessions._gradio.results import Result
    from async_sessions._gradio.visits import PageKey, Visits
    from async_sessions.dispatch.base import Dispatcher, Job
    from async_sessions.records import JobInfo, OutputRecord
    from async_sessions.session import Session

Updates: TypeAlias = "dict[Component, Any]"

_logger = logging.getLogger("async_sessions")

UPDATE_INTERVAL: Final = 0.1  # seconds between two progress messages to a page
ALIVE_EVERY: Final = 5.0  # seconds; Gradio finds out that a page is gone when it is told something
MAX_PAGES: Final = 4096
_UNSEEN: Final = 64  # runs that a page has asked for and not seen


class Generate:
    """One Generate button and what belongs to it. `slots` are the images that a pipeline takes, where not all.

    `question` is where the page is asked which of two images to keep.
    """

    def __init__(
        self,
        visits: Visits,
        dispatcher: Dispatcher,
        *,
        images: Mapping[str, Component],
        state: Mapping[str, Component],
        slots: Mapping[str, Collection[str]],
        pipeline: Component | str,
        button: gr.Button,
        cancel: gr.Button | None,
        result: Result,
        bar: gr.HTML,
        question: gr.HTML,
    ) -> None:
        self._visits = visits
        self._dispatcher = dispatcher
        self._images = images
        self._state = state
        self._slots = slots
        self._pipeline = pipeline
        self._button = button
        self._cancel = cancel
        self._result = result
        self._bar = bar
        self._question = question
        self._buttons = Buttons(button, cancel)
        self._outputs = [bar, result.component, *self._buttons.all]
        # by page: the answer that follows runs; those it asked for and has not seen; its session, if it sends no cookie
        self._followers: LRUCache[PageKey, object] = LRUCache(MAX_PAGES)
        self._asked: LRUCache[PageKey, list[str]] = LRUCache(MAX_PAGES)
        self._guests: LRUCache[PageKey, Session] = LRUCache(MAX_PAGES)

    def bind(self, page: gr.Blocks, params: Mapping[str, Component]) -> Dependency:
        """Let the button submit a run, and return the event of that."""
        pipeline = self._pipeline
        chooser = [] if isinstance(pipeline, str) else [pipeline]

        async def generate(request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
            name = pipeline if isinstance(pipeline, str) else str(values[0])
            rest = iter(values[len(chooser) :])
            given, kept, shown = (dict(zip(names, rest, strict=False)) for names in (params, self._state, self._images))
            wanted = {key: value for key, value in given.items() if value is not None}
            updates = self._generated(request, name, wanted, kept, shown)
            async with aclosing(updates):
                async for update in updates:
                    yield update

        page.load(self._show_last, None, [self._result.component, self._bar], **QUIET)
        inputs = [*chooser, *params.values(), *self._state.values(), *self._images.values()]
        clicked: Dependency = self._button.click(
            generate, inputs, [*self._outputs, self._question], preprocess=False, **QUIET
        )
        return clicked

    def listen(self, page: gr.Blocks) -> Dependency:
        """Pick up what goes on when the page is loaded, and let Cancel cancel."""
        if self._cancel is not None:
            self._cancel.click(self._cancel_all, None, None, trigger_mode="multiple", **QUIET)
        picked_up = page.load(self._follow, None, self._outputs, **QUIET)
        picked_up.then(self._rest, None, self._buttons.all, trigger_mode="multiple", **QUIET)
        return picked_up

    def look_after(self, event: Dependency) -> None:
        """Show what another tab may have made or begun, after an event by which the page hears of it."""
        event.then(self._show_last, None, [self._result.component, self._bar], trigger_mode="multiple", **QUIET)
        self.follow_after(event)

    def follow_after(self, event: Dependency) -> Dependency:
        """Follow what `event` may have begun."""
        followed: Dependency = event.then(self._follow, None, self._outputs, trigger_mode="multiple", **QUIET)
        followed.then(self._rest, None, self._buttons.all, trigger_mode="multiple", **QUIET)
        return followed

    async def _generated(
        self,
        request: gr.Request,
        pipeline: str,
        params: Mapping[str, Any],
        values: Mapping[str, Any],
        shown: Mapping[str, Payload | None],
    ) -> AsyncGenerator[Any, None]:
        page: PageKey | None = None
        takes = self._slots.get(pipeline, self._images)
        submitted = False
        try:
            page = await self._visits.page(request)
            yield {**self._buttons.submitting(page), self._bar: message_html("Storing the images")}
            if (session := await self._visits.session(request) or self._guests.get(page)) is None:
                # without a cookie the run has a session of its own, which ends when it is not followed any more
                session = self._guests[page] = await self._visits.store.create_session()
            key = await self._visits.signer()
            files = {slot: await file_of(self._images[slot], payload, key) for slot, payload in shown.items()}
            taken = {slot: file for slot, file in files.items() if file is not None and slot in takes}
            images = await self._visits.tabs.keep_shown(request, session, taken, values)
            wanted = await session.generation_request(pipeline, slots=(), params=params)
            job = await self._dispatcher.submit(replace(wanted, inputs=images))
            submitted = True
        except UndecidedError as undecided:
            yield {self._bar: UNDECIDED, self._question: undecided.question}
            return
        except AsyncSessionsError as error:
            warn("The run was not started", error)
            yield {self._bar: message_html("Not started")}
            return
        finally:
            if page is not None and not submitted:
                await self._leave(page)
        self._asked[page] = [*self._asked.get(page, ())[-_UNSEEN:], job.id]
        yield {**self._meanwhile(page), self._bar: message_html("Submitted")}

    async def _show_last(self, request: gr.Request) -> Any:
        """What the session made last."""
        try:
            page, session = await self._visits.page(request), await self._session(request)
            runs = [] if session is None else await self._runs(session)
            made = await self._result.news(self._visits, page, session, runs)
        except AsyncSessionsError as error:
            _logger.warning("a session's last result can't be shown: %s", error)  # the page says so already
            return gr.skip()
        return {self._result.component: made, **({self._bar: ""} if made is None else {})}

    async def _follow(self, request: gr.Request) -> AsyncGenerator[Any, None]:
        """What this page has asked for and not seen yet, and what else of the session is not over, one by one.

        The browser may skip an update for the next: each says all.
        """
        yield gr.skip()  # a generator that yields nothing empties its outputs, the buttons' labels too
        page, me = ("", ""), object()
        latest: Updates = {}
        told: set[str] = set()  # the runs that this page was told of, to be shown though they end meanwhile
        try:
            page = await self._visits.page(request)
            self._followers[page] = me
            session = self._guests.get(page) or await self._session(request)
            while session is not None:
                if (entry := self._next(page, await self._runs(session), told)) is None:
                    break
                updates = self._followed(session, entry, told)
                async with aclosing(updates):
                    async for update in updates:
                        if self._followers.get(page) is not me:
                            yield gr.skip()  # Gradio repeats the last update at the end
                            return
                        if update is None:
                            yield gr.skip()
                            continue
                        latest = {**self._meanwhile(page), **update}
                        if self._result.component in update:
                            self._result.shows(page, entry.id)
                        yield latest
                told.discard(entry.id)
                if entry.id in (asked := self._asked.get(page, [])):
                    asked.remove(entry.id)
        except (SessionNotFoundError, JobNotFoundError):
            if latest:
                yield {**latest, self._bar: message_html("Cleared")}
        except AsyncSessionsError as error:
            if latest or self._asked.get(page):
                yield {**latest, self._bar: self._lost(error)}
            else:
                _logger.warning("a session's runs can't be followed: %s", error)  # the page says so already
        finally:
            if self._followers.get(page) is me:
                del self._followers[page]
                await self._leave(page)

    def _next(self, page: PageKey, entries: Iterable[JobInfo], told: Collection[str]) -> JobInfo | None:
        """First what ended before this page could see it, then what is under way, then what waits."""
        known = {*told, *self._asked.get(page, ())}
        shown = [entry for entry in entries if entry.unfinished or entry.id in known]
        return min(shown, key=lambda entry: (entry.unfinished, not entry.under_way, -entry.priority), default=None)

    async def _followed(self, session: Session, entry: JobInfo, told: set[str]) -> AsyncGenerator[Updates | None, None]:
        """Progress, then the result; `None` where there is no news for a while.

        The runs that are said to wait behind it are added to `told`.
        """
        job, shown_at = await self._dispatcher.job(session, entry.id), 0.0
        preview: bytes | None = None
        more = await self._others(session, entry, told)
        if entry.unfinished and await job.latest() is None:
            yield {self._bar: status_html(None, self._visits.store.clock(), more=more)}
        last: str | None = None
        while True:
            with anyio.move_on_after(ALIVE_EVERY) as waiting:
                event = await event_after(job, last)
            if waiting.cancelled_caught:
                yield None
                continue
            if event is None:
                return
            last = event.id
            preview = (event.preview or preview) if isinstance(event, Progress) else None
            if isinstance(event, Progress) and event.step < event.total:
                if anyio.current_time() - shown_at < UPDATE_INTERVAL:
                    continue
                shown_at = anyio.current_time()
            else:
                more = await self._others(session, entry, told)
            now = self._visits.store.clock()
            update: Updates = {self._bar: status_html(event, now, more=more, preview=preview)}
            if isinstance(event, Succeeded):
                made = await self._made(session, job, event.outputs)
                update.update({} if made is None else {self._result.component: made})
            yield update

    async def _others(self, session: Session, entry: JobInfo, told: set[str]) -> int:
        others = {each.id for each in await self._runs(session) if each.unfinished} - {entry.id}
        told |= others
        return len(others)

    async def _runs(self, session: Session) -> Sequence[JobInfo]:
        """Those that this button may have begun: of its pipeline, if it has one of its own."""
        jobs = await self._dispatcher.jobs(session)
        return [job for job in jobs if job.pipeline == self._pipeline] if isinstance(self._pipeline, str) else jobs

    def _lost(self, error: AsyncSessionsError) -> str:
        if isinstance(error, StoreClosedError):
            return message_html("The server is stopping. The run goes on when it is back.")
        warn("The run can't be followed any more", error)
        return message_html("Lost sight of the run. Reload the page to look for it.")

    async def _made(self, session: Session, job: Job, outputs: Mapping[str, OutputRecord]) -> Any:
        try:
            return await self._result.of(self._visits, session, outputs.values())
        except CorruptBlobError:
            await job.info()  # `JobNotFoundError`: it was cleared meanwhile
            raise

    async def _session(self, request: gr.Request) -> Session | None:
        found = await self._visits.found(request)
        return None if found is None else found[0]

    async def _leave(self, page: PageKey) -> None:
        if (guest := self._guests.pop(page, None)) is None:
            return
        self._visits.tabs.forget_guest(guest.key)
        try:
            await guest.delete()
        except AsyncSessionsError as error:
            _logger.warning("session %s of a page without a cookie is left to the sweep: %s", guest.key, error)

    async def _cancel_all(self, request: gr.Request) -> None:
        try:
            session = self._guests.get(await self._visits.page(request)) or await self._session(request)
            if session is not None:
                await self._dispatcher.cancel_session(session)
        except AsyncSessionsError as error:
            warn("The run was not cancelled", error)

    def _meanwhile(self, page: PageKey) -> Updates:
        """One more may be queued, but by a session that others could come back to."""
        return self._buttons.meanwhile(page, more=page not in self._guests)

    async def _rest(self, request: gr.Request) -> Any:
        try:
            page = await self._visits.page(request)
        except AsyncSessionsError:
            return self._buttons.rested()  # the page says so already
        return gr.skip() if page in self._followers else self._buttons.rest(page)
