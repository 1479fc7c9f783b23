"""Where bytes live: the `BlobStore` protocol, in memory and on a local disk, and what a backend of your own needs."""

from async_sessions._keys import check_blob_key as check_key
from async_sessions._keys import check_prefix
from async_sessions.blobs.base import Blob, BlobData, BlobInfo, BlobStore, Expect, Expectation, read_all
from async_sessions.blobs.local import LocalBlobStore
from async_sessions.blobs.memory import MemoryBlobStore

__all__ = [
    "Blob",
    "BlobData",
    "BlobInfo",
    "BlobStore",
    "Expect",
    "Expectation",
    "LocalBlobStore",
    "MemoryBlobStore",
    "check_key",
    "check_prefix",
    "read_all",
]
