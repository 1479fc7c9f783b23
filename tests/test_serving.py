from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import httpx
import pytest
from msgspec.structs import replace
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount

from async_sessions import (
    BlobStore,
    LocalBlobStore,
    OutputRecord,
    Session,
    SessionNotFoundError,
    SessionStore,
    StorageError,
    open_store,
)
from async_sessions.asgi import CookieSigner, Message, Scope, SessionImages, SessionOutputs, stored_signer
from async_sessions.blobs.base import CHUNK_SIZE
from tests.faults import FaultyBlobStore, files_below
from tests.images import encoded, jpeg_with_exif, photograph, rgba_png
from tests.stage import finished_job

if TYPE_CHECKING:
    from async_sessions.blobs import BlobData
    from async_sessions.testing.clock import FrozenClock

pytestmark = pytest.mark.anyio

SECRET = "a secret of the tests"
PNG = rgba_png()


@asynccontextmanager
async def browser(store: SessionStore, session_id: str | None) -> AsyncIterator[httpx.AsyncClient]:
    """A browser with that session's cookie, and an app that has its images and outputs mounted."""
    signer = await stored_signer(store.blobs)
    ask = partial(stored_signer, store.blobs)
    routes = [Mount("/images", SessionImages(store, signer=ask)), Mount("/jobs", SessionOutputs(store, signer=ask))]
    app = Starlette(routes=routes)
    cookies = {} if session_id is None else {signer.name: signer.sign(session_id)}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app", cookies=cookies) as client:
        yield client


@pytest.fixture
async def client(session_store: SessionStore, session: Session) -> AsyncIterator[httpx.AsyncClient]:
    async with browser(session_store, session.id) as client:
        yield client


async def test_an_owner_gets_the_stored_file(session: Session, client: httpx.AsyncClient) -> None:
    await session.store_image(PNG, "start")
    answer = await client.get("/images/start")
    assert (answer.status_code, answer.content) == (200, PNG)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(PNG))
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["accept-ranges"] == "bytes"


async def test_behind_a_proxy_that_takes_a_prefix_away_an_owner_gets_it_too(
    session_store: SessionStore, session: Session
) -> None:
    await session.store_image(PNG, "start")
    signer = await stored_signer(session_store.blobs)
    images = SessionImages(session_store, signer=partial(stored_signer, session_store.blobs))
    app = Starlette(routes=[Mount("/images", images)])
    cookies = {signer.name: signer.sign(session.id or "")}
    transport = httpx.ASGITransport(app, root_path="/behind")
    async with httpx.AsyncClient(transport=transport, base_url="http://app", cookies=cookies) as client:
        for path in ("/images/start", "/behind/images/start"):  # as most proxies send it, and as some do
            assert (await client.get(path)).content == PNG
        assert (await client.get("/images/end")).status_code == 404


async def test_a_signer_may_be_given_as_it_is(session_store: SessionStore, session: Session) -> None:
    await session.store_image(PNG, "start")
    job_id, _ = await finished(session)
    signer = CookieSigner(SECRET)
    images, outputs = SessionImages(session_store, signer=signer), SessionOutputs(session_store, signer=signer)
    transport = httpx.ASGITransport(Starlette(routes=[Mount("/images", images), Mount("/jobs", outputs)]))
    cookies = {signer.name: signer.sign(session.id or "")}
    async with httpx.AsyncClient(transport=transport, base_url="http://app", cookies=cookies) as client:
        assert (await client.get("/images/start")).content == PNG
        assert (await client.get(f"/jobs/{job_id}/outputs/film")).content == FILM


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
async def test_the_type_is_that_of_the_file(session: Session, client: httpx.AsyncClient, form: str) -> None:
    await session.store_image(encoded(photograph(64, 48), form), "start", name="page.html")
    assert (await client.get("/images/start")).headers["content-type"] == f"image/{form.lower()}"


async def test_an_owner_gets_the_thumbnail(session: Session, client: httpx.AsyncClient) -> None:
    await session.store_image(jpeg_with_exif(6), "start")
    answer = await client.get("/images/start/thumbnail")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content == await session.retrieve_thumbnail("start")
    assert Image.open(io.BytesIO(answer.content)).size == (320, 240)
    assert answer.headers["etag"] != (await client.get("/images/start")).headers["etag"]


