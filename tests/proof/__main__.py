"""The long proofs: `make proof`. One figure a line; the short version of each is in the tests."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio

from tests import test_processes
from tests.proof import explorers


def kills(root: Path) -> str:
    done = anyio.run(partial(test_processes.check_kills, root, kills=500, seed=int(time.time())))
    return f"500 x kill -9: {done} acknowledged operations, 0 lost, 0 sessions unreadable, 0 leftovers after a sweep"


def two_processes(root: Path) -> str:
    rounds = 10
    for number in range(rounds):
        folder = root / str(number)
        folder.mkdir(mode=0o700)
        anyio.run(test_processes.test_two_processes_lose_no_update_of_one_session, folder)
    return f"{rounds} x 2 processes x 200 concurrent writes on one session: 0 of {rounds * 400} updates lost"


PROOFS: dict[str, Callable[[Path], str]] = {"kills": kills, "two_processes": two_processes, **explorers.PROOFS}


def main() -> None:
    for name in sys.argv[1:] or PROOFS:
        with tempfile.TemporaryDirectory() as folder:
            print(PROOFS[name](Path(folder) / "root" if name == "kills" else Path(folder)), flush=True)


if __name__ == "__main__":
    main()
