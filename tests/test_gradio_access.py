"""The demo page for people with a keyboard, a screen reader, a phone, or in the dark; and hostile text in a browser."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Locator, Page, expect

from tests.demo_page import QUICK, choose, expect_size, kept, manifest, slow_runs, start_runs, upload
from tests.hostile import HACK, HARMLESS
from tests.images import rgba_png
from tests.servers import Server, opened, wait_until

pytestmark = pytest.mark.browser

# The tabs, and what of ours is in them while something runs.
TABS: dict[str, tuple[Literal["list", "progressbar"], str]] = {
    "Generate": ("progressbar", "Progress of the run"),
    "Queue": ("list", "History"),
    "Your session": ("list", "Images"),
}
SHAPES: tuple[dict[str, Any], ...] = (
    {"viewport": {"width": 1280, "height": 900}},
    {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
)
INTERACTIVE = {"button", "checkbox", "combobox", "link", "radio", "slider", "spinbutton", "tab", "textbox", "option"}

# Of our own HTML, what is hard to read: the contrast of texts (WCAG 2.2), and what does not fit into its place.
READABLE = """
() => {
    const parts = colour => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) =>
        0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const mixed = (over, under, alpha) => over.slice(0, 3).map((part, i) => alpha * part + (1 - alpha) * under[i]);
    const problems = [];
    let texts = 0;
    for (const box of document.querySelectorAll('.html-container')) {
        if (!box.checkVisibility()) continue;
        for (const element of box.querySelectorAll('*')) {
            const style = getComputedStyle(element);
            if (style.display !== 'inline' && element.scrollWidth > element.clientWidth + 1)
                problems.push(`does not fit: ${element.textContent}`);
            if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
            let opacity = 1, background = [255, 255, 255];
            for (let each = element; each; each = each.parentElement) opacity *= Number(getComputedStyle(each).opacity);
            for (let each = element; each; each = each.parentElement) {
                const [r, g, b, alpha = 1] = parts(getComputedStyle(each).backgroundColor);
                if (alpha === 1) { background = [r, g, b]; break; }
            }
            const [light, dark] = [luminance(mixed(parts(style.color), background, opacity)), luminance(background)]
                .sort((one, other) => other - one);
            const contrast = (light + 0.05) / (dark + 0.05);
            texts += 1;
            if (contrast < 4.5) problems.push(`${contrast.toFixed(1)}: ${element.textContent}`);
        }
    }
    return [texts, problems];
}
"""
# Which elements there are, with the names of their attributes.
ELEMENTS = """
() => [...new Set([...document.querySelectorAll('body, body *')].map(
    // what Gradio takes away is `inert` while it fades
    each => [each.localName, ...each.getAttributeNames().filter(name => name !== 'inert').sort()].join(' ')))].sort()
"""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photograph with quite a long name, as cameras and telephones give them, 2026-11-22.png"
    path.write_bytes(rgba_png(90, 60))
    return path


def tab_to(page: Page, control: Locator) -> None:
    """By the Tab key alone."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if control.count() and control.first.evaluate("control => control === document.activeElement"):
            return
    raise AssertionError(f"the Tab key does not come to {control}")


def press(page: Page, name: str, key: str = "Enter", *, exact: bool = True) -> None:
    tab_to(page, page.get_by_role("button", name=name, exact=exact))
    page.keyboard.press(key)


def go_to(page: Page, name: str) -> None:
    tab_to(page, page.get_by_role("tab", name=name, exact=True))
    page.keyboard.press("Enter")


def choose_first(page: Page, label: str) -> None:
    """Again where a refresh of the list came in between."""
    choice = page.get_by_role("combobox", name=label, exact=True)
    for _ in range(5):
        tab_to(page, choice)
        expect(page.get_by_role("option").first).to_be_visible()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        if choice.input_value():
            return
        page.keyboard.press("Escape")
    raise AssertionError(f"nothing can be chosen in {label}")


