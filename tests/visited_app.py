"""The demo page for `visitors`, which tells at `/lag` how late its event loop was, at `/stalls` who was at work then.

Its arguments: a root, a port.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from async_sessions import open_store
from async_sessions.demo import CSS, build_demo
from tests.benchmarks.lag import Heard, listening
from tests.stalls import watching

if TYPE_CHECKING:
    from starlette.requests import Request

heard: list[Heard] = []
stalls: list[list[list[str]]] = []


@asynccontextmanager
async def listened(app: Any) -> AsyncIterator[None]:
    async with watching() as all_stalls, listening() as all_of_it:
        stalls.append(all_stalls)
        heard.append(all_of_it)
        yield


async def lag(request: Request) -> Response:
    """What was heard since it was last asked for: lateness, then what of it was for want of a core, as doubles."""
    late, busy_cores = (part.tobytes() for part in heard[-1])
    for part in heard[-1]:
        del part[:]
    return Response(late + busy_cores, media_type="application/octet-stream")


async def stood(request: Request) -> Response:
    """The same of `watching`."""
    told = JSONResponse(stalls[-1])
    stalls[-1].clear()
    return told


if __name__ == "__main__":
    demo, sessions = build_demo(open_store(Path(sys.argv[1])), hard_exit=True)
    routes = [Route("/lag", lag), Route("/stalls", stood), Mount("/images", sessions.images_app())]
    app = {"lifespan": listened, "routes": routes}
    sessions.launch(demo, server_port=int(sys.argv[2]), css=CSS, footer_links=[], app_kwargs=app)
