"""Writes and threads that run to their end, the order of writes to a session, and the clock."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from async_sessions.errors import StorageError, StoreClosedError

if TYPE_CHECKING:
    from anyio import CapacityLimiter
    from anyio.abc import TaskGroup

T = TypeVar("T")

CANCEL_DEADLINE = 10.0  # seconds that a cancelled caller still waits for its commit
COMMIT_DEADLINE = 60.0  # seconds that a commit may take at all; far below any sensible `grace`


def utc_now() -> datetime:
    return datetime.now(UTC)


async def in_thread(call: Callable[[], T], limiter: CapacityLimiter) -> T:
    """Run `call` in a worker thread; a cancellation, a native `task.cancel()` too, waits for its end once it has begun.

    `anyio.to_thread.run_sync` leaves the thread to itself when the cancellation is a native one: then whatever cleans
    up, or gives back what was lent for the call, races it.
    """
    running: concurrent.futures.Future[None] = concurrent.futures.Future()

    def run() -> T:
        if not running.set_running_or_notify_cancel():
            raise concurrent.futures.CancelledError
        try:
            return call()
        finally:
            running.set_result(None)

    try:
        return await anyio.to_thread.run_sync(run, limiter=limiter)
    except asyncio.CancelledError:
        if not running.cancel():
            await _outlast(asyncio.wrap_future(running))
        raise


async def finish_in_thread(call: Callable[[], object]) -> None:
    """Run `call`, which is short, in a worker thread whatever happens; then raise a cancellation that arrived."""
    future = asyncio.get_running_loop().run_in_executor(None, call)
    cancelled = await _outlast(future)
    if (error := cancelled or future.exception()) is not None:
        raise error


async def _outlast(future: asyncio.Future[T]) -> asyncio.CancelledError | None:
    """Wait for `future` through every cancellation, native or of a scope; return the last native one.

    A shielded scope alone does not stop a native one, and a loop without a scope spins under a cancelled one.
    """
    cancelled = None
    with anyio.CancelScope(shield=True):
        while not future.done():
            try:
                await asyncio.wait({future})
            except asyncio.CancelledError as error:
                cancelled = error
    return cancelled


class Commits:
    """Runs writes that a caller's cancellation must not cut in half, each in a task of `group`."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group

    async def uninterrupted(self, call: Callable[[], Awaitable[T]], *, deadline: float = CANCEL_DEADLINE) -> T:
        """Await `call()` to its end, then raise the very cancellation that arrived meanwhile, if one did.

        A shielded scope alone does not stop a native `task.cancel()`, and a loop that waits without one spins under a
        cancelled anyio scope: so the first wait learns of the cancellation, the others are shielded. `deadline` seconds
        after it the call itself is cancelled; after `COMMIT_DEADLINE`, in any case: then it is a `StorageError`.
        """
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        shield = anyio.CancelScope(shield=True, deadline=anyio.current_time() + COMMIT_DEADLINE)

        async def run() -> None:
            with shield:
                try:
                    outcome.set_result(await call())
                except Exception as error:  # noqa: BLE001 - handed to the caller, whatever it is
                    outcome.set_exception(error)
                finally:
                    if not outcome.done():
                        outcome.cancel()

        try:
            self._group.start_soon(run)
        except RuntimeError as error:
            raise StoreClosedError("The store was closed meanwhile; nothing was written.") from error
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({outcome})
        except asyncio.CancelledError as error:
            cancelled = error
            shield.deadline = min(shield.deadline, anyio.current_time() + deadline)
        await _outlast(outcome)
        if cancelled is not None:
            if not outcome.cancelled():
                outcome.exception()  # seen, so that asyncio doesn't report it as lost
            raise cancelled
        if outcome.cancelled():
            raise StorageError(f"The storage did not answer within {COMMIT_DEADLINE:g} s. Look whether it is up.")
        return outcome.result()


Fate = Literal["current", "superseded", "purged"]


class _SlotOrder:
    """Tickets are drawn when a write to the slot is asked for and spent when it commits."""

    def __init__(self) -> None:
        self.drawn = 0
        self.spent = 0
        self.purged = 0


class Tickets:
    """One write's place in the order of each of its slots. Holds on to `order`, which lives as long as its holders."""

    def __init__(self, order: Order, held: dict[str, tuple[_SlotOrder, int]]) -> None:
        self._order = order
        self._held = held

    def fate(self, slot: str) -> Fate:
        """What becomes of a write that commits now: newer ones may have replaced it, or cleared everything, already."""
        order, ticket = self._held[slot]
        if order.purged > ticket:
            return "purged"
        return "superseded" if order.spent > ticket else "current"

    def spend(self, *, purge: bool = False) -> None:
        for order, ticket in self._held.values():
            order.spent = max(order.spent, ticket)
            if purge:
                order.purged = max(order.purged, ticket)


class Order:
    """The order of writes to one session within this process.

    `lock` guards the manifest between reading it and writing it back; nothing is decoded or uploaded under it.
    """

    def __init__(self) -> None:
        self.lock = anyio.Lock(fast_acquire=True)
        self.states = anyio.Lock(fast_acquire=True)  # guards nothing but the order of `update_state` calls
        self._slots: dict[str, _SlotOrder] = {}

    def draw(self, slots: Iterable[str]) -> Tickets:
        held = {}
        for slot in slots:
            order = self._slots.setdefault(slot, _SlotOrder())
            order.drawn += 1
            held[slot] = order, order.drawn
        return Tickets(self, held)

    def draw_all(self) -> Tickets:
        """Tickets for every slot that a write in flight has a ticket for."""
        return self.draw(tuple(self._slots))


class Orders:
    """One `Order` per session, for as long as somebody holds it: its holders are the writes in flight."""

    def __init__(self) -> None:
        self._orders: WeakValueDictionary[str, Order] = WeakValueDictionary()

    def of(self, key: str) -> Order:
        order = self._orders.get(key)
        if order is None:
            self._orders[key] = order = Order()
        return order
