"""What each open page has seen of its session, and what it does to it, one after another.

A page is known by Gradio's session hash, which a client makes up: it tells the tabs of one session apart and proves
nothing. All of this is lost with the process, and of a page that is not known nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import anyio
from cachetools import LRUCache

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    import gradio as gr

    from async_sessions._gradio.question import Conflict

_SESSIONS: Final = 2048
_NAMES: Final = 1024  # slots and values on the open pages of one session
_CONFLICTS: Final = 1024
_ACTS: Final = 8192  # slots and values that a user has just touched
_PAGE_CHARACTERS: Final = 64  # Gradio's have a dozen

EMPTY: Final = ""  # the digest of no image
VALUE: Final = "value "  # and its name: what a value is known by; no slot has a space


class Seen:
    """`name` is a slot's, or a value's; `key` a session's. A page that names no session hash is not remembered."""

    def __init__(self) -> None:
        # by key, then by page and name: a session that opens many pages forgets its own
        self._seen: LRUCache[str, LRUCache[tuple[str, str], Any]] = LRUCache(_SESSIONS)
        self._acts: LRUCache[tuple[str, str], int] = LRUCache(_ACTS)  # by page and name
        self._asked: LRUCache[tuple[str, str, str], Conflict] = LRUCache(_CONFLICTS)
        self._turns: WeakValueDictionary[tuple[str, str], anyio.Lock] = WeakValueDictionary()

    def saw(self, request: gr.Request, key: str, name: str, what: Any) -> None:
        """The page shows this: of a slot the image's digest, or `EMPTY`; of a value what is as small."""
        if page := page_of(request):
            self._seen.setdefault(key, LRUCache(_NAMES))[page, name] = what

    def knows(self, request: gr.Request, key: str, name: str) -> bool:
        return (page_of(request), name) in self._pages(key)

    def seen(self, request: gr.Request, key: str, name: str) -> Any:
        """What `saw` was told last; `None` for nothing."""
        return self._pages(key).get((page_of(request), name))

    def shows(self, request: gr.Request, key: str, name: str, what: Any) -> bool:
        return self.knows(request, key, name) and bool(self.seen(request, key, name) == what)

    def all_of(self, key: str) -> dict[tuple[str, str], Any]:
        """What all pages of a session have seen, by page and name."""
        return dict(self._pages(key))

    def lost(self, key: str, seen: Mapping[tuple[str, str], Any]) -> None:
        """A session has expired: its slots are empty, whatever its pages still show of what they had `seen`."""
        pages = self._pages(key)
        for known, what in seen.items():
            if " " not in known[1] and pages.get(known) == what:
                pages[known] = EMPTY

    def forget(self, key: str, prefix: str = "") -> None:
        """Of every page of a session, what has a name that begins like that."""
        pages = self._pages(key)
        for known in [known for known in pages if known[1].startswith(prefix)]:
            del pages[known]
        if not pages:
            self._seen.pop(key, None)

    def _pages(self, key: str) -> MutableMapping[tuple[str, str], Any]:
        return self._seen.get(key, {})

    def act(self, request: gr.Request, name: str) -> None:
        """The user has chosen something: what is on its way to the page is older."""
        known = page_of(request), name
        self._acts[known] = self._acts.get(known, 0) + 1

    def acts(self, request: gr.Request, names: Iterable[str]) -> dict[str, int]:
        return {name: self._acts.get((page_of(request), name), 0) for name in names}

    def turn(self, request: gr.Request, slot: str) -> AbstractAsyncContextManager[object]:
        """Held while the page changes a slot: what it does next is not in conflict with that, and comes after it."""
        if not (page := page_of(request)):
            return anyio.Lock()
        return self._turns.setdefault((page, slot), anyio.Lock())

    def ask(self, request: gr.Request, key: str, slot: str, conflict: Conflict) -> None:
        """Remember an upload that is not kept until its user says so."""
        self._asked[key, page_of(request), slot] = conflict

    def asked(self, request: gr.Request, key: str) -> dict[str, Conflict]:
        """Such uploads of the page, by slot."""
        page = page_of(request)
        return {known[2]: conflict for known, conflict in self._asked.items() if known[:2] == (key, page)}

    def answered(self, request: gr.Request, key: str, slot: str) -> Conflict | None:
        return self._asked.pop((key, page_of(request), slot), None)


def page_of(request: gr.Request) -> str:
    """What the page calls itself; "" where it does not, or not as Gradio does."""
    page = request.session_hash or ""
    return page if len(page) <= _PAGE_CHARACTERS else ""


def mark(value: Any) -> int | float | None:
    """Of a value what tells it from another, and is small."""
    return value if value is None or isinstance(value, int | float) else hash(repr(value))
