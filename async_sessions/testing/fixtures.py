"""Pytest fixtures under anyio's plugin. Opt in from your root conftest:

pytest_plugins = ["async_sessions.testing.fixtures"]
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from async_sessions.store import SessionStore, open_store
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.pipeline import FakePipeline

if TYPE_CHECKING:
    from async_sessions.session import Session

for _module in ("blobs", "machine", "races"):  # so that a failure there shows the values
    if (_name := f"async_sessions.testing.{_module}") not in sys.modules:
        pytest.register_assert_rewrite(_name)


@pytest.fixture
def frozen_clock() -> FrozenClock:
    """The time that `session_store` goes by; it stands still until `frozen_clock.advance(hours=25)`."""
    return FrozenClock()


@pytest.fixture
async def session_store(tmp_path: Path, frozen_clock: FrozenClock) -> AsyncIterator[SessionStore]:
    """An open store in a folder of its own, without periodic cleanup; call `cleanup()` to sweep."""
    async with open_store(tmp_path / "sessions", cleanup_interval=None, clock=frozen_clock) as store:
        yield store


@pytest.fixture
async def session(session_store: SessionStore) -> Session:
    """A new session in `session_store`."""
    return await session_store.create_session()


@pytest.fixture
def fake_pipeline() -> FakePipeline:
    """A pipeline called `fake`, without a model, for a dispatcher of yours; a test holds it or lets it fail."""
    return FakePipeline()
