"""What `SessionStore.verify` reports, and how it judges: pure functions of a manifest.

report = await store.verify()
for finding in report.findings:
    print(finding.kind, finding.key, finding.reason)
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from async_sessions import _keys

if TYPE_CHECKING:
    from async_sessions._manifest import Manifest
    from async_sessions.records import ImageRecord

FindingKind = Literal[
    "damaged",
    "missing",
    "thumbnail",
    "orphan",
    "manifest",
    "newer_schema",
    "unreadable",
    "unmarked_job",
    "stale_marker",
    "stale_lease",
    "foreign",
]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it should be, at the storage key `key`.

    - `damaged`, `missing`: an image or a result that a session names. Repaired, the session names it no more: its slot
      is empty, and a job whose result it was has failed. A job that is not over keeps its images, whole or not.
    - `thumbnail`: missing or damaged. Repaired, it is made anew from its image.
    - `orphan`: a blob that no session names, older than the store's `grace`.
    - `manifest`: a session that can't be read. Moved, once it is older than `grace`, with the blobs that are then
      orphans; not while another one can't be judged: the blobs could be its.
    - `newer_schema`, `unreadable`: written by a newer version; or the storage does not give it. Left alone, and so are
      all orphans: they could be its.
    - `unmarked_job`: not over, but not in the queue. Repaired, it is.
    - `stale_marker`, `stale_lease`: of a job that is over or never was, of a process that is gone. Repaired: removed.
    - `foreign`: not one of ours. Left alone.

    `session` is the key of its session, where it has one. `repair` says what was done; it is empty where nothing was.
    """

    kind: FindingKind
    key: str
    reason: str
    session: str = ""
    repair: str = ""


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found. `blobs` and `bytes` were read; `quarantined` is what lies in `quarantine/`."""

    now: datetime
    sessions: int
    blobs: int
    bytes: int
    quarantined: int
    quarantined_bytes: int
    findings: tuple[Finding, ...]

    @property
    def unrepaired(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.repair)


class Claim(NamedTuple):
    """What a manifest says of a blob: its digest (empty where it was not kept), its size, and to people what it is."""

    digest: str
    size: int
    what: str


def claims(manifest: Manifest) -> dict[str, Claim]:
    """All that `manifest` vouches for, by storage name."""
    found: dict[str, Claim] = {}
    for what, record in images(manifest):
        thumbnail = Claim(record.thumbnail_digest, record.thumbnail_size, f"the thumbnail of {what}")
        found.setdefault(record.blob, Claim(record.digest, record.byte_size, what))
        found.setdefault(_keys.thumbnail(record.blob), thumbnail)
    for job in manifest.jobs.values():
        for output in job.outputs.values():
            found[output.blob] = Claim(output.digest, output.byte_size, f"a result of job {job.id}")
    return found


def images(manifest: Manifest) -> Iterator[tuple[str, ImageRecord]]:
    """Every image that `manifest` names, and what it is to people; one that is several things comes as often."""
    for slot, record in manifest.images.items():
        yield f"the image in slot {slot!r}", record
    for retired in manifest.retired:
        yield f"the image that was in slot {retired.slot!r}", retired.record
    for job in manifest.jobs.values():
        for record in job.inputs.values():
            yield f"an image of job {job.id}", record


def still_so(finding: Finding, manifest: Manifest) -> bool:
    """Whether what was found beside an older manifest of the session is a finding beside this one."""
    match finding.kind:
        case "unmarked_job":
            return any(_keys.queue_marker(job.id) == finding.key for job in manifest.unfinished_jobs())
        case "orphan":
            return finding.key not in manifest.named_blobs()
        case _:
            return finding.key in manifest.named_blobs()
