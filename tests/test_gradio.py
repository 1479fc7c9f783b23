from __future__ import annotations

import html
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import fastapi
import gradio as gr
import httpx
import pytest
from PIL import Image
from starlette.middleware import Middleware

from async_sessions import (
    BlobStore,
    InvalidKeyError,
    LocalBlobStore,
    StorageError,
    open_store,
)
from async_sessions._gradio.tabs import Tabs
from async_sessions.asgi import COOKIE, CookieSigner, SessionCookie
from async_sessions.gradio import GradioSessions, session_info_html
from async_sessions.testing.clock import FrozenClock
from tests.faults import FaultyBlobStore, files_below, keys_of
from tests.images import jpeg_with_exif, rgba_png
from tests.over_http import Browser, file_data, index_of, mounted
from tests.pages import ANN, BOB, SECRET, App, Page
from tests.steps import StepPipeline

if TYPE_CHECKING:
    from blockbuster import BlockBuster

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


# --- images


async def test_an_uploaded_image_is_shown_again_on_another_page_as_it_was_stored(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("photo.jpg", jpeg_with_exif(6, gps=True)))
    again = await app.open()
    shown = again.shows(app.start)
    stored = await app.kept()
    assert shown.read_bytes() == (await (await app.store.open_by_key(stored.key)).retrieve_bytes("start"))
    with Image.open(shown) as image:
        assert image.getexif()[0x0112] == 6
        assert not image.getexif().get_ifd(0x8825)
    assert again.shows(app.end) is None
    assert (stored.images["start"].source_name, list(stored.images)) == ("photo.jpg", ["start"])


async def test_a_page_that_was_only_opened_leaves_nothing_in_the_store(app: App, tmp_path: Path) -> None:
    await app.open()
    assert not files_below(tmp_path / "root")


async def test_one_browser_never_sees_the_images_of_another(app: App, uploads: Any) -> None:
    page = await app.open(ANN)
    await page.choose_file(app.start, uploads("photo.png", rgba_png()))
    other = await app.open(BOB)
    assert other.shows(app.start) is None
    await other.remove(app.start)
    await other.fire(app.button("Yes, clear all"), "click")
    assert (await app.open(ANN)).shows(app.start) is not None


async def test_a_logged_in_user_has_one_session_whatever_the_browser(app: App, uploads: Any) -> None:
    page = await app.open(ANN, username="carol")
    await page.choose_file(app.start, uploads("photo.png", rgba_png()))
    assert (await app.open(BOB, username="carol")).shows(app.start) is not None
    assert (await app.open(ANN)).shows(app.start) is None


async def test_who_writes_to_the_file_on_the_page_changes_nothing_that_is_stored(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("photo.png", rgba_png()))
    shown = (await app.open()).shows(app.start)
    original = shown.read_bytes()
    shown.write_bytes(bytes(len(original)))
    again = (await app.open()).shows(app.start)
    assert again.read_bytes() == original


async def test_a_reload_makes_no_second_copy(app: App, uploads: Any, cache: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("photo.png", rgba_png()))
    first = (await app.open()).shows(app.start)
    files = files_below(cache)
    assert (await app.open()).shows(app.start) == first
    assert files_below(cache) == files


async def test_opening_the_page_counts_as_use(uploads: Any) -> None:
    clock = FrozenClock()
    app = App(open_store("memory://", cleanup_interval=None, clock=clock, ttl=timedelta(hours=24)))
    async with app.running():
        await (await app.open()).choose_file(app.start, uploads("photo.png", rgba_png()))
        for _ in range(3):
            clock.advance(hours=20)
            await app.store.cleanup()
            assert (await app.open()).shows(app.start) is not None
        clock.advance(hours=26)
        assert (await app.open()).shows(app.start) is None


