"""Jobs that wait until a test lets them go, and what it is told of them."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio

from tests.steps import StepPipeline

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions import Session
    from async_sessions.dispatch import Dispatcher, Job
    from async_sessions.jobs import JobContext, JobEvent, Output


class Gate:
    """Holds generate calls in their thread until it is opened; tells the loop when the first has come."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, context: JobContext) -> None:
        self._loop.call_soon_threadsafe(self.reached.set)
        assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


class HeldPipeline(StepPipeline):
    """Each job waits where it `generate`s until the test lets it go, by its label, or cancels it.

    `done` has what was begun, in order: `prepare a`, `generate a`. With `deaf` it does not heed that it is cancelled.
    """

    def __init__(self, name: str = "steps", *, device: str = "cpu", deaf: bool = False, **slots: bool) -> None:
        super().__init__(name, device=device, **slots)
        self.done: list[str] = []
        self.deaf = deaf
        self._loop = asyncio.get_running_loop()
        self._begun: defaultdict[str, anyio.Event] = defaultdict(anyio.Event)
        self._free: set[str] = set()
        self._changed = threading.Condition()

    async def begun(self, what: str) -> None:
        """Until `generate a`, or `prepare a`, was begun."""
        with anyio.fail_after(30):
            await self._begun[what].wait()

    def let_go(self, *labels: str) -> None:
        with self._changed:
            self._free.update(labels)
            self._changed.notify_all()

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Image.Image]:
        self._begin(f"prepare {params['label']}")
        return super().prepare(inputs, params)

    def generate(
        self, prepared: dict[str, Image.Image], params: Mapping[str, Any], context: JobContext
    ) -> Mapping[str, Output]:
        self._begin(f"generate {params['label']}")
        with self._changed:
            while params["label"] not in self._free:
                if not self.deaf:
                    context.raise_if_cancelled()
                self._changed.wait(0.005)
        return super().generate(prepared, params, context)

    def _begin(self, what: str) -> None:
        self.done.append(what)
        self._loop.call_soon_threadsafe(lambda: self._begun[what].set())


async def submit(dispatcher: Dispatcher, session: Session, pipeline: str = "steps", **params: Any) -> Job:
    request = await session.generation_request(pipeline, slots=(), params=params)
    return await dispatcher.submit(request)


async def on_device(job: Job) -> None:
    """Until the entry says so, as another process would look, and as a take-over does."""
    with anyio.fail_after(30):
        while (await job.info()).status != "running":  # noqa: ASYNC110
            await anyio.sleep(0.001)


async def until(job: Job, kind: type[JobEvent]) -> JobEvent:
    async with aclosing(job.events()) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, kind):
                return event
    raise AssertionError(f"the job ended without {kind.__name__}")


async def collected(job: Job, after: str | None = None) -> list[JobEvent]:
    return [event async for event in job.events(after)]
