from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks import device, scale, tables
from tests.benchmarks.designs import check, retrieved, stored
from tests.benchmarks.peers import EVERYBODY
from tests.benchmarks.threaded import ThreadedSessions
from tests.images import corners, jpeg_with_exif, photograph

if TYPE_CHECKING:
    from tests.benchmarks.cases import Opened
    from tests.benchmarks.designs import Source

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]  # other tests measure it, at two thirds of the time

SIZE = 96, 64


@pytest.fixture
def anyio_backend() -> str:
    """The loop that is measured."""
    return "asyncio"


@pytest.mark.parametrize("opened", EVERYBODY, ids=lambda opened: opened(Path(), 0).facts.name)
async def test_each_design_returns_the_pixels_it_was_given(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sync", lambda: None)  # of the whole machine: for figures only
    sources: list[Source] = [photograph(*SIZE), photograph(*SIZE).convert("RGBA"), jpeg_with_exif(orientation=1)]
    async with opened(tmp_path / "design", len(sources)) as design:
        for _ in range(2):
            _, sizes = await stored(design, sources)
        assert all(sizes)
        await design.restart()
        _, images = await retrieved(design, len(sources))
    check(images, sources)


@pytest.mark.parametrize("opened", EVERYBODY, ids=lambda opened: opened(Path(), 0).facts.name)
async def test_a_design_syncs_exactly_if_the_report_says_so(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sync", lambda: None)
    async with opened(tmp_path / "design", 1) as design:
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)
        await stored(design, [photograph(*SIZE)])
        monkeypatch.undo()
    assert bool(synced) == design.facts.synced


def test_a_design_that_returns_other_pixels_stops_the_benchmark() -> None:
    with pytest.raises(AssertionError, match="other pixels"):
        check([corners(*SIZE)], [photograph(*SIZE)])


def test_both_designs_find_all_the_sessions_of_a_large_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "RESTORED", 5)
    measured = scale.measure(20, rounds=1, full=True)
    assert measured.sessions == 20
    assert len(measured.sweeps) == len(measured.scans) == 1


def test_the_threaded_design_removes_a_session_that_is_too_old(tmp_path: Path) -> None:
    threaded = ThreadedSessions(tmp_path)
    folder = threaded.store_image(corners(), "a", "start").parent
    assert threaded.cleanup(timedelta(hours=1)) == 0
    assert threaded.cleanup(timedelta(0)) == 1
    assert not folder.exists()


async def test_a_device_waits_between_all_its_jobs_with_and_without_preparing_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "RUN", 0.01)
    monkeypatch.setattr(device, "TWELVE_MEGAPIXELS", SIZE)
    monkeypatch.setattr("tests.benchmarks.pictures._STRIP", 64)
    measured = await device.measure(jobs=3, idle=0.01, reruns=0)
    assert [len(waits.between) for waits in measured.values()] == [2, 2]
    assert all(wait > 0 for waits in measured.values() for wait in waits.between)
    assert device.AHEAD in tables.device_table(measured)
