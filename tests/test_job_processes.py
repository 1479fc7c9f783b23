"""Processes that are killed, or asked to end, while they run jobs; at length in `python -m tests.proof`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import killing

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


@pytest.mark.parametrize("processes", [1, 2])
async def test_every_acknowledged_job_succeeds_once_however_often_its_process_is_killed(
    tmp_path: Path, processes: int
) -> None:
    done = await killing.check_kills(tmp_path / "root", kills=4, seed=1, processes=processes)
    assert done.acknowledged >= 4


async def test_a_job_that_kills_its_process_is_given_up_and_the_others_finish(tmp_path: Path) -> None:
    await killing.check_poison(tmp_path / "root", good=20)


@pytest.mark.parametrize("how", ["", "ignores", "ignores cancelled", "loads"])
async def test_a_process_that_is_asked_to_end_leaves_every_job_to_the_next(tmp_path: Path, how: str) -> None:
    left = await killing.check_sigterm(tmp_path / "root", how)
    assert left.status == (1 if how else 0)
    assert left.stderr.count("its pipeline does not stop") == (2 if "ignores" in how else 0)