def show(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.wait_for_timeout(500)  # what the tab shows comes a moment later, and is looked at as a whole


@contextmanager
def busy(page: Page, server: Server, photo: Path) -> Iterator[None]:
    """One run over, one under way and one that waits; two images, and one that was replaced."""
    opened(page, server.url)
    choose(page, QUICK)
    page.fill("#frames input[type=number]", "17")
    page.press("#frames input[type=number]", "Enter")
    page.fill("#prompt textarea", "A boat crosses the bay, " * 20)
    for slot in ("start", "end"):
        upload(page, slot, photo)
    wait_until(lambda: kept(server, page.context, photo.name, photo.name))
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("Done")
    with slow_runs(server):
        start_runs(page, 2)
        photo.write_bytes(rgba_png(60, 90))  # another picture of that name
        upload(page, "start", photo)
        wait_until(lambda: len(manifest(server, page.context)["retired"]) > 0)
        yield
        show(page, "Queue")
        page.get_by_role("button", name="Cancel all").click()


def test_with_the_keyboard_alone_everything_can_be_done(context: BrowserContext, server: Server, photo: Path) -> None:
    page = opened(context.new_page(), server.url)
    tab_to(page, page.locator("#start button[aria-label^='Drop']"))
    upload(page, "start", photo)  # the dialog is the browser's
    wait_until(lambda: kept(server, context, photo.name))
    tab_to(page, page.get_by_label("832"))
    page.keyboard.press("ArrowRight")
    tab_to(page, page.locator("#frames input[type=number]"))
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("121")
    with slow_runs(server):
        press(page, "Generate")
        expect(page.locator("#progress")).to_contain_text("of 121")
        press(page, "Cancel", "Space")
        expect(page.locator("#progress")).to_contain_text("Cancelled")

    go_to(page, "Your session")
    choose_first(page, "Image to clear")
    press(page, "Clear image")
    wait_until(lambda: kept(server, context))
    choose_first(page, "Replaced or cleared image")
    press(page, "Put back", "Space")
    wait_until(lambda: kept(server, context, photo.name))
    tab_to(page, page.get_by_role("button", name="Restore from ZIP"))
    press(page, "Download my session (ZIP)")
    expect(page.get_by_text("Save session.zip")).to_be_visible()
    press(page, "Clear all")
    expect(page.get_by_role("alert").get_by_text("for good")).to_be_visible()
    press(page, "No, keep it")
    expect(page.get_by_role("button", name="Yes, clear all")).to_have_count(0)

    go_to(page, "Queue")
    choose_first(page, "Run")
    history = page.get_by_role("list", name="History")
    with slow_runs(server):
        press(page, "Retry")
        expect(page.get_by_role("list", name="Under way and waiting").get_by_role("listitem")).to_have_count(1)
        press(page, "Cancel all", "Space")
        expect(history.get_by_text("Cancelled")).to_have_count(2)
    go_to(page, "Your session")
    press(page, "Clear all")
    press(page, "Yes, clear all")
    expect(page.get_by_text("Nothing is kept yet")).to_be_visible()


def check_names(page: Page) -> None:
    """Every control has a name, and what is listed and measured says what it is."""
    devtools = page.context.new_cdp_session(page)
    found = 0
    for tab in TABS:
        show(page, tab)
        for node in devtools.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("role", {}).get("value") in INTERACTIVE and not node["ignored"]:
                found += 1
                assert node["name"]["value"].strip(), (tab, node)
    assert found > 40
    show(page, "Queue")
    expect(page.get_by_role("list", name="History").get_by_role("listitem")).not_to_have_count(0)
    expect(page.get_by_role("progressbar", name="Progress of the run")).to_be_visible()
    show(page, "Your session")
    images, recent = (page.get_by_role("list", name=name) for name in ("Images", "Can be put back"))
    expect(images.get_by_role("listitem")).to_have_count(2)
    expect(recent.get_by_role("listitem")).to_have_count(1)
    assert " of " in str(page.get_by_role("meter", name="Room in use").get_attribute("aria-valuetext"))


def check_readable(page: Page, server: Server) -> None:
    """In the dark and in the light: no text without contrast, nothing beyond the window."""
    page.goto(f"{server.url}?__theme=dark")  # which follows the runs: it is answered as long as they go on
    expect(page.get_by_role("tab", name="Queue")).to_be_visible()
    assert page.evaluate("document.body.classList.contains('dark')")
    for tab, (role, name) in TABS.items():
        show(page, tab)
        expect(page.get_by_role(role, name=name)).to_be_visible()
        for theme in ("dark", "light"):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
            texts, problems = page.evaluate(READABLE)
            assert texts, (tab, theme)
            assert problems == [], (tab, theme)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), tab
        page.evaluate("document.body.classList.add('dark')")


