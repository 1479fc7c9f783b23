"""Two tabs of one session, pages that share it, and what a page that is slow or asks too late must not undo."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import gradio as gr
import pytest
from PIL import Image

from async_sessions import InvalidKeyError, MemoryBlobStore, StorageError, open_store
from async_sessions._gradio.seen import Seen
from async_sessions.dispatch import LocalDispatcher
from async_sessions.gradio import GradioSessions
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.faults import WrappedBlobStore
from tests.faults import FaultyBlobStore
from tests.images import encoded, rgba_png
from tests.pages import ANN, BOB, SECRET, App, Page
from tests.steps import StepPipeline

if TYPE_CHECKING:
    from async_sessions.blobs.base import Blob

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("cache")]


@pytest.fixture
def anyio_backend() -> str:
    """One loop: the servers that the browser tests start have the other one."""
    return "asyncio"


Uploads = Callable[[str, bytes], Path]
RECENT = "Replaced or cleared image"
HOSTILE = "<img src=x onerror=alert(1)>\"'${document.title=1}{{value}}.png"


@pytest.fixture
def one(uploads: Uploads) -> Path:
    return uploads("one.png", rgba_png(30, 20))


@pytest.fixture
def two(uploads: Uploads) -> Path:
    return uploads("two.png", rgba_png(40, 20))


async def name_kept(app: App, slot: str = "start") -> str | None:
    return (await app.kept()).images[slot].source_name


# --- two tabs


async def test_a_tab_that_is_looked_at_again_shows_what_the_other_did(app: App, one: Path) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await page.enter(app.prompt, "a red boat")
    await other.look_again()
    assert other.shows(app.start).read_bytes() == one.read_bytes()
    assert other.shows(app.prompt) == "a red boat"
    await page.remove(app.start)
    await other.look_again()
    assert other.shows(app.start) is None


@pytest.mark.parametrize("act", ["an upload", "a value"])
async def test_what_a_page_shows_of_a_session_that_expired_stays_and_is_kept_again_by_generate(
    uploads: Uploads, one: Path, two: Path, act: str
) -> None:
    clock = FrozenClock()
    app = App(open_store("memory://", cleanup_interval=None, clock=clock), StepPipeline("steps", start=True, end=False))
    async with app.running():
        page, other = await app.open(), await app.open()
        for slot, photo in ((app.start, one), (app.end, two)):
            await page.choose_file(slot, photo)
        await page.enter(app.prompt, "a boat")
        await page.enter(app.label, "not kept")
        await other.look_again()
        clock.advance(days=3)
        await app.store.cleanup()
        if act == "an upload":
            await page.choose_file(app.start, uploads("three.png", rgba_png(50, 20)))
        else:
            await page.enter(app.model, "other")
            await page.enter(app.model, "steps")
        for tab in (page, other):
            await tab.look_again()
        assert page.shows(app.end) == two
        assert other.shows(app.end).read_bytes() == two.read_bytes()
        newest = {"an upload": (50, 20), "a value": (30, 20)}[act]
        for tab in (page, other):
            with Image.open(tab.shows(app.start)) as shown:
                assert shown.size == newest
        await page.fire(app.go, "click")
        kept = await app.kept()
        assert {slot: record.size for slot, record in kept.images.items()} == {"start": newest, "end": (40, 20)}
        assert kept.state["prompt"] == "a boat"
        assert ("model" in kept.state) is (act == "a value")


async def test_values_of_a_session_that_expired_are_kept_by_the_second_generate_where_the_first_fails() -> None:
    clock, blobs = FrozenClock(), FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None, clock=clock), StepPipeline("steps"))
    async with app.running():
        page = await app.open()
        await page.enter(app.prompt, "a boat")
        clock.advance(days=3)
        await app.store.cleanup()
        blobs.full_for = lambda key: True
        with pytest.warns(UserWarning, match="no room left"):
            await page.fire(app.go, "click")
        blobs.full_for = lambda key: False
        await page.fire(app.go, "click")
        assert (await app.kept()).state == {"prompt": "a boat"}


class Late(WrappedBlobStore):
    """The next answer that there is no manifest waits until `gate` is opened; it is old by then."""

    gate: anyio.Event | None = None
    waits = False

    async def get(self, key: str) -> Blob | None:
        found = await super().get(key)
        if found is None and key.startswith("manifests/") and self.gate is not None and not self.waits:
            self.waits = True
            await self.gate.wait()
        return found


async def test_the_first_of_two_uploads_that_begin_a_session_can_be_replaced_without_a_question(
    uploads: Uploads, one: Path, two: Path
) -> None:
    blobs = Late(MemoryBlobStore())
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open()
        blobs.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(page.choose_file, app.end, two)
            while not blobs.waits:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            await page.choose_file(app.start, one)
            blobs.gate.set()
        await page.choose_file(app.start, uploads("three.png", rgba_png(50, 20)))
        assert (page.question(), await name_kept(app)) == ("", "three.png")


async def test_what_one_tab_clears_goes_from_another_though_the_session_begins_anew(
    uploads: Uploads, app: App, one: Path, two: Path
) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await page.choose_file(app.end, two)
    await other.look_again()
    await page.fire(app.button("Yes, clear all"), "click")
    three = uploads("three.png", rgba_png(50, 20))
    await page.choose_file(app.start, three)
    await other.look_again()
    assert other.shows(app.start).read_bytes() == three.read_bytes()
    assert other.shows(app.end) is None


async def test_what_a_tab_shows_and_could_not_keep_stays_when_it_is_looked_at_again(uploads: Uploads) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png(30, 20)))
        blobs.full_for = lambda key: True
        unkept = uploads("two.png", rgba_png(40, 20))
        with pytest.warns(UserWarning, match="no room left"):
            await page.choose_file(app.start, unkept)
        with pytest.warns(UserWarning, match="no room left"):
            await page.enter(app.prompt, "a long text")
        await page.look_again()
        assert (page.shows(app.start), page.shows(app.prompt)) == (unkept, "a long text")


@pytest.mark.parametrize("keep", ["mine", "other"])
async def test_an_upload_over_what_its_tab_has_not_seen_asks_which_to_keep(
    app: App, one: Path, two: Path, keep: str
) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await other.choose_file(app.start, two)
    assert "one.png" in other.question()
    assert "two.png" in other.question()
    assert "data:image/webp" in other.question()
    assert await name_kept(app) == "one.png"
    await other.look_again()
    assert other.shows(app.start) == two, "it is still to be decided"

    await other.answer("start", keep)
    assert other.question() == ""
    assert await name_kept(app) == ("two.png" if keep == "mine" else "one.png")
    assert other.shows(app.start).read_bytes() == (two if keep == "mine" else one).read_bytes()
    await page.look_again()
    await other.look_again()
    assert page.shows(app.start).read_bytes() == other.shows(app.start).read_bytes()
    await page.choose_file(app.start, two)
    await page.choose_file(app.start, one)
    assert page.question() == ""


async def test_what_changes_while_the_user_is_asked_is_asked_again(app: App, one: Path, two: Path) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await other.choose_file(app.start, two)
    three = two.with_name("three.png")
    three.write_bytes(rgba_png(50, 20))
    await page.choose_file(app.start, three)
    await other.answer("start", "mine")
    assert "three.png" in other.question()
    assert await name_kept(app) == "three.png"
    await other.answer("start", "mine")
    assert (other.question(), await name_kept(app)) == ("", "two.png")


@pytest.mark.parametrize("keep", ["mine", "other"])
async def test_a_run_with_what_was_never_kept_asks_before_it_replaces_what_its_tab_has_not_seen(
    one: Path, two: Path, keep: str
) -> None:
    app = App(open_store("memory://", cleanup_interval=None), StepPipeline("steps", start=True, end=False))
    async with app.running():
        page, other = await app.open(), await app.open()
        await other.choose_file(app.start, one)
        page.values[app.start._id] = {"path": str(two), "orig_name": "two.png"}  # as a webcam or the app's code puts it
        await page.fire(app.go, "click")
        assert "one.png" in page.question()
        assert "two.png" in page.question()
        assert "say which image" in page.shows(app.bar)
        assert (await name_kept(app), (await app.kept()).jobs) == ("one.png", {})
        await page.answer("start", keep)
        assert page.shows(app.bar) == ""
        await page.fire(app.go, "click")
        assert page.question() == ""
        assert "Done" in page.shows(app.bar)
        (job,) = (await app.kept()).jobs.values()
        assert job.inputs["start"].source_name == ("two.png" if keep == "mine" else "one.png")


async def test_what_its_tab_has_not_seen_is_shown_before_an_image_is_put_back_over_it(
    app: App, one: Path, two: Path
) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await page.remove(app.start)
    await other.choose_file(app.start, two)
    recent = next(block for block in app.demo.blocks.values() if getattr(block, "label", None) == RECENT)
    ((_, page.values[recent._id]),) = page.props[recent._id]["choices"]
    with pytest.warns(UserWarning, match="Another tab has put another image into"):
        await page.fire(app.button("Put back"), "click")
    assert await name_kept(app) == "two.png"
    assert page.shows(app.start).read_bytes() == two.read_bytes()
    await page.fire(app.button("Put back"), "click")
    assert await name_kept(app) == "one.png"


async def test_what_its_tab_has_not_seen_is_shown_before_a_zip_goes_over_it(
    app: App, uploads: Uploads, one: Path, two: Path
) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await page.fire(app.button("Download my session (ZIP)"), "click")
    (saved,) = (each for each in app.demo.blocks.values() if isinstance(each, gr.DownloadButton))
    data = Path(page.shows(saved)).read_bytes()
    await other.look_again()
    await other.choose_file(app.start, two)
    (restore,) = (each for each in app.demo.blocks.values() if isinstance(each, gr.UploadButton))
    with pytest.warns(UserWarning, match="The ZIP is not restored. Slot .*start.* holds another image"):
        await page.choose_file(restore, uploads("session.zip", data))
    assert (await name_kept(app), page.shows(app.start).read_bytes()) == ("two.png", two.read_bytes())
    await page.choose_file(restore, uploads("session.zip", data))
    assert await name_kept(app) == "one.png"


async def test_a_run_does_not_take_what_another_tab_has_put_where_its_own_image_is_gone(one: Path, two: Path) -> None:
    app = App(open_store("memory://", cleanup_interval=None), StepPipeline("steps", start=True, end=False))
    async with app.running():
        page, other = await app.open(), await app.open()
        await page.choose_file(app.start, one)
        await other.fire(app.button("Yes, clear all"), "click")
        assert not one.exists()
        await other.choose_file(app.start, two)
        with pytest.warns(UserWarning, match="Another image has been put into"):
            await page.fire(app.go, "click")
        assert (await app.kept()).jobs == {}


async def test_a_slot_of_another_page_is_cleared_and_put_back_as_often_as_one_likes(
    app: App, one: Path, two: Path
) -> None:
    session = await app.sessions.session(gr.Request(cookies=dict(ANN)))
    assert session is not None
    await session.store_image(one, "elsewhere", name="one.png")
    page = await app.open()
    labels = {getattr(block, "label", None): block for block in app.demo.blocks.values()}
    held, recent = labels["Image to clear"], labels[RECENT]
    for _ in range(2):
        page.values[held._id] = "elsewhere"
        await page.fire(app.button("Clear image"), "click")
        assert "elsewhere" not in (await app.kept()).images
        ((_, page.values[recent._id]),) = page.props[recent._id]["choices"]
        await page.fire(app.button("Put back"), "click")
        assert await name_kept(app, "elsewhere") == "one.png"
    await session.store_image(two, "elsewhere", name="two.png")
    page.values[held._id] = "elsewhere"
    with pytest.warns(UserWarning, match="which is shown now"):
        await page.fire(app.button("Clear image"), "click")
    assert await name_kept(app, "elsewhere") == "two.png"
    page.values[held._id] = "elsewhere"
    await page.fire(app.button("Clear image"), "click")
    assert "elsewhere" not in (await app.kept()).images


async def test_a_page_that_waits_for_its_run_is_told_something_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that Gradio finds out that it is gone, and lets its listener go."""
    monkeypatch.setattr("async_sessions._gradio.generate.ALIVE_EVERY", 0.01)
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    app = App(open_store("memory://", cleanup_interval=None), steps)
    async with app.running():
        page, answers = await app.open(), 0
        async for _ in page.run(page.listener(app.go, "click")):
            answers += "endless" in str(page.shows(app.bar))
            if answers == 20:
                await page.fire(app.cancel, "click")
        assert answers >= 20
        assert "Cancelled" in page.shows(app.bar)


