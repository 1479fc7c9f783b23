"""Calls of a dispatcher that are cancelled half way; at every place in `python -m tests.proof job_cancellations`."""

from __future__ import annotations

import pytest

from tests.job_acts import ACTS, cancel_a_dispatcher, cancel_job_act

# On both loops in `make proof`; other tests measure the coverage.
pytestmark = [pytest.mark.anyio, pytest.mark.no_cover, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


@pytest.mark.parametrize("name", ACTS)
async def test_a_cancelled_call_of_a_dispatcher_leaves_nothing_that_nobody_looks_after(name: str) -> None:
    runs = await cancel_job_act(name, every=7)
    assert "cancelled" in {run.ending for run in runs}


async def test_a_dispatcher_that_is_cancelled_anywhere_leaves_its_jobs_to_the_next() -> None:
    runs = await cancel_a_dispatcher(every=11)
    assert {run.ending for run in runs} == {"returned", "cancelled"}
