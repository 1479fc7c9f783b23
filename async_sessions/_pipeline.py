"""What a pipeline is, and what it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import anyio
import msgspec

from async_sessions.errors import InvalidRequestError, JobCancelledError
from async_sessions.records import KIB, GenerationRequest, JobInfo, check_json

if TYPE_CHECKING:
    from PIL import Image

    from async_sessions._reading import StoredImage

MAX_PARAMS: Final = 64 * KIB  # bytes of JSON
MAX_PREVIEW: Final = 64 * KIB  # bytes
MAX_NOTE: Final = 200  # characters

Output: TypeAlias = "Image.Image | Path | tuple[bytes, str]"
"""An image, stored as PNG; a regular file, moved in; or bytes with their media type."""


class PipelineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a pipeline is called and what it takes.

    `slots` maps the roles of its images to whether it needs them; `defaults` its parameters to the values they have
    unless a request says otherwise, and a parameter that is not in it is refused; `device` is the kind of device that
    it runs on: the part of a device's name before the colon. A run that takes its device for more than `timeout`
    seconds is stopped and has failed.
    """

    name: str
    slots: Mapping[str, bool] = {}
    defaults: Mapping[str, Any] = {}
    device: str = "cpu"
    timeout: float | None = None

    def entry(self, request: GenerationRequest, job_id: str, owner: str, now: datetime) -> JobInfo:
        """The entry that accepts `request`, its parameters completed. `InvalidRequestError` says what doesn't fit."""
        for role, required in self.slots.items():
            if required and role not in request.inputs:
                raise InvalidRequestError(f"Pipeline {self.name!r} needs an image as {role!r}; store one first.")
        if unknown := sorted(set(request.inputs) - set(self.slots)):
            takes = ", ".join(self.slots) or "none"
            raise InvalidRequestError(f"Pipeline {self.name!r} takes no image as {unknown[0]!r}; it takes: {takes}.")
        if unknown := sorted(set(request.params) - set(self.defaults), key=str):
            takes = ", ".join(self.defaults) or "none"
            raise InvalidRequestError(f"Pipeline {self.name!r} has no parameter {unknown[0]!r}; it has: {takes}.")
        try:
            check_json(request.params)
            size = len(msgspec.json.encode(request.params))
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"The parameters are not JSON: {error}") from error
        if size > MAX_PARAMS:
            raise InvalidRequestError(f"The parameters may take {MAX_PARAMS} bytes as JSON, not {size}.")
        return JobInfo(
            id=job_id,
            pipeline=self.name,
            inputs=request.inputs,
            params={**self.defaults, **request.params},
            submitted_at=now,
            owner=owner,
            priority=request.priority,
        )


class Pipeline(Protocol):
    """What makes outputs from images and parameters.

    `release()`, if there is one, is called where `load` was: at the end, and, with a `load` after it, when the device
    ran out of memory; where that one fails, so does the job, and the next one has it tried again.
    `check(inputs, params)`, if there is one, is called with the records of the images, in a worker thread, before a job
    is accepted; it raises `InvalidRequestError` for what `generate` could not do.
    """

    @property
    def spec(self) -> PipelineSpec: ...

    def load(self, device: str) -> None:
        """Called once per device, in that device's thread, before any job."""

    def prepare(self, inputs: Mapping[str, StoredImage], params: Mapping[str, Any]) -> Any:
        """Called in a CPU thread: decode, resize, lay out. `anyio.from_thread.run(inputs["start"].image)` decodes."""

    def generate(self, prepared: Any, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        """Called in the device's thread. What it raises becomes the job's failure."""
        ...


StopReason: TypeAlias = Literal["cancelled", "timeout", "drained", "overtaken"]


class CancelFlag:
    """Set on the loop by whoever wants a job to stop, read in its device's thread. Belongs to one loop.

    `reason` is why: it is not wanted, it took too long, its process is about to end, or another job is due before it.
    The user's wish is the last word. `in_pipeline` is whether its pipeline's code runs: only that can heed this then.
    """

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.in_pipeline = False
        self._event: anyio.Event | None = None

    def set(self, reason: StopReason = "cancelled") -> None:
        if self.reason is None or reason == "cancelled":
            self.reason = reason
        if self._event is not None:
            self._event.set()

    def is_set(self) -> bool:
        return self.reason is not None

    async def wait(self) -> None:
        """Until it is set."""
        if self.reason is None:
            self._event = self._event or anyio.Event()
            await self._event.wait()


Report: TypeAlias = tuple[int, int, str, bytes | None]


class JobContext:
    """What a pipeline knows of the job that it runs, and how it tells how far it is."""

    def __init__(
        self,
        job_id: str,
        attempt: int,
        device: str,
        *,
        flag: CancelFlag | None = None,
        tell: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self.device = device
        self._flag = flag or CancelFlag()
        self._tell = tell

    def report(self, step: int, total: int, note: str = "", preview: bytes | None = None) -> None:
        """Tell that `step` of `total` is done; cheap, from any thread. Raises `JobCancelledError` once cancelled.

        `preview` is an image file for people to look at meanwhile; above 64 KiB it is left out. Of `note` the first 200
        characters are told, with blanks for those that can't be printed.
        """
        self.raise_if_cancelled()
        note = note[:MAX_NOTE]
        if not note.isprintable():
            note = "".join(character if character.isprintable() else " " for character in note)
        self._tell((step, total, note, preview if preview is None or len(preview) <= MAX_PREVIEW else None))

    @property
    def cancelled(self) -> bool:
        return self._flag.is_set()

    def raise_if_cancelled(self) -> None:
        if self.cancelled:
            raise JobCancelledError("The job was cancelled.")
