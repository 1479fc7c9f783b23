"""What time a periodic sweep goes by, on a machine whose clock is set while it runs."""

from __future__ import annotations

from datetime import datetime, timedelta


class Reckoning:
    """The wall clock, checked against a steady one, which nobody can set.

    Where the two disagree by more than `tolerance` since the last look, the wall clock was set: that sweep is to be
    skipped. For `lasting` after that, for as long as anything is kept that nobody uses, the time is the earlier of the
    wall clock's and of what it would be had nobody set it: nothing goes early, whichever of the two is right.
    """

    def __init__(self, tolerance: timedelta, lasting: timedelta) -> None:
        self._tolerance = tolerance
        self.lasting = lasting
        self._last: tuple[datetime, float] | None = None
        self._set_by = timedelta()
        self._until = 0.0

    def now(self, wall: datetime, steady: float) -> datetime | None:
        """The time to sweep at; `None` if the clock was just set. `steady` is in seconds."""
        last, self._last = self._last, (wall, steady)
        if last is not None:
            ahead = (wall - last[0]) - timedelta(seconds=steady - last[1])
            if abs(ahead) > self._tolerance:
                self._set_by += ahead
                self._until = steady + self.lasting.total_seconds()
                return None
        if steady >= self._until:
            self._set_by = timedelta()
        return min(wall, wall - self._set_by)
