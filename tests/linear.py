"""Processes that write and read one session, and a judge of whether what they saw could have happened one at a time."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import anyio
import msgspec

from async_sessions import open_store

SLOTS = tuple(f"slot-{number}" for number in range(8))

WORKER = """
import random, sys, time
import anyio, msgspec
from PIL import Image
from async_sessions import Limits, open_store
from tests.linear import SLOTS, Operation

async def main(root, key, name, count):
    rng, history, image = random.Random(name), [], Image.new("RGB", (4, 4), "red")
    limits = Limits(max_session_images=32)  # so that what was replaced does not pile up in the manifest
    async with open_store(root, cleanup_interval=None, limits=limits) as store:
        session = await store.open_by_key(key)
        for number in range(count):
            slot, value, began = rng.choice(SLOTS), None, time.monotonic()
            if writes := rng.random() < 0.5:
                value = f"{name}-{number}"
                await session.store_image(image, slot, name=value)
            elif (record := (await session.info()).images.get(slot)) is not None:
                value = record.source_name
            history.append(Operation(slot, "write" if writes else "read", value, began, time.monotonic()))
            if writes:
                await session.update_state(**{name: number})
    sys.stdout.buffer.write(msgspec.json.encode(history))

anyio.run(main, sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


class Operation(NamedTuple):
    """What one process did with one slot, between two readings of the clock that all processes share.

    `value`, unique to its write, was written or read; `None` was read before the first write.
    """

    slot: str
    kind: str
    value: str | None
    began: float
    ended: float


class _Zone(NamedTuple):
    """When a value must have been there (`first` < `last`), or an instant at which it may have come and gone."""

    first: float
    last: float


def linearizable(history: Iterable[Operation]) -> bool:
    """Whether each slot is an atomic register: each operation took effect at one instant between its two times.

    Decided by zones, which is exact where every value is written once: P. Gibbons and E. Korach, "Testing shared
    memories", SIAM J. Comput. 26 (1997). What must have been there for a while must not overlap with another such, nor
    enclose one that came and went.
    """
    slots: defaultdict[str, defaultdict[str | None, list[Operation]]] = defaultdict(lambda: defaultdict(list))
    for operation in history:
        slots[operation.slot][operation.value].append(operation)
    return all(_atomic(values) for values in slots.values())


def _atomic(values: dict[str | None, list[Operation]]) -> bool:
    lasting: list[_Zone] = []
    passing: list[_Zone] = []
    for value, operations in values.items():
        writes = [operation for operation in operations if operation.kind == "write"]
        if value is None:  # the slot was empty from the beginning
            first, last = -math.inf, max(operation.began for operation in operations)
        elif len(writes) != 1 or any(operation.ended < writes[0].began for operation in operations):
            return False  # read, and never written, or not yet
        else:
            first, last = min(each.ended for each in operations), max(each.began for each in operations)
        if first < last:
            lasting.append(_Zone(first, last))
        else:
            passing.append(_Zone(last, first))
    lasting.sort()
    if any(one.last > other.first for one, other in pairwise(lasting)):
        return False
    return not any(long.first < short.first and short.last < long.last for short in passing for long in lasting)


async def check(root: Path, processes: int, operations: int) -> int:
    """Run so many processes with so many operations each on one session; the number of operations, all of them sound.

    Sound: linearizable, and the last of each process's updates of its own field of the state is there.
    """
    async with open_store(root, cleanup_interval=None) as store:
        key = (await store.create_session()).key
    names = [f"p{number}" for number in range(processes)]
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, root, key, name, str(operations)], stdout=subprocess.PIPE)
        for name in names
    ]
    history: list[Operation] = []
    last: dict[str, int] = {}
    for name, worker in zip(names, workers, strict=True):
        said, _ = await anyio.to_thread.run_sync(worker.communicate)
        assert worker.returncode == 0
        own = msgspec.json.decode(said, type=list[Operation])
        last[name] = max(number for number, operation in enumerate(own) if operation.kind == "write")
        history += own
    assert linearizable(history)
    async with open_store(root, cleanup_interval=None) as store:
        assert (await (await store.open_by_key(key)).info()).state == last
    return len(history)
