"""Who sent a request, where a cookie of ours does not say it: Gradio's own logins, and browsers that block cookies."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import gradio as gr
from gradio.context import Context
from gradio.routes import App

from async_sessions._gradio.listeners import QUIET, put_at_root

if TYPE_CHECKING:
    from async_sessions.asgi import ASGIApp, Message, Scope

P = ParamSpec("P")
T = TypeVar("T")

_USER: Final = "/gradio_api/user"
_OF_THE_BODY: Final = (b"accept-encoding", b"content-length", b"content-type", b"range", b"transfer-encoding")
_NAME: Final = "async_sessions"
_APPS: Final = 16  # of one origin; their pages share the storage
_LONGEST: Final = 512  # characters of a name and a token


class Tokens:
    """A signed token in the page's own storage, which the listeners that are registered within `carried` get along.

    A `BrowserState` mounts only where it is visible when the page opens: so it is put at the root of each page. All
    apps of an origin share it: each has a token of its own there, by the name of its cookie.
    """

    def __init__(self, minted: Callable[[gr.Request, object], Any]) -> None:
        self._minted = minted
        self._states: WeakKeyDictionary[gr.Blocks, dict[str, gr.BrowserState]] = WeakKeyDictionary()
        self._sent: WeakKeyDictionary[gr.Request, object] = WeakKeyDictionary()

    def of(self, request: gr.Request) -> object:
        """What a client sent for a token, to be checked; `None` where it sent none."""
        return self._sent.get(request)

    def note(self, request: gr.Request, token: object) -> None:
        self._sent[request] = token

    def state(self, blocks: gr.Blocks) -> gr.BrowserState:
        """The component of the page of `blocks` that is being built."""
        states = self._states.setdefault(blocks, {})
        if (state := states.get(blocks.current_page)) is None:
            # What Gradio calls a secret is known to every client; nothing rests on it.
            state = states[blocks.current_page] = gr.BrowserState(storage_key=_NAME, secret=_NAME)
            put_at_root(state, blocks)

            async def mint(token: Any, request: gr.Request) -> Any:
                return await self._minted(request, token)

            blocks.load(mint, state, state, **QUIET)
        return state

    @contextmanager
    def carried(self) -> Iterator[None]:
        if (blocks := Context.root_block) is None:
            yield
            return
        state = self.state(blocks)
        before = set(blocks.fns)
        yield
        for index, listener in blocks.fns.items():
            if index not in before and listener.fn is not None:
                listener.inputs = [*listener.inputs, state]
                listener.fn = self._noting(listener.fn)

    def _noting(self, listener: Callable[..., Any]) -> Callable[..., Any]:
        """`listener` without its last argument, the token."""

        def noted(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            *rest, token = arguments
            for request in rest:
                if isinstance(request, gr.Request):
                    self.note(request, token)
            return tuple(rest)

        if inspect.isasyncgenfunction(listener):

            @functools.wraps(listener)
            async def generate(*arguments: Any) -> AsyncGenerator[Any, None]:
                async with aclosing(listener(*noted(arguments))) as answers:
                    async for answer in answers:
                        yield answer

            return generate

        @functools.wraps(listener)
        async def call(*arguments: Any) -> Any:
            answer = listener(*noted(arguments))
            return await answer if inspect.isawaitable(answer) else answer

        return call


def tokens_in(stored: object) -> dict[str, str]:
    """By name, of whatever a client sent. It is stored as pairs: a mapping Gradio may take for something else."""
    found: dict[str, str] = {}
    for pair in stored[-_APPS:] if isinstance(stored, list) else ():
        match pair:
            case [str(name), str(token)] if len(name) + len(token) <= _LONGEST:
                found[name] = token
    return found


def carrying(method: Callable[P, T]) -> Callable[P, T]:
    """For a method of `GradioSessions` that registers listeners: they get the token along, where there is one."""

    @functools.wraps(method)
    def carried(*args: P.args, **kwargs: P.kwargs) -> T:
        sessions: Any = args[0]
        tokens: Tokens | None = sessions._visits.tokens
        with nullcontext() if tokens is None else tokens.carried():
            return method(*args, **kwargs)

    return carried


async def gradio_user(scope: Scope, app: ASGIApp | None) -> str | None:
    """Who is logged in to Gradio, by `auth=` or `auth_dependency=`: what its own route `/gradio_api/user` answers.

    `app` is asked unless the request came to a route within a Gradio app.
    """
    asked = within if isinstance(within := scope.get("app"), App) else app
    if asked is None:
        return None
    headers = [each for each in scope["headers"] if each[0] not in _OF_THE_BODY]
    question = {
        **scope,
        "method": "GET",
        "path": _USER,
        "raw_path": _USER.encode(),
        "root_path": "",
        "headers": headers,
    }
    for key in ("app", "app_root_path", "endpoint", "path_params", "route", "router"):
        question.pop(key, None)  # of the route that the request came to
    status, answer = 0, bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    await asked(question, receive, send)
    user = json.loads(answer) if status == 200 else None
    return user if isinstance(user, str) else None
