"""Serving a page until Ctrl-C or SIGTERM, and leaving the store then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from types import FrameType

    import gradio as gr

    from async_sessions._gradio.lifespan import Held

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_LOOK_EVERY: Final = 0.1  # seconds; as Gradio does
_NODE_WITHIN: Final = 5.0  # seconds that Gradio's server for SSR has to end


def launch(demo: gr.Blocks, held: Held, options: Mapping[str, Any]) -> Any:
    """`demo.launch(**options)`. Where that blocks, and in `demo.block_thread()`, a signal leaves `held` and the server.

    Only in the main thread: no other hears signals.
    """
    signals = Signals()

    def block_thread() -> None:
        with signals.noted():  # once more: what Gradio runs for SSR has handlers of its own, which don't know the store
            while demo.is_running and not signals.came:
                time.sleep(_LOOK_EVERY)
            if signals.came:
                _leave(demo, held)
                signals.came = None

    demo.block_thread = block_thread  # type: ignore[method-assign]  # when to block is Gradio's to say
    try:
        with signals.noted():
            answer = demo.launch(**options)
    except (KeyboardInterrupt, SystemExit):
        _leave(demo, held)
        raise
    if signals.came is not None:  # while it was launched, and it does not block
        _leave(demo, held)
        signal.raise_signal(signals.came)
    return answer


class Signals:
    """Notes that Ctrl-C or SIGTERM came, for code that looks for it; a second one kills.

    What a handler raises goes to whatever line the main thread is at: while Gradio launches, that left a server behind
    that kept the process alive, and a library's `except` may take it.
    """

    def __init__(self) -> None:
        self.came: int | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        if self.came is not None or threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
        for number in previous:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def _leave(demo: gr.Blocks, held: Held) -> None:
    held.close_from_thread()
    if demo.is_running:
        demo.server.config.timeout_graceful_shutdown = 1  # an open page streams without end; don't wait for it
        with _streams_are_cut():
            demo.close()
    if (node := getattr(demo, "node_process", None)) is not None:
        node.terminate()
        try:
            node.wait(_NODE_WITHIN)
        except subprocess.TimeoutExpired:
            node.kill()


@contextlib.contextmanager
def _streams_are_cut() -> Iterator[None]:
    """Meanwhile uvicorn does not tell as errors, with a traceback each, that it cut what it was asked to cut."""
    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(_is_no_cut_stream)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_cut_stream)


def _is_no_cut_stream(record: logging.LogRecord) -> bool:
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and "timeout graceful shutdown exceeded" not in record.getMessage()
