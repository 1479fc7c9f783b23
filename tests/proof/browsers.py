"""Twenty browsers at once on one server; a server that is killed in the middle of uploads; forged events."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio

from tests import uploading, visitors
from tests.benchmarks.lag import VOID, Lag
from tests.stalls import OURS, STALL

P99 = 0.015  # seconds over the idle loop's


def browsers(root: Path, count: int = 20, seconds: float = 600) -> str:
    seed = str(int(time.time()))
    crowd = partial(visitors.crowd, root, visitors=count, seconds=seconds, pause=5, idle=10, seed=seed, apart=True)
    seen = anyio.run(crowd)
    told = ", ".join(f"{times} {action.replace('_', ' ')}" for action, times in sorted(seen.actions.items()))
    valid = seen.idle.p99 <= VOID
    assert not valid or seen.busy.p99 - seen.idle.p99 <= P99, (seen.idle, seen.busy)
    ours = sum(not OURS.isdisjoint(stall) for stall in seen.stalls)
    unseen = seen.stalls.count(frozenset())
    void = "" if valid else f"; void: the idle loop's p99 is above {VOID * 1000:.0f} ms"
    return (
        f"{count} browsers on one server for {seconds:g} s, seed {seed}: {seen.actions.total()} actions ({told}), "
        f"{seen.pictures} pictures on pages and {seen.videos} videos in the store looked at: 0 of another browser, "
        f"0 errors in the log; loop lag {_over(seen.busy, seen.idle)} over the idle loop's {_of(seen.idle)}, "
        f"{_of(seen.own)} of it while the loop had a core; it stood for {1000 * STALL:.0f} ms {len(seen.stalls)} "
        f"times, {ours} of them while code of async_sessions ran in any thread, {unseen} before one could look{void}"
    )


def uploads(root: Path, kills: int = 30) -> str:
    seed = str(int(time.time()))
    found = uploading.check_kills(root, kills=kills, seed=seed)
    return (
        f"{kills} x kill -9 within {1.3 * found.within:.1f} s of the upload of a 16 MB PNG over another, seed {seed}: "
        f"the old image {found.old} times, the new one {found.new} times, 0 neither, 0 damaged"
    )


def forgeries(root: Path) -> str:
    """In a process of its own: Gradio's cache is where its environment says."""
    command = [sys.executable, "-m", "tests.forging", str(root / "store")]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    ).stdout.rstrip()


def _of(lag: Lag) -> str:
    return f"p99 {1000 * lag.p99:.1f} ms and max {1000 * lag.longest:.1f} ms"


def _over(busy: Lag, idle: Lag) -> str:
    return f"p99 {1000 * (busy.p99 - idle.p99):+.1f} ms and max {1000 * (busy.longest - idle.longest):+.1f} ms"


PROOFS: dict[str, Callable[[Path], str]] = {"browsers": browsers, "uploads": uploads, "forgeries": forgeries}
