"""The app of `tests.pages` mounted into another, and what speaks to it over HTTP, in the test's own event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import fastapi
import httpx
from starlette.routing import Mount

if TYPE_CHECKING:
    import gradio as gr

    from tests.pages import App


class Browser:
    """Speaks to a mounted app as Gradio's page does, and to its routes as anybody can."""

    def __init__(self, app: fastapi.FastAPI, *, base: str = "http://test") -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url=f"{base}/app/")
        self._events = 0

    async def open(self) -> None:
        assert (await self.http.get("./")).status_code == 200

    async def upload(self, name: str, data: bytes) -> str:
        sent = await self.http.post("gradio_api/upload", files={"files": (name, data)})
        path: str = sent.json()[0]
        return path

    async def fire(self, index: int, data: list[Any], **body: Any) -> str:
        """What the page gets to see of a listener's answer."""
        self._events += 1
        event = {"data": data, "fn_index": index, "session_hash": f"page{id(self)}{self._events}", **body}
        joined = await self.http.post("gradio_api/queue/join", json=event)
        if joined.status_code != 200:
            return joined.text
        async with self.http.stream(
            "GET", "gradio_api/queue/data", params={"session_hash": event["session_hash"]}
        ) as answer:
            return "".join([chunk async for chunk in answer.aiter_text()])


@asynccontextmanager
async def mounted(app: App, **options: Any) -> AsyncIterator[fastapi.FastAPI]:
    parent = fastapi.FastAPI()
    routes = [Mount("/images", app.sessions.images_app())]
    app.sessions.mount(parent, app.demo, path="/app", app_kwargs={"routes": routes}, **options)
    parent.mount("/own-images", app.sessions.images_app())
    async with parent.router.lifespan_context(parent):
        yield parent
        app.demo.close(verbose=False)


def index_of(demo: gr.Blocks, component: Any, event: str) -> int:
    found: int = next(i for i, fn in demo.fns.items() if (component._id, event) in fn.targets and fn.fn is not None)
    return found


def file_data(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
