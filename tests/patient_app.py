"""`examples/fastapi_app.py` with jobs that take as long as a test wants: until there is a file `~/open`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from async_sessions.dispatch import LocalDispatcher
from async_sessions.testing.pipeline import FakePipeline
from examples import fastapi_app

if TYPE_CHECKING:
    from async_sessions.jobs import JobContext, Output


class PatientPipeline(FakePipeline):
    def generate(self, prepared: Any, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        context.report(1, 2)
        while not Path("~/open").expanduser().exists():
            context.raise_if_cancelled()
            time.sleep(0.01)
        return super().generate(prepared, params, context)


fastapi_app.dispatcher = LocalDispatcher(
    fastapi_app.store, [PatientPipeline("preview")], max_queued=2, drain_timeout=timedelta(0)
)
app = fastapi_app.app
