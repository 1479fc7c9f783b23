"""`FrozenClock`: for `SessionStore(clock=)`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class FrozenClock:
    """The time in UTC, as a test says it is: `now`, until it is set or advanced.

    It starts at the real time: a disk's clock, which a sweep compares it with, can't be frozen.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta = timedelta(), **units: float) -> None:
        """Go on by `by`, and by what `timedelta(**units)` is: `advance(hours=25)`."""
        self.now += by + timedelta(**units)
