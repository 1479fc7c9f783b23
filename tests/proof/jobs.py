"""Jobs under kills, cancels, crashes and floods, at length."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio

from tests import killing

DRAIN = 1.0  # seconds that `tests.workers` gives its jobs to end


def job_kills(root: Path, kills: int = 200) -> str:
    done = anyio.run(partial(killing.check_kills, root, kills=kills, seed=int(time.time())))
    return (
        f"{kills} x kill -9 in the middle of jobs: {done.acknowledged} acknowledged, {done.attempts} attempts, "
        f"{done.interrupted} of them cut short: 0 lost, 0 with two effects, 0 stuck, 0 leftovers after a sweep"
    )


def poison(root: Path) -> str:
    cut = anyio.run(partial(killing.check_poison, root, good=100))
    return (
        f"a job that kills its process among 100: given up after 3 attempts, 100 of 100 finish, {cut} of them cut once"
    )


def sigterm(root: Path) -> str:
    took = []
    for listens in (True, False):
        left = anyio.run(partial(killing.check_sigterm, root / str(listens), queued=50, listens=listens))
        assert left.seconds < DRAIN + 1, left
        assert left.stderr.count("its pipeline does not stop") == (0 if listens else 2)
        assert left.status == (0 if listens else 1)
        took.append(left.seconds)
    return (
        f"SIGTERM with 2 jobs running and 50 queued, {DRAIN:g} s to drain: exit after {took[0]:.2f} s, and after "
        f"{took[1]:.2f} s with pipelines that do not listen; 52 of 52 succeed after the restart"
    )


PROOFS: dict[str, Callable[[Path], str]] = {
    "job_kills": job_kills,
    "poison": poison,
    "sigterm": sigterm,
}
