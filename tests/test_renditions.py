from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import JpegImageFile

from async_sessions import CorruptBlobError, MemoryBlobStore, Session, SlotEmptyError, open_store
from async_sessions.renditions import GREY, area_size, fit
from tests.images import corners, encoded, exif, photograph, rgba_png, srgb_profile, turned

if TYPE_CHECKING:
    from async_sessions.renditions import Fit

RED, LIME, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners_of(image: Image.Image) -> list[Any]:
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(place) for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def difference(first: Image.Image, second: Image.Image) -> float:
    return float(np.abs(np.asarray(first, int) - np.asarray(second, int)).mean())


def test_cover_cuts_off_evenly_and_fills_everything() -> None:
    wide = fit(corners(96, 32), (32, 32))
    assert (wide.mode, wide.size) == ("RGB", (32, 32))
    assert corners_of(wide) == [RED, LIME, WHITE, BLUE]
    assert difference(wide, corners(96, 32).crop((32, 0, 64, 32))) == 0


def test_contain_shows_everything_on_the_background() -> None:
    shown = fit(corners(64, 32), (32, 32), "contain", background=(1, 2, 3))
    assert shown.size == (32, 32)
    assert corners_of(shown) == [(1, 2, 3)] * 4
    assert corners_of(shown.crop((0, 8, 32, 24))) == [RED, LIME, WHITE, BLUE]


def test_stretch_keeps_no_ratio() -> None:
    shown = fit(corners(64, 32), (16, 48), "stretch")
    assert shown.size == (16, 48)
    assert corners_of(shown) == [RED, LIME, WHITE, BLUE]


@pytest.mark.parametrize("mode", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (333, 7), (64, 48), (640, 480)])
def test_the_size_is_exact_and_the_source_is_left_alone(mode: Fit, size: tuple[int, int]) -> None:
    for source in (photograph(64, 48), Image.new("RGB", (1, 1)), Image.new("L", (1, 700)), Image.new("P", (9, 3))):
        before = source.tobytes()
        ImageDraw.Draw(fit(source, size, mode)).rectangle((0, 0, 9, 9), fill="red")
        assert fit(source, size, mode).size == size
        assert source.tobytes() == before


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_picture(mode: str) -> None:
    source = corners().convert(mode) if mode != "I;16" else Image.fromarray(np.full((32, 48), 0x80FF, np.uint16))
    shown = fit(source, (48, 32))
    assert shown.mode == "RGB"
    expected = source.convert("RGB") if mode != "I;16" else Image.new("RGB", (48, 32), GREY)
    assert difference(shown, expected) < 1


def test_what_is_transparent_becomes_the_background() -> None:
    source = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert fit(source, (4, 4)).getcolors() == [(16, GREY)]
    assert fit(source, (4, 2), "contain", (9, 8, 7)).getcolors() == [(8, (9, 8, 7))]
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert fit(palette, (4, 4)).getcolors() == [(16, GREY)]


def test_the_profile_is_all_that_stays_in_info() -> None:
    source = photograph(64, 48)
    source.info.update(icc_profile=srgb_profile(), comment=b"hidden")
    assert fit(source, (8, 8), "contain").info == {"icc_profile": srgb_profile()}
    assert source.info["comment"] == b"hidden"


def test_a_size_or_a_mode_that_makes_no_sense_is_refused() -> None:
    for size in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="at least 1 x 1"):
            fit(corners(), size)
    with pytest.raises(ValueError, match="cover, contain, stretch"):
        fit(corners(), (4, 4), "crop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "max_area", "multiple", "expected"),
    [
        ((1920, 1080), 1280 * 720, 16, (1280, 720)),
        ((1080, 1920), 1280 * 720, 16, (720, 1280)),
        ((1920, 1080), 832 * 480, 16, (832, 464)),
        ((1000, 1000), 832 * 480, 16, (624, 624)),
        ((1280, 704), 1280 * 704, 32, (1280, 704)),
        ((4000, 3000), 1280 * 704, 32, (1088, 800)),
        ((10_000, 1), 832 * 480, 16, (63_184, 16)),
    ],
)
def test_area_size_is_the_arithmetic_of_wan(
    source: tuple[int, int], max_area: int, multiple: int, expected: tuple[int, int]
) -> None:
    assert area_size(*source, max_area, multiple) == expected


