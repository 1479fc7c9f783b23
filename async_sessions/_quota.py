"""What a session may keep, and what goes first where it would keep more. Pure decisions, taken within a commit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec.structs import replace

from async_sessions.errors import QuotaExceededError

if TYPE_CHECKING:
    from async_sessions._manifest import Manifest
    from async_sessions.records import Limits


def within(manifest: Manifest, limits: Limits, *, before: Manifest, now: datetime) -> Manifest:
    """`manifest`, which an edit made of `before`, without what has to go so that it is within its limits.

    Finished jobs with their outputs go first, the oldest before the others, but never the newest one; then images that
    were replaced or cleared, unless a pin keeps them. `QuotaExceededError` where that is not enough. An edit that adds
    nothing is never refused, so that a session which is over its limits, since they were lowered, can shrink.
    """
    for smaller in _shrinking(manifest, now):
        if _at_most(smaller.total_bytes(), limits.max_session_bytes, before.total_bytes()) and _at_most(
            smaller.image_count(), limits.max_session_images, before.image_count()
        ):
            return smaller
    raise QuotaExceededError(
        f"The session is full: it may keep {_count(limits.max_session_bytes)} bytes and "
        f"{_count(limits.max_session_images)} images. Clear an image first, or give a smaller one."
    )


def check_size(size: int, images: int, limits: Limits) -> None:
    """`QuotaExceededError` where a session of so many bytes and images is more than is kept, before anything goes."""
    if not (_at_most(size, limits.max_session_bytes, 0) and _at_most(images, limits.max_session_images, 0)):
        raise QuotaExceededError(
            f"This is more than one session may keep: {_count(limits.max_session_bytes)} bytes and "
            f"{_count(limits.max_session_images)} images. Leave some of it out, or raise the store's limits."
        )


def _shrinking(manifest: Manifest, now: datetime) -> Iterator[Manifest]:
    yield manifest
    finished = sum(not job.unfinished for job in manifest.jobs.values())
    for kept in range(finished - 1, 0, -1):
        manifest = manifest.remembering(kept)
        yield manifest
    if not any(until > now for until in manifest.pins.values()):
        for gone in sorted(manifest.retired, key=lambda each: each.removed_at):
            if not gone.discarded:  # such a one is there for a running job alone
                manifest = replace(manifest, retired=tuple(each for each in manifest.retired if each is not gone))
                yield manifest


def _at_most(size: int, limit: int | None, before: int) -> bool:
    return limit is None or size <= max(limit, before)


def _count(limit: int | None) -> str:
    return "any number of" if limit is None else f"{limit:,}"
