"""How listeners of ours are registered with Gradio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import gradio as gr
from gradio.context import Context

if TYPE_CHECKING:
    from gradio.components import Component
    from gradio.events import Dependency

T = TypeVar("T")

Payload: TypeAlias = dict[str, Any]  # a file as the browser names it; Gradio checked that `path` is in its cache

# Any number at once (Gradio's default is one for all users), no part of the app's own API, and no spinner over what the
# user looks at.
QUIET: Final[Mapping[str, Any]] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
_AT_ONCE: Final = 2_000  # events, of all pages; Gradio looks through as many places 100 times a second


class Reactions:
    """Listeners that follow events of the same page, whichever of the two is registered first."""

    def __init__(self) -> None:
        self._events: OnPages[list[Dependency]] = OnPages(list)
        self._reactions: OnPages[list[Callable[[Dependency], object]]] = OnPages(list)

    def on(self, event: Dependency) -> None:
        page = page_in_progress("on")
        self._events.of(page).append(event)
        for reaction in self._reactions.of(page):
            reaction(event)

    def react(self, reaction: Callable[[Dependency], object]) -> None:
        page = page_in_progress("react")
        self._reactions.of(page).append(reaction)
        for event in self._events.of(page):
            reaction(event)


class OnPages(Generic[T]):
    """Something for each page of each Blocks: of those that are added with `route`, too."""

    def __init__(self, new: Callable[[], T]) -> None:
        self._new = new
        self._pages: WeakKeyDictionary[gr.Blocks, dict[str, T]] = WeakKeyDictionary()

    def of(self, blocks: gr.Blocks) -> T:
        """That of the page of `blocks` which is being built."""
        pages = self._pages.setdefault(blocks, {})
        if blocks.current_page not in pages:
            pages[blocks.current_page] = self._new()
        return pages[blocks.current_page]


def page_in_progress(method: str) -> gr.Blocks:
    """The Blocks that are being built. `RuntimeError` outside."""
    if Context.root_block is None:
        raise RuntimeError(f"Call {method}() inside `with gr.Blocks()`.")
    return Context.root_block


def make_room(blocks: gr.Blocks) -> None:
    """Gradio answers 40 events at once, of all pages together: a run that is followed would take the room of others.

    No thread more: their number has a limit of its own.
    """
    queue = blocks._queue
    missing = _AT_ONCE - queue.max_thread_count
    if missing > 0:
        queue.max_thread_count += missing
        if queue.active_jobs:  # it runs already
            queue.active_jobs.extend([None] * missing)


def put_at_root(component: Component, blocks: gr.Blocks) -> None:
    """Move it out of the tab or column that is being built: what is not visible when the page opens does not mount."""
    if component.parent is not None and component.parent is not blocks:
        component.parent.children.remove(component)
        blocks.add(component)


def tab_in_progress() -> gr.Tab | None:
    """The tab that is being built, `None` outside of one."""
    block: Any = Context.block
    while block is not None and not isinstance(block, gr.Tab):
        block = block.parent
    return block
