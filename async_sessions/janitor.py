"""The cleaner: what may go is decided by pure functions; `Janitor` says when, and remembers what need not be read.

Nothing goes that somebody needs: an unfinished job or a live pin keeps its session, any job entry keeps the images it
names, a removal is a compare-and-swap on the very manifest that was judged, and a blob that no manifest names is spared
for `grace`, far longer than a commit may take.
"""

from __future__ import annotations

import logging
import math
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import anyio

from async_sessions import _keys
from async_sessions._plan import CleanupReport, Removal, next_due, plan_sweep
from async_sessions._sweep import Sweep

if TYPE_CHECKING:
    from async_sessions._context import StoreContext

__all__ = ["CleanupReport", "Janitor", "Removal", "plan_sweep"]

FULL_PASS = timedelta(days=1)  # how often every blob is compared with every manifest
_LULL = 10.0  # seconds for which a sweep that made no room is not repeated

_logger = logging.getLogger("async_sessions")


class Janitor:
    """Sweeps one open store. Remembers when each session is due, so that a quiet sweep reads no manifest."""

    def __init__(self, context: StoreContext, interval: timedelta | None) -> None:
        self._context = context
        self._interval = interval
        self._due: dict[str, tuple[datetime, datetime]] = {}  # session key: (modified, next due)
        self._ahead: dict[str, tuple[datetime, float]] = {}  # see `Sweep`
        self._times_set = 0  # the clock, when it was last looked at here
        self._making_room = anyio.Lock()  # guards `_in_vain_until`: one sweep for all who find the store full
        self._in_vain_until = -math.inf

    async def run(self) -> None:
        """Sweep now and every `interval`, until cancelled. A sweep that fails is logged and tried again."""
        if (interval := self._interval) is None:
            return
        next_full = -math.inf
        while True:
            try:
                steady = anyio.current_time()
                if (now := self._now()) is not None:
                    await self.sweep(now=now, full=steady >= next_full)
                    next_full = steady + FULL_PASS.total_seconds() if steady >= next_full else next_full
            except Exception:
                # Whatever a backend raises, an app does not end because its cleaner could not work.
                _logger.exception("a sweep failed; the next one is in %s", interval)
            await anyio.sleep(interval.total_seconds())

    async def make_room(self, size: int) -> None:
        """Sweep, for who finds the store too full for `size` bytes, or the device (0); not if it was just in vain."""
        async with self._making_room:
            if anyio.current_time() < self._in_vain_until or (now := self._now()) is None:
                return
            report = await self.sweep(now=now, full=True, wanted=size)
            if not report.removed and (size == 0 or not self._context.has_room(size)):
                self._in_vain_until = anyio.current_time() + _LULL

    def _now(self) -> datetime | None:
        """What time it is, for who deletes; `None` where that is in doubt."""
        reckoning = self._context.reckoning
        now, seen, self._times_set = reckoning.earliest(), self._times_set, reckoning.times_set
        if self._times_set == seen:
            return now
        _logger.warning("the clock was set; nothing is swept, and for %s nothing early", reckoning.lasting)
        return None

    async def sweep(
        self, *, now: datetime, full: bool = False, dry_run: bool = False, wanted: int = 0
    ) -> CleanupReport:
        """One pass at `now`. `full` judges every session and every blob, whatever is remembered about them.

        `wanted` bytes are about to be added.
        """
        sweep = Sweep(self._context, now, dry_run, self._ahead)
        unnamed = {info.key: info.size async for info in sweep.aged(_keys.BLOBS)} if full else {}
        present: set[str] = set()
        # Twice where orphans are at stake: a directory that is written to while it is listed may hide an entry once.
        for _ in range(2 if unnamed else 1):
            async for listed in self._context.blobs.list(_keys.MANIFESTS):
                key = _keys.session_key_of(listed.key)
                if key in present:
                    continue
                present.add(key)
                if full or self._is_due(key, listed.modified, now):
                    manifest = await sweep.session(key, unnamed if full else None)
                    if manifest is not None:
                        # as of today, too, where `now` is a day that somebody wants to know about
                        today = min(now, self._context.now())
                        due = next_due(manifest, listed.modified, now=today, lifetime=self._context.lifetime)
                        self._due[key] = listed.modified, due
        for blob, size in unnamed.items():
            await sweep.orphan(blob, size)
        await sweep.temporaries()
        await sweep.markers()
        await sweep.leases()
        await sweep.room(wanted)
        if not dry_run:
            self._context.used = sweep.total_bytes
            for remembered in (self._due, self._ahead):
                for key in remembered.keys() - present:
                    del remembered[key]
        report = sweep.report(len(present))
        if report.removed or report.problems:
            _logger.info("swept: %d removed, %d problems", len(report.removed), len(report.problems))
        return report

    def _is_due(self, key: str, modified: datetime, now: datetime) -> bool:
        seen = self._due.get(key)
        if seen is None or seen[0] != modified:
            # Last used at `modified` at the latest: nothing can be due before the shorter of these two periods. With a
            # maximal age it can: how old the session is only its manifest tells.
            lifetime = self._context.lifetime
            unread = timedelta() if lifetime.max_age is not None else min(lifetime.ttl, lifetime.grace)
            self._due[key] = seen = modified, min(modified, now) + unread
        return seen[1] <= now