async def test_a_client_that_opens_many_pages_makes_the_server_forget_none_of_another_session() -> None:
    seen, page = Seen(), gr.Request(session_hash="a page")
    seen.saw(page, "ann", "start", "a digest")
    for number in range(20_000):
        seen.saw(gr.Request(session_hash=f"page {number}"), "bob", "start", "a digest")
    assert seen.seen(page, "ann", "start") == "a digest"
    made_up = gr.Request(session_hash="x" * 1_000_000)
    seen.saw(made_up, "bob", "start", "a digest")
    assert not seen.knows(made_up, "bob", "start")


async def test_what_another_tab_has_cleared_is_no_reason_to_ask(app: App, one: Path, two: Path) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await other.look_again()
    await page.fire(app.button("Yes, clear all"), "click")
    await other.choose_file(app.start, two)
    assert (other.question(), await name_kept(app)) == ("", "two.png")


async def test_the_same_image_in_two_tabs_is_no_reason_to_ask(app: App, one: Path, two: Path) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    two.write_bytes(one.read_bytes())
    await other.choose_file(app.start, two)
    assert other.question() == ""
    assert not (await app.kept()).recent


async def test_an_image_that_its_tab_has_not_seen_is_shown_before_it_can_be_removed(app: App, one: Path) -> None:
    page, other = await app.open(), await app.open()
    await page.choose_file(app.start, one)
    await other.remove(app.start)
    assert other.shows(app.start).read_bytes() == one.read_bytes()
    assert await name_kept(app) == "one.png"
    await other.remove(app.start)
    assert (await app.kept()).images == {}


