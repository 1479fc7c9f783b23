from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from msgspec.structs import replace
from PIL import Image

from async_sessions import JobInfo, MemoryBlobStore, Session, SessionNotFoundError, SessionStore, open_store
from async_sessions._reckoning import Reckoning
from async_sessions.testing.clock import FrozenClock
from tests.faults import keys_of

pytestmark = pytest.mark.anyio

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
YEAR = timedelta(days=365)
JUMPS = pytest.mark.parametrize("jump", [5 * YEAR, -10 * YEAR, 2 * DAY], ids=["+5y", "-10y", "+2d"])


def reckoned(clock: FrozenClock) -> Reckoning:
    return Reckoning(clock, timedelta(minutes=1), 25 * HOUR)


def test_a_clock_that_nobody_sets_is_believed() -> None:
    clock = FrozenClock()
    now = reckoned(clock)
    for hours in (0, 1, 25, 26):
        clock.advance(hours=hours)
        clock.now += timedelta(seconds=hours)  # it is a little fast
        assert now.earliest() == now.latest() == clock.now
    assert now.times_set == 0


@JUMPS
def test_after_a_jump_nothing_is_early_until_all_that_is_kept_was_written_since(jump: timedelta) -> None:
    clock = FrozenClock()
    now, truth = reckoned(clock), clock.now
    assert now.earliest() == truth
    clock.now += jump
    for passed in (timedelta(), HOUR, 25 * HOUR - timedelta(seconds=1)):
        clock.advance(truth + passed + jump - clock.now)
        assert now.earliest() == min(truth, truth + jump) + passed
        assert now.latest() == max(truth, truth + jump) + passed
    assert now.times_set == 1
    clock.advance(seconds=1)
    assert now.earliest() == now.latest() == clock.now


def test_a_clock_that_is_set_back_to_the_truth_is_believed_at_once() -> None:
    clock = FrozenClock()
    now, truth = reckoned(clock), clock.now
    assert now.earliest() == truth
    clock.now += 5 * YEAR
    assert now.earliest() == truth
    clock.now -= 5 * YEAR
    assert now.earliest() == now.latest() == truth
    assert now.times_set == 2


async def test_on_a_machine_that_sleeps_every_night_things_go_when_their_time_has_come() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        for _ in range(30):
            clock.advance(hours=12)
            clock.now += 12 * HOUR  # asleep, which the event loop's clock does not count
            await store.cleanup()
        session = await store.create_session()
        await session.store_image(RED, "start")
        await session.clear_image("start")
        for _ in range(4):
            clock.advance(hours=12)
            clock.now += 12 * HOUR
            await session.touch()
            await store.cleanup()
        assert await keys_of(store.blobs, "blobs/") == set()


async def test_a_session_survives_sweeps_under_a_clock_that_is_set_and_goes_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(RED, "start")
        janitor = store._open()[1]
        await janitor.make_room(0)
        for jump in (5 * YEAR, -5 * YEAR, -10 * YEAR, 10 * YEAR, 5 * YEAR):
            clock.now += jump
            caplog.clear()
            for _ in range(2):
                monkeypatch.setattr(janitor, "_in_vain_until", 0.0)
                await janitor.make_room(0)
            assert caplog.text.count("the clock was set; nothing is swept") == 1
            assert len(await keys_of(store.blobs, "blobs/")) == 2
        clock.advance(hours=26)
        monkeypatch.setattr(janitor, "_in_vain_until", 0.0)
        await janitor.make_room(0)
        assert await keys_of(store.blobs) == set()


async def red_there(session: Session) -> bool:
    return (await session.retrieve_image("start")).getpixel((0, 0)) == (255, 0, 0)


@JUMPS
async def test_a_visit_finds_what_was_there_before_the_clock_was_set(jump: timedelta) -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        await (await store.session_for("ada")).store_image(RED, "start")
        created = await store.create_session()
        await created.store_image(RED, "start")
        assert created.id is not None
        clock.now += jump
        await store.session(created.id).store_image(BLUE, "end")
        await store.session_of("ada").store_image(BLUE, "end")
        for set_back in (jump, timedelta()):
            assert await red_there(await store.session_for("ada"))
            assert await red_there(await store.restore_session(created.id))
            assert await red_there(created)
            assert len([info async for info in store.sessions()]) == 2
            await store.cleanup()
            clock.now -= set_back
        clock.advance(hours=26)
        await store.cleanup()
        with pytest.raises(SessionNotFoundError):
            await store.restore_session(created.id)
        assert not await (await store.session_for("ada")).has_image("start")


@JUMPS
async def test_what_was_written_under_a_wrong_clock_has_its_time_once_it_is_right(jump: timedelta) -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        clock.now += jump
        session = await store.create_session()
        await session.store_image(RED, "start")
        clock.now -= jump
        for _ in range(2):
            clock.advance(hours=23)
            await store.cleanup()
            assert await red_there(session)


async def test_what_was_left_under_a_clock_that_was_ahead_goes_once_it_was_unused_for_long() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        clock.now += 5 * YEAR
        await store.cleanup()
        left, used = await store.create_session(), await store.create_session()
        clock.now -= 5 * YEAR
        await store.cleanup()
        clock.advance(hours=23)
        await used.touch()
        assert (await store.cleanup()).removed == ()
        clock.advance(hours=2)
        assert [removal.key for removal in (await store.cleanup()).removed] == [left.key]
        clock.advance(hours=24)
        assert [removal.key for removal in (await store.cleanup()).removed] == [used.key]
        assert await keys_of(store.blobs) == set()


