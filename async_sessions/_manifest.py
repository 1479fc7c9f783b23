"""`Manifest`: everything that is true of one session, its JSON, and the pure edits that make the next one.

An edit is a function from manifest to manifest; it does no I/O, knows no clock and may be applied again after a lost
compare-and-swap. Blobs that an edit stops naming are deleted by the caller *after* the write that dropped them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from async_sessions import _keys
from async_sessions.errors import (
    CorruptManifestError,
    RevisionConflictError,
    SessionNotFoundError,
    SlotEmptyError,
    UnknownSchemaError,
)
from async_sessions.records import ImageRecord, JobInfo, RecentImage, SessionInfo

SCHEMA = 2  # 1 had no seal
RECENT_SHOWN = 8

_SEAL = re.compile(rb',"seal":"([0-9a-f]{64})"}\Z')
_SEAL_LENGTH = len(',"seal":""}') + 64


class Lifetime(msgspec.Struct, frozen=True, kw_only=True):
    """How long a session lives unused (`ttl`), in all (`max_age`), and what it lost can be undone (`grace`)."""

    ttl: timedelta
    max_age: timedelta | None
    grace: timedelta

    @property
    def touch_after(self) -> timedelta:
        """Uses are recorded at most this often; a session is therefore kept that much longer than `ttl`."""
        return self.ttl / 24

    @property
    def longest(self) -> timedelta:
        """For how long anything at all is kept that nobody uses."""
        return max(self.ttl + self.touch_after, self.max_age or self.ttl, self.grace)

    def expires_at(self, manifest: Manifest) -> datetime:
        idle = manifest.used_at + self.ttl + self.touch_after
        return idle if self.max_age is None else min(idle, manifest.created_at + self.max_age)

    def alive(self, manifest: Manifest, now: datetime) -> bool:
        return not manifest.buried and (now < self.expires_at(manifest) or manifest.held(now))

    def living(self, manifest: Manifest | None, now: datetime, incarnation: str | None = None) -> Manifest:
        """`manifest`, if it is alive and, where one is given, of that life; else `SessionNotFoundError`."""
        if manifest is None or not self.alive(manifest, now) or incarnation not in (None, manifest.incarnation):
            raise SessionNotFoundError("There is no such session: it is unknown, expired or deleted. Start a new one.")
        return manifest


class RetiredImage(msgspec.Struct, frozen=True, kw_only=True):
    """A blob that no slot holds any more. `discarded`: gone for the user, kept only for the jobs that name it."""

    slot: str
    record: ImageRecord
    removed_at: datetime
    discarded: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One life of one session. `revision` is new with every write; `used_at` is the last recorded use."""

    schema: int = SCHEMA
    key: str
    incarnation: str
    revision: str
    created_at: datetime
    updated_at: datetime
    used_at: datetime
    buried: bool = False
    images: dict[str, ImageRecord] = {}
    retired: tuple[RetiredImage, ...] = ()
    state: dict[str, Any] = {}
    jobs: dict[str, JobInfo] = {}
    pins: dict[str, datetime] = {}

    @classmethod
    def new(cls, key: str, incarnation: str, now: datetime) -> Manifest:
        return cls(key=key, incarnation=incarnation, revision="", created_at=now, updated_at=now, used_at=now)

    def unfinished_jobs(self) -> Iterator[JobInfo]:
        return (job for job in self.jobs.values() if job.unfinished)

    def held(self, now: datetime) -> bool:
        """Whether a job or a live pin keeps the session whatever its age."""
        return any(self.unfinished_jobs()) or any(until > now for until in self.pins.values())

    def named_blobs(self) -> set[str]:
        """The storage names of every image, thumbnail and output that this manifest vouches for."""
        return set(self.blob_sizes())

    def blob_sizes(self) -> dict[str, int]:
        """The bytes of every blob that this manifest names."""
        sizes = {output.blob: output.byte_size for job in self.jobs.values() for output in job.outputs.values()}
        for record in self._image_records():
            sizes |= sizes_of(record)
        return sizes

    def available(self, record: ImageRecord) -> bool:
        """Whether a new job may name `record`: its blob is this session's and not discarded."""
        kept = (retired.record for retired in self.retired if not retired.discarded)
        of_jobs = (each for job in self.jobs.values() for each in job.inputs.values())
        return any(record.blob == each.blob for each in (*self.images.values(), *kept, *of_jobs))

    def recent(self, now: datetime, grace: timedelta) -> tuple[RecentImage, ...]:
        """The last images replaced or cleared within `grace`, newest first."""
        shown = [
            RecentImage(each.slot, each.record, each.removed_at)
            for each in reversed(self.retired)
            if not each.discarded and each.removed_at + grace > now
        ]
        return tuple(shown[:RECENT_SHOWN])

    def total_bytes(self) -> int:
        """Images, retired ones too, with their thumbnails, and outputs; each blob once."""
        return sum(self.blob_sizes().values())

    def image_count(self) -> int:
        """Images that slots hold, that can be put back or that jobs name."""
        return len({record.blob for record in self._image_records()})

    def info(self, lifetime: Lifetime, now: datetime) -> SessionInfo:
        return SessionInfo(
            key=self.key,
            created_at=self.created_at,
            updated_at=self.updated_at,
            expires_at=lifetime.expires_at(self),
            revision=self.revision,
            images=self.images,
            state=self.state,
            jobs=self.jobs,
            pins=self.pins,
            recent=self.recent(now, lifetime.grace),
            total_bytes=self.total_bytes(),
        )

    def _image_records(self) -> Iterator[ImageRecord]:
        yield from self.images.values()
        yield from (retired.record for retired in self.retired)
        for job in self.jobs.values():
            yield from job.inputs.values()

    def with_image(self, slot: str, record: ImageRecord, now: datetime) -> Manifest:
        return replace(self.without_image(slot, now), images={**self.images, slot: record})

    def without_image(self, slot: str, now: datetime) -> Manifest:
        if (old := self.images.get(slot)) is None:
            return self
        images = {name: record for name, record in self.images.items() if name != slot}
        return replace(self.with_superseded(slot, old, now), images=images)

    def with_superseded(self, slot: str, record: ImageRecord, now: datetime) -> Manifest:
        """`record` was in `slot` for an instant: a newer upload took the slot before this one was decoded."""
        return replace(self, retired=(*self.retired, RetiredImage(slot=slot, record=record, removed_at=now)))

    def check_replaces(self, slot: str, digest: str, replaces: str | None) -> None:
        """`RevisionConflictError` if `slot` holds an image that is neither of these two; `None`: whichever it is."""
        held = None if replaces is None else self.images.get(slot)
        if held is not None and held.digest not in (replaces, digest):
            raise RevisionConflictError(
                f"Slot {slot!r} holds another image by now. Look at it, and try again if it may go."
            )

    def with_restored(self, slot: str, digest: str, now: datetime, grace: timedelta) -> Manifest:
        """Put a recent image back into `slot`. `SlotEmptyError` where there is none of that digest."""
        if (current := self.images.get(slot)) is not None and current.digest == digest:
            return self
        for recent in self.recent(now, grace):
            if recent.record.digest == digest:
                rest = tuple(each for each in self.retired if each.record.blob != recent.record.blob)
                return replace(self, retired=rest).with_image(slot, recent.record, now)
        raise SlotEmptyError("That image is not among the recent ones any more; upload it again.")

    def cleared(self, now: datetime) -> Manifest:
        """No image, no recent image, no finished job with its outputs. What unfinished jobs name is kept for them."""
        needed = {record.blob for job in self.unfinished_jobs() for record in job.inputs.values()}
        slots = (RetiredImage(slot=slot, record=record, removed_at=now) for slot, record in self.images.items())
        kept = tuple(replace(each, discarded=True) for each in (*self.retired, *slots) if each.record.blob in needed)
        return replace(self, images={}, retired=kept, jobs={job.id: job for job in self.unfinished_jobs()})

    def with_state(self, values: Mapping[str, Any]) -> Manifest:
        return replace(self, state={**self.state, **values})

    def with_pin(self, owner: str, until: datetime) -> Manifest:
        return replace(self, pins={**self.pins, owner: until})

    def without_pin(self, owner: str) -> Manifest:
        return replace(self, pins={name: until for name, until in self.pins.items() if name != owner})

    def with_job(self, job: JobInfo) -> Manifest:
        """Add or replace a job's entry. An end lets go of the images that were only kept for it.

        A job that has just ended is the last of all: so they are in the order of their ends, whatever a clock says.
        """
        if job.unfinished:
            return replace(self, jobs={**self.jobs, job.id: job})
        discarded = {each.record.blob for each in self.retired if each.discarded}
        lost = [role for role, record in job.inputs.items() if record.blob in discarded]
        inputs = {role: record for role, record in job.inputs.items() if role not in lost}
        old = self.jobs.get(job.id)
        others = {name: each for name, each in self.jobs.items() if each is not old or not each.unfinished}
        changed = replace(self, jobs={**others, job.id: replace(job, inputs=inputs, lost=(*job.lost, *lost))})
        needed = {record.blob for other in changed.unfinished_jobs() for record in other.inputs.values()}
        kept = tuple(each for each in self.retired if not each.discarded or each.record.blob in needed)
        return replace(changed, retired=kept)

    def remembering(self, count: int) -> Manifest:
        """Only the last `count` of the jobs that are over, with their outputs."""
        over = [job.id for job in self.jobs.values() if not job.unfinished]
        gone = set(over[: max(0, len(over) - count)])
        return replace(self, jobs={name: job for name, job in self.jobs.items() if name not in gone}) if gone else self

    def without_retired(self, now: datetime, grace: timedelta) -> Manifest:
        """Drop retired images older than `grace`, but for those that a job names, and pins that are over."""
        pins = {owner: until for owner, until in self.pins.items() if until > now}
        if pins:
            return replace(self, pins=pins)
        named = {record.blob for job in self.jobs.values() for record in job.inputs.values()}
        kept = tuple(each for each in self.retired if each.removed_at + grace > now or each.record.blob in named)
        return replace(self, retired=kept, pins=pins)

    def as_tombstone(self) -> Manifest:
        return replace(self, buried=True, images={}, retired=(), state={}, jobs={}, pins={})

    def sealed(self, revision: str, now: datetime, *, used: bool) -> Manifest:
        """The manifest as it is written: a revision of its own, and `now` as its time.

        A clock that is behind makes no session older than others have seen it.
        """
        used_at = max(self.used_at, now) if used else self.used_at
        return replace(self, schema=SCHEMA, revision=revision, updated_at=now, used_at=used_at)