async def test_x_removes_one_image_and_not_the_other(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await page.choose_file(app.end, uploads("two.png", rgba_png(300, 200)))
    await page.remove(app.start)
    again = await app.open()
    assert (again.shows(app.start), again.shows(app.end) is not None) == (None, True)


async def test_an_upload_that_was_removed_before_its_turn_is_left_alone(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    page.values[app.start._id] = None
    await page.fire(app.start, "upload")
    assert "start" in (await app.kept()).images


async def test_a_refused_file_says_why_and_the_slot_shows_what_is_kept(app: App, uploads: Any) -> None:
    page = await app.open()
    with pytest.warns(UserWarning, match="JPEG, PNG"):
        await page.choose_file(app.start, uploads("notes.txt", b"these are only words, no image"))
    assert page.shows(app.start) is None
    await page.choose_file(app.start, uploads("photo.png", rgba_png()))
    with pytest.warns(UserWarning, match="JPEG, PNG"):
        await page.choose_file(app.start, uploads("notes.txt", b"these are only words, no image"))
    assert page.shows(app.start).name == "start.png"
    assert (await app.kept()).images["start"].source_name == "photo.png"


async def test_an_image_chosen_while_another_file_is_refused_stays(app: App, uploads: Any) -> None:
    page = await app.open()
    good = uploads("photo.png", rgba_png())
    page.values[app.start._id] = {"path": str(uploads("notes.txt", b"only words")), "orig_name": "notes.txt"}
    (listener,) = [
        index for index, fn in app.demo.fns.items() if (app.start._id, "upload") in fn.targets and fn.fn is not None
    ]
    answers = page.run(listener)
    with pytest.warns(UserWarning, match="JPEG, PNG"):
        await anext(answers)  # refused; what follows has not run yet
    page.values[app.start._id] = {"path": str(good), "orig_name": "photo.png"}
    async for _ in answers:
        pass
    assert page.shows(app.start) == good


async def test_an_x_and_an_upload_of_a_user_take_effect_in_their_order(uploads: Any) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open(username="ann")
        assert await keys_of(blobs) == set()  # opening a page writes nothing for a user either
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        gate = anyio.Event()
        blobs.before_get = lambda key: gate
        async with anyio.create_task_group() as group:
            group.start_soon(page.remove, app.start)
            await blobs.getting.wait()
            blobs.before_get = lambda key: None
            group.start_soon(page.choose_file, app.start, uploads("two.png", rgba_png()))
            await anyio.wait_all_tasks_blocked()
            gate.set()
        session = await app.store.session_for("ann")
        assert (await session.info()).images["start"].source_name == "two.png"


async def test_clear_removes_the_uploads_the_copies_and_the_settings_too(
    app: App, uploads: Any, cache: Path, tmp_path: Path
) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("photo.jpg", jpeg_with_exif(6, gps=True)))
    await page.enter(app.prompt, "a private prompt")
    await app.open()
    await page.fire(app.button("Yes, clear all"), "click")
    assert files_below(cache) == []
    assert files_below(tmp_path / "root", "blobs") == files_below(tmp_path / "root", "manifests") == []
    await page.enter(app.prompt, "a private prompt")
    assert (await app.kept()).state == {"prompt": "a private prompt"}


async def test_generate_uses_what_is_kept_of_an_upload_that_gradio_has_removed(uploads: Any) -> None:
    app = App(open_store("memory://"), StepPipeline(start=True, end=False))
    async with app.running():
        page = await app.open()
        path = uploads("photo.png", rgba_png())
        await page.choose_file(app.start, path)
        app.sessions._visits.tabs = Tabs(app.sessions._visits)  # as after a restart
        path.unlink()
        await page.fire(app.go, "click")
        assert "Done" in page.shows(app.bar)


async def test_what_code_has_put_there_is_not_taken_for_what_is_kept(uploads: Any) -> None:
    app = App(open_store("memory://", cleanup_interval=None), StepPipeline("steps", start=True))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("mine.png", rgba_png(30, 20)))
        path = uploads("other.png", rgba_png(77, 66))
        page.values[app.start._id] = {"path": str(path), "orig_name": "other.png"}  # an example, say: no upload
        path.unlink()
        with pytest.warns(UserWarning, match="Another image has been put into"):
            await page.fire(app.go, "click")
        assert (await app.kept()).jobs == {}