async def test_a_browser_that_has_the_image_is_told_so_until_it_changes(
    session: Session, client: httpx.AsyncClient
) -> None:
    for path in ("/images/start", "/images/start/thumbnail"):
        await session.store_image(PNG, "start")
        etag = (await client.get(path)).headers["etag"]
        for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = await client.get(path, headers={"if-none-match": given})
            assert (answer.status_code, answer.content) == (304, b"")
            assert answer.headers["etag"] == etag
        assert (await client.get(path, headers={"if-none-match": '"other"'})).status_code == 200
        await session.store_image(photograph(64, 48), "start")
        assert (await client.get(path, headers={"if-none-match": etag})).status_code == 200


@pytest.mark.parametrize(
    ("given", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=10-", 10, -1),
        ("bytes=-10", -10, -1),
        ("bytes=5-99999999", 5, -1),
        ("Bytes=3-3", 3, 3),
    ],
)
async def test_a_part_is_served(session: Session, client: httpx.AsyncClient, given: str, first: int, last: int) -> None:
    await session.store_image(PNG, "start")
    size = len(PNG)
    first, last = first % size, last % size
    answer = await client.get("/images/start", headers={"range": given})
    assert (answer.status_code, answer.content) == (206, PNG[first : last + 1])
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{size}"
    thumbnail = await client.get("/images/start/thumbnail", headers={"range": "bytes=1-2"})
    assert thumbnail.content == b"IF"


@pytest.mark.parametrize("given", ["bytes=0-1,3-4", "bytes=-", "bytes=5-2", "lines=0-9", "bytes=x-", "bytes", ""])
async def test_what_is_no_single_range_is_answered_with_the_whole(
    session: Session, client: httpx.AsyncClient, given: str
) -> None:
    await session.store_image(PNG, "start")
    answer = await client.get("/images/start", headers={"range": given})
    assert (answer.status_code, answer.content) == (200, PNG)


@pytest.mark.parametrize("given", ["bytes=99999999-", "bytes=-0"])
async def test_a_range_behind_the_end_cannot_be_served(session: Session, client: httpx.AsyncClient, given: str) -> None:
    await session.store_image(PNG, "start")
    answer = await client.get("/images/start", headers={"range": given})
    assert (answer.status_code, answer.content) == (416, b"")
    assert answer.headers["content-range"] == f"bytes */{len(PNG)}"


async def test_a_range_of_a_file_that_changed_is_the_new_file(session: Session, client: httpx.AsyncClient) -> None:
    await session.store_image(PNG, "start")
    etag = (await client.get("/images/start")).headers["etag"]
    for given, status in ((etag, 206), ('"old"', 200)):
        answer = await client.get("/images/start", headers={"range": "bytes=0-9", "if-range": given})
        assert answer.status_code == status


async def test_head_has_the_same_headers_and_no_body(session: Session, client: httpx.AsyncClient) -> None:
    await session.store_image(PNG, "start")
    for path in ("/images/start", "/images/start/thumbnail"):
        got, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content, dict(head.headers)) == (200, b"", dict(got.headers))


async def test_a_method_that_changes_something_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/images/start")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def _who(scope: Scope) -> str | None:
    return dict(scope["headers"]).get(b"x-user", b"").decode() or None


async def _who_later(scope: Scope) -> str | None:
    await anyio.lowlevel.checkpoint()
    return _who(scope)


@pytest.mark.parametrize("identity", [_who, _who_later])
async def test_a_user_who_is_logged_in_gets_what_is_theirs(session_store: SessionStore, identity: Any) -> None:
    await (await session_store.session_for("ada")).store_image(PNG, "start")
    anonymous = await session_store.create_session()
    await anonymous.store_image(photograph(64, 48), "end")
    signer = await stored_signer(session_store.blobs)
    images = SessionImages(session_store, signer=partial(stored_signer, session_store.blobs), identity=identity)
    transport = httpx.ASGITransport(Starlette(routes=[Mount("/images", images)]))
    cookies = {signer.name: signer.sign(anonymous.id or "")}
    async with httpx.AsyncClient(transport=transport, base_url="http://app", cookies=cookies) as client:
        for user, slot, status in (
            ("ada", "start", 200),
            ("ada", "end", 404),  # of the browser, not of the user
            ("grace", "start", 404),
            ("", "start", 404),
            ("", "end", 200),
        ):
            for part in ("", "/thumbnail"):
                answer = await client.get(f"/images/{slot}{part}", headers={"x-user": user})
                assert answer.status_code == status
    with pytest.raises(SessionNotFoundError):
        await session_store.session_of("grace").info()