def test_area_size_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="positive"):
        area_size(0, 100, 1000, 16)


# --- of stored images


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes that JPEG files were decoded to."""
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def noted(image: JpegImageFile) -> Any:
        if image.tile:  # not loaded yet
            sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImageFile, "load", noted)
    return sizes


async def _cold(data: bytes) -> tuple[MemoryBlobStore, str]:
    blobs = MemoryBlobStore()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(data, "start")
    assert session.id is not None
    return blobs, session.id


@pytest.mark.anyio
@pytest.mark.parametrize("orientation", [1, 6])
async def test_a_large_jpeg_is_decoded_small_and_once(orientation: int, drafts: list[tuple[int, int]]) -> None:
    upright = photograph(1600, 1200)
    data = encoded(turned(upright, orientation), "JPEG", quality=95, exif=exif(orientation))
    blobs, session_id = await _cold(data)
    drafts.clear()
    async with open_store(blobs, cleanup_interval=None) as store:
        session = await store.restore_session(session_id)
        small = await session.retrieve_rendition("start", (160, 90))
        assert drafts == [(400, 300) if orientation == 1 else (300, 400)]
        assert difference(small, fit(upright, (160, 90))) < 3
        ImageDraw.Draw(small).rectangle((0, 0, 159, 89), fill="red")
        again = await (await session.read_record((await session.info()).images["start"])).rendition((160, 90))
        assert again.tobytes() != small.tobytes()
        assert len(drafts) == 1
        await session.retrieve_rendition("start", (1500, 1000))
        assert len(drafts) == 2
        assert max(drafts[-1]) == 1600


@pytest.mark.anyio
async def test_a_cached_image_is_not_decoded_again(session: Session, drafts: list[tuple[int, int]]) -> None:
    await session.store_image(encoded(photograph(800, 600), "JPEG"), "start")
    drafts.clear()
    for mode in ("cover", "contain", "stretch"):
        assert (await session.retrieve_rendition("start", (40, 40), mode)).size == (40, 40)
    assert drafts == []


@pytest.mark.anyio
async def test_a_png_is_fitted_with_its_transparency(session: Session) -> None:
    await session.store_image(rgba_png(320, 200), "start")
    shown = await session.retrieve_rendition("start", (32, 20), background=(10, 20, 30))
    assert difference(Image.new("RGB", (1, 20), (10, 20, 30)), shown.crop((0, 0, 1, 20))) < 5


@pytest.mark.anyio
async def test_a_rendition_goes_with_its_image(session: Session) -> None:
    record = await session.store_image(photograph(64, 48), "start")
    stored = await session.read_record(record)
    await stored.rendition((8, 8))
    await session.clear_all_images()
    with pytest.raises(CorruptBlobError):
        await stored.rendition((8, 8))
    with pytest.raises(SlotEmptyError):
        await session.retrieve_rendition("start", (8, 8))


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("L", b"GRAY")])
def test_a_profile_of_other_samples_than_rgb_is_dropped(mode: str, space: bytes) -> None:
    image = Image.new(mode, (8, 8))
    image.info["icc_profile"] = srgb_profile().replace(b"RGB ", space, 1)
    assert fit(image, (4, 4)).info == {}


@pytest.mark.anyio
async def test_a_rendition_is_no_larger_than_the_largest_image() -> None:
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(corners(), "start")
        with pytest.raises(ValueError, match="64,000,000"):
            await session.retrieve_rendition("start", (30_000, 3_000))
