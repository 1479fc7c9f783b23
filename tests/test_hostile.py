"""Hostile names, prompts, values and notes in whatever we render: no element and no attribute more than with harmless
ones, by the rules of browsers.
"""

from __future__ import annotations

import html
import io
import json
import warnings
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import pytest
from msgspec.structs import replace

from async_sessions import JobError, JobInfo, SessionInfo, open_store
from async_sessions._gradio.html import bar_html, message_html
from async_sessions._gradio.question import Conflict, question_html
from async_sessions._gradio.runs import Shown, runs_html
from async_sessions._gradio.status import status_html
from async_sessions.asgi import COOKIE, CookieSigner
from async_sessions.bundle import stream_session
from async_sessions.gradio import GradioSessions, session_info_html
from async_sessions.jobs import Failed, JobEvent, Progress, Queued, Started
from async_sessions.records import RecentImage
from async_sessions.testing.clock import FrozenClock
from tests.hostile import HARMLESS, STRINGS, Shape, read, shape
from tests.images import rgba_png
from tests.pages import Page
from tests.steps import StepPipeline, local

if TYPE_CHECKING:
    from async_sessions.jobs import JobContext

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover, pytest.mark.usefixtures("cache")]

NOW = FrozenClock().now
SECRET = "a secret of the tests"


@pytest.fixture
def anyio_backend() -> str:
    """One: what is rendered has nothing to do with the loop."""
    return "asyncio"


def as_text(string: str) -> str:
    """What a browser lets one read of it, where it is text."""
    return read(html.escape(string))


def test_the_strings_are_many_and_most_are_elements_where_nobody_escapes_them() -> None:
    assert len(set(STRINGS)) >= 60
    assert sum(shape(string) != shape(HARMLESS) for string in STRINGS) > 30
    assert all(shape(f'<b title="{html.escape(string)}">x</b>') == shape('<b title="">x</b>') for string in STRINGS)


# --- what renders text alone


def events(string: str) -> list[JobEvent]:
    place: dict[str, Any] = {"id": "1.1", "at": NOW}
    return [
        Queued(**place, position=1, eta=30.0),
        Started(**place, attempt=1),
        Progress(**place, step=1, total=2, note=string, eta=3.0),
        Failed(**place, error=JobError(string, string)),
        Failed(**place, error=JobError(string, "")),
    ]


def job(info: SessionInfo, string: str, **fields: Any) -> JobInfo:
    return JobInfo(
        id=f"{info.key}.{'a1' * 8}",
        pipeline=string,
        inputs=dict(info.images),
        params={"prompt": string, string: string},
        submitted_at=NOW,
        owner=string,
        **fields,
    )


def renderings(string: str, info: SessionInfo) -> list[str]:
    """Everything that makes HTML, with `string` wherever a user, a file or a pipeline says something."""
    running = job(info, string, status="running", started_at=NOW)
    failed = job(info, string, status="failed", error=JobError(string, string), finished_at=NOW)
    names = {slot: replace(record, source_name=string) for slot, record in info.images.items()}
    recent = tuple(RecentImage(slot, record, NOW) for slot, record in names.items())
    pins = {string: NOW + timedelta(hours=1)}
    named = replace(info, images=names, recent=recent, pins=pins, state={string: string, "prompt": string})
    held = replace(named, jobs={running.id: running}, images={}, recent=())
    thumbnails = {record.blob: b"RIFF" for record in names.values()}
    runs = [Shown(replace(running, params={"prompt": string}), event) for event in (None, *events(string)[:3])]
    runs += [Shown(failed, None), Shown(replace(failed, status="cancelled", error=None), None)]
    return [
        session_info_html(named, now=NOW, thumbnails=thumbnails, max_bytes=10_000_000),
        session_info_html(replace(named, jobs={running.id: running}), now=NOW),
        session_info_html(held, now=NOW, thumbnails=thumbnails),
        session_info_html(replace(held, expires_at=NOW), now=NOW),
        message_html(string),
        bar_html(string, 0.5),
        *(status_html(event, NOW, more=2) for event in events(string)),
        question_html([Conflict("start", {"orig_name": string, "url": "/file"}, names["start"], None)]),
        runs_html(runs, NOW),
    ]


