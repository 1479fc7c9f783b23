"""`async-sessions`, its arguments and all, whose preview takes its time where there is a file `~/slow`.

Then a run is still under way when a browser, with less of the machine than usual, has come to look for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_sessions import demo
from async_sessions.__main__ import main
from async_sessions.jobs import JobContext
from async_sessions.pipelines.preview import PreviewPipeline

if TYPE_CHECKING:
    from async_sessions.jobs import Output
    from async_sessions.pipelines.preview import Scene

FRAME_TIME = 1.0  # seconds: two minutes for 121 frames


class PacedContext(JobContext):
    def __init__(self, context: JobContext) -> None:
        self.__dict__.update(vars(context))

    def report(self, step: int, total: int, note: str = "", preview: bytes | None = None) -> None:
        super().report(step, total, note, preview)
        over = time.monotonic() + FRAME_TIME
        while time.monotonic() < over and Path("~/slow").expanduser().exists():
            self.raise_if_cancelled()
            time.sleep(0.01)


class PacedPreview(PreviewPipeline):
    def generate(self, prepared: Scene, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        return super().generate(prepared, params, PacedContext(context))


if __name__ == "__main__":
    demo.PreviewPipeline = PacedPreview  # type: ignore[attr-defined]
    main()
