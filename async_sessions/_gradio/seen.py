"""What each open page has seen of its session, and what it does to it, one after another.

A page is known by Gradio's session hash, which a client makes up: it tells the tabs of one session apart and proves
nothing. All of this is lost with the process, and of a page that is not known nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import anyio
from cachetools import LRUCache

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    import gradio as gr

    from async_sessions._gradio.question import Conflict

_REMEMBERED: Final = 8192  # slots and values on open pages

EMPTY: Final = ""  # the digest of no image


class Seen:
    """`name` is a slot's, or a value's; `key` a session's. A page that names no session hash is not remembered."""

    def __init__(self) -> None:
        self._seen: LRUCache[tuple[str, str, str], Any] = LRUCache(_REMEMBERED)  # by key, page and name
        self._acts: LRUCache[tuple[str, str], int] = LRUCache(_REMEMBERED)  # by page and name
        self._asked: LRUCache[tuple[str, str, str], Conflict] = LRUCache(_REMEMBERED)
        self._turns: WeakValueDictionary[tuple[str, str], anyio.Lock] = WeakValueDictionary()

    def saw(self, request: gr.Request, key: str, name: str, what: Any) -> None:
        """The page shows this: of a slot the image's digest, or `EMPTY`."""
        if request.session_hash is not None:
            self._seen[key, request.session_hash, name] = what

    def knows(self, request: gr.Request, key: str, name: str) -> bool:
        return (key, str(request.session_hash), name) in self._seen

    def seen(self, request: gr.Request, key: str, name: str) -> Any:
        """What `saw` was told last; `None` for nothing."""
        return self._seen.get((key, str(request.session_hash), name))

    def forget(self, key: str, prefix: str) -> None:
        """Of every page, what has such a name."""
        for known in [known for known in self._seen if known[0] == key and known[2].startswith(prefix)]:
            del self._seen[known]

    def act(self, request: gr.Request, name: str) -> None:
        """The user has chosen something: what is on its way to the page is older."""
        known = str(request.session_hash), name
        self._acts[known] = self._acts.get(known, 0) + 1

    def acts(self, request: gr.Request, names: Iterable[str]) -> dict[str, int]:
        return {name: self._acts.get((str(request.session_hash), name), 0) for name in names}

    def turn(self, request: gr.Request, slot: str) -> AbstractAsyncContextManager[object]:
        """Held while the page changes a slot: what it does next is not in conflict with that, and comes after it."""
        if request.session_hash is None:
            return anyio.Lock()
        return self._turns.setdefault((request.session_hash, slot), anyio.Lock())

    def ask(self, request: gr.Request, key: str, slot: str, conflict: Conflict) -> None:
        """Remember an upload that is not kept until its user says so."""
        self._asked[key, str(request.session_hash), slot] = conflict

    def asked(self, request: gr.Request, key: str) -> dict[str, Conflict]:
        """Such uploads of the page, by slot."""
        page = str(request.session_hash)
        return {known[2]: conflict for known, conflict in self._asked.items() if known[:2] == (key, page)}

    def answered(self, request: gr.Request, key: str, slot: str) -> Conflict | None:
        return self._asked.pop((key, str(request.session_hash), slot), None)