async def test_where_only_users_have_sessions_a_cookie_is_not_asked_for(session_store: SessionStore) -> None:
    await (await session_store.session_for("ada")).store_image(PNG, "start")
    transport = httpx.ASGITransport(SessionImages(session_store, identity=_who))
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        assert (await client.get("/start", headers={"x-user": "ada"})).content == PNG
        assert (await client.get("/start")).status_code == 404
    assert await session_store.blobs.get("cookie/secret") is None


def test_images_that_nobody_can_own_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="`signer`, `identity` or both"):
        SessionImages(open_store("memory://"))


async def test_nobody_else_gets_anything_and_cannot_tell_why(session_store: SessionStore, session: Session) -> None:
    await session.store_image(PNG, "start")
    other = await session_store.create_session()
    answers = []
    for session_id in (other.id, "made-up", None):
        async with browser(session_store, session_id) as client:
            answers += [await client.get(f"/images/start{part}") for part in ("", "/thumbnail")]
    forged = CookieSigner(SECRET, name=(await stored_signer(session_store.blobs)).name)
    async with browser(session_store, None) as client:
        client.cookies.set(forged.name, forged.sign(session.id or ""))
        answers.append(await client.get("/images/start"))
    async with browser(session_store, session.id) as client:
        for path in ("end", "START", "..%2fstart", "start/x", "start/thumbnail/x", "", "start%00", "x" * 100):
            answers.append(await client.get(f"/images/{path}"))
        await session.delete()
        answers.append(await client.get("/images/start"))
    assert {answer.status_code for answer in answers} == {404}
    assert len({(answer.content, tuple(answer.headers.items())) for answer in answers}) == 1
    assert answers[0].headers["cache-control"] == "no-store"


