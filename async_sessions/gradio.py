"""Images, settings and runs of a Gradio page, kept per user: through refresh, in a second tab, after a restart.

    sessions = GradioSessions(open_store("~/sessions"))
    with gr.Blocks() as demo:
        ...
        sessions.bind(images={"start": start, "end": end}, state={"prompt": prompt})
        sessions.panel()
    sessions.launch(demo)

The page never depends on the store: while that does not answer, the page loads and works, and a notice says what is not
kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import gradio as gr

from async_sessions._gradio.binding import Binding
from async_sessions._gradio.generate import Generate
from async_sessions._gradio.identity import carrying
from async_sessions._gradio.kept import session_info_html
from async_sessions._gradio.lifespan import composed
from async_sessions._gradio.listeners import QUIET, OnPages, Reactions, page_in_progress
from async_sessions._gradio.panel import Panel
from async_sessions._gradio.queue import Queue
from async_sessions._gradio.results import Result
from async_sessions._gradio.status import UNDECIDED
from async_sessions._gradio.stopping import launch
from async_sessions._gradio.visits import Visits
from async_sessions.asgi import CookieSigner, SessionImages
from async_sessions.store import SessionStore, open_store

if TYPE_CHECKING:
    import fastapi
    from gradio.components import Component
    from gradio.events import Dependency
    from PIL import Image

    from async_sessions.dispatch.base import Dispatcher
    from async_sessions.session import Session

__all__ = ["GradioSessions", "session_info_html"]


class GradioSessions:
    """Keeps what the users of one Gradio page choose and make, each in a session of their own.

    A session belongs to the logged-in user (`request.username`), else to the browser, by a signed cookie. `store` is
    entered and left with the app, and so is `dispatcher`; a path or URL is opened with `open_store`. `secret` signs the
    cookies: one, or several to rotate, the newest first; by default the store keeps one of its own. Apps on one host,
    whatever their ports, that bring secrets have to name their cookies: `secret=CookieSigner(..., name="studio")`.
    Start the app with `launch` or `mount`, or pass `**launch_options()` to `demo.launch`.

    In a frame of another site browsers send no such cookie. `embedded` asks for one that they do (see `SessionCookie`);
    it takes TLS. With `identity="browser_state"` a browser that sends none is known by a signed token in the page's
    storage, which scripts on the page can read. `merge_at_login`: what a browser kept before its user logged in is
    taken along into the user's session (see `SessionStore.merge`).

    Gradio keeps what is uploaded in a cache of its own, too: give `gr.Blocks` a `delete_cache`.
    """

    def __init__(
        self,
        store: SessionStore | Path | str,
        *,
        dispatcher: Dispatcher | None = None,
        secret: str | bytes | Sequence[str | bytes] | CookieSigner | None = None,
        identity: Literal["cookie", "browser_state"] = "cookie",
        embedded: bool = False,
        merge_at_login: bool = True,
    ) -> None:
        if identity not in ("cookie", "browser_state"):
            raise ValueError(f"`identity` is 'cookie' or 'browser_state', not {identity!r}.")
        self.store = store if isinstance(store, SessionStore) else open_store(store)
        self.dispatcher = dispatcher
        self._visits = Visits(
            self.store,
            dispatcher,
            secret if secret is None or isinstance(secret, CookieSigner) else CookieSigner(*_each(secret)),
            with_tokens=identity == "browser_state",
            embedded=embedded,
            merge_at_login=merge_at_login,
        )
        self._bindings: OnPages[list[Binding]] = OnPages(list)
        self._changed = Reactions()
        self._looked = Reactions()
        self._cleared = Reactions()
        self._submitted = Reactions()
        self._retried = Reactions()

    async def session(self, request: gr.Request, token: object = None) -> Session | None:
        """The session of whoever sent `request`; `None` for a client that sends no cookie of ours.

        It may not have begun: the first write creates it. `StorageError` while the store can't be opened. `token` is
        what `token()` gave a listener of yours as an input.
        """
        if self._visits.tokens is not None and token is not None:
            self._visits.tokens.note(request, token)
        return await self._visits.session(request)

    async def images(self, request: gr.Request) -> dict[str, Image.Image]:
        """Every image that the session of `request` holds, by slot; upright, loaded, yours to draw on."""
        if (found := await self._visits.found(request)) is None:
            return {}
        session, info = found
        return {slot: await (await session.read_record(record)).image() for slot, record in info.images.items()}

    async def signer(self) -> CookieSigner:
        """What signs the cookies, for routes of your own: `(await sessions.signer()).session_id(request.cookies)`."""
        await self._visits.held.ensure_started()
        return await self._visits.signer()

    def token(self) -> gr.BrowserState:
        """With `identity="browser_state"`: the input by which a listener of yours tells `session` who sent it."""
        if self._visits.tokens is None:
            raise RuntimeError('token() needs GradioSessions(identity="browser_state").')
        return self._visits.tokens.state(page_in_progress("token"))

    def images_app(self) -> SessionImages:
        """The images of whoever asks, over HTTP: `Mount("/images", sessions.images_app())`. Knows Gradio's logins."""
        return SessionImages(self.store, signer=self.signer, identity=self._visits.user_of)

    @carrying
    def bind(
        self,
        *,
        images: Mapping[str, gr.Image | gr.ImageEditor] | None = None,
        state: Mapping[str, Component] | None = None,
    ) -> Self:
        """Keep the images that users put into `images`, by slot, and the values that they give `state`, by name.

        Call it once on each page, in the Blocks, when the components exist; they keep their own listeners and `type`.
        The pages that `demo.route` adds share the session: bind the same names to components of theirs. Images are
        stored as uploaded, of an editor all layers together, when an image is chosen and when its changes are applied;
        values as the browser sends them. What code sets or a webcam takes is stored when `bind_generate` uses it, and
        what code sets with `keep_after`, too.

        What one tab changes another shows when it is looked at again. An upload over an image that its page has not
        shown asks the user which of the two to keep. `InvalidKeyError` for a slot that the store does not have.
        """
        page = page_in_progress("bind")
        if self._bindings.of(page):
            raise RuntimeError("bind() was called already; pass all images and all state to one call.")
        binding = Binding(self._visits, images=images or {}, state=state or {})
        self._bindings.of(page).append(binding)
        for event in binding.listen(page):
            self._changed.on(event)
        self._looked.on(binding.looked)
        return self

    @carrying
    def keep_after(self, event: Dependency) -> Self:
        """Keep what an event of yours puts into the bound images, as an upload is kept. After `bind`.

        For what code makes, and for `gr.Examples`: `sessions.keep_after(examples.load_input_event)`. An image that the
        event takes away is still kept. `ValueError` if no bound image is among the event's outputs.
        """
        for kept in self._bound(page_in_progress("keep_after")).keep_after(event):
            self._changed.on(kept)
        return self

    @carrying
    def panel(self) -> gr.HTML:
        """Show here what the session keeps and until when. After `bind`.

        Below it: clear one image or all there is, put back what was replaced or cleared, download images and settings
        as a ZIP, and restore one: into what is bound and nothing else, since a ZIP may come from anybody.
        """
        page = page_in_progress("panel")
        bound = self._bound(page)
        restored = partial(bound.restored, fill=True)
        panel = Panel(self._visits, page, images=bound.images, state=bound.state, restored=restored)
        self._cleared.on(panel.cleared)
        self._changed.react(panel.show_after)
        return panel.info

    @carrying
    def queue(self) -> gr.HTML:
        """The session's runs: those that wait, with position and estimate, the one under way, and the last ones.

        Below them is what to do with each: show or download its result, run it again with the same images and
        parameters, cancel it, or all. It is fresh while a run is not over; inside a `gr.Tab` also when that is opened.
        """
        page = page_in_progress("queue")
        if self.dispatcher is None:
            raise RuntimeError("queue() needs a dispatcher; pass one to GradioSessions.")
        queue = Queue(self._visits, self.dispatcher, page)
        self._retried.on(queue.retried)
        self._submitted.on(queue.retried)
        self._submitted.react(queue.follow_after)
        self._looked.react(queue.follow_after)
        self._cleared.react(queue.empty_after)
        return queue.list

    @carrying
    def bind_generate(
        self,
        button: gr.Button,
        *,
        pipeline: Component | str,
        video: gr.Video | None = None,
        image: gr.Image | None = None,
        gallery: gr.Gallery | None = None,
        params: Mapping[str, Component] | None = None,
        slots: Mapping[str, Collection[str]] | None = None,
        cancel: gr.Button | None = None,
        progress: gr.HTML | None = None,
    ) -> gr.HTML:
        """Make `button` run a pipeline on the images that the page shows, and show what it makes. After `bind`.

        That goes to one of `video`, `image`, which gets the first image of a run, and `gallery`, which gets all.
        `pipeline` is the name of one, or the component that chooses it; `slots` says which of the bound images each
        takes, all where it says nothing. `params` are the values to run it with; an empty one is left to the pipeline.
        They and the name come as a browser sends them, whatever choices and limits the components have: any pipeline of
        the dispatcher can be asked for, and its own `check` says which values it takes.
        `cancel` ends the session's runs. Progress is shown in `progress`, or in an element made here; it is returned.
        A run belongs to the session, not to the tab: closing the tab stops nothing, and a reload picks it up. While
        one goes on the next can be submitted; the page shows them one by one, here those of `pipeline`, or of all where
        that is chosen.
        """
        page = page_in_progress("bind_generate")
        result = Result(video=video, image=image, gallery=gallery)
        bound = self._bound(page)
        if self.dispatcher is None:
            raise RuntimeError("bind_generate() needs a dispatcher; pass one to GradioSessions.")
        bound.check_slots({slot for each in (slots or {}).values() for slot in each})
        bar = gr.HTML() if progress is None else progress
        generate = Generate(
            self._visits,
            self.dispatcher,
            images=bound.images,
            state=bound.state,
            slots=slots or {},
            pipeline=pipeline,
            button=button,
            cancel=cancel,
            result=result,
            bar=bar,
            question=bound.question,
        )
        clicked = generate.bind(page, params or {})
        for event in (clicked, generate.listen(page), generate.follow_after(clicked)):
            self._changed.on(event)
        self._submitted.on(clicked)
        self._looked.react(generate.look_after)
        self._retried.react(lambda event: self._changed.on(generate.follow_after(event)))
        bound.question.select(lambda shown: "" if shown == UNDECIDED else gr.skip(), bar, bar, **QUIET)
        self._cleared.react(lambda event: event.success(lambda: (None, ""), None, [result.component, bar], **QUIET))
        return bar

    def launch_options(self, **options: Any) -> dict[str, Any]:
        """`options` for `demo.launch`, completed by what sessions need; a lifespan and middleware of yours are kept."""
        app = dict(options.pop("app_kwargs", None) or {})
        app["lifespan"] = composed(self._visits.held, app.get("lifespan"), self._visits.note_app)
        app["middleware"] = [self._visits.cookie_middleware(), *app.get("middleware", ())]
        return {**options, "app_kwargs": app}

    def launch(self, demo: gr.Blocks, **options: Any) -> Any:
        """`demo.launch` with sessions. Where that blocks, Ctrl-C and SIGTERM leave dispatcher and store first."""
        return launch(demo, self._visits.held, self.launch_options(**options))

    def mount(self, app: fastapi.FastAPI, demo: gr.Blocks, path: str = "/", **options: Any) -> fastapi.FastAPI:
        """`gr.mount_gradio_app` with sessions.

        uvicorn waits for pages that follow a run before it stops the app: give it a `timeout_graceful_shutdown`.
        """
        gr.mount_gradio_app(app, demo, path=path, **self.launch_options(**options))
        demo.has_launched = True  # else Gradio accepts a path that no upload made, for example /etc/passwd
        return app

    def _bound(self, page: gr.Blocks) -> Binding:
        for binding in self._bindings.of(page):
            return binding
        raise RuntimeError("Call bind() first: it says which components belong to the session.")


def _each(secret: str | bytes | Sequence[str | bytes]) -> Sequence[str | bytes]:
    return [secret] if isinstance(secret, str | bytes) else secret
