"""`FrozenClock`: for `SessionStore(clock=)`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class FrozenClock:
    """The time in UTC, as a test says it is: `now`.

    `advance` lets time pass; setting `now` is somebody setting the machine's clock, which a store doesn't believe at
    once.

    It starts at the real time: a disk's clock, which a sweep compares it with, can't be frozen.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)
        self._passed = timedelta()

    def __call__(self) -> datetime:
        return self.now

    def advance(self, by: timedelta = timedelta(), **units: float) -> None:
        """Go on by `by`, and by what `timedelta(**units)` is: `advance(hours=25)`."""
        self.now += by + timedelta(**units)
        self._passed += by + timedelta(**units)

    def steady(self) -> float:
        """How much time has passed, in seconds: what a clock shows that nobody can set."""
        return self._passed.total_seconds()
