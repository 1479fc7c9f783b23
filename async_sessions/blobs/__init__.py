"""Where bytes live: the `BlobStore` protocol, in memory and on a local disk."""

from async_sessions.blobs.base import Blob, BlobInfo, BlobStore, Expect
from async_sessions.blobs.local import LocalBlobStore
from async_sessions.blobs.memory import MemoryBlobStore

__all__ = ["Blob", "BlobInfo", "BlobStore", "Expect", "LocalBlobStore", "MemoryBlobStore"]
