from __future__ import annotations

import logging
import stat
import sys
from collections.abc import Awaitable, Callable
from http.cookies import Morsel, SimpleCookie
from pathlib import Path
from typing import Any

import anyio
import pytest

from async_sessions import CorruptBlobError, LocalBlobStore, MemoryBlobStore, StorageError, asgi
from async_sessions.asgi import COOKIE, CookieSigner, Message, Receive, Scope, Send, SessionCookie, stored_signer
from tests.faults import files_below

pytestmark = pytest.mark.anyio

SECRET = "a secret of the tests"
PAGE = {"accept": "text/html,application/xhtml+xml"}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in two chunks, as a stream of events does."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"kept")]})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    await send({"type": "http.response.body", "body": b"two"})


def given(signer: CookieSigner) -> Callable[[], Awaitable[CookieSigner]]:
    async def ask() -> CookieSigner:
        return signer

    return ask


class Client:
    """A browser without a jar: what is sent is what the test says."""

    def __init__(self, middleware: SessionCookie) -> None:
        self._middleware = middleware

    async def get(self, path: str = "/", headers: dict[str, str] | None = None, **scope: Any) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            raise AssertionError("nothing to receive")

        encoded = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        request = {"type": "http", "method": "GET", "scheme": "http", "path": path, "headers": encoded, **scope}
        await self._middleware(request, receive, send)
        return sent

    async def cookie(self, path: str = "/", headers: dict[str, str] | None = None, **scope: Any) -> Morsel[str] | None:
        """What the answer sets, if it sets one."""
        start = (await self.get(path, headers, **scope))[0]
        values = [value.decode() for name, value in start["headers"] if name == b"set-cookie"]
        values = [value.replace("; Partitioned", "") for value in values]  # which SimpleCookie does not know yet
        assert len(values) <= 1
        return next((each for value in values for each in SimpleCookie(value).values()), None)


@pytest.fixture
def signer() -> CookieSigner:
    return CookieSigner(SECRET)


@pytest.fixture
def client(signer: CookieSigner) -> Client:
    return Client(SessionCookie(app, signer=given(signer)))


async def test_a_new_browser_gets_a_signed_id_that_scripts_and_other_sites_cannot_use(
    client: Client, signer: CookieSigner
) -> None:
    cookie = await client.cookie()
    assert cookie is not None
    assert cookie["httponly"]
    assert (cookie["samesite"], cookie["path"], cookie["max-age"]) == ("Lax", "/", str(30 * 24 * 3600))
    assert not cookie["secure"]
    session_id = signer.session_id({COOKIE: cookie.value})
    assert session_id is not None
    assert len(session_id) == 43
    other = await client.cookie()
    assert other is not None
    assert signer.session_id({COOKIE: other.value}) != session_id


async def test_a_signer_may_be_given_as_it_is(signer: CookieSigner) -> None:
    cookie = await Client(SessionCookie(app, signer=signer)).cookie()
    assert cookie is not None
    assert signer.session_id({COOKIE: cookie.value}) is not None
    embedded = Client(SessionCookie(app, signer=signer, embedded=True))
    elsewhere = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}
    assert await embedded.cookie("/", elsewhere) is None


@pytest.mark.parametrize(
    ("path", "headers", "minted"),
    [
        ("/", {}, True),
        ("/config", {}, True),
        ("/second-page", PAGE, True),
        ("/assets/index.js", {"accept": "*/*"}, False),
        ("/gradio_api/queue/data", {"accept": "text/event-stream"}, False),
    ],
)
async def test_only_a_page_sets_the_cookie(client: Client, path: str, headers: dict[str, str], minted: bool) -> None:
    assert (await client.cookie(path, headers) is not None) is minted


async def test_a_post_sets_no_cookie(client: Client) -> None:
    assert await client.cookie(method="POST") is None


async def test_an_app_that_is_mounted_or_behind_a_prefix_has_its_page_there(client: Client) -> None:
    assert await client.cookie("/app/", root_path="/app") is not None
    assert await client.cookie("/app/file", root_path="/app") is None


async def test_a_returning_browser_keeps_its_id_and_its_cookie_is_renewed(client: Client, signer: CookieSigner) -> None:
    sent = {"cookie": f"theme=dark; {COOKIE}={signer.sign('an-id')}; other=1"}
    cookie = await client.cookie("/", sent)
    assert cookie is not None
    assert signer.session_id({COOKIE: cookie.value}) == "an-id"


@pytest.mark.parametrize("value", ["an-id", "an-id.", "an-id.AAAA", ".", "", "é", "an-id.é"])
async def test_a_forged_cookie_is_nobody_and_is_replaced(client: Client, signer: CookieSigner, value: str) -> None:
    assert signer.session_id({COOKIE: value}) is None
    cookie = await client.cookie("/", {"cookie": f"{COOKIE}={value}"})
    assert cookie is not None
    assert signer.session_id({COOKIE: cookie.value}) not in (None, "an-id")


