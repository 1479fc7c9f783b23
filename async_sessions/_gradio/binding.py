"""The components that belong to the session: what users put into them is kept, and shown again.

Gradio hands the request to a handler by its annotation, so every annotation of a handler must resolve at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gradio as gr

from async_sessions import _keys
from async_sessions._gradio.listeners import QUIET
from async_sessions._gradio.visits import Payload, Visits, warn
from async_sessions.errors import (
    AsyncSessionsError,
    ImageRejectedError,
    QuotaExceededError,
    SessionNotFoundError,
)

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency


class Binding:
    """Image components by slot and value components by name, as `GradioSessions.bind` was given them."""

    def __init__(self, visits: Visits, *, images: Mapping[str, gr.Image], state: Mapping[str, Component]) -> None:
        for slot in images:
            _keys.check_slot(slot)
        self._visits = visits
        self.images = dict(images)
        self.state = dict(state)

    def listen(self, page: gr.Blocks) -> list[Dependency]:
        """Keep what users do from now on; returns the events after which the session holds other images."""
        changes = [event for slot, image in self.images.items() for event in self._bind_image(slot, image)]
        for name, component in self.state.items():
            self._bind_state(name, component)
        if bound := [*self.images.values(), *self.state.values()]:
            page.load(self._restore, None, bound, **QUIET)
        return changes

    async def restored(self, request: gr.Request, *, fill: bool = False) -> dict[Component, Any]:
        """What the bound components shall show. `fill`: nothing, where the session holds nothing."""
        try:
            images, state = await self._visits.restored(request, self.images)
        except AsyncSessionsError as error:
            warn("What is kept for you can't be shown", error)
            return {}
        updates: dict[Component, Any] = {
            component: images.get(slot) for slot, component in self.images.items() if fill or slot in images
        }
        return updates | {component: state[name] for name, component in self.state.items() if name in state}

    def _bind_image(self, slot: str, image: gr.Image) -> list[Dependency]:
        async def upload(payload: Payload | None, request: gr.Request) -> None:
            if payload is not None:
                await self._keep_upload(request, slot, payload)

        async def take_back(payload: Payload | None, request: gr.Request) -> Any:
            """Show what is kept in place of a refused upload; but not if the user has chosen another one by now."""
            if not self._visits.was_refused(request, slot, payload):
                return gr.skip()
            return (await self.restored(request, fill=True)).get(image)

        async def clear(request: gr.Request) -> None:
            try:
                if session := await self._visits.session(request):
                    await session.clear_image(slot)
            except SessionNotFoundError:
                pass
            except AsyncSessionsError as error:
                warn("The image is still kept", error)

        # One queue for both, so that they start in the order in which the browser sent them.
        options = {**QUIET, "concurrency_id": f"async_sessions_{slot}"}
        # "once", the default, would drop an upload while another is stored; "always_last" sends it afterwards.
        uploaded = image.upload(upload, image, None, preprocess=False, trigger_mode="always_last", **options)
        uploaded.then(take_back, image, image, preprocess=False, trigger_mode="multiple", **QUIET)
        return [uploaded, image.clear(clear, None, None, trigger_mode="multiple", **options)]

    def _bind_state(self, name: str, component: Component) -> None:
        if getattr(component, "data_model", None) is not None:
            kind = type(component).__name__
            raise TypeError(
                f"state={{{name!r}: ...}} keeps plain values, not what a {kind} holds; images= keeps images."
            )

        async def keep(value: Any, request: gr.Request) -> None:
            try:
                await self._visits.keep_value(request, name, value)
            except (AsyncSessionsError, TypeError, ValueError) as error:
                warn("A setting is not kept", error)

        # `input` would be the user alone, but misses text that is pasted or cut and a slider that is reset
        component.change(keep, component, None, preprocess=False, trigger_mode="always_last", **QUIET)  # type: ignore[attr-defined]

    async def _keep_upload(self, request: gr.Request, slot: str, payload: Payload) -> None:
        try:
            await self._visits.keep(request, slot, payload)
        except (ImageRejectedError, QuotaExceededError) as error:
            warn("This file is not kept", error)
        except AsyncSessionsError as error:
            warn("This image is not kept", error)

    async def _restore(self, request: gr.Request) -> Any:
        return await self.restored(request) or gr.skip()
