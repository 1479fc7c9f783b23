from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from async_sessions import Session, SessionNotFoundError, SessionStore

if TYPE_CHECKING:
    from async_sessions.testing.clock import FrozenClock


# --- the clock


@pytest.mark.anyio
async def test_a_session_expires_when_the_clock_is_advanced(
    session_store: SessionStore, session: Session, frozen_clock: FrozenClock
) -> None:
    assert session.id is not None
    assert (await session.info()).created_at == frozen_clock.now
    frozen_clock.advance(timedelta(hours=23))
    await session_store.restore_session(session.id)
    frozen_clock.advance(hours=2, minutes=1)
    with pytest.raises(SessionNotFoundError):
        await session_store.restore_session(session.id)
