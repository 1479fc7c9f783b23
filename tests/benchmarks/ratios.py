"""How many times as fast as the threaded design this package is: a round of the one, a round of the other, again."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.benchmarks.designs import Cost, Package, Source, Threaded, check, retrieved, stored, timed

if TYPE_CHECKING:
    from PIL import Image

CALLS = 32  # of a read from memory; one is too short to be timed


class Round(NamedTuple):
    threaded: Cost
    package: Cost


class Size(NamedTuple):
    """Bytes of the same image on the disk."""

    threaded: int
    package: int


class Row(NamedTuple):
    """`goal` is a ratio, `within` seconds for one call of the package."""

    what: str
    rounds: Sequence[Round]
    sizes: Sequence[Size] = ()
    goal: float | None = None
    within: float | None = None

    def wall(self) -> list[float]:
        return [round.threaded.wall / round.package.wall for round in self.rounds]

    def cpu(self) -> list[float]:
        return [round.threaded.cpu / round.package.cpu for round in self.rounds]

    def seconds(self) -> tuple[float, float]:
        """Medians: threaded, package."""
        threaded = statistics.median(round.threaded.wall for round in self.rounds)
        return threaded, statistics.median(round.package.wall for round in self.rounds)


async def stores(what: str, rounds: Iterable[Sequence[Source]], *, goal: float | None = None) -> Row:
    """Each round stores its images at once, one per session. What the disk holds at the end is compared."""
    batches = list(rounds)
    users = len(batches[0])
    costs, sizes = [], []
    async with _designs(users) as (threaded, package):
        for sources in batches:
            there, theirs = await timed(stored(threaded.store, sources))
            here, ours = await timed(stored(package.store, sources))
            costs.append(Round(there, here))
            sizes += [Size(*pair) for pair in zip(theirs, ours, strict=True)]
        for design in (threaded, package):
            await design.restart()
            check(await retrieved(design, users), batches[-1])
    return Row(what, costs, sizes, goal)


async def cold(what: str, sources: Sequence[Source], *, rounds: int, goal: float) -> Row:
    """Each session reads its image at once, from the disk: what was in memory is forgotten before each round."""
    costs = []
    async with _designs(len(sources)) as (threaded, package):
        for design in (threaded, package):
            await stored(design.store, sources)
        for _ in range(rounds):
            cost = []
            for design in (threaded, package):
                await design.restart()
                spent, images = await timed(retrieved(design, len(sources)))
                check(images, sources)
                cost.append(spent)
            costs.append(Round(*cost))
    return Row(what, costs, goal=goal)


async def cached(what: str, source: Source, *, rounds: int, within: float) -> Row:
    """One session reads the image that is in memory; the package's manifest is on the disk."""
    costs = []
    async with _designs(1) as (threaded, package):
        for design in (threaded, package):
            await stored(design.store, [source])
        for _ in range(rounds):
            there = await _one_of_many(lambda: threaded.retrieve(0), source)
            here = await _one_of_many(lambda: package.retrieve(0), source)
            costs.append(Round(there, here))
    return Row(what, costs, within=within)


async def read_record(what: str, source: Source, *, rounds: int, within: float) -> Row:
    """Nothing on a disk: `read_record` and `image()` in the event loop; the threaded design copies in a thread."""
    costs = []
    async with _designs(1) as (threaded, _), Package("memory://", 1) as package:
        await threaded.store(0, source)
        session = package.sessions[0]
        record = await session.store_image(source, "start")

        async def read() -> Image.Image:
            return await (await session.read_record(record)).image()

        for _ in range(rounds):
            there = await _one_of_many(lambda: threaded.retrieve(0), source)
            here = await _one_of_many(read, source)
            costs.append(Round(there, here))
    return Row(what, costs, within=within)


async def _one_of_many(read: Callable[[], Awaitable[Image.Image]], source: Source) -> Cost:
    """The cost of one of `CALLS` calls, one after the other.

    Each image is let go before the next call: a design that copies would otherwise be charged for ever more memory.
    The last one is compared with the source, and so is each of as many calls that are not timed.
    """

    async def calls() -> Image.Image:
        for _ in range(CALLS):
            image = await read()
        return image

    spent, last = await timed(calls())
    check([last], [source])
    for _ in range(CALLS):
        check([await read()], [source])
    return Cost(*(total / CALLS for total in spent))


@asynccontextmanager
async def _designs(users: int) -> AsyncIterator[tuple[Threaded, Package]]:
    """Both, empty, each on a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        async with Package(Path(folder, "package"), users) as package:
            yield Threaded(Path(folder, "threaded")), package
