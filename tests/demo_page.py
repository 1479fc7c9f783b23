"""What the tests do on the page of `async-sessions demo`, and what its store holds then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

from async_sessions._keys import key_of_id
from tests.servers import drawn_size, free_port, serving, settle, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import BrowserContext, Page

    from tests.servers import Server

QUICK = "416 × 240 · quick"  # noqa: RUF001 - the resolution that the preview renders fastest


def manifest(server: Server, context: BrowserContext) -> dict[str, Any]:
    """What is on disk of this browser's session."""
    (cookie,) = context.cookies()
    key = key_of_id(cookie["value"].partition(".")[0])
    found = next(server.folder.glob(f"root/manifests/*/{key}.json"), None)
    return {"images": {}, "state": {}} if found is None else json.loads(found.read_bytes())


def kept(server: Server, context: BrowserContext, *names: str) -> bool:
    """Whether the session holds images of just these file names."""
    held = [image["source_name"] for image in manifest(server, context)["images"].values()]
    return sorted(held) == sorted(names)


@contextmanager
def slow_runs(server: Server) -> Iterator[None]:
    """Within this a run of a `paced_demo` goes on until it is cancelled."""
    marker = server.folder / "slow"
    marker.touch()
    try:
        yield
    finally:
        marker.unlink()


@contextmanager
def paced_demo(folder: Path) -> Iterator[Server]:
    """`async-sessions demo` with its store at `folder / "root"`, whose runs `slow_runs` can hold under way."""
    port = free_port()
    arguments = ("-m", "tests.paced_demo", "demo", "--port", str(port), "--root", str(folder / "root"))
    with serving(folder, *arguments, port=port) as server:
        yield server


def start_runs(page: Page, count: int = 1) -> None:
    """Of 121 frames each: one is under way, and the others wait behind it."""
    page.fill("#frames input[type=number]", "121")
    page.press("#frames input[type=number]", "Enter")
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("of 121")
    for waiting in range(1, count):
        page.click("#generate")
        expect(page.locator("#progress")).to_contain_text(f"{waiting} more waiting")


def upload(page: Page, slot: str, path: Path, *, at_once: bool = False) -> None:
    if not at_once:
        settle(page)
    page.set_input_files(f"#{slot} input[type=file]", path)


def choose(page: Page, label: str) -> None:
    """A radio button; again where it was drawn anew under the click, as after the choice of another model."""
    radio = page.get_by_label(label, exact=True)

    def chosen() -> bool:
        if not radio.is_checked():
            radio.click()
        return radio.is_checked()

    wait_until(chosen)


def expect_size(page: Page, slot: str, size: tuple[int, int]) -> None:
    """That a slot shows an image of this width and height, drawn."""
    image = page.locator(f"#{slot} img")
    wait_until(lambda: image.count() == 1 and drawn_size(image) == size)
