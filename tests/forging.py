"""Events, cookies and tokens that no page of ours would send: `python -m tests.forging ROOT` tries all of them."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from async_sessions import open_store
from async_sessions.asgi import COOKIE, CookieSigner
from tests.images import rgba_png
from tests.over_http import Browser, file_data, index_of, mounted
from tests.pages import SECRET, App
from tests.steps import StepPipeline

if TYPE_CHECKING:
    import httpx


async def check(root: Path, *, share: float, rng: random.Random) -> int:
    """Send each listener of an app that share of the forged events; returns how many answers were looked at.

    None has a byte of another session or changes it, and its images' routes answer as where there is none. That a token
    is asked for where there is no cookie is shown by one that was signed: it opens a session.
    """
    looked = 0
    store = open_store(root, cleanup_interval=None)
    app = App(store, StepPipeline("steps", start=True, end=False), identity="browser_state")
    async with mounted(app) as parent:
        ann = Browser(parent)
        await ann.open()
        upload = index_of(app.demo, app.start, "upload")
        path = await ann.upload("a-private-name.png", rgba_png(90, 60))
        assert '"success":true' in await ann.fire(upload, [file_data(path), None])
        await ann.fire(index_of(app.demo, app.prompt, "change"), ["a private prompt", None])
        session_id = CookieSigner(SECRET).session_id(dict(ann.http.cookies))
        assert session_id is not None
        victim = store.session(session_id)
        before = await victim.info()
        image = before.images["start"]
        private = ["a-private-name", "a private prompt", before.key, image.digest, session_id]
        guesses: list[Any] = [
            *(session_id, f"{session_id}.", f"{session_id}.{'A' * 43}", before.key, ann.http.cookies[COOKIE]),
            *(f"{before.key}.{'0' * 16}", image.blob, str(root / image.blob), str(root / "cookie/secret")),
            *("/etc/passwd", "../../root/cookie/secret", "file:///etc/passwd", "http://127.0.0.1:1/x"),
            *("", 0, -1, 1e308, True, [], {}, [[[]]], {"path": None}, {"__type__": "update", "value": "x"}, "\ud800"),
        ]
        texts = [guess for guess in guesses if isinstance(guess, str)]
        payloads = [*guesses, *(file_data(text, url=text) for text in texts), *([[COOKIE, text]] for text in texts)]
        payloads = [payload for payload in payloads if _encodable(payload)]
        bodies: list[dict[str, Any]] = [
            {},
            {"username": "ann", "request": {"cookies": dict(ann.http.cookies), "username": "ann"}},
            {"event_id": "x", "trigger_id": app.start._id},  # of its own page: an answer may hold what was sent before
        ]
        with _Log() as log:
            for index, fn in app.demo.fns.items():
                if fn.fn is None:
                    continue
                bob = Browser(parent)  # for what he has stored himself would come back
                await bob.open()
                nobody = Browser(parent)  # sends no cookie: what it sends for a token is looked at
                count = len(fn.inputs)
                tried = rng.sample(payloads, round(share * len(payloads)))
                for number, payload in enumerate(tried):
                    data = [payload] * count if number % 4 < 2 else [None] * (count - 1) + [payload]
                    sender = (bob, nobody)[number % 2]
                    with anyio.fail_after(60):
                        answer = await sender.fire(index, data[:count], **bodies[number % len(bodies)])
                    assert not [word for word in private if word in answer and word not in str(payload)], fn.name
                    assert "root:x:0" not in answer
                    looked += 1
        assert await victim.info() == before
        token = [[COOKIE, CookieSigner(SECRET).sign_token("a browser without cookies")]]
        await Browser(parent).fire(index_of(app.demo, app.prompt, "change"), ["its prompt", token])
        assert (await store.session("a browser without cookies").info()).state == {"prompt": "its prompt"}
        assert session_id not in "".join(record.getMessage() for record in log if record.name == "async_sessions")
        said = "".join(record.getMessage() for record in log)  # Gradio's own has what a client sends for a path
        assert bob.http.cookies[COOKIE].partition(".")[0] not in said
        assert (await ann.http.get("images/start")).status_code == 200
        answers = {_parts(await bob.http.get("images/start"))}
        for forged in ("forged", session_id, CookieSigner("another secret of tests").sign(session_id)):
            sent = {"cookie": f"{COOKIE}={forged}"}
            answers.add(_parts(await Browser(parent).http.get("images/start", headers=sent)))
        answers.add(_parts(await Browser(parent).http.get("images/never-there")))
        ((status, _, _),) = answers
        assert status == 404
    return looked


class _Log(logging.Handler):
    """All that is logged in the block."""

    def __enter__(self) -> list[logging.LogRecord]:
        self._records: list[logging.LogRecord] = []
        self._level_before = logging.root.level
        logging.root.addHandler(self)
        logging.root.setLevel(logging.DEBUG)
        return self._records

    def __exit__(self, *raised: object) -> None:
        logging.root.setLevel(self._level_before)
        logging.root.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def _parts(answer: httpx.Response) -> tuple[int, bytes, tuple[tuple[str, str], ...]]:
    return answer.status_code, answer.content, tuple(sorted(answer.headers.items()))


def _encodable(payload: Any) -> bool:
    try:
        json.dumps(payload, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return True


def _main(root: Path) -> None:
    os.environ["GRADIO_TEMP_DIR"] = str(root.with_name("gradio"))
    looked = anyio.run(lambda: check(root, share=1, rng=random.Random(0)))
    print(f"{looked} forged events: 0 foreign bytes, 0 changes of a foreign session, 0 ids in the log")  # noqa: T201


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
