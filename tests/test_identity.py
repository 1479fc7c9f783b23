"""Who a request is from, and that nobody gets at what is another's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio
import fastapi  # noqa: TC002 - FastAPI reads the annotations
import gradio as gr
import httpx
import pytest
from PIL import Image

from async_sessions import Limits, MemoryBlobStore, SessionNotFoundError, open_store
from async_sessions.asgi import COOKIE, CookieSigner
from async_sessions.gradio import GradioSessions
from async_sessions.testing.faults import FailingBlobStore
from tests import forging
from tests.faults import keys_of
from tests.images import rgba_png
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


Uploads = Callable[[str, bytes], Path]


@asynccontextmanager
async def running(*pipelines: StepPipeline, store: Any = "memory://", **options: Any) -> AsyncIterator[App]:
    app = App(open_store(store, cleanup_interval=None), *pipelines, **options)
    async with app.running():
        yield app


# --- a login


async def test_what_a_browser_kept_before_a_login_is_there_after_it_and_the_old_session_is_gone(
    uploads: Uploads,
) -> None:
    async with running() as app:
        page = await app.open(ANN)
        await page.choose_file(app.start, uploads("photo.png", rgba_png()))
        await page.enter(app.prompt, "a boat")
        page = await app.open(ANN, username="carol")
        assert page.shows(app.start) is not None
        assert page.shows(app.prompt) == "a boat"
        assert "photo.png" in page.shows(app.info)
        assert (await app.open(ANN)).shows(app.start) is None
        assert (await app.open(BOB, username="carol")).shows(app.start) is not None
        assert (await app.open(ANN, username="dave")).shows(app.start) is None
        with pytest.raises(SessionNotFoundError):
            await app.kept(ANN)


async def test_a_login_overwrites_nothing_that_the_user_has(uploads: Uploads) -> None:
    async with running() as app:
        await (await app.open({}, username="carol")).choose_file(app.start, uploads("mine.png", rgba_png()))
        page = await app.open(ANN)
        await page.choose_file(app.start, uploads("other.png", rgba_png(90, 60)))
        await page.choose_file(app.end, uploads("end.png", rgba_png(60, 90)))
        await app.open(ANN, username="carol")
        info = await app.store.session_of("carol").info()
        assert {slot: record.source_name for slot, record in info.images.items()} == {
            "start": "mine.png",
            "end": "end.png",
        }
        assert [recent.record.source_name for recent in info.recent] == ["other.png"]


async def test_where_the_app_says_so_a_login_takes_nothing_along(uploads: Uploads) -> None:
    async with running(merge_at_login=False) as app:
        await (await app.open(ANN)).choose_file(app.start, uploads("photo.png", rgba_png()))
        assert (await app.open(ANN, username="carol")).shows(app.start) is None
        assert (await app.open(ANN)).shows(app.start) is not None


async def test_two_tabs_that_open_after_a_login_show_the_same(uploads: Uploads) -> None:
    async with running() as app:
        page = await app.open(ANN)
        await page.choose_file(app.start, uploads("one.png", rgba_png()))
        await page.choose_file(app.end, uploads("two.png", rgba_png(90, 60)))
        tabs = [Page(app.demo, ANN, username="carol") for _ in range(4)]
        async with anyio.create_task_group() as group:
            for tab in tabs:
                group.start_soon(tab.load)
        assert len({(tab.shows(app.start), tab.shows(app.end)) for tab in tabs}) == 1
        assert tabs[0].shows(app.end) is not None
        assert (await app.store.session_of("carol").info()).recent == ()


async def test_what_a_login_can_not_take_along_stays_and_the_log_says_so_once_and_without_an_id(
    uploads: Uploads, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(open_store("memory://", cleanup_interval=None, limits=Limits(max_session_images=1)))
    async with app.running():
        await (await app.open({}, username="carol")).choose_file(app.end, uploads("mine.png", rgba_png()))
        await (await app.open(ANN)).choose_file(app.start, uploads("photo.png", rgba_png(90, 60)))
        for _ in range(2):
            assert (await app.open(ANN, username="carol")).shows(app.start) is None
        assert (await app.open(ANN)).shows(app.start) is not None
    (told,) = (record.getMessage() for record in caplog.records if "can't go" in record.getMessage())
    assert told.startswith("start of session")
    assert "ann" not in caplog.text
    assert "carol" not in caplog.text


async def test_a_storage_that_fails_at_a_login_does_not_keep_the_page_from_opening(uploads: Uploads) -> None:
    blobs = FailingBlobStore(MemoryBlobStore(), at=None, operations=["put"], prefix="blobs/")
    async with running(store=blobs) as app:
        await (await app.open(ANN)).choose_file(app.start, uploads("photo.png", rgba_png()))
        blobs.arm(1)
        await app.open(ANN, username="carol")
        assert blobs.failures == 1
        assert (await app.open(ANN, username="carol")).shows(app.start) is not None


# --- a browser that sends no cookie


async def with_token(app: App, token: Any = None) -> Page:
    """A page that was opened with that token in its storage, by a browser that sends no cookie."""
    page = Page(app.demo, {})
    page.values[token_of(app)._id] = token
    return await page.load()


def stored(signed: str, name: str = COOKIE) -> list[list[str]]:
    """A token in a page's storage, as that of the app whose cookie has that name."""
    return [[name, signed]]


