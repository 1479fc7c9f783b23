"""What time it is, on a machine whose clock may be set while the store is open."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import anyio


class Reckoning:
    """The wall clock, checked against a steady one, which nobody can set: `clock.steady()`, or else the event loop's.

    Where the two disagree by more than `tolerance` since the last look, the wall clock was set, and nobody knows
    whether it was right before or is now. Both are then possible, for `lasting`: for as long as anything is kept that
    nobody uses. `earliest` is for who judges what is over, `latest` for what is written down: nothing goes early,
    whichever of the two is right.
    """

    def __init__(self, clock: Callable[[], datetime], tolerance: timedelta, lasting: timedelta) -> None:
        self._clock = clock
        self.steady: Callable[[], float] = getattr(clock, "steady", anyio.current_time)
        self._tolerance = tolerance
        self.lasting = lasting
        self.times_set = 0
        self._last = clock(), self.steady()
        self._jumps: list[tuple[timedelta, float]] = []  # that are in doubt: by how much, and until when

    @property
    def _set_by(self) -> timedelta:
        return sum((by for by, _ in self._jumps), timedelta())

    def earliest(self) -> datetime:
        wall = self._look()
        return min(wall, wall - self._set_by)

    def latest(self) -> datetime:
        wall = self._look()
        return max(wall, wall - self._set_by)

    def _look(self) -> datetime:
        wall, steady = self._clock(), self.steady()
        last, self._last = self._last, (wall, steady)
        ahead = (wall - last[0]) - timedelta(seconds=steady - last[1])
        self._jumps = [(by, until) for by, until in self._jumps if steady < until]
        if abs(ahead) > self._tolerance:
            self.times_set += 1
            until = steady + self.lasting.total_seconds()
            together = self._set_by + ahead
            if abs(together) <= self._tolerance:  # set back to the truth
                self._jumps = []
            elif self._jumps and (ahead > timedelta()) != (self._set_by > timedelta()):  # set back in part
                self._jumps = [(together, until)]
            else:  # each for a time of its own: a machine that sleeps every night is set every morning
                self._jumps.append((ahead, until))
        return wall