async def test_an_id_signed_with_another_secret_is_nobody(signer: CookieSigner) -> None:
    assert signer.session_id({COOKIE: CookieSigner("another secret of tests").sign("an-id")}) is None


async def test_after_a_rotation_old_cookies_are_accepted_and_signed_anew(signer: CookieSigner) -> None:
    rotated = CookieSigner("a new secret of the tests", SECRET)
    renewed = await Client(SessionCookie(app, signer=given(rotated))).cookie(
        "/", {"cookie": f"{COOKIE}={signer.sign('an-id')}"}
    )
    assert renewed is not None
    assert CookieSigner("a new secret of the tests").session_id({COOKIE: renewed.value}) == "an-id"


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 bytes"):
        CookieSigner(SECRET, "short")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        CookieSigner()


@pytest.mark.parametrize(
    ("scheme", "secure", "expected"), [("https", False, True), ("http", True, True), ("http", False, False)]
)
async def test_the_cookie_is_secure_under_tls_or_where_the_app_says_so(
    signer: CookieSigner, scheme: str, secure: bool, expected: bool
) -> None:
    client = Client(SessionCookie(app, signer=given(signer), secure=secure))
    cookie = await client.cookie(scheme=scheme)
    assert cookie is not None
    assert bool(cookie["secure"]) is expected


async def test_under_tls_the_cookie_has_a_name_that_no_other_host_can_set(client: Client, signer: CookieSigner) -> None:
    sent = (await client.get(scheme="https"))[0]["headers"]
    (cookie,) = (value.decode() for name, value in sent if name == b"set-cookie")
    assert cookie.startswith(f"__Host-{COOKIE}=")
    assert {"Secure", "Path=/", "HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert "Domain" not in cookie


@pytest.mark.parametrize(("scheme", "name"), [("https", COOKIE), ("http", f"__Host-{COOKIE}")])
async def test_a_cookie_of_the_other_scheme_is_nobody(
    client: Client, signer: CookieSigner, scheme: str, name: str
) -> None:
    cookie = await client.cookie("/", {"cookie": f"{name}={signer.sign('planted')}"}, scheme=scheme)
    assert cookie is not None
    assert signer.session_id({cookie.key: cookie.value}) not in (None, "planted")


async def test_the_cookie_for_tls_goes_before_one_that_was_planted_beside_it(signer: CookieSigner) -> None:
    cookies = {COOKIE: signer.sign("planted"), f"__Host-{COOKIE}": signer.sign("an-id")}
    assert signer.session_id(cookies) == "an-id"
    assert signer.session_id({COOKIE: signer.sign("an-id"), f"__Host-{COOKIE}": "forged"}) == "an-id"
    assert signer.session_id({COOKIE: signer.sign("planted")}, secure=True) is None
    assert signer.session_id({f"__Host-{COOKIE}": signer.sign("planted")}, secure=False) is None


async def test_a_cookie_is_no_token_and_a_token_no_cookie(signer: CookieSigner) -> None:
    assert signer.id_of_token(signer.sign_token("an-id")) == "an-id"
    assert signer.id_of_token(signer.sign("an-id")) is None
    assert signer.session_id({COOKIE: signer.sign_token("an-id")}) is None
    rotated = CookieSigner("a new secret of the tests", SECRET)
    assert rotated.id_of_token(signer.sign_token("an-id")) == "an-id"
    assert signer.id_of_token(rotated.sign_token("an-id")) is None


@pytest.mark.parametrize(
    "token", [None, 1, True, [], {}, b"an-id", ["an-id"], "", ".", "an-id", "é.é", "a" * 10_000_000]
)
async def test_whatever_a_client_sends_for_a_token_is_nobody(signer: CookieSigner, token: object) -> None:
    assert signer.id_of_token(token) is None


@pytest.fixture
def framed(signer: CookieSigner) -> Client:
    return Client(SessionCookie(app, signer=given(signer), embedded=True))


async def test_in_a_frame_of_another_site_the_cookie_is_that_sites_own(framed: Client, signer: CookieSigner) -> None:
    sent = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}
    for scheme in ("http", "https"):
        headers = (await framed.get("/", sent, scheme=scheme))[0]["headers"]
        (cookie,) = (value.decode() for name, value in headers if name == b"set-cookie")
        assert cookie.startswith(f"__Host-{COOKIE}=")
        assert {"Secure", "Path=/", "HttpOnly", "SameSite=None", "Partitioned"} <= set(cookie.split("; "))
    again = await framed.cookie("/", sent | {"cookie": f"__Host-{COOKIE}={signer.sign('an-id')}"})
    assert again is not None
    assert signer.session_id({again.key: again.value}) == "an-id"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("mode", "method"), [("cors", "GET"), ("no-cors", "GET"), ("navigate", "POST")])
