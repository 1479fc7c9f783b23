"""What the HTTP routes of `asgi` tell whoever is not the owner: not one byte, and not even that there is something."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import NamedTuple

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount

from async_sessions import Session, SessionStore, open_store
from async_sessions.asgi import COOKIE, CookieSigner, SessionCookie, SessionImages, SessionOutputs
from async_sessions.testing.clock import FrozenClock
from tests.images import rgba_png
from tests.stage import finished_job

pytestmark = pytest.mark.anyio

SIGNER = CookieSigner("a new secret of the tests", "a secret of the tests")
PNG = rgba_png()
FILM = bytes(range(256)) * 8


class Owned(NamedTuple):
    """A session with an image and a video: its id and its storage name, and where these are."""

    id: str
    key: str
    paths: tuple[str, ...]


class Asked(NamedTuple):
    method: str
    headers: tuple[tuple[str, str], ...] = ()


async def owned(session: Session) -> Owned:
    await session.store_image(PNG, "start", name="a private name.png")
    film = await session.store_output(FILM, name="film", media_type="video/mp4")
    job = finished_job(session.key, datetime.now(UTC), {}, {"film": film})
    await session.edit_job(job.id, lambda _: job)
    paths = "/images/start", "/images/start/thumbnail", f"/jobs/{job.id}/outputs/film"
    return Owned(session.id or "", session.key, paths)


@asynccontextmanager
async def serving(store: SessionStore) -> AsyncIterator[httpx.AsyncClient]:
    async def ask() -> CookieSigner:
        return SIGNER

    routes = [Mount("/images", SessionImages(store, signer=ask)), Mount("/jobs", SessionOutputs(store, signer=ask))]
    app = Starlette(routes=routes, middleware=[Middleware(SessionCookie, signer=ask)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


def cookie(value: str, name: str = COOKIE) -> bytes:
    return f"{name}={value}".encode()


def forged(victim: Owned, stranger: Owned) -> Iterator[bytes]:
    """Cookies by which somebody who knows the victim's id, and much else, may want to be taken for the victim."""
    signed, own = SIGNER.sign(victim.id), SIGNER.sign(stranger.id)
    signature, own_signature = signed.partition(".")[2], own.partition(".")[2]
    yield b""
    yield from (
        cookie(value)
        for value in (
            *(victim.id, f"{victim.id}.", f".{victim.id}", f"{victim.id}.{'A' * 43}", f"{victim.id}.{own_signature}"),
            *(victim.key, f"{victim.key}.{signature}", signed[:-1], f"{signed}A", f'"{signed}"', f"{signed},{own}"),
            signed[:-2] + ("A" if signed[-2] != "A" else "B") + signed[-1],
            ("A" if signed[0] != "A" else "B") + signed[1:],
            *(signed.swapcase(), signed.replace(".", "%2e"), f"{stranger.id}.{signature}"),
            *(f"{victim.id}\0.{signature}", f"{victim.id}.{signature}".encode().hex()),
            CookieSigner("another secret of tests").sign(victim.id),
            SIGNER.sign_token(victim.id),  # what a page may show; a cookie is another thing
            *("", ".", "..", "é.é", "None", "../../manifests", "A" * 100_000),
        )
    )
    yield cookie(signed, name="async_sessions_0")
    yield cookie(own)
    yield cookie(SIGNER.sign("never begun"))
    yield b"; ".join([cookie(victim.id), cookie(own), b"x"])
    yield b"\xff\xfe=\xff; " + cookie("\udcff".encode("utf-8", "surrogatepass").decode("latin-1"))


def asked(etag: str) -> Iterator[Asked]:
    """Whatever makes a difference for a file that is there."""
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        yield Asked(method)
    for headers in (
        {"if-none-match": etag},
        {"if-none-match": "*"},
        {"if-match": etag},
        {"if-modified-since": "Fri, 01 Jan 2100 00:00:00 GMT"},
        {"range": "bytes=0-9"},
        {"range": "bytes=99999999-"},
        {"range": "bytes=0-9", "if-range": etag},
        {"accept": "text/html"},
        {"accept-encoding": "gzip"},
        {"origin": "http://elsewhere", "sec-fetch-site": "cross-site"},
        {"x-forwarded-proto": "https", "x-forwarded-user": "ann"},
    ):
        yield Asked("GET", tuple(headers.items()))


