"""The five filters of PNG over strips of rows, in numpy: https://www.w3.org/TR/png-3/#9Filter-types.

Everything is done in bytes and in memory that is allocated once, so that a strip stays in the processor's cache.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]

NONE: Final = 0
SUB: Final = 1
UP: Final = 2
AVERAGE: Final = 3
PAETH: Final = 4

_SCRATCH: Final = {NONE: 0, SUB: 0, UP: 0, AVERAGE: 2, PAETH: 4}  # buffers as large as the strip


class Strip:
    """Up to `rows` rows of `width` bytes and the row above them; `step` is the distance of a byte to that on its left.

    A new strip is at the top of the image: the row above it is zeros, as is what is left of a row.
    """

    def __init__(self, rows: int, width: int, step: int) -> None:
        self._width = width
        self._step = step
        self._count = 0
        self._held: Bytes = np.zeros((rows + 1, step + width), np.uint8)
        self._filtered: Bytes = np.empty((rows, 1 + width), np.uint8)
        self._scratch: list[Bytes] = []

    def load(self, pixels: bytes) -> None:
        """Take the rows that follow those held."""
        self._held[0] = self._held[self._count]
        self._count = len(pixels) // self._width
        self._held[1 : self._count + 1, self._step :] = np.frombuffer(pixels, np.uint8).reshape(-1, self._width)

    def filtered(self, kind: int) -> Bytes:
        """The rows as PNG holds them, each after the number of the filter. Valid until the next call."""
        filtered = self._filtered[: self._count]
        rows, residues = self._held[1 : self._count + 1, self._step :], filtered[:, 1:]
        filtered[:, 0] = kind
        if kind == NONE:
            residues[:] = rows
        elif kind == SUB:
            np.subtract(rows, self._held[1 : self._count + 1, : self._width], out=residues)
        elif kind == UP:
            np.subtract(rows, self._held[: self._count, self._step :], out=residues)
        else:
            np.subtract(rows, self._predicted(kind), out=residues)
        return filtered.reshape(-1)

    def _predicted(self, kind: int) -> Bytes:
        # All rows as one: shifted views of the same memory. What that makes of the zeros between two rows is cut off.
        stride = self._step + self._width
        flat = self._held[: self._count + 1].reshape(-1)
        end = flat.size
        left, above = flat[stride : end - self._step], flat[self._step : end - stride]
        corner = flat[: end - stride - self._step]
        while len(self._scratch) < _SCRATCH[kind]:
            self._scratch.append(np.empty(self._filtered.shape[0] * stride, np.uint8))
        scratch = [buffer[: corner.size] for buffer in self._scratch]
        if kind == AVERAGE:
            average(left, above, scratch)
        else:
            paeth(left, above, corner, scratch)
        return self._scratch[0][: self._count * stride].reshape(-1, stride)[:, : self._width]


def average(left: Bytes, above: Bytes, scratch: list[Bytes]) -> None:
    """Leave (left + above) // 2 in `scratch[0]`: what both share, and half of what they don't."""
    mean, shared = scratch[:2]
    np.bitwise_xor(left, above, out=mean)
    np.right_shift(mean, 1, out=mean)
    np.bitwise_and(left, above, out=shared)
    np.add(mean, shared, out=mean)


def paeth(left: Bytes, above: Bytes, corner: Bytes, scratch: list[Bytes]) -> None:
    """Leave in `scratch[0]` that of the three which is nearest to left + above - corner.

    In bytes: with `low` and `high` the lesser and the greater of `left` and `above`, it is `high` where `corner` is in
    the lowest third of the way between them or below, `low` in the highest third or above, and `corner` in between.
    """
    low, high, bound, chosen = scratch[:4]
    holds = chosen.view(np.bool_)  # 1 or 0, to multiply with
    np.minimum(left, above, out=low)
    np.maximum(left, above, out=high)
    np.subtract(high, low, out=bound)
    np.floor_divide(bound, 3, out=bound)
    np.add(low, bound, out=chosen)
    np.less_equal(corner, chosen, out=holds)
    np.subtract(high, bound, out=bound)
    # The bytes wrap around, and back again in the sum.
    np.subtract(high, corner, out=high)
    np.multiply(high, chosen, out=high)
    np.greater_equal(corner, bound, out=holds)
    np.subtract(low, corner, out=low)
    np.multiply(low, chosen, out=low)
    np.add(low, high, out=low)
    np.add(low, corner, out=low)