def token_of(app: App) -> gr.BrowserState:
    (state,) = (block for block in app.demo.blocks.values() if isinstance(block, gr.BrowserState))
    return state


async def test_a_browser_without_cookies_is_known_by_its_token(uploads: Uploads) -> None:
    async with running(identity="browser_state") as app:
        page = await with_token(app)
        token = page.shows(token_of(app))
        assert [name for name, _ in token] == [COOKIE]
        assert await keys_of(app.store.blobs, "manifests/") == set()
        await page.choose_file(app.start, uploads("photo.png", rgba_png()))
        await page.enter(app.prompt, "a boat")
        again = await with_token(app, token)
        assert again.shows(app.start) is not None
        assert again.shows(app.prompt) == "a boat"
        assert "photo.png" in again.shows(app.info)
        assert again.shows(token_of(app)) == token
        stranger = await with_token(app)
        assert stranger.shows(app.start) is None
        assert stranger.shows(token_of(app)) != token
        await again.remove(app.start)
        assert (await with_token(app, token)).shows(app.start) is None
        await again.fire(app.button("Yes, clear all"), "click")
        assert await keys_of(app.store.blobs, "manifests/") == set()


async def test_a_browser_without_cookies_generates_reloads_and_cancels() -> None:
    steps = StepPipeline("steps")
    steps.spec.defaults["endless"] = True  # type: ignore[index]
    async with running(steps, identity="browser_state") as app:
        page = await with_token(app)
        token = page.shows(token_of(app))
        answers = page.run(page.listener(app.go, "click"))
        async for _ in answers:
            if "endless" in str(page.shows(app.bar)):
                break
        await answers.aclose()
        again = Page(app.demo, {})
        again.values[token_of(app)._id] = token
        cancelled = False
        async for _ in again.run(again.listener(app.demo, "load")):
            if not cancelled and "endless" in str(again.shows(app.bar)):
                await again.fire(app.cancel, "click")
                cancelled = True
        assert "Cancelled" in again.shows(app.bar)


async def test_every_listener_of_ours_gets_the_token_and_no_listener_of_the_app() -> None:
    sessions = GradioSessions("memory://", secret=SECRET, identity="browser_state")
    demo = gr.Blocks()
    with demo:
        with gr.Tabs(), gr.Tab("first"):
            pass
        with gr.Tabs(), gr.Tab("second"), gr.Accordion(open=False):
            start, button = gr.Image(), gr.Button()
            own = button.click(lambda: None, None, None)
            sessions.bind(images={"start": start}).panel()
            state = sessions.token()
        later = button.click(lambda: None, None, None)
    assert state.parent is demo
    fns = Page(demo, {})._fns
    for index, fn in fns.items():
        assert (state in fn.inputs) is (index not in (own["id"], later["id"])), fn


