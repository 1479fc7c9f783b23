"""The components that belong to the session: what users put into them is kept, and shown again.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import gradio as gr

from async_sessions._gradio.html import warn
from async_sessions._gradio.listeners import QUIET, Payload, put_at_root
from async_sessions._gradio.payloads import file_of
from async_sessions._gradio.question import KEEP, UndecidedError, element
from async_sessions._gradio.values import is_settable
from async_sessions.errors import (
    AsyncSessionsError,
    ImageRejectedError,
    InvalidKeyError,
    QuotaExceededError,
    RevisionConflictError,
    StorageError,
)

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency

    from async_sessions._gradio.visits import Visits

ImageComponent: TypeAlias = gr.Image | gr.ImageEditor

_NO_VALUES: Final = gr.Button | gr.Dataset | gr.JSON | gr.State  # of users

_logger = logging.getLogger("async_sessions")


class Binding:
    """Image components by slot and value components by name, as `GradioSessions.bind` was given them for a page."""

    def __init__(self, visits: Visits, *, images: Mapping[str, ImageComponent], state: Mapping[str, Component]) -> None:
        for slot, image in images.items():
            visits.store.check_slot(slot)
            if not isinstance(image, gr.Image | gr.ImageEditor):
                raise TypeError(
                    f"images={{{slot!r}: ...}} is a gr.Image or gr.ImageEditor, not a {type(image).__name__}; "
                    "values go to state=."
                )
        for name, component in state.items():
            _check_value(name, component)
        places = {f"images[{slot!r}]": image for slot, image in images.items()}
        _check_once({**places, **{f"state[{name!r}]": component for name, component in state.items()}})
        self._visits = visits
        self.images = dict(images)
        self.state = dict(state)
        self.question = element()
        self._keepers: dict[str, Callable[[Dependency], Dependency]] = {}
        self.looked: Dependency  # from `listen` on: the page has heard that another tab has changed something

    def check_slots(self, slots: Iterable[str]) -> None:
        """`InvalidKeyError` for one that no image is bound to."""
        for slot in slots:
            if slot not in self.images:
                bound = ", ".join(self.images) or "none"
                raise InvalidKeyError(f"No image is bound to the slot {slot!r}, bind(images=...) has {bound}.")

    def listen(self, page: gr.Blocks) -> list[Dependency]:
        """Keep what users do from now on; returns the events after which the session holds other images."""
        put_at_root(self.question, page)
        changes = [event for slot, image in self.images.items() for event in self._bind_image(slot, image)]
        for name, component in self.state.items():
            self._bind_state(name, component)
        bound = [*self.images.values(), *self.state.values()]
        if bound:
            page.load(self._restore, None, bound, **QUIET)
        looked = {"trigger_mode": "always_last", **QUIET}
        self.question.focus(self._refresh, None, [*bound, self.question], **looked)
        self.looked = self.question.change(_nothing, None, None, **looked)
        changes.append(self.looked)
        answered = self.question.select(
            self._answer, None, [*self.images.values(), self.question], trigger_mode="multiple", **QUIET
        )
        return [*changes, answered]

    def keep_after(self, event: Dependency) -> list[Dependency]:
        """Keep the images that an event of the app's own puts there; `ValueError` where it puts none."""
        slots = [slot for slot, image in self.images.items() if image._id in event["outputs"]]
        if not slots:
            raise ValueError("None of the images that bind() was given is an output of this event.")
        return [self._keepers[slot](event) for slot in slots]

    async def restored(self, request: gr.Request, *, fill: bool = False) -> dict[Component, Any]:
        """What the bound components shall show. `fill`: nothing, where the session holds nothing."""
        try:
            images, state = await self._visits.tabs.restored(request, self.images, self.state)
        except AsyncSessionsError as error:
            warn("What is kept for you can't be shown", error)
            return {}
        updates: dict[Component, Any] = {
            self.images[slot]: path for slot, path in images.items() if fill or path is not None
        }
        return updates | self._settable(state)

    def _settable(self, state: Mapping[str, Any]) -> dict[Component, Any]:
        """Without what a component of an app that has changed since can't show: it would take all else along."""
        return {self.state[name]: value for name, value in state.items() if is_settable(self.state[name], value)}

    def _bind_image(self, slot: str, image: ImageComponent) -> list[Dependency]:
        async def upload(payload: Payload | None, request: gr.Request) -> Any:
            try:
                file = await file_of(image, payload, await self._visits.signer())
            except StorageError as error:
                warn("This image is not kept", error)
                return gr.skip()
            return gr.skip() if file is None else await self._keep_upload(request, slot, file)

        async def settle(payload: Payload | None, request: gr.Request) -> Any:
            """Show what is kept in place of a refused upload, or of an older image that was on its way to the page."""
            try:
                file = await file_of(image, payload, await self._visits.signer())
                outdated = await self._visits.tabs.is_outdated(request, slot, file)
            except AsyncSessionsError:
                return gr.skip()  # the page says so already
            return await self._kept(request, slot) if outdated else gr.skip()

        async def clear(request: gr.Request) -> Any:
            try:
                await self._visits.tabs.remove(request, slot)
            except RevisionConflictError:
                gr.Info("Another tab has put this image there meanwhile. Remove it again if you want it gone.")
                return await self._kept(request, slot)
            except AsyncSessionsError as error:
                warn("The image is still kept", error)
            return gr.skip()

        # One queue for all, so that they start in the order in which the browser sent them.
        options = {**QUIET, "concurrency_id": f"async_sessions_{slot}"}
        # "once", the default, would drop an upload while another is stored; "always_last" sends it afterwards.
        uploading = {"preprocess": False, "trigger_mode": "always_last", **options}
        settling = {"preprocess": False, "trigger_mode": "multiple", **QUIET}
        stored = [image.upload(upload, image, self.question, **uploading)]
        if isinstance(image, gr.ImageEditor):
            stored.append(image.apply(upload, image, self.question, **uploading))
        cleared = image.clear(clear, None, image, trigger_mode="multiple", **options)

        def keep_after(event: Dependency) -> Dependency:
            kept: Dependency = event.then(upload, image, self.question, **uploading)
            settled: Dependency = kept.then(settle, image, image, **settling)
            return settled

        self._keepers[slot] = keep_after
        return [event.then(settle, image, image, **settling) for event in (*stored, cleared)]

    def _bind_state(self, name: str, component: Component) -> None:
        async def keep(value: Any, request: gr.Request) -> None:
            try:
                await self._visits.tabs.keep_value(request, name, value)
            except (AsyncSessionsError, TypeError, ValueError) as error:
                warn("A setting is not kept", error)

        # `input` would be the user alone, but misses text that is pasted or cut and a slider that is reset
        component.change(keep, component, None, preprocess=False, trigger_mode="always_last", **QUIET)  # type: ignore[attr-defined]

    async def _keep_upload(self, request: gr.Request, slot: str, payload: Payload) -> Any:
        """Returns what to ask the user."""
        try:
            await self._visits.tabs.keep(request, slot, payload)
        except UndecidedError as undecided:
            return undecided.question
        except (ImageRejectedError, QuotaExceededError) as error:
            warn("This file is not kept", error)
        except AsyncSessionsError as error:
            warn("This image is not kept", error)
        return gr.skip()

    async def _kept(self, request: gr.Request, slot: str) -> Any:
        """What one of the images shall show."""
        try:
            images, _ = await self._visits.tabs.restored(request, [slot])
        except AsyncSessionsError as error:
            warn(f"The {slot} image can't be shown", error)
            return gr.skip()
        return images.get(slot, gr.skip())

    async def _restore(self, request: gr.Request) -> Any:
        return await self.restored(request) or gr.skip()

    async def _refresh(self, request: gr.Request) -> Any:
        """What another tab has done since, for a page that is looked at again. One that fails waits for the next."""
        tabs = self._visits.tabs
        try:
            if (revision := await tabs.unseen_revision(request)) is None:
                return gr.skip()
            images, state = await tabs.restored(request, self.images, self.state, news=True)
            shown: dict[Component, Any] = {self.images[slot]: path for slot, path in images.items()}
            shown |= self._settable(state)
            shown[self.question] = await tabs.question(request, revision)
            await tabs.saw_revision(request, revision)
        except AsyncSessionsError as error:
            _logger.warning("a page can't look for news: %s", error)
            return gr.skip()
        return shown

    async def _answer(self, event: gr.EventData, request: gr.Request) -> Any:
        answer = event._data if isinstance(event._data, dict) else {}
        slot, keep = answer.get("slot"), answer.get("keep")
        shown: dict[Component, Any] = {}
        try:
            if not isinstance(slot, str) or slot not in self.images or keep not in KEEP:
                return gr.skip()
            mine = await self._visits.tabs.answered(request, slot)
            if mine is not None and keep == "mine":
                await self._keep_upload(request, slot, mine)
            else:
                if keep == "mine":  # as after a restart of the server
                    gr.Warning("Your upload is not known any more; this is what is kept. Upload yours again.")
                shown[self.images[slot]] = await self._kept(request, slot)
            return {**shown, self.question: await self._visits.tabs.question(request)}
        except AsyncSessionsError as error:
            warn("Your answer has no effect", error)
            return gr.skip()


def _nothing() -> None:
    """For what follows."""


def _check_value(name: str, component: Component) -> None:
    """What is kept comes from browsers, and back through the component: none that takes it for files or for code's."""
    if getattr(component, "data_model", None) is not None or isinstance(component, _NO_VALUES):
        raise TypeError(
            f"state={{{name!r}: ...}} keeps plain values that users enter, not what a {type(component).__name__} "
            "holds; images= keeps images."
        )


def _check_once(components: Mapping[str, Component]) -> None:
    places: dict[int, str] = {}
    for place, component in components.items():
        if (other := places.setdefault(component._id, place)) != place:
            raise ValueError(f"{other} and {place} are one component; give each a component of its own.")
