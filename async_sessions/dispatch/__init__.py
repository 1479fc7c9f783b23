"""Where jobs run. `base` says what a dispatcher promises, `local` runs jobs in this process."""

from async_sessions.dispatch.base import Dispatcher, Job
from async_sessions.dispatch.local import LocalDispatcher

__all__ = ["Dispatcher", "Job", "LocalDispatcher"]