async def test_a_periodic_sweep_comes_back_to_what_was_left_under_a_clock_that_was_ahead() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        clock.now += 5 * YEAR
        await store.cleanup()
        await store.create_session()
        clock.now -= 5 * YEAR
        janitor = store._open()[1]
        for _ in range(28):  # the first look is after the grace
            clock.advance(hours=1)
            await janitor.sweep(now=clock.now)
        assert await keys_of(store.blobs) == set()


async def test_a_machine_whose_clock_is_behind_makes_no_session_older_that_it_uses() -> None:
    clock, behind, blobs = FrozenClock(), FrozenClock(), MemoryBlobStore()
    behind.advance(-10 * YEAR)
    async with (
        open_store(blobs, clock=clock, cleanup_interval=None) as store,
        open_store(blobs, clock=behind, cleanup_interval=None) as other,
    ):
        read, written = await store.create_session(), await store.create_session()
        for session in (read, written):
            await session.store_image(RED, "start")
        assert await red_there(await other.open_by_key(read.key))
        await (await other.open_by_key(written.key)).store_image(BLUE, "end")
        clock.advance(hours=23)
        await store.cleanup()
        assert await red_there(read)
        assert await red_there(written)


async def test_what_was_used_under_a_clock_that_was_ahead_stays_as_long_as_it_is_used() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        clock.now += 5 * YEAR
        session = await store.create_session()
        await session.store_image(RED, "start")
        clock.now -= 5 * YEAR
        for _ in range(60):
            clock.advance(hours=1)
            await store.cleanup()
            assert await red_there(session)
        for hours in (0, 24):
            clock.advance(hours=hours)
            assert (await store.cleanup()).removed == ()
        clock.advance(hours=2)
        await store.cleanup()
        assert await keys_of(store.blobs) == set()


@JUMPS
async def test_what_was_written_before_a_wrong_clock_is_set_right_stays(jump: timedelta) -> None:
    clock = FrozenClock()
    clock.now += jump
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(RED, "start")
        clock.now -= jump
        for _ in range(3):
            clock.advance(hours=23)
            await store.cleanup()
            assert await red_there(session)


async def test_an_image_that_was_replaced_can_be_put_back_after_the_clock_was_set() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        session = await store.create_session()
        red = await session.store_image(RED, "start")
        await session.store_image(BLUE, "start")
        clock.now += 5 * YEAR
        await store.cleanup()
        assert [recent.record for recent in (await session.info()).recent] == [red]
        await session.restore_recent(red.digest, "start")
        assert await red_there(session)


async def test_no_sweep_or_repair_takes_an_orphan_on_the_word_of_a_clock_that_was_set() -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, cleanup_interval=None) as store:
        orphan = f"blobs/{'3' * 32}/{'1' * 64}.{'2' * 16}"
        await store.blobs.put(orphan, b"x")
        clock.now += 5 * YEAR
        await store.cleanup()
        await store.verify(repair=True)
        assert orphan in await keys_of(store.blobs)
        await store.cleanup(now=clock.now)  # said, and obeyed
        assert await keys_of(store.blobs) == set()


async def pin(store: SessionStore, session: Session) -> None:
    await session.pin("me", until=store.clock() + 100 * DAY)


async def unpin(store: SessionStore, session: Session) -> None:
    await session.unpin("me")


async def begin_job(store: SessionStore, session: Session) -> None:
    job = JobInfo(
        id=f"{session.key}.{'0' * 16}", pipeline="p", inputs={}, params={}, submitted_at=store.clock(), owner="o"
    )
    await session.edit_job(job.id, lambda _: job)


async def end_job(store: SessionStore, session: Session) -> None:
    await session.edit_job(f"{session.key}.{'0' * 16}", lambda job: job and replace(job, status="succeeded"))


Hold = Callable[[SessionStore, Session], Awaitable[None]]


@pytest.mark.parametrize(("hold", "let_go"), [(pin, unpin), (begin_job, end_job)], ids=["pin", "job"])
@pytest.mark.parametrize("max_age", [None, HOUR], ids=["ttl", "max_age"])
async def test_a_visit_finds_what_a_pin_or_a_job_keeps_past_its_time(
    hold: Hold, let_go: Hold, max_age: timedelta | None
) -> None:
    clock = FrozenClock()
    async with open_store("memory://", clock=clock, max_age=max_age, cleanup_interval=None) as store:
        mine, created = await store.session_for("ada"), await store.create_session()
        assert created.id is not None
        for session in (mine, created):
            await session.store_image(RED, "start")
            await hold(store, session)
        clock.advance(days=9)
        await store.cleanup()
        assert await red_there(await store.session_for("ada"))
        await store.session_of("ada").store_image(BLUE, "end")
        await store.session(created.id).store_image(BLUE, "end")
        clock.advance(days=9)
        assert {info.key async for info in store.sessions()} == {mine.key, created.key}
        await store.session(created.id).update_state(model="i2v")
        await store.cleanup()
        assert await red_there(await store.restore_session(created.id))
        assert await red_there(await store.session_for("ada"))
        await let_go(store, created)
        clock.advance(days=9)
        with pytest.raises(SessionNotFoundError):
            await store.restore_session(created.id)
