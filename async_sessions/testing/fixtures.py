"""Pytest fixtures under anyio's plugin. Opt in from your root conftest:

pytest_plugins = ["async_sessions.testing.fixtures"]
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from async_sessions.store import SessionStore, open_store
from async_sessions.testing.clock import FrozenClock
from async_sessions.testing.pipeline import FakePipeline
from async_sessions.testing.stalls import LoopWatch, Stall

if TYPE_CHECKING:
    from async_sessions.session import Session

_STALLS = pytest.StashKey[list[Stall]]()

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


@pytest.fixture
def stall_threshold() -> float:
    """Seconds for which the loop may be blocked under `no_stalled_loop`. Override it for other ones."""
    return 0.1


@pytest.fixture
def no_stalled_loop(request: pytest.FixtureRequest, stall_threshold: float) -> Iterator[list[Stall]]:
    """Fails the test, and names the line, where something blocks the event loop; a test without one passes."""
    if "anyio_backend" not in request.fixturenames:
        yield []
        return
    loop, thread = request.getfixturevalue("_running_loop")
    with LoopWatch(loop, thread, threshold=stall_threshold).watching() as stalls:
        request.node.stash[_STALLS] = stalls
        yield stalls
    _fail_for(stalls)


@pytest.fixture
async def _running_loop() -> tuple[asyncio.AbstractEventLoop, int]:
    return asyncio.get_running_loop(), threading.get_ident()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    _fail_for(item.stash.get(_STALLS, []))
    return result


def _fail_for(stalls: list[Stall]) -> None:
    if stalls:
        shown = "\n".join(map(str, stalls))
        stalls.clear()
        pytest.fail(shown, pytrace=False)