def sizes_of(record: ImageRecord) -> dict[str, int]:
    """The bytes of an image's blob and of its thumbnail's."""
    return {record.blob: record.byte_size, _keys.thumbnail(record.blob): record.thumbnail_size}


class _Schema(msgspec.Struct):
    schema: int


# Made here, once: what msgspec knows of a type it finds out at the first decode, and two threads that do so at the same
# time crash the process.
_SCHEMA_OF: Final = msgspec.json.Decoder(_Schema)
_MANIFEST_OF: Final = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """JSON whose last member, `seal`, is the SHA-256 of the JSON without it: a flipped bit may leave it well formed."""
    body = msgspec.json.encode(manifest)
    return body[:-1] + b',"seal":"%s"}' % hashlib.sha256(body).hexdigest().encode()


def decode(key: str, data: bytes) -> Manifest:
    """Raise `UnknownSchemaError` for a newer format and `CorruptManifestError` for anything that is not a manifest."""
    seal = _SEAL.search(data[-_SEAL_LENGTH:])
    if seal and hashlib.sha256(data[:-_SEAL_LENGTH] + b"}").hexdigest() != seal[1].decode():
        raise CorruptManifestError(f"The manifest of session {key} is damaged: it is not what was written.")
    try:
        schema = _SCHEMA_OF.decode(data).schema
        if schema > SCHEMA:
            raise UnknownSchemaError(
                f"Session {key} was written in format {schema}; this version reads up to {SCHEMA}. "
                "Upgrade async-sessions; nothing was changed."
            )
        manifest = _MANIFEST_OF.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptManifestError(f"The manifest of session {key} is damaged: {error}") from error
    if schema != 1 and seal is None:
        raise CorruptManifestError(f"The manifest of session {key} is damaged: its seal is broken.")
    if manifest.key != key:
        raise CorruptManifestError(f"The manifest of session {key} is that of session {manifest.key}.")
    return manifest