FORGED: Final[list[Any]] = ["ann's id", "ann's id.", "x.y", 7, True, ["x"], {"a": 1}, "x" * 100_000, None]


@pytest.mark.parametrize("forged", [*FORGED, *([[COOKIE, forged]] for forged in FORGED)])
async def test_a_forged_token_is_nobody_and_is_replaced(uploads: Uploads, forged: Any) -> None:
    async with running(identity="browser_state") as app:
        await (await app.open(ANN)).choose_file(app.start, uploads("photo.png", rgba_png()))
        page = await with_token(app, forged)
        assert page.shows(app.start) is None
        [(name, token)] = page.shows(token_of(app))
        assert name == COOKIE
        assert CookieSigner(SECRET).id_of_token(token)
        page = await with_token(app, stored(ANN[COOKIE]))
        assert page.shows(app.start) is None


async def test_two_apps_of_one_origin_leave_each_other_their_tokens(uploads: Uploads) -> None:
    async with running(identity="browser_state") as one, running(identity="browser_state") as two:
        two.sessions._visits._signer = CookieSigner("a secret of the other app", name="studio")
        page = await with_token(one)
        await page.choose_file(one.start, uploads("photo.png", rgba_png()))
        both = (await with_token(two, page.shows(token_of(one)))).shows(token_of(two))
        assert [name for name, _ in both] == [COOKIE, "studio"]
        page = await with_token(one, both)
        assert page.shows(one.start) is not None
        assert page.shows(token_of(one)) == both
        assert (await with_token(two, both)).shows(token_of(two)) == both


async def test_a_token_of_an_older_secret_is_signed_anew(uploads: Uploads) -> None:
    old = stored(CookieSigner(SECRET).sign_token("ann's id"))
    async with running(identity="browser_state") as app:
        app.sessions._visits._signer = CookieSigner("a new secret of the tests", SECRET)
        page = await with_token(app, old)
        [(_, token)] = page.shows(token_of(app))
        assert token == CookieSigner("a new secret of the tests").sign_token("ann's id")


async def test_a_browser_that_sends_a_cookie_or_has_logged_in_gets_no_token() -> None:
    async with running(identity="browser_state") as app:
        assert (await app.open(ANN)).shows(token_of(app)) is None
        assert (await app.open({}, username="carol")).shows(token_of(app)) is None


async def test_a_token_is_nothing_to_an_app_that_did_not_ask_for_it(uploads: Uploads) -> None:
    async with running() as app:
        assert not [block for block in app.demo.blocks.values() if isinstance(block, gr.BrowserState)]
        with gr.Blocks(), pytest.raises(RuntimeError, match="browser_state"):
            app.sessions.token()
        token = stored(CookieSigner(SECRET).sign_token("ann's id"))
        assert await app.sessions.session(gr.Request(cookies={}), token) is None
    with pytest.raises(ValueError, match="browser_state"):
        GradioSessions("memory://", identity="session_hash")  # type: ignore[arg-type]


async def test_a_listener_of_the_app_finds_the_session_by_the_token() -> None:
    async with running(identity="browser_state") as app:
        token = stored(CookieSigner(SECRET).sign_token("ann's id"))
        session = await app.sessions.session(gr.Request(cookies={}), token)
        assert session is not None
        assert session.key == app.store.session("ann's id").key
        assert await app.sessions.session(gr.Request(cookies={}), "forged") is None
        named = await app.sessions.session(gr.Request(cookies=dict(BOB)), token)
        assert named is not None
        assert named.key == app.store.session("bob's id").key
        user = await app.sessions.session(gr.Request(cookies={}, username="carol"), token)
        assert user is not None
        assert user.key == app.store.session_of("carol").key


async def test_what_a_token_kept_is_taken_along_at_a_login(uploads: Uploads) -> None:
    async with running(identity="browser_state") as app:
        page = await with_token(app)
        await page.choose_file(app.start, uploads("photo.png", rgba_png()))
        user = Page(app.demo, {}, username="carol")
        user.values[token_of(app)._id] = page.shows(token_of(app))
        assert (await user.load()).shows(app.start) is not None


