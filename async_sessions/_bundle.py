"""What the manifest of a bundle says: which session it holds and which of its files is what."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import chain, count
from typing import IO, Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from async_sessions import _keys
from async_sessions._archive import ZipReader
from async_sessions._outputs import MEDIA_TYPES
from async_sessions.errors import BundleError
from async_sessions.records import (
    MAX_MEDIA_TYPE,
    MEDIA_TYPE,
    MIB,
    ImageRecord,
    JobError,
    JobInfo,
    OutputRecord,
    SessionInfo,
    check_json,
)

MANIFEST: Final = "manifest.json"
FORMAT: Final = "async-sessions bundle"
SCHEMA: Final = 1
MAX_MANIFEST: Final = 4 * MIB

_SUFFIXES: Final = {media_type: suffix for suffix, media_type in MEDIA_TYPES.items()}
_ODD: Final = re.compile(r"[^a-z0-9_-]")

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
FileName = Annotated[str, Meta(pattern=r"^[a-z0-9_-]+(/[a-z0-9_-]+)*(\.[a-z0-9]+)?\Z", max_length=120)]
JobName = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
MediaType = Annotated[str, Meta(pattern=MEDIA_TYPE, max_length=MAX_MEDIA_TYPE)]
Slot = Annotated[str, Meta(max_length=32)]
Moment = Annotated[datetime, Meta(tz=True)]

Record: TypeAlias = "ImageRecord | OutputRecord"


class BundledFile(msgspec.Struct, frozen=True, kw_only=True):
    """`digest` is the SHA-256 of the file; `name` an image's source name, or that of an output."""

    digest: Digest
    byte_size: Annotated[int, Meta(ge=1)]
    media_type: MediaType
    name: str | None = None


class BundledJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is over. `inputs` and `outputs` map roles and names to files."""

    pipeline: str
    inputs: dict[str, FileName]
    outputs: dict[str, FileName]
    params: dict[str, Any]
    status: Literal["succeeded", "failed", "cancelled"]
    submitted_at: Moment
    started_at: Moment | None
    finished_at: Moment | None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
    attempt: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    cancel_requested: bool
    error: JobError | None

    def entry(self, job_id: str, images: Mapping[str, ImageRecord], outputs: Mapping[str, OutputRecord]) -> JobInfo:
        """The job of that id whose files are now these records."""
        return JobInfo(
            id=job_id,
            pipeline=self.pipeline,
            inputs={role: images[name] for role, name in self.inputs.items()},
            params=self.params,
            submitted_at=self.submitted_at,
            owner="",
            priority=self.priority,
            status=self.status,
            attempt=self.attempt,
            cancel_requested=self.cancel_requested,
            started_at=self.started_at,
            finished_at=self.finished_at,
            outputs={name: outputs[file] for name, file in self.outputs.items()},
            error=self.error,
        )


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """A session: `images` maps its slots to files, `jobs` the names of its jobs, and `files` is what they are."""

    format: str = FORMAT
    schema: int = SCHEMA
    state: dict[str, Any]
    images: dict[Slot, FileName]
    jobs: dict[JobName, BundledJob]
    files: dict[FileName, BundledFile]

    @property
    def pictures(self) -> dict[str, str | None]:
        """The images by file, each with its slot; `None` for one that only jobs name."""
        slots = {file: slot for slot, file in self.images.items()}
        return slots | {file: slots.get(file) for job in self.jobs.values() for file in job.inputs.values()}

    @property
    def results(self) -> set[str]:
        return {file for job in self.jobs.values() for file in job.outputs.values()}


def describe(info: SessionInfo, *, jobs: bool) -> tuple[Contents, dict[str, Record]]:
    """The manifest for that snapshot, and the record of each file.

    Without pins, and without what was replaced or cleared: a user who removed an image doesn't want it back.
    """
    files: dict[str, str] = {}  # by blob
    records: dict[str, Record] = {}

    def file_of(record: Record, folder: str, name: str) -> str:
        if record.blob not in files:
            stem = f"{folder}/{_ODD.sub('-', name)[:32] or '-'}"
            suffix = _SUFFIXES.get(record.media_type.partition(";")[0], "")
            free = (f"{stem}{number or ''}{suffix}" for number in count())
            files[record.blob] = next(file for file in free if file not in records)
            records[files[record.blob]] = record
        return files[record.blob]

    images = {slot: file_of(record, "images", slot) for slot, record in info.images.items()}
    over: dict[str, BundledJob] = {}
    for job in info.jobs.values() if jobs else ():
        if job.status == "queued" or job.status == "preparing" or job.status == "running":
            continue
        name = _keys.split_job_id(job.id)[1]
        over[name] = BundledJob(
            pipeline=job.pipeline,
            inputs={role: file_of(record, f"jobs/{name}/inputs", role) for role, record in job.inputs.items()},
            outputs={key: file_of(record, f"jobs/{name}/outputs", key) for key, record in job.outputs.items()},
            params=job.params,
            status=job.status,
            submitted_at=job.submitted_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            priority=job.priority,
            attempt=job.attempt,
            cancel_requested=job.cancel_requested,
            error=job.error,
        )
    bundled = {file: _bundled(record) for file, record in records.items()}
    return Contents(state=dict(info.state), images=images, jobs=over, files=bundled), records


def _bundled(record: Record) -> BundledFile:
    name = record.source_name if isinstance(record, ImageRecord) else record.name
    return BundledFile(digest=record.digest, byte_size=record.byte_size, media_type=record.media_type, name=name)


class Bundle:
    """A bundle that may be hostile; `BundleError` unless its manifest is true of its files, digests excepted.

    Those are compared while the files are read.
    """

    def __init__(self, file: IO[bytes], *, max_files: int) -> None:
        self._zip = ZipReader(file, max_entries=max_files)
        sizes = dict(self._zip.sizes)
        if not 0 < sizes.pop(MANIFEST, 0) <= MAX_MANIFEST:
            raise BundleError(f"A bundle has a {MANIFEST} of at most {MAX_MANIFEST:,} bytes; this ZIP has none.")
        self.contents = contents = _decode(b"".join(self._zip.chunks(MANIFEST)))
        pictures, results = contents.pictures.keys(), contents.results
        if {name: file.byte_size for name, file in contents.files.items()} != sizes:
            raise _lie("it names other files than there are, or other sizes")
        if len(set(contents.images.values())) < len(contents.images):
            raise _lie("two slots have the same file")
        if pictures & results or pictures | results != contents.files.keys():
            raise _lie("it does not say of each file whether it is an image or a result")
        names = [contents.files[file].name for file in results]
        if not all(map(_keys.is_slot, chain(names, *(job.outputs for job in contents.jobs.values())))):
            raise _lie("a result has a name that no result can have")

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file; `BundleError` at their end if they are not those that the manifest speaks of."""
        digest = hashlib.sha256()
        for chunk in self._zip.chunks(name):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.contents.files[name].digest:
            raise _lie(f"{name} has another digest")


class _Head(msgspec.Struct):
    format: str
    schema: int


_HEAD_OF: Final = msgspec.json.Decoder(_Head)  # made once, see `_manifest`
_CONTENTS_OF: Final = msgspec.json.Decoder(Contents)


def _decode(data: bytes) -> Contents:
    try:
        head = _HEAD_OF.decode(data)
        contents = _CONTENTS_OF.decode(data) if head == _Head(FORMAT, SCHEMA) else None
        for values in (contents.state, *(job.params for job in contents.jobs.values())) if contents else ():
            check_json(values)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _lie("a value in it is not of the kind that belongs there") from error
    if contents is None:
        raise BundleError(
            f"This is {head.format[:40]!r}, format {head.schema}; what is read here is {FORMAT!r}, format {SCHEMA}. "
            "If it comes from a newer version, upgrade async-sessions."
        )
    return contents


def _lie(what: str) -> BundleError:
    return BundleError(f"The manifest of the bundle is not as `export_session` writes it: {what}. Export it again.")
