from __future__ import annotations

from datetime import UTC, datetime, timedelta

from async_sessions.testing.clock import FrozenClock as Clock

__all__ = ["Clock", "WallClock"]


class WallClock:
    """This machine's clock, which goes on by itself, set `ahead` of the truth by that much."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead
