from __future__ import annotations

import pytest

from tests.crashes import STEPS, walk

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]  # other tests measure it, at half the time


@pytest.mark.parametrize("name", STEPS)
async def test_a_crash_after_any_write_of_a_job_is_mended_by_the_next_process(name: str) -> None:
    walked = await walk(STEPS[name])
    assert walked.crashes == len(walked.written) > 1