async def test_a_run_takes_what_its_tab_shows_and_leaves_what_another_tab_has_put_there(uploads: Uploads) -> None:
    app = App(open_store("memory://"), StepPipeline("steps", start=True, end=False), slots={"steps": ["start"]})
    async with app.running():
        page, other = await app.open(), await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png(30, 20)))
        await other.look_again()
        await other.choose_file(app.start, uploads("two.png", rgba_png(40, 20)))
        await page.fire(app.go, "click")
        (job,) = (await app.kept()).jobs.values()
        assert (job.inputs["start"].size, await name_kept(app)) == ((30, 20), "two.png")
        await page.choose_file(app.start, uploads("three.png", rgba_png(50, 20)))
        assert "two.png" in page.question()


async def test_who_has_one_tab_is_never_asked(uploads: Uploads, tmp_path: Path) -> None:
    root = open_store(tmp_path / "root", cleanup_interval=None)
    app = App(root, StepPipeline("steps", start=True, end=False))
    async with app.running():
        page = await app.open()
        for number in range(3):
            await page.choose_file(app.start, uploads(f"{number}.png", rgba_png(30 + number, 20)))
            await page.enter(app.prompt, f"text {number}")
        await page.fire(app.go, "click")
        page = await app.open()
        await page.choose_file(app.start, uploads("3.png", rgba_png(33, 20)))
        await page.remove(app.start)
        (*_, latest) = (await app.kept()).recent
        panel = {each.label: each for each in app.demo.blocks.values() if isinstance(each, gr.Dropdown)}
        page.values[panel["Replaced or cleared image"]._id] = latest.record.digest
        await page.fire(app.button("Put back"), "click")
        await page.choose_file(app.start, uploads("4.png", rgba_png(34, 20)))
        page.values[panel["Image to clear"]._id] = "start"
        await page.fire(app.button("Clear image"), "click")
        await page.choose_file(app.start, uploads("5.png", rgba_png(35, 20)))
        await page.fire(app.button("Yes, clear all"), "click")
        await page.choose_file(app.start, uploads("6.png", rgba_png(36, 20)))
        assert page.question() == ""
        assert await name_kept(app) == "6.png"
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with app.running():
        again = Page(app.demo, ANN)  # a page that was open while the server was started anew
        await again.look_again()
        await again.choose_file(app.start, uploads("7.png", rgba_png(37, 20)))
        assert (again.question(), await name_kept(app)) == ("", "7.png")


