"""Pytest fixtures under anyio's plugin. Opt in from your root conftest:

pytest_plugins = ["async_sessions.testing.fixtures"]
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from async_sessions.store import SessionStore, open_store

if TYPE_CHECKING:
    from async_sessions.session import Session


@pytest.fixture
async def session_store(tmp_path: Path) -> AsyncIterator[SessionStore]:
    """An open store in a folder of its own, without periodic cleanup; call `cleanup(now=...)` to sweep."""
    async with open_store(tmp_path / "sessions", cleanup_interval=None) as store:
        yield store


@pytest.fixture
async def session(session_store: SessionStore) -> Session:
    """A new session in `session_store`."""
    return await session_store.create_session()
