"""Twenty browsers at once on one server, for ten minutes; a server that is killed in the middle of uploads."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio

from tests import uploading, visitors
from tests.benchmarks.lag import VOID, Lag


def browsers(root: Path, count: int = 20, seconds: float = 600) -> str:
    seed = str(int(time.time()))
    crowd = partial(visitors.crowd, root, visitors=count, seconds=seconds, pause=5, idle=10, seed=seed)
    seen = anyio.run(crowd)
    told = ", ".join(f"{times} {action.replace('_', ' ')}" for action, times in sorted(seen.actions.items()))
    void = f"; void: the idle loop's p99 is above {VOID * 1000:.0f} ms" if seen.idle.p99 > VOID else ""
    return (
        f"{count} browsers on one server for {seconds:g} s, seed {seed}: {seen.actions.total()} actions ({told}), "
        f"{seen.pictures} pictures on pages and {seen.videos} videos in the store looked at: 0 of another browser, "
        f"0 errors in the log; loop lag {_over(seen.busy, seen.idle)} over the idle loop's {_of(seen.idle)}, "
        f"{_of(seen.own)} of it while the loop had a core{void}"
    )


def uploads(root: Path, kills: int = 30) -> str:
    seed = str(int(time.time()))
    found = uploading.check_kills(root, kills=kills, seed=seed)
    return (
        f"{kills} x kill -9 within {1.3 * found.within:.1f} s of the upload of a 16 MB PNG over another, seed {seed}: "
        f"the old image {found.old} times, the new one {found.new} times, 0 neither, 0 damaged"
    )


def _of(lag: Lag) -> str:
    return f"p99 {1000 * lag.p99:.1f} ms and max {1000 * lag.longest:.1f} ms"


def _over(busy: Lag, idle: Lag) -> str:
    return f"p99 {1000 * (busy.p99 - idle.p99):+.1f} ms and max {1000 * (busy.longest - idle.longest):+.1f} ms"


PROOFS: dict[str, Callable[[Path], str]] = {"browsers": browsers, "uploads": uploads}