async def test_a_value_that_the_app_can_not_show_any_more_takes_nothing_along(tmp_path: Path, uploads: Any) -> None:
    path = uploads("one.png", rgba_png(30, 20))
    for component in (gr.Textbox, lambda: gr.Number(precision=0), lambda: gr.Slider(1, 10, precision=0)):
        sessions = GradioSessions(open_store(tmp_path / "root"), secret=SECRET)
        with gr.Blocks() as demo:
            start, level, prompt = gr.Image(), component(), gr.Textbox()
            sessions.bind(images={"start": start}, state={"level": level, "prompt": prompt})
            sessions.panel()
        async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
            page = await Page(demo, ANN).load()
            if component is gr.Textbox:
                await page.choose_file(start, path)
                await page.enter(level, "high")
                await page.enter(prompt, "a boat")
                continue
            assert (page.shows(start).read_bytes(), page.shows(prompt)) == (path.read_bytes(), "a boat")
            assert page.shows(level) != "high"


async def test_two_apps_on_one_host_keep_their_cookies_apart(blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # Gradio reads files while it mounts
    held: dict[str, str] = {}
    for name in ("one", "two"):
        signer = CookieSigner(SECRET + name, name=name)
        sessions = GradioSessions(open_store("memory://", cleanup_interval=None), secret=signer)
        with gr.Blocks() as demo:
            sessions.bind(images={"start": gr.Image()})
        parent = fastapi.FastAPI()
        sessions.mount(parent, demo, path="/app")
        async with parent.router.lifespan_context(parent):
            browser = Browser(parent)
            browser.http.cookies.update(held)
            await browser.open()
            held = dict(browser.http.cookies)
            demo.close(verbose=False)
    assert held.keys() == {"one", "two"}


async def test_a_component_that_holds_files_is_no_state() -> None:
    sessions = GradioSessions(open_store("memory://"))
    with gr.Blocks(), pytest.raises(TypeError, match="Audio"):
        sessions.bind(state={"voice": gr.Audio()})


async def test_every_request_is_told_why_the_store_can_not_be_opened(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    visits = GradioSessions(open_store(tmp_path))._visits
    told: list[str] = []

    async def ask() -> None:
        for _ in range(3):
            with pytest.raises(StorageError) as raised:
                await visits.held.ensure_started()
            told.append(str(raised.value))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(ask)
    assert len(told) == 12
    await visits.held.close()


async def test_without_a_cookie_the_page_says_that_nothing_is_kept(app: App, uploads: Any) -> None:
    page = await app.open({})
    path = uploads("photo.png", rgba_png())
    with pytest.warns(UserWarning, match="sends no cookie"):
        await page.choose_file(app.start, path)
    assert page.shows(app.start) == path


async def test_clear_removes_every_image_on_disk_and_in_the_folder_that_gradio_serves(
    app: App, uploads: Any, cache: Path, tmp_path: Path
) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await page.choose_file(app.end, uploads("two.png", rgba_png(300, 200)))
    page = await app.open()
    await page.fire(app.button("Yes, clear all"), "click")
    assert (page.shows(app.start), page.shows(app.end)) == (None, None)
    assert "Nothing is kept" in page.shows(app.info)
    assert not files_below(tmp_path / "root", "blobs")
    assert all(path.parent.name.startswith("upload") for path in files_below(cache))


async def test_refresh_shows_what_another_tab_did(app: App, uploads: Any) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await other.fire(app.button("Refresh"), "click")
    assert other.shows(app.start) is not None
    assert "one.png" in other.shows(app.info)
    await page.remove(app.start)
    await other.fire(app.button("Refresh"), "click")
    assert other.shows(app.start) is None


async def test_images_gives_an_apps_own_handler_what_the_user_stored(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("photo.jpg", jpeg_with_exif(6, image=Image.new("RGB", (60, 40)))))
    images = await app.sessions.images(gr.Request(cookies=dict(ANN)))
    assert {slot: image.size for slot, image in images.items()} == {"start": (60, 40)}
    assert await app.sessions.images(gr.Request(cookies=dict(BOB))) == {}
    assert await app.sessions.images(gr.Request(cookies={})) == {}


# --- values


async def test_a_value_is_shown_again_and_only_what_is_new_is_written(app: App) -> None:
    page = await app.open()
    await page.enter(app.prompt, "a red boat")
    await page.enter(app.model, "other")
    again = await app.open()
    assert (again.shows(app.prompt), again.shows(app.model)) == ("a red boat", "other")
    before = (await app.kept()).revision
    await again.fire(app.prompt, "change")  # as the browser does after a restore
    assert (await app.kept()).revision == before
    await again.enter(app.prompt, "a blue boat")
    await again.enter(app.prompt, "a red boat")
    assert (await app.kept()).state == {"prompt": "a red boat", "model": "other"}


async def test_a_value_that_is_too_large_says_so(app: App) -> None:
    page = await app.open()
    with pytest.warns(UserWarning, match="state may take"):
        await page.enter(app.prompt, "x" * 100_000)


# --- a store that does not answer


async def test_a_page_opens_without_its_store_and_finds_it_when_it_is_back(tmp_path: Path, uploads: Any) -> None:
    root = tmp_path / "root"
    root.write_text("a file in the way")
    app = App(open_store(root, cleanup_interval=None))
    path = uploads("photo.png", rgba_png())
    async with app.running():
        with pytest.warns(UserWarning, match="storage does not answer"):
            page = await app.open()
        assert "storage does not answer" in page.shows(app.info)
        with pytest.warns(UserWarning, match="storage does not answer"):
            await page.choose_file(app.start, path)
        assert page.shows(app.start) == path
        root.unlink()
        await page.choose_file(app.start, path)
        assert (await app.open()).shows(app.start) is not None


async def test_a_full_disk_keeps_the_page_and_what_was_stored_before(uploads: Any) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        blobs.full_for = lambda key: True
        second = uploads("two.png", rgba_png(300, 200))
        with pytest.warns(UserWarning, match="no room left"):
            await page.choose_file(app.start, second)
        assert page.shows(app.start) == second
        with pytest.warns(UserWarning, match="no room left"):
            await page.enter(app.prompt, "words")
        with pytest.warns(UserWarning, match="no room left"):
            await page.remove(app.start)
        assert (await app.open()).shows(app.start).name == "start.png"
        await page.fire(app.button("Yes, clear all"), "click")
        assert (await app.open()).shows(app.start) is None  # which takes no room


async def test_a_damaged_image_leaves_its_slot_empty_and_the_others_shown(
    app: App, uploads: Any, tmp_path: Path
) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    await page.choose_file(app.end, uploads("two.png", rgba_png(300, 200)))
    (tmp_path / "root" / (await app.kept()).images["start"].blob).write_bytes(b"damage")
    with pytest.warns(UserWarning, match="damaged"):
        again = await app.open()
    assert (again.shows(app.start), again.shows(app.end) is not None) == (None, True)


# --- generate


def a_video(steps: StepPipeline) -> StepPipeline:
    steps.make = lambda params: {"video": (b"not really a video", "video/mp4")}
    return steps


@asynccontextmanager
async def generating(
    *pipelines: StepPipeline, slots: Any = None, clock: FrozenClock | None = None
) -> AsyncIterator[App]:
    options: dict[str, Any] = {} if clock is None else {"clock": clock, "ttl": timedelta(hours=1)}
    app = App(open_store("memory://", cleanup_interval=None, **options), *pipelines, slots=slots)
    async with app.running():
        yield app


async def test_generate_shows_progress_and_then_the_video(uploads: Any, cache: Path) -> None:
    async with generating(a_video(StepPipeline("steps", start=True, end=False))) as app:
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        bars: list[str] = []
        async for _ in page.run(page.listener(app.go, "click")):
            bars.append(page.shows(app.bar))
            if "Storing" in bars[-1]:
                assert page.props[app.go._id]["interactive"] is False
            elif "Done" not in bars[-1]:
                assert page.props[app.go._id]["interactive"] is page.props[app.cancel._id]["interactive"] is True
        assert any("progressbar" in bar for bar in bars)
        assert "Done" in page.shows(app.bar)
        video = page.shows(app.video)
        assert video.is_relative_to(cache)
        assert (video.name, video.read_bytes()) == ("video.mp4", b"not really a video")
        assert page.props[app.go._id]["interactive"] is True
        assert page.props[app.cancel._id]["interactive"] is False
        assert "1 done" in page.shows(app.info)
        assert (await app.open()).shows(app.video) == video
        assert (await app.open(BOB)).shows(app.video) is None


async def test_generate_sends_what_the_page_shows_and_only_what_the_pipeline_takes(uploads: Any) -> None:
    pipelines = [StepPipeline("steps", start=False), StepPipeline("other", start=False, end=False)]
    async with generating(*pipelines, slots={"steps": ["start"]}) as app:
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        await page.choose_file(app.end, uploads("two.png", rgba_png(300, 200)))
        await page.enter(app.label, "a label")
        await page.fire(app.go, "click")
        page.values[app.start._id] = None
        page.values[app.label._id] = None
        page.values[app.model._id] = "other"
        await page.fire(app.go, "click")
        first, second = (await app.kept()).jobs.values()
        assert (first.pipeline, list(first.inputs), first.params["label"]) == ("steps", ["start"], "a label")
        assert (second.pipeline, list(second.inputs), second.params["label"]) == ("other", ["end"], "")


async def test_a_session_that_expired_under_an_open_page_gets_the_visible_images_again(uploads: Any) -> None:
    clock = FrozenClock()
    async with generating(StepPipeline("steps", start=True), slots={"steps": ["start"]}, clock=clock) as app:
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        page = await app.open()
        clock.advance(days=2)
        await app.store.cleanup()
        await page.look_again()
        await page.fire(app.go, "click")
        assert [job.status for job in (await app.kept()).jobs.values()] == ["succeeded"]
        assert "start" in (await app.kept()).images


async def test_a_session_that_expired_under_an_open_page_gets_the_values_again_that_it_had() -> None:
    clock = FrozenClock()
    async with generating(StepPipeline("steps"), clock=clock) as app:
        page = await app.open()
        await page.enter(app.prompt, "a boat")
        clock.advance(days=2)
        await app.store.cleanup()
        await page.fire(app.go, "click")
        assert (await app.kept()).state == {"prompt": "a boat"}, "what nobody touched may change with the app"
        assert (await app.open()).shows(app.prompt) == "a boat"


async def test_a_tab_that_was_open_shows_the_run_of_another_when_it_is_looked_at_and_lets_go_of_what_was_cleared() -> (
    None
):
    async with generating(a_video(StepPipeline("steps"))) as app:
        page, other = await app.open(), await app.open()
        await page.fire(app.go, "click")
        await other.look_again()
        assert other.shows(app.video).name == "video.mp4"
        other.values[app.video._id] = None
        await other.look_again()
        assert other.shows(app.video) is None, "what it has shown is not shown again"
        await page.fire(app.button("Yes, clear all"), "click")
        other = await app.open()
        await page.fire(app.go, "click")
        await other.look_again()
        assert other.shows(app.video).name == "video.mp4"
        await page.fire(app.button("Yes, clear all"), "click")
        await other.look_again()
        assert other.shows(app.video) is None
        assert other.shows(app.bar) == ""


async def test_buttons_are_the_apps_own_matter_until_a_run_has_changed_them() -> None:
    async with generating(StepPipeline("steps")) as app:
        page, other = await app.open(), await app.open()
        await other.enter(app.prompt, "a boat")
        await page.look_again()
        assert page.shows(app.prompt) == "a boat"
        assert not {app.go._id, app.cancel._id} & page.props.keys()
        await page.fire(app.go, "click")
        assert [page.props[button._id]["interactive"] for button in (app.go, app.cancel)] == [True, False]


async def test_a_tab_that_was_open_follows_the_run_of_another_once_it_is_looked_at() -> None:
    steps = a_video(StepPipeline("steps"))
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with generating(steps) as app, anyio.create_task_group() as group:
        page, other = await app.open(), await app.open()
        group.start_soon(page.fire, app.go, "click")
        while "endless" not in str(page.shows(app.bar)):  # noqa: ASYNC110
            await anyio.sleep(0.01)
        group.start_soon(other.look_again)
        while "endless" not in str(other.shows(app.bar)):  # noqa: ASYNC110
            await anyio.sleep(0.01)
        assert other.props[app.cancel._id]["interactive"]
        await other.fire(app.cancel, "click")
    assert "Cancelled" in other.shows(app.bar)


async def test_what_an_event_of_the_app_puts_into_an_image_is_kept_if_it_is_asked_for(app: App, uploads: Any) -> None:
    made = uploads("made.png", rgba_png(120, 80))
    with app.demo:
        make, other, none = gr.Button(), gr.Button(), gr.Button()
        app.sessions.keep_after(make.click(lambda: str(made), None, app.start))
        other.click(lambda: str(made), None, app.end)
        with pytest.raises(ValueError, match="None of the images"):
            app.sessions.keep_after(none.click(lambda: None, None, app.prompt))
    page = await app.open()
    await page.fire(other, "click")
    await page.fire(make, "click")
    assert list((await app.kept()).images) == ["start"]
    assert "made.png" in page.shows(app.info)
    assert (await app.open()).shows(app.start) is not None


async def test_an_image_that_another_tab_replaced_is_generated_from_as_this_tab_shows_it(uploads: Any) -> None:
    async with generating(StepPipeline("steps", start=True), slots={"steps": ["start"]}) as app:
        page, other = await app.open(), await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png(120, 80)))
        await other.look_again()
        await other.choose_file(app.start, uploads("two.png", rgba_png(90, 60)))
        stored = (await app.kept()).images["start"].blob
        await other.fire(app.go, "click")
        assert (await app.kept()).images["start"].blob == stored, "it is not stored again while it is the one"
        await page.fire(app.go, "click")
        sizes = [job.inputs["start"].size for job in (await app.kept()).jobs.values()]
        assert sizes == [(90, 60), (120, 80)]


