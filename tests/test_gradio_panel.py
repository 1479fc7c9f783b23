"""The panel: what it shows of a session, and what its buttons do to it."""

from __future__ import annotations

import shutil
import zipfile
from contextlib import AsyncExitStack
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import fastapi
import gradio as gr
import httpx
import pytest

from async_sessions import JobInfo, Limits, Session, SessionInfo, SessionNotFoundError, open_store
from async_sessions._gradio.kept import age
from async_sessions.bundle import export_session, import_session
from async_sessions.gradio import GradioSessions, session_info_html
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, files_below
from tests.images import jpeg_with_exif, photograph, rgba_png
from tests.pages import ANN, BOB, SECRET, App, Page
from tests.steps import StepPipeline
from tests.test_gradio import generating

if TYPE_CHECKING:
    from blockbuster import BlockBuster

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


HOSTILE = "<img src=x onerror=alert(1)>\"'<b>&amp;${document.title=1}{{value}}.png"
START = FrozenClock().now


class Read(HTMLParser):
    """What a browser makes of HTML: the tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "img":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def component(app: App, label: str) -> Any:
    return next(block for block in app.demo.blocks.values() if getattr(block, "label", None) == label)


def choices(page: Page, chooser: Any) -> dict[str, str]:
    """The labels by value."""
    return {value: label for label, value in page.props.get(chooser._id, {}).get("choices", [])}


async def choose(page: Page, app: App, label: str, value: Any) -> None:
    page.values[component(app, label)._id] = value


async def click(page: Page, app: App, label: str) -> None:
    await page.fire(app.button(label), "click")


async def session_of(app: App) -> Session:
    session = await app.sessions.session(gr.Request(cookies=dict(ANN)))
    assert session is not None
    return session


def job(info: SessionInfo, status: Any = "running") -> JobInfo:
    return JobInfo(
        id=f"{info.key}.{'a1b2c3d4' * 2}",
        pipeline="steps",
        inputs={"start": info.images["start"]},
        params={},
        submitted_at=START,
        owner="x",
        status=status,
    )


# --- what it shows


async def test_it_shows_thumbnail_name_size_dimensions_age_and_the_end(uploads: Any) -> None:
    clock = FrozenClock()
    limits = Limits(max_session_bytes=10 * 2**20)
    app = App(open_store("memory://", cleanup_interval=None, clock=clock, limits=limits))
    async with app.running():
        page = await app.open()
        photo = jpeg_with_exif(6, image=photograph(480, 640, seed=1))
        await page.choose_file(app.start, uploads("boat.jpg", photo))
        clock.advance(minutes=5)
        await click(page, app, "Refresh")
        read = Read(page.shows(app.info))
        assert "start · boat.jpg" in read.text
        assert "480 × 640" in read.text  # noqa: RUF001 - as the panel writes it
        assert "KB · stored 5 minutes ago" in read.text
        assert f"kept until {(await app.kept()).expires_at:%d %b %Y, %H:%M} UTC" in read.text
        (image,) = [attributes for tag, attributes in read.tags if tag == "img"]
        assert str(image["src"]).startswith("data:image/webp;base64,")
        (meter,) = [attributes for _, attributes in read.tags if attributes.get("role") == "meter"]
        assert str(meter["aria-valuetext"]).endswith("of 10.0 MB")
        assert [attributes["aria-label"] for tag, attributes in read.tags if tag == "ul"] == ["Images"]


async def test_what_a_run_needs_is_kept_whatever_the_clock_says(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    info = await app.kept()
    held = Read(session_info_html(_with(info, jobs={"x": job(info)}), now=info.expires_at + timedelta(days=1)))
    assert "kept while a run needs it" in held.text
    assert "kept until" not in held.text
    assert "needed by run a1b2c3 (running)" in held.text
    soon = Read(session_info_html(_with(info, jobs={"x": job(info)}), now=info.created_at))
    assert "UTC, and while a run needs it" in soon.text
    over = Read(session_info_html(_with(info, jobs={"x": job(info, "succeeded")}), now=info.created_at))
    assert "needed by" not in over.text
    pins = {HOSTILE: info.expires_at + timedelta(days=9), "over": info.created_at}
    pinned = Read(session_info_html(_with(info, pins=pins), now=info.expires_at + timedelta(days=1)))
    assert f"kept for {HOSTILE} until" in pinned.text
    alone = Read(session_info_html(_with(info, images={}, jobs={"x": job(info)}), now=info.created_at))
    assert "Kept for runs alone" in alone.text


def _with(info: SessionInfo, **changes: Any) -> SessionInfo:
    fields = {name: getattr(info, name) for name in info.__struct_fields__}
    return SessionInfo(**{**fields, **changes})


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "just now"), (59, "just now"), (60, "1 minute ago"), (7199, "1 hour ago"), (200_000, "2 days ago")],
)
def test_an_age_is_told_as_people_would(seconds: float, words: str) -> None:
    assert age(seconds) == words


async def test_hostile_names_are_only_text(app: App, uploads: Any) -> None:
    page = await app.open()
    for size in (40, 50):  # the first goes to those that can be put back
        path = uploads("file.png", rgba_png(size, 30))
        page.values[app.start._id] = {"path": str(path), "orig_name": HOSTILE}
        await page.fire(app.start, "upload")
    read = Read(page.shows(app.info))
    assert read.text.count("onerror=alert(1)") == 2
    assert "onerror" not in {name for _, attributes in read.tags for name in attributes}
    assert {tag for tag, _ in read.tags} <= {
        "div", "span", "b", "code", "img", "ul", "li", "h3", "section", "time",
    }  # fmt: skip
    assert all(str(attributes["src"]).startswith("data:") for tag, attributes in read.tags if tag == "img")


async def test_colours_are_the_themes_alone(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    styles = " ".join(str(attributes.get("style", "")) for _, attributes in Read(page.shows(app.info)).tags)
    assert "#" not in styles
    assert "rgb" not in styles


async def test_a_damaged_thumbnail_leaves_the_rest_shown(app: App, uploads: Any, tmp_path: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    record = (await app.kept()).images["start"]
    (tmp_path / "root" / f"{record.blob}.thumb").write_bytes(b"damage")
    await click(page, app, "Refresh")
    assert "no preview" in page.shows(app.info)
    assert "boat.png" in page.shows(app.info)


# --- clear and put back


async def test_one_image_is_cleared_and_put_back(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    await page.choose_file(app.end, uploads("shore.png", rgba_png(300, 200)))
    held, recent = component(app, "Image to clear"), component(app, "Replaced or cleared image")
    assert list(choices(page, held)) == ["start", "end"]
    page.values[held._id] = "start"
    await click(page, app, "Clear image")
    assert (page.shows(app.start), page.shows(app.end) is not None) == (None, True)
    assert "Can be put back" in page.shows(app.info)
    assert list(choices(page, held)) == ["end"]
    assert page.shows(held) is None
    (digest,) = choices(page, recent)
    page.values[recent._id] = digest
    await click(page, app, "Put back")
    assert page.shows(app.start).name == "start.png"
    assert (await app.kept()).images["start"].source_name == "boat.png"
    assert choices(page, recent) == {}


async def test_a_replaced_image_goes_to_the_slot_that_is_chosen(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png(40, 30)))
    await page.choose_file(app.start, uploads("two.png", rgba_png(50, 30)))
    recent = component(app, "Replaced or cleared image")
    ((digest, label),) = choices(page, recent).items()
    (removed,) = (await app.kept()).recent
    until = f"until {removed.removed_at + app.store.grace:%d %b %H:%M} UTC"
    assert label == f"start · one.png · 40 × 30 · {until}"  # noqa: RUF001 - as the panel writes it
    assert "was in start · one.png" in Read(page.shows(app.info)).text
    assert f", until {removed.removed_at + app.store.grace:%d %b %Y, %H:%M} UTC" in Read(page.shows(app.info)).text
    page.values[recent._id] = digest
    await choose(page, app, "Put it", "end")
    await click(page, app, "Put back")
    names = {slot: record.source_name for slot, record in (await app.kept()).images.items()}
    assert names == {"start": "two.png", "end": "one.png"}


@pytest.mark.parametrize(
    ("label", "chooser", "value", "told"),
    [
        ("Clear image", "Image to clear", None, "Choose an image first"),
        ("Clear image", "Image to clear", "../../etc", "still kept"),
        ("Clear image", "Image to clear", {"x": 1}, "Choose an image first"),
        ("Put back", "Replaced or cleared image", None, "Choose an image first"),
        ("Put back", "Replaced or cleared image", "0" * 64, "not among the recent ones"),
        ("Put back", "Put it", "elsewhere", "Choose an image first"),
    ],
)
async def test_what_is_not_there_is_told(
    app: App, uploads: Any, label: str, chooser: str, value: Any, told: str
) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await choose(page, app, chooser, value)
    with pytest.warns(UserWarning, match=told):
        await click(page, app, label)
    assert "start" in (await app.kept()).images


async def test_an_image_goes_to_no_slot_that_the_page_has_not(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await page.remove(app.start)
    (digest,) = choices(page, component(app, "Replaced or cleared image"))
    await choose(page, app, "Replaced or cleared image", digest)
    await choose(page, app, "Put it", "elsewhere")
    with pytest.warns(UserWarning, match="Choose where"):
        await click(page, app, "Put back")
    assert (await app.kept()).images == {}


async def test_what_is_past_its_grace_can_not_be_put_back(uploads: Any) -> None:
    clock = FrozenClock()
    app = App(open_store("memory://", cleanup_interval=None, clock=clock, grace=timedelta(hours=1)))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        await page.remove(app.start)
        (digest,) = choices(page, component(app, "Replaced or cleared image"))
        await choose(page, app, "Replaced or cleared image", digest)
        clock.advance(hours=2)
        with pytest.warns(UserWarning, match="not among the recent ones"):
            await click(page, app, "Put back")
        assert page.shows(app.start) is None
        assert choices(page, component(app, "Replaced or cleared image")) == {}


async def test_nobody_clears_or_puts_back_what_is_anothers(app: App, uploads: Any) -> None:
    page = await app.open(ANN)
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    digest = (await app.kept()).images["start"].digest
    other = await app.open(BOB)
    await choose(other, app, "Image to clear", "start")
    await click(other, app, "Clear image")
    assert "start" in (await app.kept()).images
    await choose(other, app, "Replaced or cleared image", digest)
    with pytest.warns(UserWarning, match="not among the recent ones"):
        await click(other, app, "Put back")
    assert other.shows(app.start) is None


async def test_clear_all_asks_first(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    sure = next(block for block in app.demo.blocks.values() if isinstance(block, gr.Column) and not block.visible)
    await click(page, app, "Clear all")
    assert page.props[sure._id]["visible"] is True
    assert "start" in (await app.kept()).images
    await click(page, app, "No, keep it")
    assert page.props[sure._id]["visible"] is False
    assert "start" in (await app.kept()).images
    await click(page, app, "Clear all")
    await click(page, app, "Yes, clear all")
    assert page.props[sure._id]["visible"] is False
    assert page.shows(app.start) is None
    assert "Nothing is kept yet" in page.shows(app.info)


# --- ZIP


def saved(app: App, page: Page) -> Path | None:
    button = next(block for block in app.demo.blocks.values() if isinstance(block, gr.DownloadButton))
    value = page.shows(button)
    return None if value is None else Path(value)


def restore_button(app: App) -> gr.UploadButton:
    return next(block for block in app.demo.blocks.values() if isinstance(block, gr.UploadButton))


async def test_a_session_goes_into_a_zip_and_out_of_it_in_another_browser(app: App, uploads: Any, cache: Path) -> None:
    page = await app.open(ANN)
    await page.choose_file(app.start, uploads("boat.jpg", jpeg_with_exif(6)))
    await page.enter(app.prompt, "a boat")
    await click(page, app, "Download my session (ZIP)")
    path = saved(app, page)
    assert path is not None
    assert path.is_relative_to(cache)
    assert len(path.parent.name) == 64
    data = path.read_bytes()
    assert b"ann" not in data
    assert (await app.kept()).key.encode() not in data

    other = await app.open(BOB)
    await other.choose_file(restore_button(app), uploads("session.zip", data))
    assert other.shows(app.start).name == "start.jpg"
    assert other.shows(app.prompt) == "a boat"
    assert "boat.jpg" in other.shows(app.info)
    there, here = await app.kept(BOB), await app.kept(ANN)
    assert there.images["start"].digest == here.images["start"].digest
    assert there.state == here.state
    assert not files_below(cache, "upload1")  # the ZIP that was sent
    before = there.revision
    await other.fire(app.prompt, "change")  # as the browser does after a restore
    assert (await app.kept(BOB)).revision == before


async def test_the_zip_has_what_the_runs_made_and_restoring_it_begins_none(uploads: Any, tmp_path: Path) -> None:
    steps = StepPipeline("steps", start=True)
    steps.make = lambda params: {"video": (b"a video", "video/mp4")}
    app = App(open_store("memory://", cleanup_interval=None), steps, slots={"steps": ["start"]})
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("boat.png", rgba_png()))
        await page.enter(app.label, "a boat")
        await page.fire(app.go, "click")
        await click(page, app, "Download my session (ZIP)")
        path = saved(app, page)
        assert path is not None
        taken = anyio.Path(tmp_path / "taken.zip")
        await taken.write_bytes(path.read_bytes())
        async with open_store("memory://") as elsewhere:
            (run,) = (await (await import_session(elsewhere, Path(taken))).info()).jobs.values()
        assert (run.status, run.params["label"], sorted(run.outputs)) == ("succeeded", "a boat", ["start", "video"])
        other = await app.open(BOB)
        await other.choose_file(restore_button(app), uploads("session.zip", await taken.read_bytes()))
        assert other.shows(app.start) is not None
        assert (await app.kept(BOB)).jobs == {}


async def test_clear_all_removes_the_zip_that_was_made(app: App, uploads: Any, cache: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    await click(page, app, "Download my session (ZIP)")
    await click(page, app, "Download my session (ZIP)")
    assert len([path for path in files_below(cache) if path.suffix == ".zip"]) == 1
    await click(page, app, "Yes, clear all")
    assert saved(app, page) is None
    assert files_below(cache) == []


async def test_where_no_file_can_be_made_for_the_browser_the_page_says_so(app: App, uploads: Any, cache: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    shutil.rmtree(cache)
    cache.write_bytes(b"a file in its place")
    with pytest.warns(UserWarning, match="There is no ZIP. .*storage does not answer"):
        await click(page, app, "Download my session (ZIP)")
    assert saved(app, page) is None


async def test_there_is_no_zip_of_nothing_or_of_what_is_damaged(app: App, uploads: Any, tmp_path: Path) -> None:
    page = await app.open()
    with pytest.warns(UserWarning, match="Nothing is kept yet"):
        await click(page, app, "Download my session (ZIP)")
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    (tmp_path / "root" / (await app.kept()).images["start"].blob).write_bytes(b"damage")
    with pytest.warns(UserWarning, match="damaged"):
        await click(page, app, "Download my session (ZIP)")
    assert saved(app, page) is None


async def bundle_of(tmp_path: Path, *slots: str, **state: Any) -> bytes:
    async with open_store("memory://") as store:
        session = await store.create_session(**state)
        for slot in slots:
            await session.store_image(rgba_png(90, 60), slot, name=f"{slot}.png")
        await export_session(session, tmp_path / "made.zip")
    return (tmp_path / "made.zip").read_bytes()


async def test_a_zip_brings_what_is_bound_and_nothing_else(app: App, uploads: Any, tmp_path: Path) -> None:
    page = await app.open()
    await page.choose_file(app.end, uploads("shore.png", rgba_png(31, 20)))
    data = await bundle_of(tmp_path, "start", "secret", prompt="a boat", credits=1000)
    await page.choose_file(restore_button(app), uploads("session.zip", data))
    info = await app.kept()
    assert {slot: record.source_name for slot, record in info.images.items()} == {
        "start": "start.png",
        "end": "shore.png",
    }
    assert info.state == {"prompt": "a boat"}
    assert page.shows(app.end) is not None


async def test_a_zip_makes_no_component_update_and_names_no_file_of_the_server(
    app: App, uploads: Any, tmp_path: Path
) -> None:
    file = {"path": __file__, "meta": {"_type": "gradio.FileData"}}
    update = {"__type__": "update", "visible": False}
    page = await app.open()
    for hostile in (file, [file], update, [[update]]):
        data = await bundle_of(tmp_path, "start", prompt=hostile, model=hostile)
        await page.choose_file(restore_button(app), uploads("session.zip", data))
        assert (await app.kept()).state == {}
        assert (page.shows(app.prompt), page.shows(app.model)) == (None, "steps")


async def test_a_value_that_its_component_can_not_show_is_left_out(uploads: Any, tmp_path: Path) -> None:
    sessions = GradioSessions(open_store("memory://", cleanup_interval=None), secret=SECRET)
    with gr.Blocks() as demo:
        steps, prompt = gr.Number(precision=0), gr.Textbox()
        sessions.bind(state={"steps": steps, "prompt": prompt}).panel()
        button = next(block for block in demo.blocks.values() if isinstance(block, gr.UploadButton))
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        page = await Page(demo, ANN).load()
        data = await bundle_of(tmp_path, steps="many", prompt="a boat")
        await page.choose_file(button, uploads("session.zip", data))
        assert (page.shows(steps), page.shows(prompt)) == (None, "a boat")


@pytest.mark.parametrize("damage", ["no ZIP", "another ZIP", "nothing for this page", "compressed"])
async def test_a_zip_that_is_none_of_ours_changes_nothing(
    app: App, uploads: Any, tmp_path: Path, cache: Path, damage: str
) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("boat.png", rgba_png()))
    before = await app.kept()
    data = {
        "no ZIP": b"only words",
        "another ZIP": _zip(tmp_path, zipfile.ZIP_STORED, {"a.txt": b"words"}),
        "compressed": _zip(tmp_path, zipfile.ZIP_DEFLATED, {"manifest.json": b"{}"}),
        "nothing for this page": await bundle_of(tmp_path, "elsewhere"),
    }[damage]
    sent = uploads("session.zip", data)
    with pytest.warns(UserWarning, match="The ZIP is not restored"):
        await page.choose_file(restore_button(app), sent)
    assert await app.kept() == before
    assert page.shows(app.start) is not None
    assert not sent.exists()


def _zip(tmp_path: Path, compression: int, files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(tmp_path / "other.zip", "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return (tmp_path / "other.zip").read_bytes()


async def test_a_zip_that_does_not_fit_says_so_and_changes_nothing(uploads: Any, tmp_path: Path) -> None:
    app = App(open_store("memory://", cleanup_interval=None, limits=Limits(max_session_images=1)))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("boat.png", rgba_png()))
        before = await app.kept()
        data = await bundle_of(tmp_path, "start", "end")
        with pytest.warns(UserWarning, match=r"not restored.*may keep"):
            await page.choose_file(restore_button(app), uploads("session.zip", data))
        assert await app.kept() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
async def test_a_zip_is_restored_over_http_but_none_that_was_not_uploaded(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # Gradio's own calls run below our middleware
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    parent = fastapi.FastAPI()
    app.sessions.mount(parent, app.demo, path="/app")
    data = await bundle_of(tmp_path, "start")
    index = next(i for i, fn in app.demo.fns.items() if (restore_button(app)._id, "upload") in fn.targets)
    async with parent.router.lifespan_context(parent), AsyncExitStack() as stack:
        transport = httpx.ASGITransport(parent)
        browser = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test/app/"))

        async def restore(path: str) -> str:
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            event = {"data": [None, None, file], "fn_index": index, "session_hash": "page"}
            await browser.post("gradio_api/queue/join", json=event)
            return (await browser.get("gradio_api/queue/data", params={"session_hash": "page"})).text

        await browser.get("./")
        for private in (str(tmp_path / "made.zip"), str(tmp_path / "gradio" / ".." / "made.zip")):
            assert '"success":false' in await restore(private)
        with pytest.raises(SessionNotFoundError):
            await app.kept(dict(browser.cookies))
        assert (tmp_path / "made.zip").exists()
        sent = await browser.post("gradio_api/upload", files={"files": ("session.zip", data)})
        assert '"success":true' in await restore(sent.json()[0])
        assert (await app.kept(dict(browser.cookies))).images["start"].size == (90, 60)
        app.demo.close(verbose=False)


async def test_without_a_cookie_a_zip_is_not_restored_and_the_page_says_why(
    app: App, uploads: Any, tmp_path: Path
) -> None:
    page = await app.open({})
    data = await bundle_of(tmp_path, "start")
    with pytest.warns(UserWarning, match="sends no cookie"):
        await page.choose_file(restore_button(app), uploads("session.zip", data))
    assert page.shows(app.start) is None


async def test_a_store_that_does_not_answer_is_told_and_the_page_stays(uploads: Any, tmp_path: Path) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("boat.png", rgba_png()))
        data = await bundle_of(tmp_path, "end")
        blobs.full_for = lambda key: True
        with pytest.warns(UserWarning, match="no room left"):
            await page.choose_file(restore_button(app), uploads("session.zip", data))
        await choose(page, app, "Image to clear", "start")
        with pytest.warns(UserWarning, match="no room left"):
            await click(page, app, "Clear image")
        assert page.shows(app.start) is not None


async def test_an_image_that_a_run_waits_for_is_shown_as_needed(uploads: Any) -> None:
    async with generating(StepPipeline("steps", start=True, end=False)) as app:
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        session = await session_of(app)
        assert app.dispatcher is not None
        running = await app.dispatcher.submit(
            await session.generation_request("steps", slots=["start"], params={"endless": True})
        )
        await click(page, app, "Refresh")
        assert "needed by run" in Read(page.shows(app.info)).text
        await running.cancel()
        async for _ in running.events():
            pass
        await click(page, app, "Refresh")
        assert "needed by run" not in Read(page.shows(app.info)).text