async def test_an_answer_that_was_not_asked_for_changes_nothing(app: App, one: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, one)
    with pytest.warns(UserWarning, match="not known any more"):
        await page.answer("start", "mine")
    for slot, keep in [("nowhere", "other"), ("start", "x"), (["start"], {})]:
        await page.answer(slot, keep)  # type: ignore[arg-type]
    assert await name_kept(app) == "one.png"
    assert page.shows(app.start).read_bytes() == one.read_bytes()


async def test_an_answer_to_a_server_that_was_started_anew_shows_what_is_kept(
    uploads: Uploads, tmp_path: Path, one: Path, two: Path
) -> None:
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with app.running():
        page, other = await app.open(), await app.open()
        await other.choose_file(app.start, one)
        await page.choose_file(app.start, two)
        assert page.question()
    again = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with again.running():
        reopened = await again.open()
        reopened.values[again.start._id] = {"path": str(two), "orig_name": two.name}
        with pytest.warns(UserWarning, match="Upload yours again"):
            await reopened.answer("start", "mine")
        assert await name_kept(again) == "one.png"
        assert reopened.shows(again.start).read_bytes() == one.read_bytes()


async def test_news_that_could_not_be_read_are_shown_at_the_next_look(uploads: Uploads, one: Path) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None, cache_bytes=0))
    async with app.running():
        page, other = await app.open(), await app.open()
        await other.choose_file(app.start, one)
        reads: list[str] = []

        def fail_at_the_second(key: str) -> None:
            reads.append(key)
            if len(reads) == 2:
                raise StorageError("The storage does not answer.")

        blobs.before_get = fail_at_the_second
        await page.look_again()
        assert page.shows(app.start) is None
        await page.look_again()
        assert page.shows(app.start).read_bytes() == one.read_bytes()