async def test_without_a_cookie_generate_still_works() -> None:
    async with generating(a_video(StepPipeline("steps"))) as app:
        page = await app.open({})
        await page.fire(app.go, "click")
        assert page.shows(app.video).name == "video.mp4"
        assert await keys_of(app.store.blobs, "manifests/") == set()  # nobody could ever come back to it


async def test_without_a_cookie_a_run_can_be_cancelled() -> None:
    steps = a_video(StepPipeline("steps"))
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with generating(steps) as app:
        page = await app.open({})
        cancelled = False
        async for _ in page.run(page.listener(app.go, "click")):
            if not cancelled and "endless" in str(page.shows(app.bar)):
                await page.fire(app.cancel, "click")
                cancelled = True
        assert "Cancelled" in page.shows(app.bar)


async def test_a_request_that_does_not_fit_says_why_and_the_button_works_again() -> None:
    async with generating(StepPipeline("steps", start=True)) as app:
        page = await app.open()
        with pytest.warns(UserWarning, match="needs an image as"):
            await page.fire(app.go, "click")
        assert "Not started" in page.shows(app.bar)
        assert page.props[app.go._id]["interactive"] is True


async def test_a_failure_is_told_as_text() -> None:
    steps = StepPipeline("steps")
    steps.spec.defaults["fail"] = "<b>out</b> of memory"  # type: ignore[index]
    async with generating(steps) as app:
        page = await app.open()
        await page.fire(app.go, "click")
        assert "&lt;b&gt;out&lt;/b&gt; of memory" in page.shows(app.bar)