async def test_a_file_that_is_gone_from_the_disk_is_a_404(tmp_path: Path) -> None:
    async with open_store(LocalBlobStore(tmp_path / "root"), cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(PNG, "start")
        for path in files_below(tmp_path / "root", "blobs"):
            path.unlink()
        async with browser(store, session.id) as client:
            for path in ("/images/start", "/images/start/thumbnail"):  # type: ignore[assignment]
                assert (await client.get(str(path))).status_code == 404


async def test_a_large_file_is_streamed_in_chunks(session_store: SessionStore, session: Session) -> None:
    data = encoded(Image.effect_noise((1200, 1200), 90), "PNG")
    assert len(data) > CHUNK_SIZE
    await session.store_image(data, "start")
    signer = await stored_signer(session_store.blobs)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nothing to receive")

    app = SessionImages(session_store, signer=partial(stored_signer, session_store.blobs))
    cookie = f"{signer.name}={signer.sign(session.id or '')}".encode()
    scope = {"type": "http", "method": "GET", "path": "/start", "headers": [(b"cookie", cookie)]}
    await app(scope, receive, send)
    bodies = [message["body"] for message in sent[1:]]
    assert b"".join(bodies) == data
    assert max(map(len, bodies)) <= CHUNK_SIZE
    assert not sent[-1].get("more_body")
    sent.clear()
    await app({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close"}]


class BreaksOff(FaultyBlobStore):
    def stream(self, key: str, **options: Any) -> AsyncIterator[bytes]:
        async def half() -> AsyncIterator[bytes]:
            yield PNG[:10]
            raise StorageError("The disk is gone.")

        return half()


async def test_a_file_that_breaks_off_is_not_passed_off_as_whole() -> None:
    async with open_store(BreaksOff(), cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(PNG, "start")
        async with browser(store, session.id) as client:
            with pytest.raises(StorageError, match="The disk is gone"):
                await client.get("/images/start")


async def test_while_the_storage_fails_the_answer_says_try_again(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(FaultyBlobStore):
        broken = False

        async def get(self, key: str) -> Any:
            if self.broken and key.startswith("manifests/"):
                raise StorageError("The disk is gone.")
            return await super().get(key)

    blobs: BlobStore = Failing()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        async with browser(store, session.id) as client:
            Failing.broken = True
            answer = await client.get("/images/start")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert (session.id or "?") not in caplog.text


FILM = bytes(range(256)) * 8


async def finished(session: Session, media_type: str = "video/mp4") -> tuple[str, OutputRecord]:
    """A job of `session` that made FILM, and its record."""
    film = await session.store_output(FILM, name="film", media_type="video/mp4")
    film = replace(film, media_type=media_type)  # whatever an entry holds
    job = finished_job(session.key, datetime.now(UTC), {}, {"film": film})
    await session.edit_job(job.id, lambda _: job)
    return job.id, film


async def test_an_owner_gets_what_a_job_made_and_can_seek_in_it(session: Session, client: httpx.AsyncClient) -> None:
    job_id, film = await finished(session)
    url = f"/jobs/{job_id}/outputs/film"
    answer = await client.get(url)
    assert (answer.status_code, answer.content) == (200, FILM)
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["content-length"] == str(len(FILM))
    assert answer.headers["etag"] == f'"{film.digest}"'
    assert answer.headers["cache-control"] == "private, no-cache"
    part = await client.get(url, headers={"range": "bytes=100-199", "if-range": answer.headers["etag"]})
    assert (part.status_code, part.content) == (206, FILM[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(FILM)}"
    assert (await client.get(url, headers={"if-none-match": answer.headers["etag"]})).status_code == 304
    head = await client.head(url)
    assert (head.status_code, head.content, dict(head.headers)) == (200, b"", dict(answer.headers))
    assert (await client.delete(url)).status_code == 405


async def test_what_a_browser_might_run_is_only_to_be_downloaded(session: Session, client: httpx.AsyncClient) -> None:
    job_id, _ = await finished(session, "text/html\r\nx-forged: yes")
    answer = await client.get(f"/jobs/{job_id}/outputs/film")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "x-forged" not in answer.headers
    assert "sandbox" in answer.headers["content-security-policy"]


async def test_what_a_job_made_is_nobody_elses_and_nobody_can_tell_why(
    session_store: SessionStore, session: Session
) -> None:
    job_id, film = await finished(session)
    other = await session_store.create_session()
    other_job, _ = await finished(other)
    answers = []
    for session_id in (other.id, "made-up", None):
        async with browser(session_store, session_id) as client:
            answers.append(await client.get(f"/jobs/{job_id}/outputs/film"))
    async with browser(session_store, session.id) as client:
        unknown = (f"{job_id}/outputs/x", f"{job_id}/film", job_id, f"{other_job}/outputs/film", "x/outputs/y", "")
        answers += [await client.get(f"/jobs/{path}") for path in unknown]
        await session_store.blobs.delete(film.blob)
        answers.append(await client.get(f"/jobs/{job_id}/outputs/film"))
    assert {answer.status_code for answer in answers} == {404}
    assert len({(answer.content, tuple(answer.headers.items())) for answer in answers}) == 1


async def test_watching_a_video_keeps_its_session(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock, client: httpx.AsyncClient
) -> None:
    job_id, _ = await finished(session)
    for _ in range(3):
        frozen_clock.advance(hours=20)
        assert (await client.get(f"/jobs/{job_id}/outputs/film")).status_code == 200


async def test_a_use_that_cannot_be_recorded_stops_no_video(frozen_clock: FrozenClock) -> None:
    class Full(FaultyBlobStore):
        full = False

        async def put(self, key: str, data: BlobData, **options: Any) -> str:
            if self.full:
                raise StorageError("The disk is full.")
            return await super().put(key, data, **options)

    blobs = Full()
    async with open_store(blobs, cleanup_interval=None, clock=frozen_clock) as store:
        session = await store.create_session()
        job_id, _ = await finished(session)
        async with browser(store, session.id) as client:
            frozen_clock.advance(hours=20)
            blobs.full = True
            assert (await client.get(f"/jobs/{job_id}/outputs/film")).content == FILM
