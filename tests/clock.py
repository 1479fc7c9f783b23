from __future__ import annotations

from async_sessions.testing.clock import FrozenClock as Clock

__all__ = ["Clock"]
