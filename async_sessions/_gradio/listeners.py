"""How listeners of ours are registered with Gradio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from gradio.context import Context

if TYPE_CHECKING:
    from gradio.events import Dependency

# Any number at once (Gradio's default is one for all users), no part of the app's own API, and no spinner over what the
# user looks at.
QUIET: Final[Mapping[str, Any]] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}


class Reactions:
    """Listeners that follow events, whichever of the two is registered first."""

    def __init__(self) -> None:
        self._events: list[Dependency] = []
        self._reactions: list[Callable[[Dependency], object]] = []

    def on(self, event: Dependency) -> None:
        self._events.append(event)
        for reaction in self._reactions:
            reaction(event)

    def react(self, reaction: Callable[[Dependency], object]) -> None:
        self._reactions.append(reaction)
        for event in self._events:
            reaction(event)


def page_in_progress(method: str) -> gr.Blocks:
    """The Blocks that are being built. `RuntimeError` outside."""
    if Context.root_block is None:
        raise RuntimeError(f"Call {method}() inside `with gr.Blocks()`.")
    return Context.root_block


def tab_in_progress() -> gr.Tab | None:
    """The tab that is being built, `None` outside of one."""
    block: Any = Context.block
    while block is not None and not isinstance(block, gr.Tab):
        block = block.parent
    return block