# --- over HTTP


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the statistics that Gradio keeps with pandas
async def test_under_tls_a_page_has_a_session_of_its_own_and_a_planted_cookie_is_nobodys(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # Gradio's own calls run below our middleware
    app = App(open_store(tmp_path / "root", cleanup_interval=None))
    async with mounted(app) as parent:
        browser = Browser(parent, base="https://test")
        browser.http.cookies.update(ANN)
        await browser.open()
        host = f"__Host-{COOKIE}"
        assert set(browser.http.cookies) == {COOKIE, host}
        upload = index_of(app.demo, app.start, "upload")
        path = await browser.upload("photo.png", rgba_png(90, 60))
        assert '"success":true' in await browser.fire(upload, [file_data(path)])
        signer = CookieSigner(SECRET)
        session_id = signer.session_id({host: browser.http.cookies[host]}, secure=True)
        assert session_id is not None
        assert await app.store.session(session_id).has_image("start")
        with pytest.raises(SessionNotFoundError):
            await app.store.session("ann's id").info()
        assert (await browser.http.get("images/start")).status_code == 200
        del browser.http.cookies[host]
        await browser.fire(upload, [file_data(path)])
        with pytest.raises(SessionNotFoundError):
            await app.store.session("ann's id").info()
        assert (await browser.http.get("images/start")).status_code == 404


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("by", ["auth", "auth_dependency"])
async def test_the_images_of_who_logged_in_with_gradio_are_theirs_over_http_too(
    tmp_path: Path, blockbuster: BlockBuster, by: str
) -> None:
    blockbuster.deactivate()
    app = App(open_store(tmp_path / "root", cleanup_interval=None))

    async def who(request: fastapi.Request) -> str | None:
        await asyncio.sleep(0)
        return request.headers.get("x-user")

    options: dict[str, Any] = {"auth_dependency": who} if by == "auth_dependency" else {}
    if by == "auth":
        options["auth"] = [("carol", "her password"), ("dave", "his password")]

    async def log_in(browser: Browser, user: str, password: str) -> None:
        if by == "auth_dependency":
            browser.http.headers["x-user"] = user
        else:
            done = await browser.http.post("login", data={"username": user, "password": password})
            assert done.json() == {"success": True}

    async with mounted(app, **options) as parent:
        carol, dave, nobody = Browser(parent), Browser(parent), Browser(parent)
        await log_in(carol, "carol", "her password")
        await log_in(dave, "dave", "his password")
        for browser in (carol, dave):
            await browser.open()
        path = await carol.upload("photo.png", rgba_png(90, 60))
        assert '"success":true' in await carol.fire(index_of(app.demo, app.start, "upload"), [file_data(path)])
        assert await app.store.session_of("carol").has_image("start")
        for url in ("images/start", "http://test/own-images/start", "images/start/thumbnail"):
            assert (await carol.http.get(url)).status_code == 200
            assert (await dave.http.get(url)).status_code == 404
            assert (await nobody.http.get(url)).status_code == 404


async def test_the_images_routes_start_what_nothing_has_started_yet(tmp_path: Path) -> None:
    """As in reload mode, which runs no lifespan."""
    async with open_store(tmp_path, cleanup_interval=None) as store:
        await store.session("ann's id").store_image(Image.new("RGB", (8, 8)), "start")
    sessions = GradioSessions(tmp_path, secret=SECRET)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(sessions.images_app()), base_url="http://test")
    try:
        assert (await http.get("/start", headers={"cookie": f"{COOKIE}={ANN[COOKIE]}"})).status_code == 200
    finally:
        await sessions._visits.held.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
async def test_no_forged_event_gets_a_foreign_byte_or_another_answer_than_for_what_does_not_exist(
    tmp_path: Path, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()
    assert await forging.check(tmp_path / "root", share=0.2, rng=random.Random()) > 100
