"""A small crowd of browsers for a short while; `python -m tests.proof browsers` is the large one."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import anyio
import pytest

from tests import visitors

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_four_browsers_at_once_see_their_own_images_and_nobody_elses(tmp_path: Path) -> None:
    seed = str(random.SystemRandom().random())
    seen = anyio.run(partial(visitors.crowd, tmp_path, visitors=4, seconds=60, pause=2, idle=0.1, seed=seed))
    assert seen.actions.keys() >= {"upload_start", "generate", "clear", "reload", "other_tab"}
    assert seen.pictures >= seen.actions.total()
