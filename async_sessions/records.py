"""The values that a session is made of. All are frozen; times are timezone-aware UTC, sizes are bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, Literal, TypeAlias

import msgspec

from async_sessions import _keys
from async_sessions.errors import InvalidOutputError, QuotaExceededError

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"
JobStatus: TypeAlias = Literal["queued", "preparing", "running", "succeeded", "failed", "cancelled"]
RetryReason: TypeAlias = Literal["interrupted", "out_of_memory"]

JSON_DEPTH = 32
KIB, MIB = 1024, 1024 * 1024
FORMATS: Final = ("JPEG", "PNG", "WEBP", "AVIF", "HEIC")
MAX_MEDIA_TYPE: Final = 100  # characters

# RFC 9110, section 8.3.1: what may stand in a header
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
MEDIA_TYPE: Final = rf"""^{_WORD}/{_WORD}([ \t]*;[ \t]*{_WORD}=({_WORD}|"([^"\\\x00-\x1f\x7f-\U0010ffff])*"))*\Z"""

# of `Limits`; the state of a session that has none is `{}`
_LEAST: Final = {"max_bytes": 1, "max_pixels": 1, "max_side": 1, "max_state_bytes": 2}
_OPTIONAL: Final = ("max_session_bytes", "max_session_images", "max_total_bytes")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a store takes in. `max_bytes`, `max_pixels` and `max_side` are of an image, `max_state_bytes` of a session.

    `max_session_bytes` and `max_session_images` count everything that a session still keeps: images, those that can be
    put back or that its jobs name, thumbnails and outputs. They are exact. In a session that is full, the oldest
    finished jobs go first, with what they made, then the images that were replaced or cleared longest ago; then it is
    `QuotaExceededError`. Of the jobs that are over a session remembers the last `keep_jobs`.
    `max_total_bytes` is for the whole store and soft: a full store is swept, and sessions unused for longest go.
    `formats` can hold "HEIC" too, with the extra `heif`. AVIF and HEIC files are stored as PNG.
    With `keep_metadata` a JPEG, PNG or WebP file is checked as ever and then stored as it came, to the last byte: with
    where and when it was taken, and with whatever hides in it. `ValueError` for a limit that lets nothing in.
    """

    max_bytes: int = 32 * MIB
    max_pixels: int = 64_000_000
    max_side: int = 16_384
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "AVIF")
    max_session_bytes: int | None = 2048 * MIB
    max_session_images: int | None = 256
    max_state_bytes: int = 64 * KIB
    keep_jobs: int = 20
    max_total_bytes: int | None = None
    keep_metadata: bool = False

    def __post_init__(self) -> None:
        if self.keep_jobs < 1:
            raise ValueError("`keep_jobs` must be at least 1: who follows a job has to learn how it ended.")
        if not isinstance(self.formats, tuple) or not self.formats or not {*self.formats} <= {*FORMATS}:
            raise ValueError(f"`formats` is a tuple of one or more of {', '.join(FORMATS)}; not {self.formats!r}.")
        for name, least in _LEAST.items():
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise ValueError(f"`{name}` must be a whole number and at least {least}, not {value!r}.")
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number and at least 1, or None for none, not {value!r}.")


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stored image.

    `digest` is the SHA-256 of the stored bytes, `byte_size` how many they are, `blob` their storage name;
    `thumbnail_digest` and `thumbnail_size` (bytes) are those of the thumbnail, the digest empty in records from before
    it was kept. `width` and `height` are the upright image's, in pixels; `orientation` is the EXIF value (1 to 8) that
    the stored bytes still carry. `mode` is Pillow's.
    `verbatim`: the stored file has everything that it came with (`Limits.keep_metadata`).
    """

    digest: str
    media_type: str
    width: int
    height: int
    mode: str
    has_alpha: bool
    orientation: int
    byte_size: int
    thumbnail_size: int
    stored_at: datetime
    blob: str
    source_name: str | None = None
    verbatim: bool = False
    thumbnail_digest: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """`(width, height)` in pixels, upright."""
        return self.width, self.height

    @property
    def aspect_ratio(self) -> float:
        return self.width / self.height

    @property
    def pixel_count(self) -> int:
        return self.width * self.height


class OutputRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One stored result of a job: a video, an image, any bytes with a media type."""

    name: str
    media_type: str
    digest: str
    byte_size: int
    stored_at: datetime
    blob: str


class RecentImage(msgspec.Struct, frozen=True):
    """An image that was replaced or cleared at `removed_at` and can still be put back."""

    slot: str
    record: ImageRecord
    removed_at: datetime


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed: the exception's class name (or `abandoned`) and its message."""

    kind: str
    message: str


class JobInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its session's manifest holds it: the authority on what became of it.

    A job is `preparing` from the moment in which an attempt begins until its device takes it. `attempt` counts the
    attempts that were begun, `excused` those among them that were stopped so that the process could end. `owner` is the
    dispatcher that looks after it. A job that waits for a `retry` runs with nothing beside it: its last attempt ended
    with its process, or took more memory than its device had. `lost` are the roles of `inputs` that were removed.
    """

    id: str
    pipeline: str
    inputs: dict[str, ImageRecord]
    params: dict[str, Any]
    submitted_at: datetime
    owner: str
    priority: int = 0
    status: JobStatus = "queued"
    attempt: int = 0
    excused: int = 0
    retry: RetryReason | None = None
    cancel_requested: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None
    outputs: dict[str, OutputRecord] = {}
    error: JobError | None = None
    lost: tuple[str, ...] = ()

    @property
    def unfinished(self) -> bool:
        return self.status in ("queued", "preparing", "running")

    @property
    def under_way(self) -> bool:
        """Whether an attempt has begun that has not ended."""
        return self.status in ("preparing", "running")


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One consistent snapshot of a session.

    `images` are by slot, `jobs` by id; `pins` maps owners to the time they hold until. `recent` are the last 8 images
    that were replaced or cleared and can still be put back, the newest first. `revision` changes with every write, and
    is what `if_revision` takes. `total_bytes` is what it takes in the store: images, thumbnails, what can be put back,
    and what its jobs made. `expires_at` is when it goes if nobody uses it until then; a pin or an unfinished job keeps
    it longer.
    """

    key: str
    created_at: datetime
    updated_at: datetime
    expires_at: datetime
    revision: str
    images: Mapping[str, ImageRecord]
    state: Mapping[str, Any]
    jobs: Mapping[str, JobInfo]
    pins: Mapping[str, datetime]
    recent: tuple[RecentImage, ...]
    total_bytes: int


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a dispatcher is asked to do: names of stored images and JSON, never pixels, never a session id.

    Two requests of one session with the same `idempotency_key` are one job.
    """

    session_key: str
    pipeline: str
    inputs: dict[str, ImageRecord]
    params: dict[str, Any] = {}
    priority: int = 0
    idempotency_key: str | None = None


def check_output(name: str, media_type: str) -> None:
    """Raise `InvalidOutputError` unless `name` is well formed, as that of a slot is, and so is `media_type`."""
    if not _keys.is_slot(name):
        raise InvalidOutputError(
            f"An output is named as a slot is: a letter, then up to 31 of a-z 0-9 _ -; not {str(name)[:40]!r}."
        )
    well_formed = isinstance(media_type, str) and len(media_type) <= MAX_MEDIA_TYPE
    if not well_formed or re.search(MEDIA_TYPE, media_type) is None:
        raise InvalidOutputError(
            f"The media type of the output {name!r} is none: {str(media_type)[:40]!r}. Give one such as 'video/mp4'."
        )


def check_state(values: Mapping[str, JSON], limit: int) -> None:
    """Raise `QuotaExceededError` above `limit` bytes of JSON, or what `check_json` raises."""
    check_json(dict(values))
    if len(msgspec.json.encode(values)) > limit:
        raise QuotaExceededError(f"A session's state may take {limit} bytes as JSON; store less in it.")


def check_json(value: object, *, depth: int = JSON_DEPTH) -> None:
    """Raise `TypeError` for what JSON can't hold, `ValueError` for NaN, infinity, huge integers or deep nesting."""
    if depth < 0:
        raise ValueError(f"JSON values may be nested at most {JSON_DEPTH} deep.")
    match value:
        case None | bool():
            pass
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError("Half a surrogate pair is no text; leave it out.") from error
        case int():
            if not -(2**63) <= value < 2**64:
                raise ValueError("An integer must fit into 64 bits; store a larger one as text.")
        case float():
            if not math.isfinite(value):
                raise ValueError("NaN and infinity are not JSON; leave the value out or store None.")
        case list():
            for item in value:
                check_json(item, depth=depth - 1)
        case dict():
            for name, item in value.items():
                if not isinstance(name, str):
                    raise TypeError(f"JSON object keys are str, not {type(name).__name__}.")
                check_json(item, depth=depth - 1)
        case _:
            raise TypeError(f"Only JSON values can be stored here, not {type(value).__name__}.")
