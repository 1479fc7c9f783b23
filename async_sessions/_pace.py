"""How long work will still take, by what it has taken so far. Times are seconds of a monotonic clock."""

from __future__ import annotations

from cachetools import LRUCache

REMEMBERED = 64  # pipelines
WEIGHT = 0.3  # of the newest run in what is expected of the next


class Pace:
    """One run's: the mean time of the steps it has done since its first report, which comes after a warm-up.

    Steps that begin anew are those of another phase, which is measured by itself.
    """

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = 0

    def remaining(self, step: int, total: int, now: float) -> float | None:
        """Seconds until step `total` is done, now that `step` is; `None` until two steps have been seen."""
        if self._first is None or step < self._last:
            self._first = step, now
        self._last = step
        first, since = self._first
        if step <= first:
            return None
        return max(0, total - step) * (now - since) / (step - first)


class Paces:
    """How long a run of each pipeline takes: a moving average of the last ones."""

    def __init__(self) -> None:
        self._seconds: LRUCache[str, float] = LRUCache(REMEMBERED)

    def note(self, pipeline: str, seconds: float) -> None:
        known = self._seconds.get(pipeline, seconds)
        self._seconds[pipeline] = known + WEIGHT * (seconds - known)

    def expected(self, pipeline: str) -> float | None:
        return self._seconds.get(pipeline)