async def test_whatever_is_rendered_has_the_elements_and_attributes_of_a_harmless_one() -> None:
    async with open_store("memory://", cleanup_interval=None, clock=FrozenClock()) as store:
        session = await store.create_session()
        await session.store_images({"start": rgba_png(40, 30), "end": rgba_png(30, 40)})
        info = await session.info()
    harmless = [shape(text) for text in renderings(HARMLESS, info)]
    assert sum(map(len, harmless)) > 100
    for string in STRINGS:
        rendered = renderings(string, info)
        assert [shape(text) for text in rendered] == harmless, string[:80]
        for text in rendered[:2] + rendered[4:6] + rendered[-1:]:
            assert as_text(string)[:100] in read(text), string[:80]


# --- through the page


class App:
    """A page with all that there is, a pipeline whose notes and failures are the prompt, and what was told by it."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.store = open_store("memory://", cleanup_interval=None, clock=self.clock)
        self.pipeline = StepPipeline("steps", start=False)
        self.pipeline.before_generate = self._note
        self.dispatcher = local(self.store, [self.pipeline])
        self.sessions = GradioSessions(self.store, dispatcher=self.dispatcher, secret=SECRET)
        with gr.Blocks() as self.demo:
            self.start, self.prompt = gr.Image(), gr.Textbox()
            self.model = gr.Textbox("steps")
            self.sessions.bind(images={"start": self.start}, state={"prompt": self.prompt})
            self.info = self.sessions.panel()
            self.video, self.go = gr.Video(), gr.Button("Go")
            params = {"fail": self.prompt, "label": self.prompt}
            self.bar = self.sessions.bind_generate(self.go, pipeline=self.model, params=params, video=self.video)
            self.list = self.sessions.queue()
        self.html = [block for block in self.demo.blocks.values() if isinstance(block, gr.HTML)]

    def _note(self, context: JobContext) -> None:
        context.report(1, 2, note=self.pipeline.ran[-1])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.sessions.launch_options()["app_kwargs"]["lifespan"](None):
            yield

    def labelled(self, label: str) -> Any:
        return next(
            each
            for each in self.demo.blocks.values()
            if label in (getattr(each, "label", None), getattr(each, "value", None))
        )

    async def open(self, who: str) -> Page:
        return await Page(self.demo, {COOKIE: CookieSigner(SECRET).sign(who)}).load()

    def shown(self, page: Page) -> list[str]:
        """What the page shows as HTML."""
        return [str(page.shows(block)) for block in self.html]


async def live(app: App, page: Page, string: str) -> list[str]:
    """Upload, replace, set a value, run and fail, with `string` as every name and value."""
    data = partial(Path(gr.utils.get_upload_folder()).joinpath, str(page._request.session_hash))
    for number, size in enumerate([(40, 30), (50, 30)]):
        (path := data(str(number))).mkdir(parents=True)
        (path / "image.png").write_bytes(rgba_png(*size))
        page.values[app.start._id] = {"path": str(path / "image.png"), "orig_name": string}
        await page.fire(app.start, "upload")
    await page.enter(app.prompt, string)
    seen = app.shown(page)
    await page.fire(app.go, "click")
    await page.load()
    return [*seen, *app.shown(page)]


@asynccontextmanager
async def told() -> AsyncIterator[list[str]]:
    """The notices that the page is given."""
    notices: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notices
    notices += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


def is_text(string: str) -> bool:
    """Whether UTF-8 can hold it: half a surrogate pair is refused where something is to be kept."""
    return string == string.encode(errors="replace").decode()


@pytest.mark.slow
async def test_names_prompts_values_and_failures_add_nothing_to_a_page() -> None:
    app = App()
    async with app.running():
        harmless = [shape(text) for text in await live(app, await app.open(HARMLESS), HARMLESS)]
        kept = 0
        for number, string in enumerate(STRINGS):
            async with told() as notices:
                page = await app.open(f"user {number}")
                seen = await live(app, page, string)
            if is_text(string) and not notices:
                kept += 1
                assert [shape(text) for text in seen] == harmless, string[:80]
                again = await app.open(f"user {number}")
                assert again.shows(app.prompt) == string
            assert all(shape(notice) == shape(HARMLESS) for notice in notices), string[:80]
            assert bool(notices) is not is_text(string), string[:80]
        assert kept >= 60


async def test_what_a_client_says_for_a_choice_is_only_text_in_the_notice_about_it() -> None:
    app = App()
    async with app.running():
        page = await app.open("ann")
        await live(app, page, HARMLESS)
        harmless: dict[str, list[Shape]] = {}
        for string in (f"no slot, {HARMLESS}", *STRINGS):
            for labels, button in CHOICES:
                for label in labels:
                    page.values[app.labelled(label)._id] = string
                async with told() as notices:
                    await page.fire(app.labelled(button), "click")
                assert len(notices) == 1, (button, string[:80])
                assert shape(notices[0]) == shape(HARMLESS), (button, string[:80])
                shapes = [shape(text) for text in app.shown(page)]
                assert harmless.setdefault(button, shapes) == shapes, (button, string[:80])
            page.values[app.model._id] = string
            async with told() as notices:
                await page.fire(app.go, "click")
            assert [shape(notice) for notice in notices] == [shape(HARMLESS)], string[:80]


CHOICES = [
    (["Image to clear"], "Clear image"),
    (["Replaced or cleared image", "Put it"], "Put back"),
    (["Replaced or cleared image"], "Put back"),
    (["Run"], "Show result"),
    (["Run"], "Retry"),
]


async def bundle() -> bytes:
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session(prompt=HARMLESS)
        await session.store_image(rgba_png(40, 30), "start", name=HARMLESS)
        return b"".join([chunk async for chunk in stream_session(session)])


def renamed(data: bytes, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> bytes:
    """The ZIP with another manifest, or other files."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    change(manifest, files)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in {"manifest.json": json.dumps(manifest).encode(), **files}.items():
            archive.writestr(name, content)
    return made.getvalue()


