"""Jobs under kills, cancels, crashes and floods, at length."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio

from async_sessions import LocalBlobStore
from async_sessions.records import MIB
from tests import crashes, crowds, job_acts, killing

DRAIN = 1.0  # seconds that `tests.workers` gives its jobs to end


def job_kills(root: Path, kills: int = 200) -> str:
    told = []
    for processes in (1, 2):
        (folder := root / str(processes)).mkdir(parents=True)
        check = partial(killing.check_kills, folder / "root", kills, int(time.time()), processes=processes)
        done = anyio.run(check)
        told.append(f"{done.acknowledged} acknowledged, {done.attempts} attempts, {done.interrupted} of them cut short")
    return (
        f"{kills} x kill -9 in the middle of jobs: {told[0]}; {kills} more of one of two processes: {told[1]}: "
        "0 lost, 0 with two effects, 0 stuck, 0 leftovers after a sweep"
    )


def poison(root: Path) -> str:
    cut = anyio.run(partial(killing.check_poison, root, good=100))
    return (
        f"a job that kills its process among 100: given up after 3 attempts, 100 of 100 finish, {cut} of them cut once"
    )


def sigterm(root: Path) -> str:
    took = {}
    for how in ("", "ignores", "ignores cancelled", "loads"):
        left = anyio.run(partial(killing.check_sigterm, root / how, how))
        assert left.seconds < DRAIN + 1, left
        assert left.status == (1 if how else 0), left
        assert ("its pipeline does not stop" in left.stderr) == ("ignores" in how), left
        took[how] = f"{left.seconds:.2f} s"
    return (
        f"SIGTERM with 2 jobs running and 50 queued, {DRAIN:g} s to drain: exit after {took['']}, "
        f"{took['ignores']} with pipelines that do not listen ({took['ignores cancelled']} where the app is "
        f"cancelled), {took['loads']} while they load; 52 of 52 succeed after the restart"
    )


def crash_points(root: Path) -> str:
    walked = {name: anyio.run(crashes.walk, step) for name, step in crashes.STEPS.items()}
    told = ", ".join(f"{name} {each.crashes}" for name, each in walked.items())
    return f"crashes after each write ({told}): 0 lost, 0 with two effects, 0 leftovers once the next process has swept"


def job_cancellations(root: Path) -> str:
    async def cancel() -> int:
        runs = [await job_acts.cancel_job_act(name) for name in job_acts.ACTS]
        runs += [await job_acts.cancel_a_dispatcher()]
        return sum(len(each) - 1 for each in runs)  # one was left undisturbed

    runs = [anyio.run(cancel, backend_options={"use_uvloop": use_uvloop}) for use_uvloop in (False, True)]
    return (
        f"cancel_everywhere: {len(job_acts.ACTS)} kinds of call of a dispatcher, and a dispatcher's whole life, "
        f"cancelled {sum(runs)} times: 0 entries, markers, threads or followers left"
    )


def cancels(root: Path) -> str:
    met = anyio.run(partial(crowds.check_cancels, LocalBlobStore(root), cancels=1000, seed=int(time.time())))
    assert met.total() == 1000
    told = ", ".join(f"{count} {status}" for status, count in sorted(met.items()))
    return (
        f"1000 random cancels among 1500 jobs on 8 lanes (theirs were {told} then): 0 wrong cancels, "
        "0 lanes, entries, markers or threads leaked"
    )


def flood(root: Path) -> str:
    done = anyio.run(partial(crowds.check_flood, 10_000, max_queued=100))
    assert (done.accepted, done.refused) == (100, 9900)
    assert done.grown < MIB / 2
    return (
        f"10,000 submits where 100 may wait: {done.refused} typed refusals, {done.accepted} jobs done, "
        f"{done.grown / 1024:.0f} KiB more in memory after the last 9,000"
    )


def expired(root: Path) -> str:
    rounds = 20
    swept = [anyio.run(crowds.check_sweeps, 50) for _ in range(rounds)]
    return (
        f"{sum(swept)} sweeps beside {rounds} x 50 jobs that wait in expired sessions: {rounds * 50} find their "
        "images, then every session goes"
    )


PROOFS: dict[str, Callable[[Path], str]] = {
    "job_kills": job_kills,
    "poison": poison,
    "sigterm": sigterm,
    "crash_points": crash_points,
    "job_cancellations": job_cancellations,
    "cancels": cancels,
    "flood": flood,
    "expired": expired,
}
