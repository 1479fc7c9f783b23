"""Many jobs at once; at length in `python -m tests.proof`."""

from __future__ import annotations

import pytest

from async_sessions import MemoryBlobStore
from async_sessions.records import MIB
from tests.crowds import check_cancels, check_flood, check_sweeps

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]  # other tests measure it, at two thirds of the time


async def test_random_cancels_over_eight_lanes_reach_their_own_jobs_only() -> None:
    assert (await check_cancels(MemoryBlobStore(), cancels=60, seed=1)).total() == 60


async def test_a_flood_of_submits_is_refused_and_leaves_nothing_in_memory() -> None:
    flood = await check_flood(1000, max_queued=20)
    assert (flood.accepted, flood.refused) == (20, 980)
    assert flood.grown < MIB


async def test_sweeps_take_no_image_of_a_job_that_waits_in_an_expired_session() -> None:
    await check_sweeps(50)
