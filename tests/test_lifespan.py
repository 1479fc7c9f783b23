from __future__ import annotations

from datetime import timedelta

import anyio
import pytest

from async_sessions import open_store
from async_sessions._gradio import lifespan
from async_sessions._gradio.lifespan import Held
from async_sessions.dispatch import LocalDispatcher
from tests.following import HeldPipeline, submit

pytestmark = pytest.mark.anyio


async def test_a_stopping_app_waits_for_as_long_as_its_dispatcher_drains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lifespan, "LEAVE_WITHIN", 0.0)  # what is left of the time is the dispatcher's
    pipeline = HeldPipeline()
    store = open_store("memory://", cleanup_interval=None)
    dispatcher = LocalDispatcher(store, [pipeline], drain_timeout=timedelta(minutes=1))
    held = Held([store, dispatcher])
    await held.ensure_started()
    job = await submit(dispatcher, await store.create_session(), label="long")
    await pipeline.begun("generate long")
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, held.close_from_thread)
        await anyio.wait_all_tasks_blocked()
        pipeline.let_go("long")
        assert (await job.result())["text"].byte_size == 4
    assert "was not left within" not in caplog.text
    await held.close()
