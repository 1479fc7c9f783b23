"""What one store takes of the machine at a time: threads are bounded by cores, memory has to be bounded by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import anyio
import numpy as np

from async_sessions import _tasks
from async_sessions.errors import ImageRejectedError, OutOfMemoryError

T = TypeVar("T")

# Two JPEGs of the largest size that `Limits` takes by default, or ten of 12 MP: 512 MB at four bytes a pixel.
DEFAULT_PIXELS: Final = 128_000_000


class PixelBudget:
    """`pixels` that are lent to decodes, first come, first served: a small image never overtakes a large one for ever.

    Belongs to one event loop.
    """

    def __init__(self, pixels: int = DEFAULT_PIXELS) -> None:
        if pixels < 1:
            raise ValueError(f"A budget of {pixels} pixels lets nothing be decoded; give at least one.")
        self.pixels = pixels
        self.free = pixels
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    @asynccontextmanager
    async def lent(self, pixels: int) -> AsyncIterator[None]:
        """Wait for `pixels` and keep them for the body; what is larger than the budget takes all of it."""
        async with self.loan() as loan:
            await loan.ask(pixels)
            yield

    @asynccontextmanager
    async def loan(self) -> AsyncIterator[Loan]:
        """A loan that the body may ask for, for as long as the body lasts."""
        loan = Loan(self)
        try:
            yield loan
        finally:
            loan.give_back()

    async def borrow(self, amount: int) -> None:
        """Wait for `amount`, which the budget has in all; `loan` and `lent` see to it that it comes back."""
        if not amount or (not self._waiting and amount <= self.free):
            self.free -= amount
            return
        turn = anyio.Event()
        self._waiting.append((amount, turn))
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # cancelled in the very moment in which it was its turn
                self.give_back(amount)
            else:
                self._waiting.remove((amount, turn))
                self.give_back(0)  # who waits behind may well fit
            raise

    def give_back(self, amount: int) -> None:
        """The reverse of `borrow`."""
        self.free += amount
        while self._waiting and self._waiting[0][0] <= self.free:
            lent, turn = self._waiting.popleft()
            self.free -= lent
            turn.set()


class Loan:
    """Pixels of a budget, asked for all at once: who held some while it waited for more would wait for its like."""

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self._amount: int | None = None

    @property
    def asked(self) -> bool:
        return self._amount is not None

    async def ask(self, pixels: int) -> None:
        """Wait for `pixels`, or for all that there are. Who asks for none waits for nobody."""
        if self.asked:
            raise RuntimeError("A loan is asked for all at once; give it back first.")
        amount = min(pixels, self._budget.pixels)
        await self._budget.borrow(amount)
        self._amount = amount

    def give_back(self) -> None:
        if self._amount is not None:
            self._budget.give_back(self._amount)
            self._amount = None


async def in_thread(call: Callable[[], T], limiter: anyio.CapacityLimiter, *, pixels: int = 0) -> T:
    """Run CPU-bound `call`, which takes up to that many pixels of four bytes, in a worker thread.

    A cancellation waits for its end, so that whatever was lent for the call can be given back then. `OutOfMemoryError`
    where it gets no memory. Of most decoders a file is broken then; so where one is refused, make
    sure that there was memory.
    """
    try:
        try:
            return await _tasks.in_thread(call, limiter)
        except ImageRejectedError as error:
            if error.reason in ("corrupt", "truncated"):
                np.empty(4 * pixels, np.uint8)  # is not touched, so it takes no time
            raise
    except MemoryError as error:
        raise OutOfMemoryError("There is no memory for this image now. Try again later, or make it smaller.") from error
