"""`examples/fastapi_app.py`, served by uvicorn in a process of its own; once in this one, to count its tasks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import av
import httpx
import pytest
from PIL import Image

from tests.faults import files_below
from tests.images import photo
from tests.servers import ROOT, Server, chromium, free_port, serving

if TYPE_CHECKING:
    from types import ModuleType

EXAMPLE = ROOT / "examples" / "fastapi_app.py"
PHOTO = photo("astronaut.png")
SHORT = {"params": {"num_frames": 9, "width": 64}}

Event = dict[str, str]


@contextlib.contextmanager
def uvicorn(folder: Path, app: str) -> Iterator[Server]:
    port = free_port()
    options = ("--timeout-graceful-shutdown", "1", "--port", str(port))
    with serving(folder, "-m", "uvicorn", *options, app, port=port) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with uvicorn(tmp_path, "examples.fastapi_app:app") as server:
        yield server


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Server]:
    """No job ends before the file `open` is in the server's folder."""
    with uvicorn(tmp_path, "tests.patient_app:app") as server:
        yield server


@contextlib.contextmanager
def browser(server: Server) -> Iterator[httpx.Client]:
    """A browser that has opened the page."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert "swagger" in client.get("/").text
        yield client


def events(lines: Iterator[str]) -> Iterator[Event]:
    """What an EventSource makes of the lines."""
    event: Event = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if name:
            event[name] = value
        elif event:
            yield event
            event = {}


def followed(client: httpx.Client, job_id: str, after: str | None = None) -> list[Event]:
    headers = {} if after is None else {"last-event-id": after}
    with client.stream("GET", f"/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(events(answer.iter_lines()))


def test_the_example_is_short() -> None:
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) < 120


def test_a_photograph_is_uploaded_listed_shown_made_a_video_and_cleared(server: Server, tmp_path: Path) -> None:
    with browser(server) as client:
        assert client.get("/images").json() == {}
        assert client.get("/jobs").json() == []
        assert files_below(tmp_path / "fastapi-sessions", "manifests") == []

        chunks = (PHOTO[start : start + 10_000] for start in range(0, len(PHOTO), 10_000))
        stored = client.post("/images/start", params={"name": "astronaut.png"}, content=chunks)
        assert stored.status_code == 201
        assert stored.json() == {
            "width": 512,
            "height": 512,
            "media_type": "image/png",
            "byte_size": len(client.get("/images/start").content),
            "source_name": "astronaut.png",
        }
        assert client.get("/images").json() == {"start": stored.json()}
        for path in ("/images/start", "/images/start/thumbnail"):
            answer = client.get(path)
            assert answer.status_code == 200
            assert client.get(path, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
            part = client.get(path, headers={"range": "bytes=0-3"})
            assert (part.status_code, part.content) == (206, answer.content[:4])

        accepted = client.post("/jobs", json=SHORT)
        assert accepted.status_code == 202
        job_id = accepted.json()["id"]
        told = followed(client, job_id)
        assert told[-1]["event"] == json.loads(told[-1]["data"])["event"] == "succeeded"
        (job,) = client.get("/jobs").json()
        assert (job["id"], job["status"]) == (job_id, "succeeded")
        video = client.get(f"/jobs/{job_id}/outputs/video")
        assert video.headers["content-type"] == "video/mp4"
        assert len(video.content) == job["outputs"]["video"]["byte_size"]
        (tmp_path / "video.mp4").write_bytes(video.content)
        with av.open(tmp_path / "video.mp4", "r") as opened:
            assert opened.streams.video[0].frames == 9

        assert client.delete("/images/start").status_code == 204
        assert client.get("/images/start").status_code == 404
        assert client.get("/images").json() == {}


def test_two_browsers_see_nothing_of_each_other(server: Server) -> None:
    with browser(server) as ada, browser(server) as grace:
        ada.post("/images/start", content=PHOTO)
        job_id = ada.post("/jobs", json=SHORT).json()["id"]
        followed(ada, job_id)
        missing = f"{job_id[:-16]}{'0' * 16}"
        for begun in (False, True):
            assert grace.get("/images/start").status_code == 404
            assert "start" not in grace.get("/images").json()
            assert grace.get("/jobs").json() == []
            for method, path in (("GET", "events"), ("GET", "outputs/video"), ("DELETE", "")):
                answers = [grace.request(method, f"/jobs/{each}/{path}".rstrip("/")) for each in (job_id, missing)]
                assert {answer.status_code for answer in answers} == {404}
                assert answers[0].content == answers[1].content
            if not begun:
                assert grace.post("/images/end", content=PHOTO).status_code == 201
        assert list(ada.get("/images").json()) == ["start"]
        assert ada.get(f"/jobs/{job_id}/outputs/video").status_code == 200


def test_without_a_cookie_nothing_is_stored_and_the_answer_says_why(server: Server, tmp_path: Path) -> None:
    answer = httpx.post(f"{server.url}images/start", content=PHOTO)
    assert (answer.status_code, answer.json()["reason"]) == (404, "SessionNotFoundError")
    assert "open / first" in answer.json()["detail"]
    assert files_below(tmp_path / "fastapi-sessions", "manifests") == []


def test_what_is_refused_says_why_and_what_to_do(server: Server) -> None:
    with browser(server) as client:
        for data, status, reason in (
            (PHOTO[:5000], 422, "truncated"),
            (b"", 422, "empty"),
            (b"no image at all", 422, "unsupported_format"),
            (bytes(33 * 2**20), 413, "too_many_bytes"),
        ):
            answer = client.post("/images/start", content=data)
            assert (answer.status_code, answer.json()["reason"]) == (status, reason)
            assert answer.json()["detail"].endswith(".")
        assert client.post("/images/Start!", content=PHOTO).status_code == 422
        assert client.get("/images").json() == {}
        client.post("/images/start", content=PHOTO)
        for wanted, sentence in (
            ({"pipeline": "nothing"}, "There is no pipeline 'nothing'"),
            ({"params": {"frames": 9}}, "has no parameter 'frames'"),
            ({"slots": ["end"]}, "needs an image as 'start'"),
        ):
            answer = client.post("/jobs", json=wanted)
            assert answer.status_code == 422
            assert sentence in answer.json()["detail"]
        assert client.get("/jobs/x/events").json()["detail"] == "There is no such job."
        job_id = client.post("/jobs", json=SHORT).json()["id"]
        unread = client.get(f"/jobs/{job_id}/events", headers={"last-event-id": "yesterday"})
        assert (unread.status_code, unread.json()["reason"]) == (422, "InvalidRequestError")


def test_a_full_queue_tells_when_to_try_again(patient: Server) -> None:
    opened = patient.folder / "open"
    with browser(patient) as client:
        client.post("/images/start", content=PHOTO)
        opened.touch()
        followed(client, client.post("/jobs", json={}).json()["id"])  # so that the time of a run is known
        opened.unlink()
        answers = [client.post("/jobs", json={}) for _ in range(6)]  # one runs, one is made ready, two wait
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) > 0
        assert "are waiting already; try again in" in answers[-1].json()["detail"]


def test_a_cancelled_job_ends_its_events(patient: Server) -> None:
    with browser(patient) as client:
        client.post("/images/start", content=PHOTO)
        job_id = client.post("/jobs", json={}).json()["id"]
        with client.stream("GET", f"/jobs/{job_id}/events") as answer:
            told = events(answer.iter_lines())
            while next(told)["event"] != "progress":
                pass
            assert client.delete(f"/jobs/{job_id}").status_code == 200
            assert list(told)[-1]["event"] == "cancelled"


def test_who_comes_back_gets_what_was_missed_and_after_the_end_is_told_to_stay_away(server: Server) -> None:
    with browser(server) as client:
        client.post("/images/start", content=PHOTO)
        job_id = client.post("/jobs", json=SHORT).json()["id"]
        whole = followed(client, job_id)
        started = next(event for event in whole if event["event"] == "started")
        rest = followed(client, job_id, after=started["id"])
        again = followed(client, job_id)  # of positions and progress the last ones
        assert rest == again[[event["event"] for event in again].index("started") + 1 :]
        assert rest[-1] == whole[-1]
        ended = client.get(f"/jobs/{job_id}/events", headers={"last-event-id": whole[-1]["id"]})
        assert (ended.status_code, ended.content) == (204, b"")


def test_a_job_outlives_the_server_and_a_new_connection_is_told_its_end(patient: Server) -> None:
    with browser(patient) as client:
        client.post("/images/start", content=PHOTO)
        jobs = [client.post("/jobs", json={}).json()["id"] for _ in range(2)]
        with client.stream("GET", f"/jobs/{jobs[0]}/events") as answer:
            told = events(answer.iter_lines())
            while (last := next(told))["event"] != "progress":
                pass
            patient.stop()
            with pytest.raises(httpx.RemoteProtocolError):  # broken off, so an EventSource comes back
                list(told)
        (patient.folder / "open").touch()
        patient.start()
        rest = followed(client, jobs[0], after=last["id"])
        assert [json.loads(event["data"])["attempt"] for event in rest if event["event"] == "started"] == [2]
        assert rest[-1]["event"] == "succeeded"
        assert followed(client, jobs[1])[-1]["event"] == "succeeded"
        assert client.get(f"/jobs/{jobs[0]}/outputs/video").content == b"a fake video"


def test_an_upload_that_breaks_off_stores_nothing_and_is_no_error_of_the_server(server: Server) -> None:
    with browser(server) as client:
        (name, value), *_ = client.cookies.items()
        lines = ("POST /images/start HTTP/1.1", "Host: a", f"Cookie: {name}={value}", f"Content-Length: {len(PHOTO)}")
        head = "".join(f"{line}\r\n" for line in (*lines, ""))
        with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
            connection.sendall(head.encode() + PHOTO[:1000])
        assert client.get("/images").json() == {}
        server.stop()
    assert "Traceback" not in server.log.read_text()


def test_no_id_and_no_cookie_is_in_the_servers_log_or_answers(server: Server) -> None:
    with browser(server) as client:
        (_, value), *_ = client.cookies.items()
        texts = [client.post("/images/start", content=PHOTO).text, client.post("/jobs", json=SHORT).text]
        texts += [client.get(path).text for path in ("/images", "/jobs", "/openapi.json")]
    assert value.partition(".")[0] not in server.log.read_text() + "".join(texts)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example in this process, with a store of its own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.anyio
async def test_who_stops_following_a_job_leaves_nothing_behind(example: ModuleType) -> None:
    sent: list[dict[str, Any]] = []
    told, gone = anyio.Event(), anyio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            told.set()

    async with example.lifespan(example.app):
        example.dispatcher.pause()  # so the job waits for longer than its follower
        session = await example.store.create_session()
        await session.store_image(Image.new("RGB", (64, 48)), "start")
        job = await example.dispatcher.submit(await session.generation_request("preview"))
        signer = await example.signer()
        headers = [(b"cookie", f"{signer.name}={signer.sign(session.id)}".encode())]
        path = f"/jobs/{job.id}/events"
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b""}
        before = asyncio.all_tasks()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(example.app, scope, receive, send)
                await told.wait()
                assert len(asyncio.all_tasks()) > len(before) + 1
                gone.set()
            await settled(before)
        assert sent[0]["status"] == 200
        assert b"event: queued" in sent[1]["body"]
        assert (await job.info()).status == "queued"


async def settled(before: set[asyncio.Task[Any]]) -> None:
    """Until every task that is not among `before` is over."""
    while asyncio.all_tasks() - before:
        await anyio.lowlevel.checkpoint()


FOLLOW = """async () => {
    await fetch("/images/start", {method: "POST", body: await (await fetch(window.photo)).blob()});
    const body = JSON.stringify({params: {num_frames: 9, width: 64}});
    const headers = {"content-type": "application/json"};
    const {id} = await (await fetch("/jobs", {method: "POST", headers, body})).json();
    const told = [], source = new EventSource(`/jobs/${id}/events`);
    for (const name of ["queued", "started", "progress", "succeeded"])
        source.addEventListener(name, () => told.push(name));
    while (source.readyState !== EventSource.CLOSED)
        await new Promise(again => source.addEventListener("error", again, {once: true}));
    return {id, told};
}"""


@pytest.mark.browser
def test_a_browser_follows_a_job_to_its_end_and_plays_the_video_on_a_page_of_its_own(server: Server) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.goto(server.url)
        page.evaluate("data => { window.photo = data }", f"data:image/png;base64,{base64.b64encode(PHOTO).decode()}")
        found = page.evaluate(FOLLOW)
        assert found["told"].count("succeeded") == 1  # it asked again, as an EventSource does, and was told to stop
        page.goto(f"{server.url}jobs/{found['id']}/outputs/video")
        page.wait_for_function("document.querySelector('video').videoWidth === 64")
