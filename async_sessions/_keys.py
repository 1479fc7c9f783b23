"""The only place that spells a storage key.

    manifests/<k2>/<key>.json              the one commit point of a session
    blobs/<incarnation>/<digest>.<nonce>   immutable; a name is written once and never again
    blobs/<incarnation>/<digest>.<nonce>.thumb
    queue/<job id>.json                    a hint: this job may be unfinished
    owners/<owner>.json                    the lease of a living dispatcher
    cookie/secret                          what signs the cookies, unless an app has a secret of its own
    quarantine/<key>                       what `verify(repair=True)` moved out of the way; never swept
    quarantine/<key>.reason.json           why
    tmp/...                                a backend's own unfinished writes

A session id is a secret: it is hashed before it touches storage, and no text that a client sends becomes a path.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection
from typing import Final, Literal, TypeAlias

from async_sessions.errors import InvalidKeyError, JobNotFoundError

MANIFESTS = "manifests/"
BLOBS = "blobs/"
QUEUE = "queue/"
OWNERS = "owners/"
COOKIE_SECRET = "cookie/secret"  # noqa: S105 - where it is kept
QUARANTINE = "quarantine/"
TEMPORARY = "tmp/"

Family: TypeAlias = Literal["manifest", "blob", "marker", "lease", "secret", "quarantine"]

_SLOT = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SESSION_KEY = re.compile(r"[0-9a-f]{32}")
_JOB_ID = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{16})")
_REASON = ".reason.json"
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_FAMILIES: Final[dict[Family, re.Pattern[str]]] = {
    "manifest": re.compile(r"manifests/([0-9a-f]{2})/\1[0-9a-f]{30}\.json"),
    "blob": re.compile(r"blobs/[0-9a-f]{32}/[0-9a-f]{64}\.[0-9a-f]{16}(\.thumb)?"),
    "marker": re.compile(r"queue/[0-9a-f]{32}\.[0-9a-f]{16}\.json"),
    "lease": re.compile(r"owners/[^/]+\.json"),
    "secret": re.compile(re.escape(COOKIE_SECRET)),
    "quarantine": re.compile(r"quarantine/.+"),
}


def new_session_id() -> str:
    """256 random bits, URL-safe: whoever knows it is the session."""
    return secrets.token_urlsafe(32)


def key_of_id(session_id: str) -> str:
    return _hashed(f"id:{session_id}")[:32]


def key_of_identity(identity: str) -> str:
    return _hashed(f"identity:{identity}")[:32]


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # a client may send half a pair


def new_incarnation() -> str:
    """Names one life of a session; its blobs live under it."""
    return secrets.token_hex(16)


def new_revision() -> str:
    return secrets.token_hex(8)


def check_session_key(key: str) -> str:
    if not _SESSION_KEY.fullmatch(key):
        raise InvalidKeyError("A session key is 32 lower-case hexadecimal digits; `async-sessions` prints them.")
    return key


def is_slot(slot: object) -> bool:
    return isinstance(slot, str) and _SLOT.fullmatch(slot) is not None


def check_slot(slot: str, slots: Collection[str] | None = None) -> str:
    """`slots` are those that there are, where not all are."""
    if not is_slot(slot):
        raise InvalidKeyError(f"A slot name is a lower-case letter, then up to 31 of a-z 0-9 _ -; not {slot!r}.")
    if slots is not None and slot not in slots:
        raise InvalidKeyError(f"This store's slots are {', '.join(sorted(slots))}; not {slot!r}.")
    return slot


def is_segment(name: str) -> bool:
    return _SEGMENT.fullmatch(name) is not None


def check_blob_key(key: str) -> str:
    """Raise `InvalidKeyError` unless every segment of `key` is a plain name."""
    if not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise InvalidKeyError(f"A storage key is names of A-Z a-z 0-9 . _ - joined by '/'; not {key!r}.")
    return key


def check_prefix(prefix: str) -> str:
    if prefix:
        if not prefix.endswith("/"):
            raise InvalidKeyError(f"A prefix is empty or ends with '/'; not {prefix!r}.")
        check_blob_key(prefix[:-1])
    return prefix


def manifest(key: str) -> str:
    return f"{MANIFESTS}{key[:2]}/{key}.json"


def session_key_of(manifest_key: str) -> str:
    return manifest_key.rpartition("/")[2].removesuffix(".json")


def incarnation_prefix(incarnation: str) -> str:
    return f"{BLOBS}{incarnation}/"


def incarnation_of(blob: str) -> str:
    return blob.split("/")[1]


def new_blob(incarnation: str, digest: str) -> str:
    return f"{BLOBS}{incarnation}/{digest}.{secrets.token_hex(8)}"


def thumbnail(blob: str) -> str:
    return f"{blob}.thumb"


def image_of(thumbnail: str) -> str:
    return thumbnail.removesuffix(".thumb")


def family(key: str) -> Family | None:
    """What a key of the layout above is; `None` for one that has no place in it."""
    return next((name for name, pattern in _FAMILIES.items() if pattern.fullmatch(key)), None)


def quarantined(key: str) -> str:
    return f"{QUARANTINE}{key}"


def reason_for(quarantined: str) -> str:
    return f"{quarantined}{_REASON}"


def is_reason(quarantined: str) -> bool:
    return quarantined.endswith(_REASON)


def job_hex(idempotency_key: str | None) -> str:
    if idempotency_key is None:
        return secrets.token_hex(8)
    return _hashed(f"job:{idempotency_key}")[:16]


def job_id(session_key: str, name: str) -> str:
    return f"{session_key}.{name}"


def split_job_id(job_id: str) -> tuple[str, str]:
    """The session key and the job's name within the session."""
    if not (match := _JOB_ID.fullmatch(job_id)):
        raise JobNotFoundError("There is no such job.")
    return match[1], match[2]


def queue_marker(job_id: str) -> str:
    return f"{QUEUE}{job_id}.json"


def job_of_marker(marker: str) -> str:
    return marker.removeprefix(QUEUE).removesuffix(".json")


def owner_lease(owner: str) -> str:
    return f"{OWNERS}{owner}.json"


def owner_of_lease(lease: str) -> str:
    return lease.removeprefix(OWNERS).removesuffix(".json")