async def test_a_closed_tab_stops_nothing_and_a_reload_picks_the_run_up_until_it_is_cancelled() -> None:
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with generating(steps) as app:
        page = await app.open()
        answers = page.run(page.listener(app.go, "click"))
        async for _ in answers:
            if "step 3" in page.shows(app.bar) or "endless" in page.shows(app.bar):
                break
        await answers.aclose()
        again = Page(app.demo, ANN)
        cancelled = False
        async for _ in again.run(again.listener(app.demo, "load")):
            if not cancelled and "endless" in str(again.shows(app.bar)):
                await again.fire(app.cancel, "click")
                cancelled = True
        assert "Cancelled" in again.shows(app.bar)
        assert [job.status for job in (await app.kept()).jobs.values()] == ["cancelled"]


async def test_cancel_of_one_user_leaves_the_run_of_another() -> None:
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with generating(steps) as app:
        page = await app.open(ANN)
        answers = page.run(page.listener(app.go, "click"))
        async for _ in answers:
            if "endless" in page.shows(app.bar):
                break
        await (await app.open(BOB)).fire(app.cancel, "click")
        assert [job.under_way for job in (await app.kept(ANN)).jobs.values()] == [True]
        await page.fire(app.cancel, "click")
        async for _ in answers:
            pass
        assert "Cancelled" in page.shows(app.bar)


