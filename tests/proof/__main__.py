"""The long proofs: `make proof`. One figure a line; the short version of each is in the tests."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio

from async_sessions.records import MIB
from tests import bounds, linear, test_processes
from tests.proof import browsers, devices, explorers, jobs, soak
from tests.proof.damage import damage
from tests.proof.fuzz import fuzz
from tests.proof.stores import stores


async def kills(root: Path) -> str:
    done = await test_processes.check_kills(root, kills=500, seed=int(time.time()))
    return f"500 x kill -9: {done} acknowledged operations, 0 lost, 0 sessions unreadable, 0 leftovers after a sweep"


async def two_processes(root: Path) -> str:
    rounds = 10
    for number in range(rounds):
        folder = root / str(number)
        folder.mkdir(mode=0o700, parents=True)
        await test_processes.test_two_processes_lose_no_update_of_one_session(folder)
    return f"{rounds} x 2 processes x 200 concurrent writes on one session: 0 of {rounds * 400} updates lost"


async def sixteen_processes(root: Path) -> str:
    done = await linear.check(root, processes=16, operations=1000)
    return f"16 processes x 1000 operations on 8 slots: {done} of {done} linearizable, 0 updates lost"


def refusals(root: Path) -> str:
    costs = bounds.costs(tries=5)
    over = [cost for cost in costs if cost.seconds > cost.most_seconds or cost.memory > cost.most_memory]
    assert not over, over
    faults = [cost for cost in costs if cost.fault == "structure"]
    damaged = [cost for cost in costs if cost.fault == "pixels"]
    slowest, largest = max(cost.seconds for cost in faults), max(cost.memory for cost in faults)
    time_share = max(cost.seconds / cost.most_seconds for cost in damaged)
    memory_share = max(cost.memory / cost.most_memory for cost in damaged)
    return (
        f"{len(faults)} faulty files: refused in {1000 * slowest:.0f} of 100 ms CPU and {largest / MIB:.1f} of 32 MiB; "
        f"{len(damaged)} of 12 MP with damaged pixels: in {time_share:.0%} of the time and {memory_share:.0%} of the "
        "memory of the whole"
    )


def _awaited(proof: Callable[[Path], Awaitable[str]]) -> Callable[[Path], str]:
    return lambda root: anyio.run(proof, root)


PROOFS: dict[str, Callable[[Path], str]] = {
    "refusals": refusals,
    "fuzz": fuzz,
    "stores": stores,
    "kills": _awaited(kills),
    "damage": damage,
    "two_processes": _awaited(two_processes),
    "sixteen_processes": _awaited(sixteen_processes),
    "full": _awaited(partial(devices.tmpfs, options="size=512k")),
    "no_inodes": _awaited(partial(devices.tmpfs, options="nr_inodes=60,size=64m")),
    "read_only": _awaited(devices.read_only),
    "few_files": _awaited(devices.few_files),
    "somebody_elses": _awaited(devices.somebody_elses),
    "sweeps": _awaited(soak.sweeps),
    "locks": _awaited(soak.locks),
    "memory": soak.memory,
    **explorers.PROOFS,
    **jobs.PROOFS,
    **browsers.PROOFS,
}


def main() -> None:
    logging.basicConfig(level=logging.ERROR)  # the proofs do what is warned of
    for name in sys.argv[1:] or PROOFS:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            root.mkdir(mode=0o700)
            print(PROOFS[name](root), flush=True)


if __name__ == "__main__":
    main()
