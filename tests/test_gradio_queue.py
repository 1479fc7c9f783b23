"""The queue on a page: what it lists, what its buttons do, and what the bar of Generate says of several runs."""

from __future__ import annotations

import re
import threading
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest

from async_sessions import JobError, JobInfo, SessionStore, open_store
from async_sessions._gradio.runs import Shown, runs_html
from async_sessions._gradio.status import status_html, status_text
from async_sessions.gradio import GradioSessions
from async_sessions.jobs import Cancelled, Failed, JobContext, JobEvent, Progress, Queued, Started, Succeeded
from async_sessions.testing.clock import FrozenClock
from tests.pages import ANN, BOB, SECRET, Page
from tests.steps import StepPipeline, local
from tests.test_gradio import a_video

if TYPE_CHECKING:
    from async_sessions import GenerationRequest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


NOW = FrozenClock().now
KEY = "0" * 32
HOSTILE = "<img src=x onerror=alert(1)>\"'</li></ul><script>alert(1)</script>${document.title=1}{{value}}"


class App:
    """A page with a Generate button and a queue, which is in a tab."""

    def __init__(self, store: SessionStore, *pipelines: StepPipeline) -> None:
        self.store = store
        self.dispatcher = local(store, pipelines)
        self.sessions = GradioSessions(store, dispatcher=self.dispatcher, secret=SECRET)
        with gr.Blocks() as self.demo:
            self.label, self.video, self.go = gr.Textbox(), gr.Video(), gr.Button("Go")
            self.sessions.bind(state={"label": self.label})
            self.bar = self.sessions.bind_generate(
                self.go, pipeline="steps", video=self.video, params={"label": self.label}
            )
            with gr.Tab("Queue") as self.tab:
                self.list = self.sessions.queue()
            self.sessions.panel()
        blocks = list(self.demo.blocks.values())
        self.run = next(block for block in blocks if isinstance(block, gr.Dropdown))
        self.result = next(block for block in blocks if isinstance(block, gr.Video) and block is not self.video)
        self.files = next(block for block in blocks if isinstance(block, gr.File))

    def button(self, label: str) -> gr.Button:
        return next(each for each in self.demo.blocks.values() if isinstance(each, gr.Button) and each.value == label)

    async def open(self, cookies: Any = ANN) -> Page:
        return await Page(self.demo, cookies).load()

    async def request(self, cookies: Any = ANN, **params: Any) -> GenerationRequest:
        session = await self.sessions.session(gr.Request(cookies=dict(cookies)))
        assert session is not None
        await session.update_state()
        return await session.generation_request("steps", params=params)

    async def ended(self, cookies: Any = ANN, **params: Any) -> str:
        """The id of a run that is over."""
        job = await self.dispatcher.submit(await self.request(cookies, **params))
        async for _ in job.events():
            pass
        return job.id

    async def statuses(self, cookies: Any = ANN) -> list[str]:
        session = await self.sessions.session(gr.Request(cookies=dict(cookies)))
        assert session is not None
        return [entry.status for entry in await self.dispatcher.jobs(session)]


@asynccontextmanager
async def opened(*pipelines: StepPipeline) -> AsyncIterator[App]:
    app = App(open_store("memory://", cleanup_interval=None), *(pipelines or (StepPipeline("steps"),)))
    async with app.sessions.launch_options()["app_kwargs"]["lifespan"](None):
        yield app