async def test_a_new_run_takes_the_page_from_the_one_that_was_picked_up() -> None:
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with generating(steps) as app:
        first = await app.open()
        answers = first.run(first.listener(app.go, "click"))
        async for _ in answers:
            if "endless" in first.shows(app.bar):
                break
        await answers.aclose()
        page = Page(app.demo, ANN)
        picked_up, clicked = (page.run(page.listener(*event)) for event in ((app.demo, "load"), (app.go, "click")))
        async for _ in picked_up:
            if "endless" in str(page.shows(app.bar)):
                break
        async for _ in clicked:
            if "1 more waiting" in page.shows(app.bar):
                break
        async for _ in picked_up:
            assert "1 more waiting" in page.shows(app.bar)
        assert page.props[app.go._id]["interactive"] is True
        await page.fire(app.cancel, "click")
        async for _ in clicked:
            pass
        assert "Cancelled" in page.shows(app.bar)
        assert page.props[app.go._id]["interactive"] is True


# --- what is shown


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>.png", "\"'><script>alert(1)</script>.png", "a&amp;b.png"]
)
async def test_a_hostile_file_name_is_only_text(app: App, cache: Path, name: str) -> None:
    page = await app.open()
    path = cache / "upload" / "file.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(rgba_png())
    page.values[app.start._id] = {"path": str(path), "orig_name": name}
    await page.fire(app.start, "upload")
    text = page.shows(app.info)
    shown = name.rpartition("/")[2]
    assert html.escape(shown) in text
    assert shown not in text


