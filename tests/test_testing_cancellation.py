from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from async_sessions.testing.cancellation import CancellationError, Run, cancel_everywhere

pytestmark = pytest.mark.anyio


class Account:
    """A thing that has a right way to be cancelled, and several wrong ones."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.limiter = anyio.CapacityLimiter(1)
        self.total = 0
        self.group: anyio.abc.TaskGroup | None = None

    async def careful(self) -> None:
        async with self.lock:
            await anyio.lowlevel.checkpoint()
            await anyio.to_thread.run_sync(threading.Event().is_set, limiter=self.limiter)
            self.total += 1

    async def locks_before_it_tries(self) -> None:
        await self.lock.acquire()
        await anyio.lowlevel.checkpoint()
        self.lock.release()

    async def gives_the_lock_away_unseen(self) -> None:
        """What the lock's taker is handed is lost if it is cancelled between the hand-over and its next step."""
        ready = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(ready.set_result, None)
        ready.add_done_callback(lambda _: setattr(self, "total", self.total + 1))
        try:
            await ready
        except asyncio.CancelledError:
            if ready.cancelled():
                raise
            raise  # forgets to take back what it was handed
        self.total -= 1

    async def swallows(self) -> None:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            return

    async def leaves_a_task(self) -> None:
        task = asyncio.get_running_loop().create_task(anyio.sleep(60))
        await anyio.lowlevel.checkpoint()
        task.cancel()

    async def loses_an_exception(self) -> None:
        async def fail() -> None:
            raise LookupError("lost")

        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.wait({task})
        task.exception()  # not reached

    async def spins(self) -> None:
        work = asyncio.get_running_loop().create_task(asyncio.sleep(0.001))
        cancelled = None
        while not work.done():
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def hangs(self) -> None:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(60)

    async def raises_another_cancellation(self) -> None:
        cancelled = False
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            cancelled = True
        if cancelled:
            raise asyncio.CancelledError("mine")

    async def works_in_a_child(self) -> None:
        async def child() -> None:
            self.total += 1
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            self.total -= 1

        async with anyio.create_task_group() as group:
            group.start_soon(child)


@pytest.fixture
def account() -> Account:
    return Account()


async def test_a_careful_coroutine_passes_and_every_place_was_tried(account: Account) -> None:
    async def check(run: Run) -> None:
        assert not account.lock.locked()
        assert account.limiter.borrowed_tokens == 0

    runs = await cancel_everywhere(account.careful, check)
    assert runs[0].point is None
    assert runs[0].ending == "returned"
    tried = {(run.means, run.moment) for run in runs[1:]}
    assert tried == {(means, moment) for means in ("task", "scope") for moment in ("before", "during", "after")}
    native = [run for run in runs[1:] if run.means == "task"]
    assert all(run.ending == "cancelled" for run in native)
    assert any("test_testing_cancellation.py" in run.where or "anyio" in run.where for run in native)


async def test_what_check_raises_comes_out_with_the_place(account: Account) -> None:
    async def check(run: Run) -> None:
        assert not account.lock.locked()

    with pytest.raises(AssertionError) as caught:
        await cancel_everywhere(account.locks_before_it_tries, check)
    assert "cancelled by its task before suspension 0, at " in caught.value.__notes__[0]


async def test_a_result_that_is_lost_in_the_hand_over_is_found_only_there(account: Account) -> None:
    async def check(run: Run) -> None:
        assert account.total == 0

    await cancel_everywhere(account.gives_the_lock_away_unseen, check, moments=["before", "during"], means=["scope"])
    with pytest.raises(AssertionError) as caught:
        await cancel_everywhere(account.gives_the_lock_away_unseen, check, moments=["after"])
    assert "cancelled by its task after suspension 0" in caught.value.__notes__[0]


async def nothing(run: Run) -> None:
    pass


@pytest.mark.parametrize(
    ("way", "complaint"),
    [
        (Account.swallows, "was told that it is cancelled, and returned"),
        (Account.leaves_a_task, "left behind"),
        (Account.loses_an_exception, "lost"),
        (Account.hangs, "still running"),
    ],
)
@pytest.mark.parametrize("means", ["task", "scope"])
async def test_a_wrong_way_to_be_cancelled_is_named(
    account: Account, way: Callable[[Account], Coroutine[Any, Any, None]], complaint: str, means: Any
) -> None:
    with pytest.raises(CancellationError, match=complaint):
        await cancel_everywhere(partial(way, account), nothing, means=[means], patience=0.2)


async def test_a_coroutine_that_spins_under_a_cancelled_scope_is_found(account: Account) -> None:
    await cancel_everywhere(account.spins, nothing, means=["task"])
    with pytest.raises(CancellationError, match="it spins"):
        await cancel_everywhere(account.spins, nothing, means=["scope"])


async def test_a_cancellation_that_is_not_the_scopes_is_found(account: Account) -> None:
    await cancel_everywhere(account.raises_another_cancellation, nothing, means=["task"])
    with pytest.raises(CancellationError, match="of its own"):
        await cancel_everywhere(account.raises_another_cancellation, nothing, means=["scope"])


async def test_the_suspensions_of_the_tasks_that_it_starts_are_places_too(account: Account) -> None:
    async def check(run: Run) -> None:
        assert account.total == 0

    with pytest.raises(AssertionError) as caught:
        await cancel_everywhere(account.works_in_a_child, check, moments=["during"])
    assert "suspension" in caught.value.__notes__[0]


async def test_an_error_of_the_undisturbed_coroutine_comes_out(account: Account) -> None:
    async def fail() -> None:
        raise LookupError("x")

    with pytest.raises(LookupError):
        await cancel_everywhere(fail, nothing)


async def test_each_run_is_prepared_and_what_is_cancelled_is_only_the_coroutine(account: Account) -> None:
    async def prepare() -> None:
        await anyio.lowlevel.checkpoint()
        account.total = 0

    async def check(run: Run) -> None:
        assert account.total in (0, 1)
        assert run.ending == "cancelled" or account.total == 1

    runs = await cancel_everywhere(account.careful, check, prepare=prepare, every=2)
    assert {run.point for run in runs[1:]} == {point for point in range(0, 99, 2) if point <= (runs[-1].point or 0)}
