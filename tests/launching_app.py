"""An app that is stopped by `test_launching`. Its arguments: a root; what it does; the signal that it sends itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TextIO

import gradio as gr
import httpx

from async_sessions import open_store
from async_sessions.gradio import GradioSessions


def say(*words: object) -> None:
    sys.stdout.write(" ".join(["app:", *map(str, words), "\n"]))


class Interrupted:
    """Standard output on which Gradio says that it runs: at that line, while it launches, the signal comes.

    And whatever a signal's handler raises there is lost, as in many a library's `except`.
    """

    def __init__(self, stream: TextIO, number: int) -> None:
        self._stream = stream
        self._number = number

    def write(self, text: str) -> int:
        if "Running on local URL" in text:
            try:
                os.kill(os.getpid(), self._number)
            except BaseException:  # noqa: BLE001
                self._stream.write("app: it was lost\n")
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    say("the app's own begins")
    yield
    say("the app's own ends")


if __name__ == "__main__":
    root, what, name = sys.argv[1:]
    number = getattr(signal, name)
    store = open_store(root, cleanup_interval=None)
    sessions = GradioSessions(store)
    with gr.Blocks() as demo:
        sessions.bind(images={"start": gr.Image()})
    options: dict[str, Any] = {"app_kwargs": {"lifespan": lifespan}}
    if what == "early":
        sys.stdout = Interrupted(sys.stdout, number)
        sessions.launch(demo, **options)
    elif what == "early and going on":
        sys.stdout = Interrupted(sys.stdout, number)
        signal.signal(number, lambda *_: say("the app heard it"))
        sessions.launch(demo, prevent_thread_lock=True, **options)
    elif what == "twice":
        for _ in range(2):
            _, url, _ = sessions.launch(demo, prevent_thread_lock=True, quiet=True, **options)
            say("serves", httpx.get(url, timeout=60).status_code)
            demo.close(verbose=False)
    else:
        sessions.launch(demo, prevent_thread_lock=True, **options)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        demo.block_thread()
    say("the script goes on; the store is", "open" if repr(store).endswith("open)") else "closed")
