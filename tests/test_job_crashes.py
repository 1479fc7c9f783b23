from __future__ import annotations

import pytest

from tests.crashes import STEPS, walk

# On both loops in `make proof`; other tests measure the coverage.
pytestmark = [pytest.mark.anyio, pytest.mark.no_cover, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


@pytest.mark.parametrize("name", STEPS)
async def test_a_crash_after_any_write_of_a_job_is_mended_by_the_next_process(name: str) -> None:
    walked = await walk(STEPS[name])
    assert walked.crashes == len(walked.written) > 1
