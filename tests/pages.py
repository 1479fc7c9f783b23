"""Gradio pages without a browser: their listeners are called as Gradio does, in the test's own event loop."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.helpers import skip, special_args

from async_sessions.asgi import COOKIE, CookieSigner
from async_sessions.dispatch import LocalDispatcher
from async_sessions.gradio import GradioSessions

if TYPE_CHECKING:
    from gradio.block_function import BlockFunction

    from async_sessions import SessionInfo, SessionStore
    from tests.steps import StepPipeline

SECRET = "a secret of the tests"
ANN, BOB = ({COOKIE: CookieSigner(SECRET).sign(name)} for name in ("ann's id", "bob's id"))

_pages = 0


def is_question(block: Any) -> bool:
    return isinstance(block, gr.HTML) and "async-sessions-question" in block.elem_classes


def _shown(component: Any, path: Path) -> dict[str, Any]:
    """As the browser names a file that `component` shows."""
    file = {"path": str(path), "orig_name": path.name}
    if isinstance(component, gr.ImageEditor):
        return {"background": file, "layers": [], "composite": file, "id": None}
    return file


class Page:
    """One open page of `demo`, as a user with these `cookies` sees it. `values` and `props` are what it shows."""

    def __init__(self, demo: gr.Blocks, cookies: Mapping[str, str], *, username: str | None = None) -> None:
        global _pages  # every page has a session hash of its own
        _pages += 1
        self._fns = demo.fns
        self._demo = demo
        self._request = gr.Request(username=username, session_hash=f"page{_pages}", cookies=dict(cookies))
        self.values = {block._id: getattr(block, "value", None) for block in demo.blocks.values()}
        self.props: dict[int, dict[str, Any]] = {}
        self._event: dict[str, str] = {}

    async def load(self) -> Page:
        await self.fire(self._demo, "load")
        return self

    def shows(self, component: Any) -> Any:
        """A component's value; of a file its path."""
        value = self.values[component._id]
        value = value["composite"] if isinstance(value, dict) and "composite" in value else value
        return Path(value["path"]) if isinstance(value, dict) and "path" in value else value

    async def choose_file(self, component: Any, path: Path, event: str = "upload") -> None:
        """What an upload does: the file is in Gradio's cache, and the browser names it."""
        self._demo.upload_file_set.add(str(path))
        self.values[component._id] = _shown(component, path)
        await self.fire(component, event)

    async def remove(self, component: Any) -> None:
        self.values[component._id] = None
        await self.fire(component, "clear")

    async def enter(self, component: Any, value: Any) -> None:
        self.values[component._id] = value
        await self.fire(component, "change")

    async def look_again(self) -> None:
        """What coming back to the page does, from another tab or window."""
        for block in list(self._demo.blocks.values()):
            if isinstance(block, gr.HTML):
                before = self.values[block._id]
                await self.fire(block, "focus")
                if self.values[block._id] != before:
                    await self.fire(block, "change")

    async def answer(self, slot: str, keep: str) -> None:
        """What a click in the page's question does."""
        self._event = {"slot": slot, "keep": keep}
        for block in list(self._demo.blocks.values()):
            if isinstance(block, gr.HTML):
                await self.fire(block, "select")

    def question(self) -> str:
        """What the page asks; nothing if it does not."""
        shown = "".join(str(self.values[block._id] or "") for block in self._demo.blocks.values() if is_question(block))
        return shown if "<dialog" in shown else ""

    async def fire(self, component: Any, event: str) -> None:
        """Run the listeners of an event, and those that follow them."""
        for index, fn in list(self._fns.items()):
            if (component._id, event) in fn.targets and fn.fn is not None:
                async for _ in self.run(index):
                    pass

    def listener(self, component: Any, event: str, output: Any = None) -> int:
        """The one listener of that event that answers more than once; of several, the one that writes to `output`."""
        (found,) = [
            index
            for index, fn in self._fns.items()
            if (component._id, event) in fn.targets and inspect.isasyncgenfunction(fn.fn)
            if output is None or output in fn.outputs
        ]
        return found

    async def run(self, index: int) -> AsyncGenerator[None, None]:
        """Run one listener, then those that follow it, stopping at each answer."""
        fn = self._fns[index]
        failed = False
        try:
            answers = self._call(fn)
            if inspect.isasyncgen(answers):
                async for answer in answers:
                    self._apply(fn, answer)
                    yield
            else:
                answer = await answers if inspect.isawaitable(answers) else answers
                self._apply(fn, answer)
                yield
        except gr.Error:
            failed = True
        for next_index, following in list(self._fns.items()):
            if following.trigger_after == index and not (failed and following.trigger_only_on_success):
                followers = self.run(next_index)
                async with aclosing(followers):
                    async for _ in followers:
                        yield

    def _call(self, fn: BlockFunction) -> Any:
        assert fn.fn is not None
        inputs = [self.values[block._id] for block in fn.inputs]
        arguments, *_ = special_args(fn.fn, inputs, self._request, gr.EventData(None, self._event))
        return fn.fn(*arguments)

    def _apply(self, fn: BlockFunction, answer: Any) -> None:
        if not fn.outputs or answer == skip():
            return
        if isinstance(answer, dict) and not answer.get("__type__"):
            updates = {component._id: value for component, value in answer.items()}
        elif len(fn.outputs) == 1:
            updates = {fn.outputs[0]._id: answer}
        else:
            updates = {block._id: value for block, value in zip(fn.outputs, answer, strict=True)}
        for block in fn.outputs:
            if block._id in updates:
                self._set(block, updates[block._id])

    def _set(self, block: Any, value: Any) -> None:
        if isinstance(value, dict) and value.get("__type__") == "update":
            self.props.setdefault(block._id, {}).update(value)
            if "value" not in value:
                return
            value = value["value"]
        if isinstance(block, gr.Image | gr.Video | gr.ImageEditor) and value is not None:
            value = _shown(block, Path(value))
        self.values[block._id] = value