async def answer(client: httpx.AsyncClient, path: str, asked: Asked, sent: bytes) -> tuple[object, ...]:
    """Status, headers and body, without the date and without the id that a page is given, which is new each time."""
    client.cookies.clear()
    headers = [(name.encode(), value.encode()) for name, value in asked.headers]
    headers += [(b"cookie", sent)] if sent else []
    got = await client.request(asked.method, path, headers=headers)
    kept = [
        (name, f"{COOKIE}=...;{value.partition(';')[2]}" if name == "set-cookie" else value)
        for name, value in got.headers.multi_items()
        if name != "date"
    ]
    return got.status_code, tuple(kept), got.content


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
async def store(clock: FrozenClock) -> AsyncIterator[SessionStore]:
    async with open_store("memory://", cleanup_interval=None, clock=clock) as store:
        yield store


class Told:
    """Compares what is told of paths that somebody has, or had, with what is told of paths that nobody ever had."""

    NEVER = "/images/never", "/images/never/thumbnail", f"/jobs/{'0' * 32}.{'0' * 16}/outputs/film"

    def __init__(self, client: httpx.AsyncClient, victim: Owned) -> None:
        self._client = client
        self._victim = victim
        self._etags: dict[str, str] = {}
        self._never: dict[tuple[str, Asked], tuple[object, ...]] = {}

    async def learn(self) -> None:
        """While the owner can get them: the ETags, which others may have heard of."""
        for path in self._victim.paths:
            got = await self._client.get(path, headers={"cookie": cookie(SIGNER.sign(self._victim.id)).decode()})
            assert got.content
            self._etags[path] = got.headers["etag"]

    async def check_nothing(self, sent: bytes) -> None:
        for path, never in zip(self._victim.paths, self.NEVER, strict=True):
            for each in asked(self._etags[path]):
                known = never, each
                if known not in self._never:
                    self._never[known] = await answer(self._client, never, each, b"")
                told = await answer(self._client, path, each, sent)
                assert told == self._never[known], (path, each, sent[:200])
                assert told[0] in (404, 405)
                assert told[2] == b""


async def test_a_forged_cookie_gets_the_answer_for_what_does_not_exist(store: SessionStore) -> None:
    victim = await owned(await store.create_session())
    stranger = await owned(await store.create_session())
    await store.session(stranger.id).clear_image("start")
    async with serving(store) as client:
        told = Told(client, victim)
        await told.learn()
        cookies = list(forged(victim, stranger))
        for sent in cookies:
            await told.check_nothing(sent)
        assert len(cookies) > 30
        own = await answer(client, stranger.paths[2], Asked("GET"), cookie(SIGNER.sign(stranger.id)))
        assert own[2] == FILM


async def test_a_foreign_id_in_a_path_is_as_one_that_was_made_up(store: SessionStore) -> None:
    victim = await owned(await store.create_session())
    stranger = await owned(await store.create_session())
    job = victim.paths[2]
    hexadecimal = job.rpartition("/outputs")[0].rpartition(".")[2]
    async with serving(store) as client:
        own = cookie(SIGNER.sign(stranger.id))
        for path in (
            *(
                job,
                f"{job}/",
                f"{job}/../film",
                job.replace(job[6:20], job[6:20].upper()),
                job.replace(".", "%2e"),
                job.replace("/jobs/", "/jobs//"),
            ),
            f"/jobs/{stranger.key}.{hexadecimal[::-1]}x/outputs/film",
            *(f"/jobs/{victim.key}/outputs/film", f"/jobs/{victim.id}/outputs/film", f"/images/{victim.id}"),
            *(f"/images/{victim.key}/start", f"/images/..%2f{victim.key}", f"/images/{victim.id}/thumbnail"),
        ):
            for each in asked('"x"'):
                told = await answer(client, path, each, own)
                kind = "/jobs/x/outputs/y" if path.startswith("/jobs") else "/images/never"
                assert told == await answer(client, kind, each, own), (path, each)
                assert told[0] in (404, 405)


@pytest.mark.parametrize("how", ["deleted", "expired"])
async def test_an_old_cookie_gets_the_answer_for_what_does_not_exist(
    store: SessionStore, clock: FrozenClock, how: str
) -> None:
    session = await store.create_session()
    victim = await owned(session)
    async with serving(store) as client:
        told = Told(client, victim)
        await told.learn()
        if how == "deleted":
            await session.delete()
        else:
            clock.advance(hours=30)
        await told.check_nothing(cookie(SIGNER.sign(victim.id)))


async def test_a_cookie_of_a_secret_that_was_given_up_is_nobodys(store: SessionStore) -> None:
    victim = await owned(await store.create_session())
    async with serving(store) as client:
        for secret in ("a secret of the tests", "a new secret of the tests"):  # both are in use
            sent = cookie(CookieSigner(secret).sign(victim.id))
            assert (await answer(client, victim.paths[0], Asked("GET"), sent))[2] == PNG
        told = Told(client, victim)
        await told.learn()
        await told.check_nothing(cookie(CookieSigner("the secret of last year").sign(victim.id)))
