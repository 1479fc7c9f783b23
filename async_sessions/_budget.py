"""How many pixels one store decodes at a time: threads are bounded by cores, memory has to be bounded by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

# Two images of the largest size that `Limits` takes by default, or ten of 12 MP: 512 MB at four bytes a pixel.
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
        """Wait for `pixels` and keep them for the body; what is larger than the budget takes all of it.

        Ask for all at once: who holds some while it waits for more may wait for somebody who does the same. What takes
        none waits for nobody.
        """
        amount = min(pixels, self.pixels)
        await self._borrow(amount)
        try:
            yield
        finally:
            self._return(amount)

    async def _borrow(self, amount: int) -> None:
        if not amount or (not self._waiting and amount <= self.free):
            self.free -= amount
            return
        turn = anyio.Event()
        self._waiting.append((amount, turn))
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # cancelled in the very moment in which it was its turn
                self._return(amount)
            else:
                self._waiting.remove((amount, turn))
                self._return(0)  # who waits behind may well fit
            raise

    def _return(self, amount: int) -> None:
        self.free += amount
        while self._waiting and self._waiting[0][0] <= self.free:
            lent, turn = self._waiting.popleft()
            self.free -= lent
            turn.set()
