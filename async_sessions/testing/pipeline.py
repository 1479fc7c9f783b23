"""`FakePipeline`: a `Pipeline` without a model, which does what a test says and tells what it was asked."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import anyio.from_thread

from async_sessions.jobs import PipelineSpec

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions._reading import StoredImage
    from async_sessions.jobs import JobContext, Output

Stage: TypeAlias = Literal["load", "prepare", "generate", "release"]


class FakeRun(NamedTuple):
    """What one `generate` was given; `images` by role."""

    job_id: str
    attempt: int
    device: str
    images: Mapping[str, Image.Image]
    params: Mapping[str, Any]


class DeviceMemoryError(RuntimeError):
    """What torch raises where a device's memory is full, by name and words, where there is no torch.

    A job that raises it once is tried again, alone; one that raises it again then has failed:

        fake_pipeline.fail(DeviceMemoryError())
    """

    def __init__(self) -> None:
        super().__init__("CUDA out of memory. Tried to allocate 20.00 GiB.")


DeviceMemoryError.__name__ = "OutOfMemoryError"  # which `JobError.kind` tells; torch's is known by its name, too


class Gate:
    """Keeps a pipeline's thread until it is opened, or until the job is cancelled."""

    def __init__(self) -> None:
        self._reached: Future[None] = Future()
        self._opened = threading.Event()

    async def reached(self) -> None:
        """Wait, on the loop, until a job has come to the gate."""
        await asyncio.shield(asyncio.wrap_future(self._reached))

    def open(self) -> None:
        self._opened.set()

    def hold(self, context: JobContext) -> None:
        with suppress(InvalidStateError):  # a second device's job
            self._reached.set_result(None)
        while not self._opened.wait(0.005):
            context.raise_if_cancelled()


class FakePipeline:
    """Reports `steps` steps and puts out `outputs`.

    `calls` are the methods that were called, in order; `runs` what each `generate` was given.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        slots: Mapping[str, bool] | None = None,
        defaults: Mapping[str, Any] | None = None,
        device: str = "cpu",
        steps: int = 3,
    ) -> None:
        self.spec = PipelineSpec(
            name=name,
            slots={"start": False, "end": False} if slots is None else slots,
            defaults={"prompt": ""} if defaults is None else defaults,
            device=device,
        )
        self.steps = steps
        self.outputs: Mapping[str, Output] = {"video": (b"a fake video", "video/mp4")}
        self.calls: list[Stage] = []
        self.runs: list[FakeRun] = []
        self._errors: defaultdict[Stage, deque[Exception]] = defaultdict(deque)
        self._gate: Gate | None = None

    def fail(self, error: Exception, *, at: Stage = "generate") -> None:
        """Let the next call of `at` raise `error`; said several times, as many calls do, in that order."""
        self._errors[at].append(error)

    @contextmanager
    def held(self) -> Iterator[Gate]:
        """Jobs that start in the `with` stop after their first step, until the gate is opened or the `with` is left."""
        self._gate = gate = Gate()
        try:
            yield gate
        finally:
            self._gate = None
            gate.open()

    def load(self, device: str) -> None:
        self._enter("load")

    def release(self) -> None:
        self._enter("release")

    def prepare(self, inputs: Mapping[str, StoredImage], params: Mapping[str, Any]) -> dict[str, Image.Image]:
        self._enter("prepare")
        return {role: anyio.from_thread.run(image.image) for role, image in inputs.items()}

    def generate(
        self, prepared: Mapping[str, Image.Image], params: Mapping[str, Any], context: JobContext
    ) -> Mapping[str, Output]:
        gate = self._gate
        self.runs.append(FakeRun(context.job_id, context.attempt, context.device, prepared, params))
        self._enter("generate")
        for step in range(1, self.steps + 1):
            context.report(step, self.steps)
            if gate is not None:
                gate.hold(context)
        return self.outputs

    def _enter(self, stage: Stage) -> None:
        self.calls.append(stage)
        if self._errors[stage]:
            raise self._errors[stage].popleft()
