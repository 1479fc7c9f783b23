"""The Generate and Cancel buttons of a page: which can be pressed while a run goes on, and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from cachetools import LRUCache

if TYPE_CHECKING:
    from async_sessions._gradio.generate import Updates
    from async_sessions._gradio.visits import PageKey

_PAGES: Final = 4096


class Buttons:
    """Of each page; where no run has changed its buttons they are the app's own matter."""

    def __init__(self, generate: gr.Button, cancel: gr.Button | None) -> None:
        self._generate = generate
        self._cancel = cancel
        self.all = [generate] if cancel is None else [generate, cancel]
        self._changed: LRUCache[PageKey, bool] = LRUCache(_PAGES)

    def submitting(self, page: PageKey) -> Updates:
        self._changed[page] = True
        return {self._generate: gr.update(interactive=False)}

    def meanwhile(self, page: PageKey, *, more: bool) -> Updates:
        """While a run goes on, that can be cancelled; `more`: the next can be submitted."""
        self._changed[page] = True
        return {self._generate: gr.update(interactive=more)} | {
            cancel: gr.update(interactive=True) for cancel in self.all[1:]
        }

    def rest(self, page: PageKey) -> Any:
        return self.rested() if self._changed.pop(page, False) else gr.skip()

    def rested(self) -> Any:
        """While no run goes on."""
        rested: Any = gr.update(interactive=True)
        return rested if self._cancel is None else (rested, gr.update(interactive=False))