async def test_the_panel_names_the_session_by_its_key_and_never_by_its_id(app: App, uploads: Any) -> None:
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    info = await app.kept()
    assert info.key[:8] in page.shows(app.info)
    assert "ann" not in json.dumps([str(value) for value in page.values.values()])
    assert session_info_html(info).count("<li") == 1


# --- the app


async def test_an_apps_own_lifespan_and_middleware_are_kept_and_find_the_store_open(tmp_path: Path) -> None:
    store = open_store(tmp_path / "root", cleanup_interval=None)
    sessions = GradioSessions(store, secret=SECRET)
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[dict[str, str]]:
        await store.create_session()
        seen.append("entered")
        yield {"own": "state"}
        await store.create_session()
        seen.append("left")

    own = Middleware(SessionCookie, signer=sessions.signer)
    options = sessions.launch_options(quiet=True, app_kwargs={"lifespan": lifespan, "middleware": [own], "title": "x"})
    assert (options["quiet"], options["app_kwargs"]["title"]) == (True, "x")
    assert options["app_kwargs"]["middleware"][1:] == [own]
    composed: Callable[[object], AbstractAsyncContextManager[Any]] = options["app_kwargs"]["lifespan"]
    async with composed(None) as state:
        assert (state, seen) == ({"own": "state"}, ["entered"])
    assert seen == ["entered", "left"]
    async with composed(None):
        assert len(await keys_of(store.blobs, "manifests/")) == 3


async def test_a_request_before_any_lifespan_starts_the_store(tmp_path: Path, uploads: Any) -> None:
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    page = await app.open()
    await page.choose_file(app.start, uploads("one.png", rgba_png()))
    assert (await app.open()).shows(app.start) is not None
    async with app.running():
        pass  # and a lifespan leaves it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
