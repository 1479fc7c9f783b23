"""The queue on a page: what a session's runs are at, and what its user can do with each.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final

import anyio
import gradio as gr
from cachetools import LRUCache

from async_sessions._gradio.html import message_html, sentence, warn
from async_sessions._gradio.listeners import QUIET, tab_in_progress
from async_sessions._gradio.results import is_image, is_video
from async_sessions._gradio.runs import Shown, choice_of, ordered, runs_html
from async_sessions.errors import (
    AsyncSessionsError,
    DispatchError,
    InvalidRequestError,
    JobNotFoundError,
    SessionNotFoundError,
)

if TYPE_CHECKING:
    from gradio.events import Dependency

    from async_sessions._gradio.visits import PageKey, Visits
    from async_sessions.dispatch.base import Dispatcher, Job
    from async_sessions.session import Session

TICK: Final = 1.0  # seconds between two looks at runs that are not over
MAX_PAGES: Final = 4096


class Queue:
    """A list that is fresh while a run is not over, and buttons for the run that is chosen. Made inside a Blocks.

    No page asks on a timer: one that shows an unfinished run gets what changes, in one answer without an end, until
    the last run is over. It looks again when the page or its tab is opened, and after whatever may have begun a run.
    """

    def __init__(self, visits: Visits, dispatcher: Dispatcher, page: gr.Blocks) -> None:
        self._visits = visits
        self._dispatcher = dispatcher
        self._followers: LRUCache[PageKey, object] = LRUCache(MAX_PAGES)  # by page: the answer that goes on
        self.list = gr.HTML(message_html("Looking for your runs"))
        with gr.Row(equal_height=True):
            self._choice = gr.Dropdown([], value=None, label="Run", filterable=False, scale=3, min_width=260)
            with gr.Column(scale=4, min_width=260), gr.Row():
                show = gr.Button("Show result", size="sm", min_width=100)
                retry = gr.Button("Retry", size="sm", min_width=100)
                cancel = gr.Button("Cancel", size="sm", variant="stop", min_width=100)
                self._cancel_all = gr.Button("Cancel all", size="sm", variant="stop", min_width=100, interactive=False)
        # Each in a place that is shown or not: Gradio looks into the video of an update on the event loop, with ffprobe
        # where there is one.
        with gr.Column(visible=False) as video:
            self._video = gr.Video(label="Result", interactive=False)
        with gr.Column(visible=False) as images:
            self._images = gr.Gallery(label="Result", interactive=False)
        with gr.Column(visible=False) as files:
            self._files = gr.File(label="Files of the result", interactive=False)
        listen = {"preprocess": False, **QUIET}
        self._results = [self._video, self._images, self._files]
        self._places = [video, images, files]
        show.click(self._show, self._choice, [*self._results, *self._places], **listen)
        self.retried = retry.click(self._retry, self._choice, None, **listen)
        for event in (
            cancel.click(self._cancel, self._choice, None, **listen),
            self._cancel_all.click(self._cancel_every, None, None, **QUIET),
        ):
            self.follow_after(event)
        outputs = [self.list, self._choice, self._cancel_all]
        page.load(self.follow, None, outputs, **QUIET)
        if (tab := tab_in_progress()) is not None:
            tab.select(self.follow, None, outputs, trigger_mode="multiple", **QUIET)

    def follow_after(self, event: Dependency) -> None:
        outputs = [self.list, self._choice, self._cancel_all]
        event.then(self.follow, None, outputs, trigger_mode="multiple", **QUIET)

    def empty_after(self, event: Dependency) -> None:
        """For what clears the session."""
        nothing = runs_html((), self._visits.store.clock())
        outputs = [self.list, self._choice, self._cancel_all, *self._results, *self._places]

        def empty() -> Any:
            rest = gr.update(choices=[], value=None), gr.update(interactive=False)
            return nothing, *rest, *(None,) * 3, *(gr.update(visible=False),) * 3

        event.success(empty, None, outputs, **QUIET)

    async def follow(self, request: gr.Request) -> AsyncGenerator[Any, None]:
        """Show the runs for as long as one of them is not over; the latest call on a page is the one that goes on."""
        page, me = ("", ""), object()
        told: list[tuple[str, str]] | None = None
        try:
            page = await self._visits.page(request)
            self._followers[page] = me
            while True:
                session, runs = await self._runs(request)
                if self._followers.get(page) is not me:
                    yield gr.skip()
                    return
                unfinished, over = ordered(runs)
                choices = [choice_of(run.entry) for run in (*unfinished, *over)]
                update: dict[Any, Any] = {self.list: runs_html(runs, self._visits.store.clock())}
                if choices != told:  # what was sent already is left alone: a user may be looking through it
                    told = choices
                    update[self._choice] = gr.update(choices=choices)
                    update[self._cancel_all] = gr.update(interactive=bool(unfinished))
                yield update
                if session is None or not unfinished:
                    return
                await self._change(session, unfinished[0].entry.id)
        except AsyncSessionsError as error:
            yield {self.list: message_html(f"Your runs can't be shown now. {sentence(error)}")}
        finally:
            if self._followers.get(page) is me:
                del self._followers[page]

    async def _runs(self, request: gr.Request) -> tuple[Session | None, list[Shown]]:
        if (found := await self._visits.found(request)) is None:
            return None, []
        session, _ = found
        runs = []
        try:
            for entry in await self._dispatcher.jobs(session):
                event = None
                if entry.unfinished:
                    event = await (await self._dispatcher.job(session, entry.id)).latest()
                runs.append(Shown(entry, event))
        except (JobNotFoundError, SessionNotFoundError):  # cleared just now
            return session, []
        return session, runs

    async def _change(self, session: Session, job_id: str) -> None:
        """Wait until the run at the front is over, but no longer than a tick."""
        with anyio.move_on_after(TICK):
            try:
                await (await self._dispatcher.job(session, job_id)).result()
            except (DispatchError, SessionNotFoundError):
                return  # that is its end, too

    async def _job(self, request: gr.Request, choice: Any) -> tuple[Session, Job]:
        """The chosen run. `choice` is what a client says: a run of somebody else's is as none."""
        if not choice:
            raise InvalidRequestError("Choose a run first.")
        if not isinstance(choice, str) or (found := await self._visits.found(request)) is None:
            raise JobNotFoundError("There is no such job.")
        return found[0], await self._dispatcher.job(found[0], choice)

    async def _show(self, choice: Any, request: gr.Request) -> Any:
        try:
            session, job = await self._job(request, choice)
            outputs = (await job.info()).outputs.values()
            if not outputs:
                raise InvalidRequestError("This run has no result.")
            paths = {record.name: await self._visits.copy_result(session, record) for record in outputs}
            videos = [paths[record.name] for record in outputs if is_video(record)]
            images = [paths[record.name] for record in outputs if is_image(record)]
            files = [paths[record.name] for record in outputs if not (is_video(record) or is_image(record))]
        except AsyncSessionsError as error:
            warn("The result can't be shown", error)
            return gr.skip()
        shown = next(iter(videos), None), images or None, files or None
        return *shown, *(gr.update(visible=bool(each)) for each in (videos, images, files))

    async def _retry(self, choice: Any, request: gr.Request) -> None:
        try:
            session, job = await self._job(request, choice)
            await self._dispatcher.retry(session, job.id)
        except AsyncSessionsError as error:
            warn("The run was not started", error)

    async def _cancel(self, choice: Any, request: gr.Request) -> None:
        try:
            _, job = await self._job(request, choice)
            await job.cancel()
        except AsyncSessionsError as error:
            warn("The run was not cancelled", error)

    async def _cancel_every(self, request: gr.Request) -> None:
        try:
            if (found := await self._visits.found(request)) is not None:
                await self._dispatcher.cancel_session(found[0])
        except AsyncSessionsError as error:
            warn("The runs were not cancelled", error)
