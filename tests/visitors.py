"""Browsers that use the demo page at the same time, each with images in a colour of its own, and look what they see."""

from __future__ import annotations

import asyncio
import colorsys
import io
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import anyio
import av
import httpx
from PIL import Image
from playwright.async_api import TimeoutError as TooLateError
from playwright.async_api import async_playwright, expect

from async_sessions import SessionNotFoundError, SessionStore, open_store
from async_sessions.asgi import stored_signer
from tests.benchmarks.lag import Heard, Lag, lag_of
from tests.servers import FLAGS, Server, chromium_path, free_port, serving

if TYPE_CHECKING:
    from playwright.async_api import Browser, BrowserContext, Page

Colour: TypeAlias = tuple[int, int, int]

SLOTS: Final = ("start", "end")
WITHIN: Final = 240_000  # milliseconds; many pages on few cores take long to open
ERRORS: Final = re.compile("Traceback|ERROR|Exception|Error:")

MODEST: Final[dict[str, Any]] = {"viewport": {"width": 800, "height": 600}, "reduced_motion": "reduce"}  # paints less

# Every picture that a page shows: which, its size, and the colour in its middle.
LOOK: Final = """
async () => {
    const canvas = document.createElement('canvas');
    canvas.width = canvas.height = 1;
    const brush = canvas.getContext('2d', {willReadFrequently: true}), seen = [];
    for (const each of document.querySelectorAll('img, video')) {
        const film = each instanceof HTMLVideoElement;
        try {
            if (!film) await each.decode();
        } catch { continue; }
        const [width, height] = film ? [each.videoWidth, each.videoHeight] : [each.naturalWidth, each.naturalHeight];
        if (!width || film && each.readyState < 2) continue;
        brush.drawImage(each, width / 2, height / 2, 1, 1, 0, 0, 1, 1);
        const place = film ? 'video' : each.closest('#start, #end')?.id ?? 'panel';
        seen.push([place, width, height, ...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)]);
    }
    return seen;
}
"""


class Seen(NamedTuple):
    """What a crowd did and saw: actions by name, pictures that were looked at, and how late the server's loop was.

    `own` is what is left of `busy` without the time for which the loop's thread had no core; `stalls` are the packages
    that were at work at each of the moments at which the loop stood still.
    """

    actions: Counter[str]
    pictures: int
    videos: int
    idle: Lag
    busy: Lag
    own: Lag
    stalls: list[frozenset[str]]


def colour_of(number: int, count: int) -> Colour:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(number / count, 1, 0.9))
    return red, green, blue


def png(colour: Colour, size: tuple[int, int]) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "PNG")
    return written.getvalue()


