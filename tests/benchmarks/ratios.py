"""How many times as fast as the others this package is: a round of each design, then again, on the same images."""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from tests.benchmarks.designs import (
    PACKAGE,
    SLOT,
    THREADED,
    UNSYNCED,
    Cost,
    Design,
    Package,
    Source,
    Threaded,
    check,
    retrieved,
    stored,
    timed,
)
from tests.benchmarks.peers import BARE_SYNCED

if TYPE_CHECKING:
    from tests.benchmarks.cases import Case, Opened

CALLS = 32  # of a read from memory; one is too short to be timed
READ_ALIKE = UNSYNCED, BARE_SYNCED  # as their twins
SMALL = Image.new("RGB", (64, 48), "gray")  # what each user stores before anything is timed


class Row(NamedTuple):
    """`costs` has a round's cost for each round, by design, and `sizes` the bytes of each stored file.

    `goal` is a ratio to the threaded design, `within` seconds for one call of the package.
    """

    what: str
    costs: Mapping[str, Sequence[Cost]]
    sizes: Mapping[str, Sequence[int]] = {}
    goal: float | None = None
    within: float | None = None

    def times(self, name: str, base: str = PACKAGE) -> list[float]:
        """By how much `base` was faster than the design of that name, in each round."""
        return [other.wall / own.wall for other, own in zip(self.costs[name], self.costs[base], strict=True)]

    def times_by_cpu(self, name: str, base: str = PACKAGE) -> list[float]:
        return [other.cpu / own.cpu for other, own in zip(self.costs[name], self.costs[base], strict=True)]

    def seconds(self, name: str = PACKAGE) -> float:
        return statistics.median(cost.wall for cost in self.costs[name])


class Rows(NamedTuple):
    stores: Row
    reads: Row


async def rows(case: Case) -> Rows:
    """Each round stores its images at once, one per user; then each round of reads reads the last ones, likewise.

    Before a read what was in memory is forgotten. What was read is compared with what was stored.
    """
    storing: dict[str, list[Cost]] = defaultdict(list)
    reading: dict[str, list[Cost]] = defaultdict(list)
    sizes: dict[str, list[int]] = defaultdict(list)
    rounds = case.sources()
    async with _opened(case.designs, case.users) as designs:
        for sources in rounds:
            for design in designs:
                cost, written = await stored(design, sources)
                storing[design.facts.name].append(cost)
                sizes[design.facts.name] += written
        readers = [design for design in designs if design.facts.name not in READ_ALIKE]
        for _ in range(case.reads):
            for design in readers:
                reading[design.facts.name].append(await _cold(design, rounds[-1]))
    return Rows(Row(case.what, storing, sizes, case.goal), Row(case.what, reading, goal=case.read_goal))


async def cached(what: str, source: Source, *, rounds: int, within: float) -> Row:
    """One user reads the image that is in memory; the package's manifest is on the disk."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    async with _opened([Threaded, Package], 1) as designs:
        for design in designs:
            await stored(design, [source])
        for _ in range(rounds):
            for design in designs:
                costs[design.facts.name].append(await _one_of_many(lambda: design.retrieve(0), source))  # noqa: B023
    return Row(what, costs, within=within)


async def read_record(what: str, source: Source, *, rounds: int, within: float) -> Row:
    """Nothing on a disk: `read_record` and `image()` in the event loop; the threaded design copies in a thread."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    async with _opened([Threaded], 1) as (threaded,), Package("memory://", 1) as package:
        await stored(threaded, [source])
        session = package.sessions[0]
        record = await session.store_image(source, SLOT)

        async def read() -> Image.Image:
            return await (await session.read_record(record)).image()

        for _ in range(rounds):
            costs[THREADED].append(await _one_of_many(lambda: threaded.retrieve(0), source))
            costs[PACKAGE].append(await _one_of_many(read, source))
    return Row(what, costs, within=within)


async def _cold(design: Design, sources: Sequence[Source]) -> Cost:
    await design.restart()
    cost, images = await retrieved(design, len(sources))
    check(images, sources)
    return cost


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
async def _opened(openers: Sequence[Opened], users: int) -> AsyncIterator[list[Design]]:
    """Each on a folder of its own, with its threads and connections made."""
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        designs = [
            await stack.enter_async_context(opened(root / f"{number}", users)) for number, opened in enumerate(openers)
        ]
        for design in designs:
            await stored(design, [SMALL] * users)
        yield designs
