"""The durable layer between `gr.Image` and the GPU pipeline: asyncio-native image sessions and jobs.

    async with open_store("~/sessions") as store:
        session = await store.create_session()
        await session.store_image(image, "start")
        image = await session.retrieve_image("start")

Other parts have an import path of their own: `async_sessions.gradio`, `async_sessions.asgi`, `async_sessions.bundle`,
`async_sessions.dispatch`, `async_sessions.jobs`, `async_sessions.pipelines.preview`, `async_sessions.pipelines.wan`,
`async_sessions.renditions`, `async_sessions.testing`. Most of the names below are those of `async_sessions.blobs`,
`async_sessions.errors` and `async_sessions.records`.
"""

from async_sessions._draft import Draft
from async_sessions._ingest import ImageSource
from async_sessions._merge import Merged
from async_sessions._reading import StoredImage
from async_sessions.blobs import Blob, BlobInfo, BlobStore, Expect, LocalBlobStore, MemoryBlobStore
from async_sessions.errors import (
    AsyncSessionsError,
    BundleError,
    CorruptBlobError,
    CorruptManifestError,
    DispatchError,
    ImageRejectedError,
    InvalidKeyError,
    InvalidOutputError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    LockTimeoutError,
    ModelError,
    OutOfMemoryError,
    QueueFullError,
    QuotaExceededError,
    RevisionConflictError,
    SessionNotFoundError,
    SlotEmptyError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    UnknownPipelineError,
    UnknownSchemaError,
    VersionConflictError,
)
from async_sessions.janitor import CleanupReport, Removal
from async_sessions.records import (
    JSON,
    GenerationRequest,
    ImageRecord,
    JobError,
    JobInfo,
    Limits,
    OutputRecord,
    RecentImage,
    SessionInfo,
)
from async_sessions.session import Session
from async_sessions.stats import CacheStats, StoreStats
from async_sessions.store import SessionStore, open_store
from async_sessions.verify import Finding, VerifyReport

__all__ = [
    "JSON",
    "AsyncSessionsError",
    "Blob",
    "BlobInfo",
    "BlobStore",
    "BundleError",
    "CacheStats",
    "CleanupReport",
    "CorruptBlobError",
    "CorruptManifestError",
    "DispatchError",
    "Draft",
    "Expect",
    "Finding",
    "GenerationRequest",
    "ImageRecord",
    "ImageRejectedError",
    "ImageSource",
    "InvalidKeyError",
    "InvalidOutputError",
    "InvalidRequestError",
    "JobCancelledError",
    "JobError",
    "JobFailedError",
    "JobInfo",
    "JobNotFoundError",
    "Limits",
    "LocalBlobStore",
    "LockTimeoutError",
    "MemoryBlobStore",
    "Merged",
    "ModelError",
    "OutOfMemoryError",
    "OutputRecord",
    "QueueFullError",
    "QuotaExceededError",
    "RecentImage",
    "Removal",
    "RevisionConflictError",
    "Session",
    "SessionInfo",
    "SessionNotFoundError",
    "SessionStore",
    "SlotEmptyError",
    "StorageError",
    "StorageFullError",
    "StoreClosedError",
    "StoreStats",
    "StoredImage",
    "UnknownPipelineError",
    "UnknownSchemaError",
    "VerifyReport",
    "VersionConflictError",
    "open_store",
]