async def test_a_mounted_page_has_sessions_and_takes_no_path_that_was_not_uploaded(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # Gradio's own calls run below our middleware
    page = App(open_store(tmp_path / "root", cleanup_interval=None))
    parent = fastapi.FastAPI()
    page.sessions.mount(parent, page.demo, path="/app")
    (tmp_path / "private.png").write_bytes(rgba_png())
    upload = next(i for i, fn in page.demo.fns.items() if (page.start._id, "upload") in fn.targets)
    async with parent.router.lifespan_context(parent), AsyncExitStack() as stack:
        transport = httpx.ASGITransport(parent)
        browser = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test/app/"))

        async def store(path: str) -> str:
            event = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "fn_index": upload}
            await browser.post("gradio_api/queue/join", json={**event, "session_hash": "page"})
            return (await browser.get("gradio_api/queue/data", params={"session_hash": "page"})).text

        await browser.get("./")
        assert list(browser.cookies) == [COOKIE]
        sent = await browser.post("gradio_api/upload", files={"files": ("photo.png", rgba_png(90, 60))})
        assert '"success":true' in await store(sent.json()[0])
        assert (await page.kept(dict(browser.cookies))).images["start"].size == (90, 60)
        assert "was not uploaded by a user" in await store(str(tmp_path / "private.png"))
        assert (await page.kept(dict(browser.cookies))).images["start"].size == (90, 60)
        page.demo.close(verbose=False)


async def test_a_path_is_opened_as_a_store(tmp_path: Path) -> None:
    sessions = GradioSessions(tmp_path / "root")
    assert isinstance(sessions.store.blobs, LocalBlobStore)
    blobs: BlobStore = sessions.store.blobs
    assert (await sessions.signer()).name.startswith(COOKIE)
    assert await keys_of(blobs) == {"cookie/secret"}


async def test_binding_in_the_wrong_place_or_order_is_a_clear_error() -> None:
    sessions = GradioSessions("memory://", secret=SECRET)
    with pytest.raises(RuntimeError, match=r"inside `with gr\.Blocks\(\)`"):
        sessions.bind()
    with gr.Blocks():
        with pytest.raises(RuntimeError, match=r"Call bind\(\) first"):
            sessions.panel()
        with pytest.raises(InvalidKeyError, match="Start"):
            sessions.bind(images={"Start": gr.Image()})
        sessions.bind(images={"start": gr.Image()})
        with pytest.raises(RuntimeError, match="was called already"):
            sessions.bind()
        with pytest.raises(RuntimeError, match="needs a dispatcher"):
            sessions.bind_generate(gr.Button(), pipeline="steps", video=gr.Video())


async def test_no_listener_of_ours_is_part_of_the_apps_api_or_waits_for_another_user() -> None:
    app = App(open_store("memory://"), StepPipeline("steps"))
    assert {fn.api_visibility for fn in app.demo.fns.values()} == {"private"}
    assert {fn.concurrency_limit for fn in app.demo.fns.values() if fn.fn} == {None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
@pytest.mark.slow
async def test_nobody_waits_for_the_run_of_another_whatever_limit_the_app_sets(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # Gradio's own calls run below our middleware
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    app = App(open_store("memory://", cleanup_interval=None), steps)
    app.demo.queue(default_concurrency_limit=1)
    loaded = [index for index, fn in app.demo.fns.items() if (app.demo._id, "load") in fn.targets]
    (follow,) = (index for index in loaded if inspect.isasyncgenfunction(app.demo.fns[index].fn))
    async with mounted(app) as parent:
        browsers, seen = [Browser(parent) for _ in range(41)], []  # Gradio answers 40 events at once

        async def generate(browser: Browser) -> None:
            await browser.open()
            await browser.fire(index_of(app.demo, app.go, "click"), ["steps", "", "", "steps", None, None])
            seen.append(await browser.fire(follow, []))

        def followed() -> int:
            return sum(job is not None and job[0].fn is app.demo.fns[follow] for job in app.demo._queue.active_jobs)

        async with anyio.create_task_group() as group:
            for browser in browsers:
                group.start_soon(generate, browser)
            with anyio.fail_after(100):
                while followed() < len(browsers):  # noqa: ASYNC110
                    await anyio.sleep(0.05)
                late = Browser(parent)
                await late.open()
                path = await late.upload("photo.png", rgba_png(90, 60))
                assert '"success":true' in await late.fire(index_of(app.demo, app.start, "upload"), [file_data(path)])
                for browser in browsers:
                    await browser.fire(index_of(app.demo, app.cancel, "click"), [])
        assert ["Cancelled" in each for each in seen] == [True] * len(browsers)