class Visitor:
    """One browser with up to two tabs. `holds` is what it knows of its slots: the size of the image in each."""

    def __init__(
        self,
        context: BrowserContext,
        url: str,
        store: SessionStore,
        opening: anyio.CapacityLimiter,
        number: int,
        count: int,
        seed: str,
    ) -> None:
        self._context = context
        self._url = url
        self._store = store
        self._opening = opening
        self._colours = [colour_of(each, count) for each in range(count)]
        self._number = number
        self._rng = random.Random(f"{seed}.{number}")
        self._tabs: list[Page] = []
        self._page: Page = None  # type: ignore[assignment]  # the tab in front, from `open` on
        self._sizes = [(64 + 2 * step, 48) for step in range(400)]
        self.holds: dict[str, tuple[int, int]] = {}
        self.did: list[str] = []
        self.pictures = 0

    async def open(self) -> None:
        await self._new_tab()
        await self._page.get_by_label("416").check()  # what the preview renders fastest
        await self._page.fill("#frames input[type=number]", "17")
        await self._page.press("#frames input[type=number]", "Enter")

    async def act(self) -> None:
        """Do something, then look at all that there is to see. Of four visitors each begins with something else."""
        actions: list[Callable[[], Awaitable[None]]] = [self.upload, self.upload, self.reload, self.other_tab]
        first = [self.upload_start, (self.generate, self.clear, self.reload, self.other_tab)[self._number % 4]]
        if self.holds:
            actions += [self.clear, self.put_back]
        if "start" in self.holds:
            actions += [self.generate, self.cancel]
        action = first[len(self.did)] if len(self.did) < len(first) else self._rng.choice(actions)
        self.did.append(action.__name__)
        await action()
        await self.look()

    async def upload_start(self) -> None:
        await self.upload("start")

    async def upload(self, slot: str = "") -> None:
        """Or replace."""
        slot, size = slot or self._rng.choice(SLOTS), self._sizes.pop(0)
        data = png(self._colours[self._number], size)
        await self._page.set_input_files(
            f"#{slot} input[type=file]", {"name": f"{size[0]}.png", "mimeType": "image/png", "buffer": data}
        )
        self.holds[slot] = size

    async def clear(self) -> None:
        slot = self._rng.choice(sorted(self.holds))
        await self._page.click(f"#{slot} button[aria-label='Remove Image']")
        del self.holds[slot]

    async def reload(self) -> None:
        await self._opened(self._page)

    async def other_tab(self) -> None:
        """Go on in another tab, which looks or loads first: what it does is on top of what it has seen."""
        if len(self._tabs) < 2:
            await self._new_tab()
            return
        if self._rng.random() < 0.3:
            await self._tabs.pop(self._tabs.index(self._page)).close()
            self._page = self._tabs[0]
        else:
            self._page = next(tab for tab in self._tabs if tab is not self._page)
        await self._page.bring_to_front()
        if self._rng.random() < 0.5:
            await self._opened(self._page)
        else:  # headless windows all have the focus all the time
            await self._page.evaluate("window.dispatchEvent(new Event('focus'))")

    async def put_back(self) -> None:
        """Undo the latest replacing or clearing, in the panel."""
        page = self._page
        await page.get_by_role("tab", name="Your session").click()
        await page.get_by_role("button", name="Refresh").click()
        choice = page.get_by_label("Replaced or cleared image")
        await choice.click()
        options = page.get_by_role("option")
        with suppress(TooLateError):  # nothing was replaced yet
            await options.first.wait_for(timeout=2000)
        if await options.count():
            label = await options.first.inner_text()
            slot, width, height = re.findall(r"(start|end) · \d+\.png · (\d+) . (\d+)", label)[0]
            await options.first.click()
            await page.get_by_role("button", name="Put back").click()
            self.holds[slot] = int(width), int(height)
        else:
            await page.keyboard.press("Escape")
        await page.get_by_role("tab", name="Generate", exact=True).click()

    async def generate(self) -> None:
        if await self._unfinished():
            return
        await self._page.click("#generate")
        await expect(self._page.locator("#progress [role=progressbar]")).to_be_visible(timeout=WITHIN)

    async def cancel(self) -> None:
        if await self._page.locator("#cancel").is_enabled():
            with suppress(TooLateError):  # the run is over by now
                await self._page.click("#cancel", timeout=1000)

    async def look(self) -> None:
        """What is in this browser and in its session is its own; in the tab in front and in the store it is all."""
        with anyio.fail_after(WITHIN / 1000):
            while await self._seen(self._page) != self.holds or await self._kept() != self.holds:  # noqa: ASYNC110
                await anyio.sleep(0.2)
        for tab in self._tabs:
            await self._seen(tab)
        toasts = await self._page.locator("[data-testid=toast-body]").all_inner_texts()
        assert not toasts, toasts

    async def leave(self) -> int:
        """Wait for the runs to be over. Returns how many videos there are, all in this browser's colour."""
        with anyio.fail_after(WITHIN / 1000):
            while await self._unfinished():  # noqa: ASYNC110 - another process runs them
                await anyio.sleep(0.5)
        await self.reload()
        await self.look()
        session = await self._session()
        videos = 0
        for job in (await session.info()).jobs.values() if session else ():
            assert job.status in ("succeeded", "cancelled"), job
            for output in job.outputs.values():
                async with session.output_file(output) as path:
                    with av.open(str(path)) as film:
                        frame = next(film.decode(video=0)).to_ndarray(format="rgb24")
                self._check_own(frame[frame.shape[0] // 2, frame.shape[1] // 2], "a video in the store")
                videos += 1
        assert not videos or await self._page.locator("#video video").count() == 1
        return videos

    async def _new_tab(self) -> None:
        self._page = await self._context.new_page()
        self._page.set_default_timeout(WITHIN)
        self._tabs.append(self._page)
        await self._opened(self._page)

    async def _opened(self, page: Page) -> None:
        """As `servers.opened`; of many pages a few at a time, which is sooner for all."""
        over = asyncio.Event()

        def note(request: Any) -> None:
            if "queue/data" in request.url:
                over.set()

        page.on("requestfinished", note)
        page.on("requestfailed", note)
        async with self._opening:
            with anyio.fail_after(WITHIN / 1000):
                await page.goto(self._url, timeout=WITHIN, wait_until="commit")
                over.clear()  # those of the page before
                await over.wait()
        page.remove_listener("requestfinished", note)
        page.remove_listener("requestfailed", note)

    async def _seen(self, page: Page) -> dict[str, tuple[int, int]]:
        """Sizes by slot, of what a tab shows."""
        found = await page.evaluate(LOOK)
        for place, _, _, *colour in found:
            self._check_own(colour, place)
        self.pictures += len(found)
        return {place: (width, height) for place, width, height, *_ in found if place in SLOTS}

    async def _kept(self) -> dict[str, tuple[int, int]]:
        """Sizes by slot, of what the store holds, and what the server gives to whoever has this browser's cookie."""
        if (session := await self._session()) is None:
            return {}
        info = await session.info()
        for record in (*info.images.values(), *(recent.record for recent in info.recent)):
            image = await (await session.read_record(record)).image()
            self._check_own(image.getpixel((0, 0)), "the store")
        cookies = {cookie.get("name", ""): cookie.get("value", "") for cookie in await self._context.cookies()}
        async with httpx.AsyncClient(cookies=cookies, timeout=WITHIN / 1000) as client:
            for slot in SLOTS:
                answer = await client.get(f"{self._url}images/{slot}")
                assert answer.status_code in (200, 404)
                if answer.status_code == 200:
                    self._check_own(Image.open(io.BytesIO(answer.content)).getpixel((0, 0)), "a route")
        return {slot: record.size for slot, record in info.images.items()}

    async def _session(self) -> Any:
        signer = await stored_signer(self._store.blobs)
        cookies = {cookie.get("name", ""): cookie.get("value", "") for cookie in await self._context.cookies()}
        session_id = signer.session_id(cookies)
        assert session_id is not None
        session = self._store.session(session_id)
        try:
            await session.info()
        except SessionNotFoundError:
            return None
        return session

    async def _unfinished(self) -> bool:
        session = await self._session()
        return session is not None and any(job.unfinished for job in (await session.info()).jobs.values())

    def _check_own(self, colour: Any, where: str) -> None:
        distances = [
            sum(abs(int(part) - int(own)) for part, own in zip(colour, mine, strict=True)) for mine in self._colours
        ]
        nearest = distances.index(min(distances))
        assert nearest == self._number, f"visitor {self._number} sees {nearest}'s {colour} in {where}: {self.did}"


async def crowd(
    folder: Path, *, visitors: int, seconds: float, pause: float, idle: float, seed: str, apart: bool = False
) -> Seen:
    """Let that many browsers use one server at random for so long, each with up to `pause` seconds between two actions.

    `idle` seconds are listened to before and after. `apart`: the server has a core to itself, where there are several;
    twenty browsers that take all of them would be heard as its lag.
    """
    port = free_port()
    first, *others = sorted(os.sched_getaffinity(0))
    own, rest = ([first], others) if apart and others else ([first, *others],) * 2
    with ExitStack() as entered:
        with _on_cores(own):
            served = serving(folder, "-m", "tests.visited_app", str(folder / "root"), str(port), port=port)
            server = entered.enter_context(served)
        entered.enter_context(_on_cores(rest))
        async with async_playwright() as playwright, open_store(folder / "root", cleanup_interval=None) as store:
            browser = await playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
            try:
                seen = await _visited(server, browser, store, visitors, seconds, pause, idle, seed)
            finally:
                await browser.close()
        logged = server.log.read_text()
        assert not ERRORS.search(logged), logged
        return seen


@contextmanager
def _on_cores(cores: Iterable[int]) -> Iterator[None]:
    """What this thread starts in the block runs on these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def _visited(
    server: Server,
    browser: Browser,
    store: SessionStore,
    count: int,
    seconds: float,
    pause: float,
    idle: float,
    seed: str,
) -> Seen:
    opening = anyio.CapacityLimiter(3)
    crowd = [
        Visitor(await browser.new_context(**MODEST), server.url, store, opening, number, count, seed)
        for number in range(count)
    ]
    await _heard(server)
    await anyio.sleep(idle)
    before = await _heard(server)
    videos: list[int] = []

    async def visit(visitor: Visitor, ends: float | None) -> None:
        try:
            if ends is None:
                await visitor.open()
                return
            while anyio.current_time() < ends or len(visitor.did) < 2:
                await visitor.act()
                await anyio.sleep(random.Random(f"{seed}.{len(visitor.did)}").uniform(0, pause))
            videos.append(await visitor.leave())
        except Exception as error:
            error.add_note(f"seed {seed!r}, visitor {crowd.index(visitor)}: {visitor.did}, holds {visitor.holds}")
            raise

    await _stalls(server)
    for opened in (False, True):
        ends = anyio.current_time() + seconds if opened else None
        async with anyio.create_task_group() as group:
            for visitor in crowd:
                group.start_soon(visit, visitor, ends)
    busy, stalls = await _heard(server), await _stalls(server)
    await browser.close()
    await anyio.sleep(idle / 2)  # pages that are gone are noticed
    await _heard(server)
    await anyio.sleep(idle)
    after = await _heard(server)
    own = array("d", (late - busy_cores for late, busy_cores in zip(*busy, strict=True)))
    return Seen(
        Counter(action for visitor in crowd for action in visitor.did),
        sum(visitor.pictures for visitor in crowd),
        sum(videos),
        lag_of(before, after),
        lag_of(busy),
        lag_of(Heard(own, array("d", bytes(8 * len(own))))),
        [frozenset(packages) for packages in stalls],
    )


async def _stalls(server: Server) -> list[list[str]]:
    async with httpx.AsyncClient(timeout=30) as client:
        stalls: list[list[str]] = (await client.get(f"{server.url}stalls")).json()
    return stalls


async def _heard(server: Server) -> Heard:
    async with httpx.AsyncClient(timeout=30) as client:
        data = (await client.get(f"{server.url}lag")).content
    half = len(data) // 2
    return Heard(array("d", data[:half]), array("d", data[half:]))
