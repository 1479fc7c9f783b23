"""Events that nobody's page sends: with another user's ids, for another page, by a program. And what one may send."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import httpx
import pytest
from gradio_client import Client, handle_file  # type: ignore[import-untyped]

from async_sessions import SessionStore, open_store
from async_sessions.asgi import COOKIE, CookieSigner
from tests.images import rgba_png
from tests.over_http import Browser, file_data, index_of, mounted
from tests.pages import BOB, SECRET, App
from tests.servers import Server, serving
from tests.steps import StepPipeline
from tests.test_gradio import a_video

if TYPE_CHECKING:
    from blockbuster import BlockBuster

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


class Whole(App):
    """A page with all that there is."""

    def __init__(self, store: SessionStore, *pipelines: StepPipeline) -> None:
        super().__init__(store, *pipelines)
        with self.demo:
            self.sessions.queue()


def told(answer: str, given: object) -> str:
    """An answer without what differs from call to call, and without what was sent."""
    answer = re.sub(r"input_value=.*?, input_type", "", answer.replace(json.dumps(given)[1:-1], "GIVEN"))
    answer = re.sub(r'"(event_id|session_hash)":\s*"[^"]*"', r'"\1":0', answer)
    answer = re.sub(r'"(\w*duration|\w*_?time\w*|\w*eta)":\s*(null|[-\d.e]+)', r'"\1":0', answer)
    answer = re.sub(r'datetime=\\"[^"]*"', "", answer)
    return re.sub(r"<code>[0-9a-f]{8}</code>|\d\d:\d\d UTC", "", answer)  # a stranger's own session


@pytest.mark.anyio
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
@pytest.mark.slow
async def test_what_is_anothers_is_answered_as_what_is_not_there(tmp_path: Path, blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # Gradio's own calls run below our middleware
    steps = a_video(StepPipeline("steps", start=True, end=False))
    app = Whole(open_store(tmp_path / "root", cleanup_interval=None), steps)
    async with mounted(app) as parent:
        numbers = itertools.count()

        def stranger() -> Browser:
            browser = Browser(parent)
            browser.http.cookies.set(COOKIE, CookieSigner(SECRET).sign(f"stranger {next(numbers)}"))
            return browser

        ann = stranger()
        for name, width in (("one.png", 90), ("two.png", 91)):
            path = await ann.upload(name, rgba_png(width, 60))
            assert '"success":true' in await ann.fire(index_of(app.demo, app.start, "upload"), [file_data(path)])
        session = app.store.session("stranger 0")
        request = await session.generation_request("steps", slots=["start"])
        assert app.dispatcher is not None
        over = await app.dispatcher.submit(request)
        await over.result()
        page = {"session_hash": "page-of-ann"}
        await ann.fire(index_of(app.demo, app.go, "click"), ["steps", "", "", "steps", None, None], **page)
        before = await session.info()
        (recent,) = before.recent
        pairs: list[tuple[Any, Any]] = [
            (over.id, f"{'0' * 32}.{'0' * 16}"),
            (recent.record.digest, "0" * 64),
            (before.images["start"].blob, f"blobs/00/{'0' * 32}.png"),
        ]
        for index, fn in app.demo.fns.items():
            if fn.fn is None:
                continue
            for real, made_up in pairs:
                answers = set()
                for given, said in ((real, page), (made_up, {"session_hash": f"page {next(numbers)}"})):
                    answer = await stranger().fire(index, [given] * len(fn.inputs), **said)
                    answers.add(told(answer, given))
                assert len(answers) == 1, "\n".join([str(fn.name), *sorted(answers)])
        assert await session.info() == before


@pytest.mark.anyio
async def test_who_says_another_pages_name_sees_nothing_of_it_and_stops_nothing() -> None:
    steps = a_video(StepPipeline("steps"))
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    app = Whole(open_store("memory://", cleanup_interval=None), steps)
    async with app.running():
        page, other = await app.open({}), await app.open(BOB)  # of a page without a cookie the name is all there is
        other._request = gr.Request(session_hash=page._request.session_hash, cookies=dict(BOB))
        before, tried = dict(other.values), False
        async for _ in page.run(page.listener(app.go, "click")):
            if not tried and "endless" in str(page.shows(app.bar)):
                tried = True
                await other.fire(app.demo, "load")
                await other.fire(app.cancel, "click")
                await other.fire(app.button("Cancel all"), "click")
                assert other.values == before
                (job,) = [job async for info in app.store.sessions() for job in info.jobs.values()]
                assert (job.under_way, job.cancel_requested) == (True, False)
                await page.fire(app.cancel, "click")
        assert tried
        assert "Cancelled" in page.shows(app.bar)


# --- a program, with the cookie of a browser


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path, "-m", "tests.results_app", str(tmp_path / "root")) as server:
        yield server


class Program:
    """A `gradio_client` that sends a cookie, or none, and may call what only a page calls."""

    def __init__(self, server: Server, cookie: str | None, folder: Path) -> None:
        headers = {} if cookie is None else {"Cookie": cookie}
        self._client = Client(server.url, headers=headers, download_files=str(folder), verbose=False)

    def index(self, part: str, event: str) -> int:
        (component,) = [each["id"] for each in self._client.config["components"] if _elem_id(each) == part]
        return self._find(lambda dependency: [component, event] in dependency["targets"])

    def index_after(self, index: int) -> int:
        return self._find(lambda dependency: dependency["trigger_after"] == index)

    def call(self, index: int, *data: Any) -> Any:
        self._client.endpoints[index].is_valid = True  # the client's own refusal of what is private, not the server's
        return self._client.predict(*data, fn_index=index)

    def kept(self) -> Any:
        return self._client.predict(api_name="/kept")

    def close(self) -> None:
        self._client.close()

    def _find(self, suits: Any) -> int:
        return next(int(each["id"]) for each in self._client.config["dependencies"] if suits(each))


def _elem_id(component: dict[str, Any]) -> Any:
    return component["props"].get("elem_id")


def test_a_program_that_sends_a_browsers_cookie_has_its_session_and_any_other_has_none(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "open").touch()
    photo = tmp_path / "photo.png"
    photo.write_bytes(rgba_png(240, 160))
    cookies = []
    for _ in range(2):
        (cookie,) = httpx.get(server.url).cookies.items()
        cookies.append("=".join(cookie))
    ann, bob, nobody = programs = [Program(server, cookie, tmp_path / "got") for cookie in (*cookies, None)]
    ann.call(ann.index("start", "upload"), handle_file(photo))
    assert [program.kept() for program in programs] == [{"start": [240, 160]}, {}, {}]
    clicked = ann.index("every", "click")
    ann.call(clicked, "a label", "a label", handle_file(photo))
    bar, gallery, *_ = ann.call(ann.index_after(clicked))
    assert "Done" in bar
    assert len(gallery) == 4
    for program in (bob, nobody):
        answer = str(program.call(program.index_after(clicked)))
        assert "Done" not in answer
        assert ".png" not in answer
    for program in programs:
        program.close()
    assert "Traceback" not in server.log.read_text()
