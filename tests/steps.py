from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.from_thread

from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import JobContext, Output, Pipeline, PipelineSpec

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions import SessionStore


def local(store: SessionStore, pipelines: Iterable[Pipeline], **options: Any) -> LocalDispatcher:
    """A dispatcher that is left at once, whatever runs."""
    return LocalDispatcher(store, pipelines, **{"drain_timeout": timedelta(0), **options})


class StepPipeline:
    """Reports `steps` steps and puts out what `make` makes; with `endless` it goes on until it is cancelled.

    It writes down in which thread, and in which order, it was called.
    """

    def __init__(self, name: str = "steps", *, device: str = "cpu", **slots: bool) -> None:
        self.spec = PipelineSpec(
            name=name,
            slots=slots,
            defaults={"steps": 3, "endless": False, "label": "", "fail": "", "colour": "red"},
            device=device,
        )
        self.calls: list[tuple[str, str]] = []  # (what, thread)
        self.ran: list[str] = []  # labels
        self.endless = True  # whether it heeds `endless`
        self.files: list[Path] = []
        self.before_generate: Callable[[JobContext], None] = lambda context: None
        self.on_load: Callable[[str], None] = lambda device: None
        self.make: Callable[[Mapping[str, Any]], Mapping[str, Output]] = lambda params: {
            "text": (b"done", "text/plain")
        }

    def _note(self, what: str) -> None:
        self.calls.append((what, threading.current_thread().name))

    def load(self, device: str) -> None:
        self._note("load")
        self.on_load(device)

    def release(self) -> None:
        self._note("release")

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Image.Image]:
        self._note("prepare")
        return {role: anyio.from_thread.run(image.image) for role, image in inputs.items()}

    def generate(
        self, prepared: dict[str, Image.Image], params: Mapping[str, Any], context: JobContext
    ) -> Mapping[str, Output]:
        self._note("generate")
        self.ran.append(params["label"])
        self.before_generate(context)
        steps = params["steps"]
        for step in range(1, steps + 1):
            context.report(step, steps, note=f"step {step}")
        while params["endless"] and self.endless:
            context.report(steps, steps, note="endless")
            time.sleep(0.001)
        if params["fail"]:
            raise RuntimeError(params["fail"])
        return {**self.make(params), **prepared}

    def file(self, data: bytes, suffix: str = ".mp4") -> Path:
        with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
            file.write(data)
        self.files.append(Path(file.name))
        return self.files[-1]