async def test_a_request_that_another_sites_page_sends_is_nobodys(
    signer: CookieSigner, site: str, mode: str, method: str
) -> None:
    seen: list[dict[bytes, bytes]] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"]))
        await app(scope, receive, send)

    cookie = f"theme=dark; __Host-{COOKIE}={signer.sign('an-id')}; {COOKIE}={signer.sign('an-id')}; last=1"
    headers = {"cookie": cookie, "sec-fetch-site": site, "sec-fetch-mode": mode}
    client = Client(SessionCookie(note, signer=given(signer), embedded=True))
    start, *_ = await client.get("/", headers, scheme="https", method=method)
    assert seen[0][b"cookie"] == b"theme=dark; last=1"
    assert not any(name == b"set-cookie" for name, _ in start["headers"])
    await client.get("/", headers | {"sec-fetch-site": "same-origin"}, scheme="https", method=method)
    assert seen[1][b"cookie"] == cookie.encode()

    async def unreadable() -> CookieSigner:
        raise StorageError("The disk is gone.")

    await Client(SessionCookie(note, signer=unreadable, embedded=True)).get("/", headers, method=method)
    assert b"cookie" not in seen[2]


async def test_the_answer_passes_through_chunk_by_chunk_and_no_shared_cache_may_keep_it(client: Client) -> None:
    start, *bodies = await client.get()
    assert (b"x-own", b"kept") in start["headers"]
    assert (b"cache-control", b"private") in start["headers"]
    assert [body["body"] for body in bodies] == [b"one", b"two"]


async def test_websockets_and_lifespans_are_left_alone(signer: CookieSigner) -> None:
    seen: list[str] = []

    async def record(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    middleware = SessionCookie(record, signer=given(signer))
    for kind in ("websocket", "lifespan"):
        await middleware({"type": kind}, None, None)  # type: ignore[arg-type]
    assert seen == ["websocket", "lifespan"]


async def test_the_store_keeps_one_secret_however_many_ask_for_it_first(tmp_path: Path) -> None:
    signed: list[tuple[str, str]] = []

    async def ask() -> None:
        signer = await stored_signer(LocalBlobStore(tmp_path / "root"))
        signed.append((signer.name, signer.sign("an-id")))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(ask)
    assert len(set(signed)) == 1
    (secret,) = files_below(tmp_path / "root", "cookie")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


async def test_two_processes_that_ask_for_the_secret_first_share_it(tmp_path: Path) -> None:
    code = f"""
import anyio
from async_sessions import LocalBlobStore
from async_sessions.asgi import stored_signer
print(anyio.run(stored_signer, LocalBlobStore({str(tmp_path / "root")!r})).sign("an-id"))
"""
    signed: list[bytes] = []

    async def ask() -> None:
        signed.append((await anyio.run_process([sys.executable, "-c", code])).stdout)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(ask)
    assert len(signed) == 4
    assert len(set(signed)) == 1


async def test_two_stores_on_one_host_do_not_overwrite_each_others_cookie() -> None:
    first, second = await stored_signer(MemoryBlobStore()), await stored_signer(MemoryBlobStore())
    assert first.name != second.name
    assert second.session_id({first.name: first.sign("an-id")}) is None


async def test_while_the_secret_cannot_be_read_pages_are_served_without_a_cookie(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def unreadable() -> CookieSigner:
        raise StorageError("The disk is gone.")

    client = Client(SessionCookie(app, signer=unreadable))
    assert await client.cookie() is None
    assert "no session cookie" in caplog.text


async def test_no_id_and_no_cookie_is_logged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        cookie = await client.cookie()
        assert cookie is not None
        await client.cookie("/", {"cookie": f"{COOKIE}={cookie.value}"})
        await client.cookie("/", {"cookie": f"{COOKIE}={cookie.value}x"})
    assert cookie.value.partition(".")[0] not in caplog.text


async def test_a_store_that_hangs_delays_no_page_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never() -> CookieSigner:
        await anyio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(asgi, "_SIGNER_WITHIN", 0.05)
    with anyio.fail_after(10):
        assert await Client(SessionCookie(app, signer=never)).cookie() is None


@pytest.mark.parametrize("damaged", [b"", b"short"])
async def test_a_damaged_secret_is_a_typed_error_that_says_what_to_do(tmp_path: Path, damaged: bytes) -> None:
    for blobs in (MemoryBlobStore(), LocalBlobStore(tmp_path / "root")):
        await blobs.put("cookie/secret", damaged)
        with pytest.raises(CorruptBlobError, match="Delete cookie/secret"):
            await stored_signer(blobs)


async def test_a_secret_that_can_not_be_read_is_a_typed_error_and_is_not_replaced(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path / "root")
    before = (await stored_signer(blobs)).sign("an-id")
    (path,) = files_below(tmp_path / "root", "cookie")
    secret = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError):
        await stored_signer(blobs)
    path.rmdir()
    path.write_bytes(secret)
    assert (await stored_signer(blobs)).sign("an-id") == before
