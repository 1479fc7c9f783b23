from __future__ import annotations

from datetime import UTC, datetime, timedelta


class Clock:
    """Time as the test says it is; it starts at the real one, which file times are compared with."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **units: float) -> None:
        self.now += timedelta(**units)