async def test_clear_all_removes_what_was_refused_and_leaves_what_another_user_shows(
    app: App, uploads: Uploads, one: Path
) -> None:
    page, theirs = await app.open(), await app.open(BOB)
    for each in (page, theirs):
        await each.choose_file(app.start, one)  # Gradio has one file for both
    refused = uploads("refused.png", b"no picture")
    with pytest.warns(UserWarning, match="not kept"):
        await page.choose_file(app.start, refused)
    await page.fire(app.button("Yes, clear all"), "click")
    assert not refused.exists()
    assert theirs.shows(app.start).exists()


async def test_a_hostile_file_name_is_only_text_in_the_question(app: App, one: Path, two: Path) -> None:
    page, other = await app.open(), await app.open()
    for each, file in ((page, one), (other, two)):
        each.values[app.start._id] = {"path": str(file), "orig_name": HOSTILE, "url": '"><script>alert(1)</script>'}
        await each.fire(app.start, "upload")
    assert "<script" not in other.question()
    assert "<img src=x" not in other.question()


# --- what is on its way


async def test_a_slow_restore_does_not_replace_what_the_user_has_chosen_meanwhile(uploads: Uploads) -> None:
    blobs = FaultyBlobStore()
    app = App(open_store(blobs, cleanup_interval=None))
    async with app.running():
        page = await app.open()
        await page.choose_file(app.start, uploads("one.png", rgba_png(30, 20)))
        await page.choose_file(app.end, uploads("two.png", rgba_png(40, 20)))
        await page.enter(app.prompt, "old")
        again, gate = Page(app.demo, ANN), anyio.Event()
        blob = (await app.kept()).images["start"].blob
        app.store._context().cache._images.clear()
        blobs.before_get = lambda key: gate if key == blob else None
        chosen = uploads("three.png", rgba_png(50, 20))
        async with anyio.create_task_group() as group:
            group.start_soon(again.load)
            await blobs.getting.wait()
            await again.choose_file(app.start, chosen)
            await again.enter(app.prompt, "new")
            gate.set()
        assert (again.shows(app.start), again.shows(app.prompt)) == (chosen, "new")
        assert again.shows(app.end) is not None
        assert (await app.kept()).state["prompt"] == "new"
        assert again.question() == ""