def test_what_we_show_can_be_read_and_has_a_name_on_a_desktop_on_a_phone_and_in_the_dark(
    browser: Browser, context: BrowserContext, server: Server, photo: Path
) -> None:
    page = context.new_page()
    with busy(page, server, photo):
        check_names(page)
        for shape in SHAPES:
            with browser.new_context(**shape, storage_state=context.storage_state()) as other:
                check_readable(other.new_page(), server)


def test_on_a_phone_a_tap_does_what_a_click_does(browser: Browser, server: Server, photo: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = opened(context.new_page(), server.url)
    with page.expect_file_chooser() as chooser:
        page.locator("#start button[aria-label^='Drop']").tap()
    chooser.value.set_files(photo)
    wait_until(lambda: kept(server, context, photo.name))
    page.get_by_label(QUICK).tap()
    page.locator("#generate").tap()
    expect(page.locator("#progress")).to_contain_text("Done")
    page.get_by_role("tab", name="Your session").tap()
    page.get_by_label("Image to clear").tap()
    page.get_by_role("option").first.tap()
    page.get_by_role("button", name="Clear image").tap()
    wait_until(lambda: kept(server, context))
    opened(page, server.url)
    expect(page.locator("#start img")).to_have_count(0)
    context.close()


def bad_zip(format_name: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"format": format_name, "schema": 1}))
    return written.getvalue()


def held(server: Server, page: Page) -> dict[str, Any]:
    image: dict[str, Any] = manifest(server, page.context)["images"].get("start", {})
    return image


def tried(page: Page, server: Server, string: str) -> set[str]:
    """The elements of a page on which everything that can have a name has that one, with every list open."""
    opened(page, server.url)
    page.fill("#prompt textarea", string)
    choose(page, QUICK)
    page.fill("#frames input[type=number]", "17")
    page.press("#frames input[type=number]", "Enter")
    found: set[str] = set()
    for number in range(2):
        data = rgba_png(90 + number, 60)
        page.set_input_files("#start input[type=file]", {"name": string, "mimeType": "image/png", "buffer": data})
        wait_until(lambda width=90 + number: held(server, page).get("width") == width)  # type: ignore[misc]
    page.click("#generate")
    expect(page.locator("#progress")).to_contain_text("Done")
    expect(page.locator("#video video")).to_be_visible()
    for tab, labels in (("Queue", ["Run"]), ("Your session", ["Image to clear", "Replaced or cleared image"])):
        show(page, tab)
        for label in labels:
            page.get_by_label(label, exact=True).click()
            expect(page.get_by_role("option").first).to_be_visible()
            found |= set(page.evaluate(ELEMENTS))
            page.keyboard.press("Escape")
    page.set_input_files(
        "input[type=file][accept*=zip]",
        {"name": "session.zip", "mimeType": "application/zip", "buffer": bad_zip(string)},
    )
    notice = page.get_by_test_id("toast-body")
    expect(notice).to_contain_text("The ZIP is not restored")
    expect(notice).to_contain_text(string[:20])
    found |= set(page.evaluate(ELEMENTS))
    opened(page, server.url)
    expect(page.locator("#prompt textarea")).to_have_value(string)
    return found | set(page.evaluate(ELEMENTS))


def test_hostile_names_are_only_text_in_a_browser(browser: Browser, server: Server) -> None:
    dialogs: list[Dialog] = []
    known: set[str] = set()
    for string in (
        HARMLESS,
        f"<img src=x onerror={HACK},alert(1)>.png",
        f'"><svg onload={HACK}>',
        f"<iframe srcdoc='<script>parent.{HACK}'>",
        "{{constructor.constructor('" + HACK + "')()}}[x](javascript:" + HACK + ") <b onclick=x>",
    ):
        context = browser.new_context()
        page = context.new_page()
        page.on("dialog", lambda dialog: dialogs.append(dialog))
        elements = tried(page, server, string)
        known = known or elements
        assert elements <= known, string
        assert page.evaluate("window.hacked") is None, string
        expect_size(page, "start", (91, 60))
        context.close()
    assert not dialogs
