"""What a pipeline put out, or raised, as a job's entry keeps it."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from async_sessions.errors import OutOfMemoryError
from async_sessions.records import JobError

if TYPE_CHECKING:
    from async_sessions._pipeline import Output
    from async_sessions.records import OutputRecord
    from async_sessions.session import Session

MAX_MESSAGE: Final = 2000  # characters of a failure that are kept

MEDIA_TYPES: Final = {
    ".gif": "image/gif",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".txt": "text/plain",
    ".wav": "audio/wav",
    ".webm": "video/webm",
    ".webp": "image/webp",
}

_logger = logging.getLogger("async_sessions")


class NotLoadedError(Exception):
    """Its cause is what `Pipeline.load` raised."""


async def keep(session: Session, name: str, output: Output) -> OutputRecord:
    if isinstance(output, tuple):
        return await session.store_output(output[0], name=name, media_type=output[1])
    suffix = output.suffix.lower() if isinstance(output, Path) else ".png"
    return await session.store_output(output, name=name, media_type=MEDIA_TYPES.get(suffix, "application/octet-stream"))


def remove_files(outputs: Iterable[Output]) -> None:
    """Delete the files that were moved in. What is none was refused, and may be anybody's: a device, a folder."""
    for output in outputs:
        if isinstance(output, Path):
            try:
                if stat.S_ISREG(output.lstat().st_mode):
                    output.unlink()
            except FileNotFoundError:
                continue
            except (OSError, ValueError):  # the pipeline's own leftover; the job's end matters more
                _logger.warning("could not delete %s", output, exc_info=True)


def check(raised: BaseException | None) -> None:
    """Raise what a pipeline raised in its thread; there, a `SystemExit` is a failure like any other."""
    if raised is None:
        return
    if isinstance(raised, Exception):
        raise raised
    raise RuntimeError(f"{type(raised).__name__}: {raised}") from raised


def job_error(error: Exception) -> JobError:
    if isinstance(error, NotLoadedError) and error.__cause__ is not None:
        kind, message = type(error.__cause__).__name__, f"The pipeline could not be loaded: {_words(error.__cause__)}"
    else:
        kind, message = type(error).__name__, _words(error)
    return JobError(kind, message[:MAX_MESSAGE].encode(errors="replace").decode())


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a pipeline's own class; the job fails all the same
        return "The pipeline raised an error that does not say what it is."


def out_of_device_memory(error: BaseException) -> bool:
    """Whether torch, or its like, says so. It is known by its name: there may be no torch. Not this package's own."""
    return not isinstance(error, OutOfMemoryError) and any(
        each.__name__ == "OutOfMemoryError" for each in type(error).__mro__
    )
