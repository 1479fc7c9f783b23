"""What a sweep may remove and when it has to look again: pure decisions, and the report."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from async_sessions._manifest import Lifetime, Manifest, RetiredImage

RemovalKind = Literal["session", "image", "orphan", "temporary", "marker", "lease"]

FULL_SHARE = 0.9  # of `max_total_bytes`, to which a full store is swept, so that the next upload doesn't fill it again


class Removal(msgspec.Struct, frozen=True):
    """Something that a sweep removed: `key` is a session's key or a blob's name, `size` in bytes."""

    kind: RemovalKind
    key: str
    reason: str
    size: int


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep did, or with `dry_run` would do. `problems` names the sessions it could not judge, and why.

    `total_bytes` is what all blobs take afterwards, counted where `Limits.max_total_bytes` is set; `overshoot` by how
    much that is too much.
    """

    now: datetime
    dry_run: bool
    sessions: int
    removed: tuple[Removal, ...]
    problems: tuple[str, ...]
    total_bytes: int | None = None
    overshoot: int = 0

    @property
    def freed_bytes(self) -> int:
        return sum(removal.size for removal in self.removed)


class SweepPlan(NamedTuple):
    """What is due in one session: all of it, for `expired` as the reason, or some retired images."""

    expired: str | None
    retired: tuple[RetiredImage, ...]


def plan_sweep(manifest: Manifest, *, now: datetime, lifetime: Lifetime) -> SweepPlan:
    """Decide what may go at `now`. Reads nothing but its arguments."""
    if manifest.buried:
        return SweepPlan("deleted", ())
    if not lifetime.alive(manifest, now):
        aged = lifetime.max_age is not None and now >= manifest.created_at + lifetime.max_age
        reason = f"older than {lifetime.max_age}" if aged else f"unused for {lifetime.ttl}"
        return SweepPlan(reason, ())
    kept = {each.record.blob for each in manifest.without_retired(now, lifetime.grace).retired}
    return SweepPlan(None, tuple(each for each in manifest.retired if each.record.blob not in kept))


def next_due(manifest: Manifest, modified: datetime, *, now: datetime, lifetime: Lifetime) -> datetime:
    """When a session that is not written to again has to be looked at next."""
    moments = [lifetime.expires_at(manifest), modified + lifetime.grace, *manifest.pins.values()]
    moments += [each.removed_at + lifetime.grace for each in manifest.retired]
    # a job that keeps an overdue session ends with a write, which is a look of its own
    return min((moment for moment in moments if moment > now), default=now + lifetime.grace)


class Usage(NamedTuple):
    """A session that nobody needs at the moment."""

    used_at: datetime
    key: str
    size: int


def idle(manifest: Manifest, *, now: datetime, lifetime: Lifetime) -> bool:
    """Whether a session may go so that others find room: no job, no pin, and unused for `grace`."""
    return not manifest.held(now) and manifest.used_at + lifetime.touch_after + lifetime.grace <= now


def plan_room(idle: Iterable[Usage], excess: int) -> list[Usage]:
    """Those unused for longest, as many as it takes to free `excess` bytes, or all of them."""
    chosen: list[Usage] = []
    for usage in sorted(idle):
        if excess <= 0:
            break
        chosen.append(usage)
        excess -= usage.size
    return chosen