class App:
    """A small page: two images, two values, a panel, and a pipeline that takes the images."""

    def __init__(self, store: SessionStore, *pipelines: StepPipeline, slots: Any = None, **options: Any) -> None:
        self.store = store
        self.dispatcher = LocalDispatcher(store, pipelines) if pipelines else None
        self.sessions = GradioSessions(store, dispatcher=self.dispatcher, secret=SECRET, **options)
        with gr.Blocks() as self.demo:
            self.start, self.end = gr.Image(type="pil"), gr.Image()
            self.prompt, self.model = gr.Textbox(), gr.Dropdown(["steps", "other"], value="steps")
            self.label = gr.Textbox()
            self.sessions.bind(
                images={"start": self.start, "end": self.end}, state={"prompt": self.prompt, "model": self.model}
            )
            self.info = self.sessions.panel()
            if pipelines:
                self.video, self.go, self.cancel = gr.Video(), gr.Button("Go"), gr.Button("Stop")
                self.bar = self.sessions.bind_generate(
                    self.go,
                    pipeline=self.model,
                    video=self.video,
                    params={"label": self.label},
                    slots=slots,
                    cancel=self.cancel,
                )

    def button(self, label: str) -> gr.Button:
        return next(each for each in self.demo.blocks.values() if isinstance(each, gr.Button) and each.value == label)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.sessions.launch_options()["app_kwargs"]["lifespan"](
            SimpleNamespace(blocks=self.demo, state=SimpleNamespace())
        ):
            yield

    async def open(self, cookies: Mapping[str, str] = ANN, **user: Any) -> Page:
        return await Page(self.demo, cookies, **user).load()

    async def kept(self, cookies: Mapping[str, str] = ANN) -> SessionInfo:
        session = await self.sessions.session(gr.Request(cookies=dict(cookies)))
        assert session is not None
        return await session.info()
