from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import start_blocking_portal
from PIL import Image

from async_sessions import JobCancelledError, JobFailedError, Session, SessionNotFoundError, SessionStore
from async_sessions.dispatch import LocalDispatcher
from async_sessions.jobs import Progress
from async_sessions.testing.pipeline import DeviceMemoryError, FakePipeline, Stage
from async_sessions.testing.stalls import LoopWatch, Stall

if TYPE_CHECKING:
    from async_sessions.testing.clock import FrozenClock

ROOT = Path(__file__).parent.parent
RED = Image.new("RGB", (40, 30), "red")


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


# --- the pipeline


@pytest.mark.anyio
async def test_a_fake_pipeline_tells_what_it_was_asked(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    await session.store_image(RED, "start")
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        job = await dispatcher.submit(await session.generation_request("fake", params={"prompt": "a boat"}))
        assert (await job.result())["video"].media_type == "video/mp4"
        assert max(event.step for event in [event async for event in job.events()] if isinstance(event, Progress)) == 3
    [run] = fake_pipeline.runs
    assert (run.job_id, run.attempt, run.device, run.params) == (job.id, 1, "cpu", {"prompt": "a boat"})
    assert run.images["start"].getpixel((0, 0)) == (255, 0, 0)
    assert fake_pipeline.calls == ["load", "prepare", "generate", "release"]


@pytest.mark.anyio
async def test_a_held_job_waits_for_its_gate_and_can_be_cancelled_there(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        with fake_pipeline.held() as gate:
            job = await dispatcher.submit(await session.generation_request("fake"))
            await gate.reached()
            assert (await job.info()).under_way
            await job.cancel()
            with pytest.raises(JobCancelledError):
                await job.result()
        with fake_pipeline.held() as gate:
            job = await dispatcher.submit(await session.generation_request("fake"))
            await gate.reached()
            gate.open()
            await job.result()
        await (await dispatcher.submit(await session.generation_request("fake"))).result()
    assert len(fake_pipeline.runs) == 3


@pytest.mark.anyio
@pytest.mark.parametrize("stage", ["load", "prepare", "generate"])
async def test_a_fake_pipeline_fails_where_and_as_often_as_it_is_told(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline, stage: Stage
) -> None:
    for _ in range(2 if stage == "generate" else 1):  # on the device it is tried once more
        fake_pipeline.fail(DeviceMemoryError(), at=stage)
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        job = await dispatcher.submit(await session.generation_request("fake"))
        with pytest.raises(JobFailedError, match="CUDA out of memory"):
            await job.result()
        error = (await job.info()).error
        assert error is not None
        assert error.kind == "OutOfMemoryError"
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        await (await dispatcher.submit(await session.generation_request("fake"))).result()


@pytest.mark.anyio
async def test_a_device_whose_memory_was_full_once_is_told_by_the_second_attempt(
    session_store: SessionStore, session: Session, fake_pipeline: FakePipeline
) -> None:
    fake_pipeline.fail(DeviceMemoryError())
    async with LocalDispatcher(session_store, [fake_pipeline]) as dispatcher:
        await (await dispatcher.submit(await session.generation_request("fake"))).result()
    assert [run.attempt for run in fake_pipeline.runs] == [1, 2]
    assert fake_pipeline.calls.count("load") == 2


# --- the watch


class DeafLoop:
    """Answers no knock; tells when it was looked at often enough for several thresholds."""

    def __init__(self, running: bool) -> None:
        self.looked_at = threading.Event()
        self._running = running
        self._looks = 0

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        pass

    def is_running(self) -> bool:
        self._looks += 1
        if self._looks > 30:
            self.looked_at.set()
        return self._running


def stalls_of(thread: int, *, running: bool = True) -> list[Stall]:
    loop = DeafLoop(running)
    with LoopWatch(loop, thread, threshold=0.01).watching() as stalls:  # type: ignore[arg-type]
        assert loop.looked_at.wait(30)
    return stalls


@pytest.mark.parametrize("uvloop", [False, True])
def test_a_loop_that_waits_for_something_to_do_is_not_stalled(uvloop: bool) -> None:
    with start_blocking_portal(backend_options={"use_uvloop": uvloop}) as portal:
        assert stalls_of(portal.call(threading.get_ident)) == []


@pytest.mark.parametrize("uvloop", [False, True])
def test_a_stall_is_told_with_the_line_that_blocks(uvloop: bool) -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        leave.wait(30)  # here

    with start_blocking_portal(backend_options={"use_uvloop": uvloop}) as portal:
        thread = portal.call(threading.get_ident)
        blocked = portal.start_task_soon(block)
        assert entered.wait(30)
        [stall] = stalls_of(thread)
        assert stalls_of(thread, running=False) == []
        leave.set()
        blocked.result()
    here = next(number for number, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "# here" in line)
    assert f"{__file__}:{here}, in block" in str(stall)
    assert stall.seconds >= 0.01


PROJECT = {
    "conftest.py": """
import pytest

pytest_plugins = ["async_sessions.testing.fixtures"]

@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}

@pytest.fixture
def stall_threshold():
    return 0.02
""",
    "test_app.py": """
import pytest

pytestmark = pytest.mark.usefixtures("no_stalled_loop")

def spin(stalls):
    while not stalls:
        pass  # here

@pytest.mark.anyio
async def test_it_blocks(no_stalled_loop):
    spin(no_stalled_loop)

@pytest.fixture
async def left_blocking(no_stalled_loop):
    yield
    spin(no_stalled_loop)

@pytest.mark.anyio
async def test_its_fixture_blocks(left_blocking):
    pass

def test_it_has_no_loop():
    pass
""",
    "test_patient.py": """
import anyio
import pytest

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_stalled_loop")]

@pytest.fixture
def stall_threshold():
    return 60

async def test_it_works_elsewhere(session_store, session):
    await anyio.to_thread.run_sync(sum, range(10))
""",
}


def test_a_test_that_stalls_its_loop_fails_and_others_pass(tmp_path: Path) -> None:
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:randomly", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = sorted(re.findall(r"^(PASSED|FAILED|ERROR) test_\w+.py::(\S+)", done.stdout, re.MULTILINE))
    assert outcomes == [
        ("ERROR", "test_its_fixture_blocks[asyncio]"),
        ("ERROR", "test_its_fixture_blocks[uvloop]"),
        ("FAILED", "test_it_blocks[asyncio]"),
        ("FAILED", "test_it_blocks[uvloop]"),
        ("PASSED", "test_it_has_no_loop"),
        ("PASSED", "test_it_works_elsewhere[asyncio]"),
        ("PASSED", "test_it_works_elsewhere[uvloop]"),
        ("PASSED", "test_its_fixture_blocks[asyncio]"),
        ("PASSED", "test_its_fixture_blocks[uvloop]"),
    ], done.stdout
    told = re.findall(r"blocked for [\d.]+ s at \S+test_app.py:(\d+), in spin:", done.stdout)
    lines = PROJECT["test_app.py"].splitlines()
    assert len(told) >= 4
    assert {lines[int(line) - 1].strip() for line in told} <= {"while not stalls:", "pass  # here"}