async def test_an_older_image_that_arrives_after_an_upload_is_put_right(app: App, one: Path, two: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, one)
    page = await app.open()
    (listener,) = [
        index for index, fn in app.demo.fns.items() if (app.start._id, "upload") in fn.targets and fn.fn is not None
    ]
    older = page.values[app.start._id]
    page.values[app.start._id] = {"path": str(two), "orig_name": "two.png"}
    answers = page.run(listener)
    await anext(answers)
    page.values[app.start._id] = older  # the answer to the load, which the network held
    async for _ in answers:
        pass
    assert page.shows(app.start).read_bytes() == two.read_bytes()
    assert await name_kept(app) == "two.png"


async def test_what_is_bound_opens_no_connection_that_stays_open(app: App) -> None:
    """Gradio keeps one for each tab of an app that has a `State`, and browsers have six for each host."""
    assert not [block for block in app.demo.blocks.values() if isinstance(block, gr.State)]
    assert not app.demo.config.get("connect_heartbeat")


async def test_what_is_restored_is_not_stored_again(app: App, one: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, one)
    await page.enter(app.prompt, "words")
    before = (await app.kept()).revision
    again = await app.open()
    await again.fire(app.start, "change")
    await again.fire(app.prompt, "change")
    await again.fire(app.start, "upload")  # as an editor tells that it was made to show something
    await again.look_again()
    assert (await app.kept()).revision == before


async def test_images_are_restored_after_gradios_own_cache_was_deleted(app: App, one: Path, cache: Path) -> None:
    page = await app.open()
    await page.choose_file(app.start, one)
    data = one.read_bytes()
    shown = (await app.open()).shows(app.start)
    await anyio.to_thread.run_sync(_empty, cache)
    assert not shown.exists()
    assert (await app.open()).shows(app.start).read_bytes() == data