def with_values(string: str, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """A bundle that is true: the name of the image and the value are hostile."""
    for file in manifest["files"].values():
        file["name"] = string
    manifest["state"] = {"prompt": string}


def with_files(string: str, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """The file in the ZIP is called so, and is no image."""
    (name,) = files
    manifest["files"] = {string: manifest["files"].pop(name)}
    manifest["images"] = {"start": string}
    files[string] = b"x" * len(files.pop(name))


def with_keys(string: str, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """Whatever has a name in the manifest has that one."""
    manifest["images"] = {string: manifest["images"]["start"]}
    manifest["state"] = {string: string}
    manifest["format"] = string


@pytest.mark.parametrize("change", [with_values, with_files, with_keys])
async def test_a_zip_with_hostile_names_adds_nothing_to_a_page(
    cache: Path, change: Callable[[str, dict[str, Any], dict[str, bytes]], None]
) -> None:
    app, data = App(), await bundle()
    async with app.running():
        harmless = None
        for number, string in enumerate((HARMLESS, *STRINGS)):
            if not is_text(string):
                continue
            page = await app.open(f"user {number}")
            (path := cache / str(number)).mkdir(parents=True)
            (path / "session.zip").write_bytes(renamed(data, partial(change, string)))
            async with told() as notices:
                await page.choose_file(app.labelled("Restore from ZIP"), path / "session.zip")
            assert len(notices) == (change is not with_values), string[:80]
            assert all(shape(notice) == shape(HARMLESS) for notice in notices), string[:80]
            shapes = [shape(text) for text in app.shown(page)]
            assert (harmless := harmless or shapes) == shapes, string[:80]
            assert change is not with_values or page.shows(app.prompt) == string
