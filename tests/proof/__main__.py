"""The long proofs: `make proof`. One figure a line; the short version of each is in the tests."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio

from tests import linear, test_processes
from tests.proof import devices


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


PROOFS: dict[str, Callable[[Path], Awaitable[str]]] = {
    "kills": kills,
    "two_processes": two_processes,
    "sixteen_processes": sixteen_processes,
    "full": partial(devices.tmpfs, options="size=512k"),
    "no_inodes": partial(devices.tmpfs, options="nr_inodes=60,size=64m"),
    "read_only": devices.read_only,
    "few_files": devices.few_files,
    "somebody_elses": devices.somebody_elses,
}


def main() -> None:
    for name in sys.argv[1:] or PROOFS:
        with tempfile.TemporaryDirectory() as folder:
            print(anyio.run(PROOFS[name], Path(folder) / "root"), flush=True)


if __name__ == "__main__":
    main()