class Read(HTMLParser):
    """What a browser makes of HTML: the tags, their attributes, all text, and the text of each item by its list."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.lists: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._list = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.append((tag, dict(attributes)))
        if tag == "ul":
            self._list = str(dict(attributes)["aria-label"])
            self.lists[self._list] = []
        elif tag == "li":
            self.lists[self._list].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text
        if "li" in self._open:
            self.lists[self._list][-1] += text


def choices(page: Page, app: App) -> dict[str, str]:
    """Labels by job id."""
    return {value: label for label, value in page.props.get(app.run._id, {}).get("choices", [])}


def listed(text: str, part: str) -> list[str]:
    """The text of each run in a part of the list."""
    return Read(text).lists[part]


# --- the list


async def test_a_queue_lists_what_goes_on_what_waits_and_what_is_over() -> None:
    async with opened() as app:
        await app.ended(fail="not enough memory")
        await app.ended(label="fine")
        running = await app.dispatcher.submit(await app.request(endless=True))
        async for event in running.events():
            if isinstance(event, Progress) and event.note == "endless":
                break
        for _ in range(3):
            await app.dispatcher.submit(await app.request(endless=True))
        page = Page(app.demo, ANN)
        followed = page.run(page.listener(app.tab, "select"))
        await anext(followed)
        text = page.shows(app.list)
        first, *rest = listed(text, "Under way and waiting")
        assert "Running" in first
        assert "step 3 of 3" in first
        assert [re.sub(r".*(Waiting: [^,]+).*", r"\1", each) for each in rest] == [
            "Waiting: the next to run",
            "Waiting: number 2",
            "Waiting: number 3",
        ]
        done, failed = listed(text, "History")
        assert "Done" in done
        assert "not enough memory" in failed
        assert len(choices(page, app)) == 6
        await page.fire(app.button("Cancel all"), "click")
        async for _ in followed:
            pass
        assert await app.statuses() == ["failed", "succeeded", *["cancelled"] * 4]
        assert len(listed(page.shows(app.list), "History")) == 6


async def test_a_queue_follows_a_run_to_its_end_without_being_asked() -> None:
    steps = StepPipeline("steps")
    async with opened(steps) as app:
        job = await app.dispatcher.submit(await app.request(endless=True))
        page = Page(app.demo, ANN)
        followed = page.run(page.listener(app.tab, "select"))
        await anext(followed)
        assert listed(page.shows(app.list), "Under way and waiting")
        await job.cancel()
        async for _ in followed:
            pass
        assert "Cancelled" in page.shows(app.list)
        assert page.props[app.button("Cancel all")._id]["interactive"] is False


async def test_a_run_that_is_begun_on_the_page_is_in_its_queue() -> None:
    async with opened(a_video(StepPipeline("steps"))) as app:
        page = await app.open()
        assert "No runs yet" in page.shows(app.list)
        await page.fire(app.go, "click")
        (entry,) = listed(page.shows(app.list), "History")
        assert "Done" in entry
        (job_id,) = choices(page, app)
        assert choices(page, app)[job_id].startswith(job_id.rpartition(".")[2][:6])


async def test_of_two_looks_of_a_page_the_later_goes_on() -> None:
    async with opened() as app:
        job = await app.dispatcher.submit(await app.request(endless=True))
        page = Page(app.demo, ANN)
        first, second = (page.run(page.listener(app.tab, "select")) for _ in range(2))
        async with aclosing(first), aclosing(second):
            await anext(first)
            await anext(second)
            async for _ in first:
                pass
            assert listed(page.shows(app.list), "Under way and waiting")
            await job.cancel()
            async for _ in second:
                pass
        assert "Cancelled" in page.shows(app.list)


async def test_clearing_the_session_empties_its_queue() -> None:
    async with opened() as app:
        await app.ended()
        page = await app.open()
        await page.fire(app.button("Yes, clear all"), "click")
        assert "No runs yet" in page.shows(app.list)
        assert choices(page, app) == {}


# --- what can be done about a run


async def test_a_past_result_is_shown_and_its_files_can_be_downloaded(cache: Path) -> None:
    steps = StepPipeline("steps")
    steps.make = lambda params: {"video": (b"a video", "video/mp4"), "notes": (b"some notes", "text/plain")}
    async with opened(steps) as app:
        first = await app.ended()
        await app.ended()
        page = await app.open()
        page.values[app.run._id] = first
        await page.fire(app.button("Show result"), "click")
        assert page.shows(app.result).read_bytes() == b"a video"
        (notes,) = page.shows(app.files)
        assert Path(notes).read_bytes() == b"some notes"
        assert Path(notes).is_relative_to(cache)
        places = [each.parent for each in (app.result, app.files)]
        assert all(place is not None and page.props[place._id]["visible"] is True for place in places)
        assert not {app.result._id, app.files._id} & page.props.keys(), "Gradio looks into an update on the event loop"


async def test_a_run_without_a_result_says_so() -> None:
    async with opened() as app:
        page = await app.open()
        page.values[app.run._id] = await app.ended(fail="broken")
        with pytest.warns(UserWarning, match="has no result"):
            await page.fire(app.button("Show result"), "click")


async def test_retry_runs_the_same_again_and_the_page_shows_it() -> None:
    async with opened(a_video(StepPipeline("steps"))) as app:
        job_id = await app.ended(label="a label")
        page = await app.open()
        page.values[app.run._id] = job_id
        await page.fire(app.button("Retry"), "click")
        session = await app.sessions.session(gr.Request(cookies=dict(ANN)))
        assert session is not None
        old, new = await app.dispatcher.jobs(session)
        assert (new.params, new.inputs, new.status) == (old.params, old.inputs, "succeeded")
        assert "Done" in page.shows(app.bar)
        assert len(listed(page.shows(app.list), "History")) == 2


async def test_cancel_ends_the_chosen_run_and_no_other() -> None:
    async with opened() as app:
        jobs = [await app.dispatcher.submit(await app.request(endless=True)) for _ in range(2)]
        page = Page(app.demo, ANN)
        page.values[app.run._id] = jobs[1].id
        pressed = page.run(next(i for i, fn in app.demo.fns.items() if fn.targets[0][0] == app.button("Cancel")._id))
        async with aclosing(pressed):
            await anext(pressed)
            first, second = await app.statuses()
            assert (first in ("preparing", "running"), second) == (True, "cancelled")
        await jobs[0].cancel()


@pytest.mark.parametrize("label", ["Show result", "Retry", "Cancel"])
async def test_a_run_of_another_session_is_as_one_that_is_not_there(label: str) -> None:
    async with opened() as app:
        theirs = await app.ended(BOB, label="secret")
        mine = await app.ended(ANN)
        forged = f"{theirs.partition('.')[0]}.{mine.partition('.')[2]}"
        told = set()
        for choice in (theirs, forged, f"{mine.partition('.')[0]}.{'0' * 16}", "x", "../../x", {"a": 1}, 7):
            page = await app.open(ANN)
            page.values[app.run._id] = choice
            with pytest.warns(UserWarning, match="There is no such job") as warned:
                await page.fire(app.button(label), "click")
            told.add(str(warned[0].message))
        assert len(told) == 1
        page = await app.open({})
        page.values[app.run._id] = theirs
        with pytest.warns(UserWarning, match="There is no such job"):
            await page.fire(app.button(label), "click")
        assert (await app.statuses(BOB), await app.statuses(ANN)) == (["succeeded"], ["succeeded"])


@pytest.mark.parametrize("label", ["Show result", "Retry", "Cancel"])
async def test_with_no_run_chosen_a_button_says_what_to_do(label: str) -> None:
    async with opened() as app:
        page = await app.open()
        with pytest.warns(UserWarning, match="Choose a run first"):
            await page.fire(app.button(label), "click")


# --- several runs on a page


async def test_a_page_shows_the_runs_of_its_session_one_by_one() -> None:
    steps = a_video(StepPipeline("steps"))
    async with opened(steps) as app:
        app.dispatcher.pause()
        for _ in range(2):
            await app.dispatcher.submit(await app.request())
        page = Page(app.demo, ANN)
        bars: list[str] = []
        picked_up = page.run(page.listener(app.demo, "load", app.bar))
        async for _ in picked_up:
            bars.append(str(page.shows(app.bar)))
            app.dispatcher.resume()
        assert [bar for bar in bars if "1 more waiting" in bar]
        assert sum("Done" in bar for bar in bars) >= 2
        assert await app.statuses() == ["succeeded"] * 2


async def test_a_run_that_ended_before_its_page_could_follow_is_shown_all_the_same() -> None:
    async with opened(a_video(StepPipeline("steps"))) as app:
        page = await app.open()
        clicked = page.run(page.listener(app.go, "click"))
        async for _ in clicked:
            if "Submitted" in page.shows(app.bar):
                session = await app.sessions.session(gr.Request(cookies=dict(ANN)))
                assert session is not None
                (entry,) = await app.dispatcher.jobs(session)
                await (await app.dispatcher.job(session, entry.id)).result()
        assert page.shows(app.video).read_bytes() == b"not really a video"


async def test_a_run_that_another_process_had_is_no_frozen_bar() -> None:
    async with opened() as app:
        request = await app.request()
        session = await app.store.open_by_key(request.session_key)
        entry = JobInfo(
            id=f"{session.key}.{'1' * 16}",
            pipeline="steps",
            inputs={},
            params={},
            submitted_at=app.store.clock(),
            owner="another",
            status="running",
            attempt=1,
        )
        await session.edit_job(entry.id, lambda _: entry)  # without a marker: nobody takes it over
        page = Page(app.demo, ANN)
        picked_up = page.run(page.listener(app.demo, "load", app.bar))
        async with aclosing(picked_up):
            while "Another server has this run" not in str(page.shows(app.bar)):
                await anext(picked_up)
        followed = page.run(page.listener(app.tab, "select"))
        async with aclosing(followed):
            await anext(followed)
            assert "Another server has this run" in page.shows(app.list)
            await session.edit_job(entry.id, lambda _: None)


# --- words


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (None, "Waiting for its place in the queue"),
        (Queued(id="0.1", at=NOW, position=1), "Waiting: the next to run"),
        (Queued(id="0.1", at=NOW, position=3, eta=150), "Waiting: number 3, about 2 min"),
        (Queued(id="0.1", at=NOW - timedelta(seconds=100), position=3, eta=140), "Waiting: number 3, about 40 s"),
        (Queued(id="0.1", at=NOW - timedelta(seconds=200), position=3, eta=140), "Waiting: number 3"),
        (Queued(id="0.1", at=NOW, position=2, eta=3 * 3600), "Waiting: number 2, about 3 h"),
        (Started(id="1.1", at=NOW, attempt=1), "Started"),
        (Progress(id="1.2", at=NOW, step=5, total=40, eta=90), "Step 5 of 40, about 2 min left"),
        (Progress(id="1.2", at=NOW, step=5, total=40, note="Step", eta=7.2), "Step 5 of 40, about 8 s left"),
        (Progress(id="1.2", at=NOW, step=40, total=40, note="Decoding"), "Decoding: step 40 of 40"),
        (Succeeded(id="1.9", at=NOW, outputs={}), "Done"),
        (Failed(id="1.9", at=NOW, error=JobError("abandoned", "")), "Failed: abandoned"),
        (Cancelled(id="1.9", at=NOW), "Cancelled"),
    ],
)
async def test_an_event_is_told_in_words(event: JobEvent | None, said: str) -> None:
    assert status_text(event, NOW) == said


async def test_a_bar_has_a_name_and_a_value_for_who_does_not_see_it() -> None:
    text = status_html(Progress(id="1.2", at=NOW, step=10, total=40, note=HOSTILE), NOW, more=2)
    (bar,) = [attributes for _, attributes in Read(text).tags if "role" in attributes]
    assert (bar["aria-label"], bar["aria-valuenow"]) == ("Progress of the run", "25")
    assert bar["aria-valuetext"] == f"{HOSTILE}: step 10 of 40 (2 more waiting)"


async def test_a_run_that_the_device_has_just_begun_is_not_called_the_next() -> None:
    begun = hostile(1, status="preparing")  # its entry follows within a moment
    for event in (Started(id="1.1", at=NOW, attempt=1), Progress(id="1.2", at=NOW, step=1, total=2)):
        (item,) = listed(runs_html([Shown(begun, event)], NOW), "Under way and waiting")
        assert item.startswith("Running")
    (item,) = listed(runs_html([Shown(begun, Queued(id="0.1", at=NOW, position=1))], NOW), "Under way and waiting")
    assert item.startswith("Next")


async def test_what_is_coming_is_shown_below_the_bar_until_the_run_is_over() -> None:
    steps = a_video(StepPipeline("steps"))
    async with opened(steps) as app:
        picture = b"a small picture"
        seen = [threading.Event(), threading.Event()]

        def report(context: JobContext) -> None:
            for step, each in enumerate(seen, start=1):
                while not each.is_set():
                    context.report(step, 3, preview=picture if step == 1 else None)
                    time.sleep(0.01)

        steps.before_generate = report
        page = await app.open()
        shown: dict[str, list[str | None]] = {}
        async for _ in page.run(page.listener(app.go, "click")):
            read = Read(str(page.shows(app.bar)))
            shown[read.text] = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
            for step, each in enumerate(seen, start=1):
                if f"tep {step} of 3" in read.text:
                    each.set()
    source = f"data:image/webp;base64,{b64encode(picture).decode()}"
    assert shown["Step 1 of 3"] == [source]
    (second,) = [images for text, images in shown.items() if text.startswith("Step 2 of 3")]
    assert second == [source]  # it stays while steps come without one
    assert shown["Done"] == []


async def test_a_queue_that_was_not_looked_at_yet_does_not_say_that_there_are_no_runs() -> None:
    async with opened() as app:
        await app.ended()
        page = Page(app.demo, ANN)
        assert Read(page.shows(app.list)).text == "Looking for your runs"


def hostile(number: int, **fields: Any) -> JobInfo:
    return JobInfo(
        id=f"{KEY}.{number:016x}",
        pipeline=HOSTILE,
        inputs={},
        params={"prompt": HOSTILE * 3},
        submitted_at=NOW,
        owner=HOSTILE,
        **fields,
    )


async def test_whatever_users_and_pipelines_write_is_only_text() -> None:
    runs = [
        Shown(hostile(1), None),
        Shown(hostile(2, status="running"), Progress(id="1.1", at=NOW, step=1, total=2, note=HOSTILE)),
        Shown(hostile(3, status="failed", error=JobError(HOSTILE, HOSTILE), finished_at=NOW), None),
        Shown(hostile(4, status="cancelled", cancel_requested=True, retry="interrupted"), None),
    ]
    text = runs_html(runs, NOW)
    read = Read(text)
    assert {tag for tag, _ in read.tags} == {"div", "section", "h3", "ul", "li", "b", "span", "code", "time"}
    assert {name for _, attributes in read.tags for name in attributes} == {
        *("style", "aria-label", "aria-valuemin", "aria-valuemax", "aria-valuenow", "aria-valuetext", "role"),
        "datetime",
    }
    assert read.text.count(HOSTILE) >= 4
    assert KEY not in text
    assert not re.search(r"#[0-9a-f]{3,8}\b|rgb|\burl\(", re.sub(r"<code>.*?</code>", "", text))


async def test_a_queue_needs_a_dispatcher() -> None:
    sessions = GradioSessions("memory://", secret=SECRET)
    with gr.Blocks(), pytest.raises(RuntimeError, match="needs a dispatcher"):
        sessions.queue()


async def test_no_listener_of_a_queue_is_part_of_the_apps_api_or_waits_for_another_user() -> None:
    app = App(open_store("memory://"), StepPipeline("steps"))
    assert {fn.api_visibility for fn in app.demo.fns.values()} == {"private"}
    assert {fn.concurrency_limit for fn in app.demo.fns.values() if fn.fn} == {None}
