"""Every error that a user of this package can cause, in one tree.

Storage answers a miss with `None`; the public floor raises. A message is a sentence that says what to do; it never
holds a session id.
"""

from __future__ import annotations

from typing import Literal

RejectReason = Literal[
    "empty",
    "too_many_bytes",
    "too_many_pixels",
    "too_many_frames",
    "unsupported_format",
    "truncated",
    "corrupt",
    "metadata_bomb",
    "cpu_bomb",
]


class AsyncSessionsError(Exception):
    """The root of this package's errors."""


class InvalidKeyError(AsyncSessionsError, ValueError):
    """A slot name or a storage key is not well formed, or is not one of the store's slots."""


class StoreClosedError(AsyncSessionsError, RuntimeError):
    """A store or dispatcher was used outside its `async with`."""


class SessionNotFoundError(AsyncSessionsError, LookupError):
    """No such session: unknown, expired and deleted are one answer."""


class SlotEmptyError(AsyncSessionsError, LookupError):
    """The slot holds no image."""


class QuotaExceededError(AsyncSessionsError):
    """The session, or the store, would outgrow one of its limits."""


class RevisionConflictError(AsyncSessionsError):
    """Somebody else wrote in between: `if_revision` or `replaces` is not what the session holds any more."""


class ImageRejectedError(AsyncSessionsError, ValueError):
    """What was given is not an image that this store takes; `reason` says why, in one word."""

    def __init__(self, reason: RejectReason, message: str) -> None:
        super().__init__(message)
        self.reason: RejectReason = reason

    def __reduce__(self) -> tuple[type[ImageRejectedError], tuple[RejectReason, str]]:
        return type(self), (self.reason, str(self))


class OutOfMemoryError(AsyncSessionsError, MemoryError):
    """The machine has no memory left to decode, convert or encode an image; nothing is wrong with the image."""


class StorageError(AsyncSessionsError, OSError):
    """The storage below could not do what was asked; what was acknowledged before is untouched."""


class VersionConflictError(StorageError):
    """A conditional write found another version than the expected one."""


class CorruptBlobError(StorageError):
    """The bytes that a record names are missing, or are not the bytes that were stored."""


class CorruptManifestError(StorageError):
    """A session's manifest can't be read."""


class UnknownSchemaError(StorageError):
    """The manifest was written by a newer version of this package."""


class StorageFullError(StorageError):
    """No room is left on the device, or in its quota."""


class LockTimeoutError(StorageError):
    """Another process held a lock for too long; it may be stopped."""


class BundleError(AsyncSessionsError, ValueError):
    """What was given is no bundle of a session, or one that this store does not take; nothing of it was kept."""


class DispatchError(AsyncSessionsError):
    """The root of the errors that are about jobs."""


class UnknownPipelineError(DispatchError, LookupError):
    """The dispatcher has no pipeline of that name."""


class ModelError(DispatchError):
    """A pipeline's model can't be loaded: its folder, its files or its device are not what it needs."""


class InvalidRequestError(DispatchError, ValueError):
    """The request does not fit its pipeline: a required image is missing, or a parameter is not accepted."""


class InvalidOutputError(DispatchError, ValueError):
    """What a pipeline put out can't be kept: there is nothing in it, or it is not what an output may be."""


class QueueFullError(DispatchError):
    """The dispatcher, or the session, has as many jobs waiting as it may; try again later.

    `position` is the one that the job would have had; `retry_after`, in seconds and at least 1, is when a place may be
    free, as far as that is known.
    """

    def __init__(self, message: str, position: int, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.position = position
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[QueueFullError], tuple[str, int, float | None]]:
        return type(self), (str(self), self.position, self.retry_after)


class JobNotFoundError(DispatchError, LookupError):
    """The session has no such job; a job of another session is the same answer."""


class JobFailedError(DispatchError):
    """The job ended in failure; the message is the pipeline's."""


class JobCancelledError(DispatchError):
    """The job was cancelled before it finished."""
