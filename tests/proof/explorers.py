"""What `async_sessions.testing` finds in a store, at length: every cancellation, every power cut, many orders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest import mock

import anyio

from async_sessions.testing.fuzz import fuzz
from tests import stage, test_power, test_races

SEEDS = 2000


def cancellations(root: Path) -> str:
    """Both means, all three moments, every suspension, on asyncio and on uvloop."""

    async def cancel(folder: Path) -> int:
        runs = 0
        for number, name in enumerate(stage.ACTS):
            (folder / str(number)).mkdir(parents=True)
            runs += len(await stage.cancel_act(folder / str(number), name)) - 1  # one was left undisturbed
        return runs

    runs = [
        anyio.run(cancel, root / str(use_uvloop), backend_options={"use_uvloop": use_uvloop})
        for use_uvloop in (False, True)
    ]
    return (
        f"cancel_everywhere: {len(stage.ACTS)} kinds of call cancelled {sum(runs)} times, on asyncio and uvloop: "
        "0 left a file, lock, token, pixel or task, 0 spun, 0 contents neither old nor new"
    )


def power_cuts(root: Path) -> str:
    async def cut() -> tuple[int, int]:
        tried = [await test_power.check_cuts(step) for step in test_power.STEPS.values()]
        tried.append(await test_power.check_cuts(*test_power.LIFE))
        assert not any(each.sampled for each in tried)
        return sum(each.cuts for each in tried), sum(each.states for each in tried)

    cuts, states = anyio.run(cut)
    return f"power_cuts: {cuts} cuts of store, replace, clear, delete and sweep, all {states} states: 0 violations"


def orders(root: Path) -> str:
    def on_disk() -> Awaitable[None]:
        shutil.rmtree(root, ignore_errors=True)
        return test_races.one_process_on_disk(root)

    with mock.patch.object(os, "fsync"):  # nobody cuts the power here
        found = {_seeds(test_races.two_processes_with_janitors, SEEDS), _seeds(on_disk, SEEDS)}
    assert found == {SEEDS}
    for race in test_races.RACES:
        _seeds(race, SEEDS // 4)
    return (
        f"FuzzLoop: 2 x {SEEDS} orders of store, retrieve, undo, clear, sweep and evict on one session, "
        f"{len(test_races.RACES)} x {SEEDS // 4} of the known races: 0 violations; a seed replays"
    )


def _seeds(scenario: Callable[[], Awaitable[None]], count: int) -> int:
    """How many different orders there were. Some are run again, to see that they are the same again."""
    found = fuzz(scenario, seeds=range(count))
    again = range(0, count, count // 10)
    assert fuzz(scenario, seeds=again) == {seed: found[seed] for seed in again}
    return len(set(found.values()))


PROOFS: dict[str, Callable[[Path], str]] = {
    "cancellations": cancellations,
    "power_cuts": power_cuts,
    "orders": orders,
}