def _empty(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


# --- other components


class Editor:
    """A page with an editor, and a run that takes what it shows."""

    def __init__(self) -> None:
        self.store = open_store("memory://", cleanup_interval=None)
        self.dispatcher = LocalDispatcher(self.store, [StepPipeline("steps", start=True, end=False)])
        self.sessions = GradioSessions(self.store, dispatcher=self.dispatcher, secret=SECRET)
        with gr.Blocks() as self.demo:
            self.editor, self.go, video = gr.ImageEditor(), gr.Button("Go"), gr.Video()
            self.sessions.bind(images={"start": self.editor})
            self.bar = self.sessions.bind_generate(self.go, pipeline="steps", video=video)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.sessions.launch_options()["app_kwargs"]["lifespan"](None):
            yield

    async def size(self) -> tuple[int, int] | None:
        images = await self.sessions.images(gr.Request(cookies=dict(ANN)))
        return images["start"].size if "start" in images else None


def drawn(background: Path, composite: Path) -> dict[str, Any]:
    return {"background": {"path": str(background)}, "layers": [], "composite": {"path": str(composite)}, "id": None}


@pytest.mark.parametrize("event", ["upload", "apply"])
async def test_of_an_editor_all_layers_together_are_kept_and_shown_again(one: Path, two: Path, event: str) -> None:
    app = Editor()
    async with app.running():
        page = await Page(app.demo, ANN).load()
        page.values[app.editor._id] = drawn(one, two)
        await page.fire(app.editor, event)
        assert await app.size() == (40, 20)
        again = await Page(app.demo, ANN).load()
        assert again.shows(app.editor).read_bytes() == two.read_bytes()
        await again.remove(app.editor)
        assert await app.size() is None


async def test_an_editor_that_shows_nothing_leaves_what_is_kept(one: Path) -> None:
    app = Editor()
    async with app.running():
        page = await Page(app.demo, ANN).load()
        page.values[app.editor._id] = drawn(one, one)
        await page.fire(app.editor, "upload")
        page.values[app.editor._id] = {"background": None, "layers": [], "composite": None, "id": None}
        await page.fire(app.editor, "upload")
        assert await app.size() == (30, 20)


async def test_of_an_editor_whose_strokes_the_app_listens_to_the_image_is_kept_too() -> None:
    app = Editor()
    async with app.running():
        page = await Page(app.demo, ANN).load()
        blobs = gr.components.image_editor.EditorDataBlobs(
            background=None, layers=[], composite=encoded(Image.new("RGB", (11, 7)), "PNG")
        )
        app.editor.blob_storage["an id"] = blobs
        page.values[app.editor._id] = {"background": None, "layers": [], "composite": None, "id": "an id"}
        await page.fire(app.editor, "upload")
        assert await app.size() == (11, 7)
        assert app.editor.blob_storage == {}


async def test_a_run_takes_what_the_editor_shows(one: Path, two: Path) -> None:
    app = Editor()
    async with app.running():
        page = await Page(app.demo, ANN).load()
        page.values[app.editor._id] = drawn(one, two)
        await page.fire(app.go, "click")
        assert "Done" in page.shows(app.bar)
        assert await app.size() == (40, 20)
        page.values[app.editor._id] = None
        with pytest.warns(UserWarning, match="needs an image as"):
            await page.fire(app.go, "click")


def values() -> dict[str, tuple[Any, Any]]:
    """Components, and what a browser sends of them."""
    return {
        "textbox": (gr.Textbox(), "words"),
        "number": (gr.Number(), 1.5),
        "slider": (gr.Slider(0, 10), 7),
        "checkbox": (gr.Checkbox(), True),
        "group": (gr.CheckboxGroup(["a", "b"]), ["a", "b"]),
        "radio": (gr.Radio(["a", "b"]), "b"),
        "several": (gr.Dropdown(["a", "b"], multiselect=True), ["b"]),
        "color": (gr.ColorPicker(), "#ff0000"),
        "time": (gr.DateTime(), "2026-01-02 03:04:05"),
        "code": (gr.Code(language="json"), "{}"),
    }


async def test_any_value_component_can_be_bound_and_takes_back_what_it_gave() -> None:
    sessions = GradioSessions("memory://", secret=SECRET)
    with gr.Blocks() as demo:
        components = values()
        sessions.bind(state={name: component for name, (component, _) in components.items()})
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        page = await Page(demo, ANN).load()
        for component, value in components.values():
            await page.enter(component, value)
        again = await Page(demo, ANN).load()
        for component, value in components.values():
            assert again.shows(component) == value
            component.postprocess(value)


# --- several pages


async def test_two_pages_of_an_app_share_the_session(one: Path, two: Path) -> None:
    sessions = GradioSessions("memory://", secret=SECRET)
    pages, panels = [], []
    with gr.Blocks() as demo:
        pages.append((gr.Image(), gr.Textbox()))
        sessions.bind(images={"start": pages[0][0]}, state={"prompt": pages[0][1]})
        panels.append(sessions.panel())
    with demo.route("Other", "/other"):
        pages.append((gr.Image(), gr.Textbox()))
        sessions.bind(images={"start": pages[1][0]}, state={"prompt": pages[1][1]})
        panels.append(sessions.panel())
    for fn in demo.fns.values():
        assert {block.page for block in (*fn.inputs, *fn.outputs)} <= {fn.page}, "a browser has one page at a time"
    async with sessions.launch_options()["app_kwargs"]["lifespan"](None):
        page = await Page(demo, ANN).load()
        await page.choose_file(pages[0][0], one)
        await page.enter(pages[0][1], "words")
        again = await Page(demo, ANN).load()
        for image, text in pages:
            assert again.shows(image).read_bytes() == one.read_bytes()
            assert again.shows(text) == "words"
        await again.choose_file(pages[1][0], two)
        assert "two.png" in again.shows(panels[1])
        await page.look_again()
        assert page.shows(pages[0][0]).read_bytes() == two.read_bytes()


# --- what is refused


async def test_binding_what_can_not_be_bound_says_what_to_do() -> None:
    sessions = GradioSessions(open_store("memory://", slots=["start", "end"]), secret=SECRET)
    with gr.Blocks() as demo:
        image, text = gr.Image(), gr.Textbox()
        with pytest.raises(InvalidKeyError, match="slots are end, start; not 'middle'"):
            sessions.bind(images={"middle": image})
        with pytest.raises(TypeError, match="not a Video; values go to state="):
            sessions.bind(images={"start": gr.Video()})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"images\['start'\] and images\['end'\] are one component"):
            sessions.bind(images={"start": image, "end": image})
        with pytest.raises(ValueError, match=r"state\['a'\] and state\['b'\] are one component"):
            sessions.bind(state={"a": text, "b": text})
        # a JSON takes text for a file's name, a Dataframe too, and a State is for code alone
        for component in (gr.File(), gr.Audio(), gr.JSON(), gr.Dataframe(), gr.State(), gr.Button()):
            with pytest.raises(TypeError, match=rf"not what a {type(component).__name__} holds"):
                sessions.bind(state={"a": component})
        sessions.bind(images={"start": image})  # which none of these was
        with pytest.raises(RuntimeError, match="was called already; pass all images and all state to one call"):
            sessions.bind(images={"end": gr.Image()})
    with demo.route("Other", "/other"), pytest.raises(RuntimeError, match=r"Call bind\(\) first"):
        sessions.panel()
    with pytest.raises(RuntimeError, match=r"Call bind\(\) inside `with gr.Blocks\(\)`"):
        sessions.bind(images={"end": image})


async def test_a_run_on_a_slot_that_is_not_bound_says_which_are() -> None:
    store = open_store("memory://")
    sessions = GradioSessions(store, dispatcher=LocalDispatcher(store, [StepPipeline("steps")]), secret=SECRET)
    with gr.Blocks():
        sessions.bind(images={"start": gr.Image()})
        with pytest.raises(InvalidKeyError, match=r"bound to the slot 'strat', bind\(images=...\) has start"):
            sessions.bind_generate(gr.Button(), pipeline="steps", video=gr.Video(), slots={"steps": ["strat"]})
