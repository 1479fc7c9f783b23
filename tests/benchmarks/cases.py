"""What is stored and read: which pictures, in how many sessions at once, how often, by which designs, to which goal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tests.benchmarks import pictures
from tests.benchmarks.designs import Design, Package, Source, Threaded
from tests.benchmarks.peers import EVERYBODY
from tests.benchmarks.pictures import HD, SMALL, TWELVE_MEGAPIXELS

Opened: TypeAlias = Callable[[Path, int], Design]

TWO = Threaded, Package
UNTHREADED = tuple(opened for opened in EVERYBODY if opened is not Threaded)
PICTURES = 4  # different ones, in turn


class Case(NamedTuple):
    """`rounds` of stores by `users` at once, then `reads` rounds of reads; `quick` rounds, if any, in a quick run.

    The goals are ratios to the threaded design.
    """

    what: str
    picture: Callable[[int], Source]  # by a seed
    users: int = 1
    rounds: int = 2
    quick: int = 0
    reads: int = 2
    designs: Sequence[Opened] = EVERYBODY
    goal: float | None = None
    read_goal: float | None = None

    def sources(self) -> list[list[Source]]:
        """The picture of each user, for each round."""
        count = self.rounds * self.users
        made = [self.picture(seed) for seed in range(min(PICTURES, count))]
        each = [made[number % len(made)] for number in range(count)]
        return [each[first : first + self.users] for first in range(0, count, self.users)]


def chosen(*, quick: bool) -> list[Case]:
    if not quick:
        return CASES
    return [case._replace(rounds=case.quick, reads=min(2, case.reads)) for case in CASES if case.quick]


def _rgb(size: tuple[int, int]) -> Callable[[int], Source]:
    return lambda seed: pictures.collage(size, seed)


def _rgba(size: tuple[int, int]) -> Callable[[int], Source]:
    return lambda seed: pictures.faded(size, seed)


def _jpeg(seed: int) -> Source:
    return pictures.upload(TWELVE_MEGAPIXELS, seed)


CASES = [
    Case("1080p RGB, alone", _rgb(HD), rounds=8, quick=2, reads=8, goal=12, read_goal=0.9),
    Case("1080p RGB, 8 sessions", _rgb(HD), users=8, rounds=3, quick=1, reads=4, goal=25, read_goal=1.5),
    Case("1080p RGB, 64 sessions", _rgb(HD), users=64, rounds=1, reads=1, designs=UNTHREADED),
    Case("1080p RGBA, alone", _rgba(HD), rounds=4),
    Case("720p RGB, alone", _rgb(SMALL), rounds=4),
    Case("720p RGB, 64 sessions", _rgb(SMALL), users=64, rounds=1, reads=1, designs=UNTHREADED),
    Case("720p RGBA, 8 sessions", _rgba(SMALL), users=8, quick=1),
    Case("12 MP RGB, alone", _rgb(TWELVE_MEGAPIXELS)),
    Case("12 MP RGBA, alone", _rgba(TWELVE_MEGAPIXELS)),
    Case("12 MP JPEG upload, alone", _jpeg, rounds=3, quick=1, goal=30),
    Case("12 MP JPEG upload, 8 sessions", _jpeg, users=8, rounds=4, quick=1, designs=UNTHREADED),
    Case("12 MP JPEG upload, 64 sessions", _jpeg, users=64, reads=0, designs=UNTHREADED),
    Case(
        "1080p RGB photograph that was scaled up",
        lambda seed: pictures.scaled_up(HD, seed),
        rounds=4,
        quick=1,
        designs=TWO,
    ),
    Case("1080p flat image", lambda seed: pictures.drawings(HD)[seed % 2], quick=2, designs=TWO),
]
