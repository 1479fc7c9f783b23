from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from async_sessions._tasks import utc_now


class WallClock:
    """A machine's clock, which goes on by itself, set `ahead` of the truth by that much."""

    def __init__(self, truth: Callable[[], datetime] = utc_now) -> None:
        self._truth = truth
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return self._truth() + self.ahead
