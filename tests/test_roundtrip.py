"""Images of chance, in every mode, size and format, in and out of a store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFile

from async_sessions import Session, open_store
from tests.images import MODES, encoded, exif, noise, payload, shown

if TYPE_CHECKING:
    from PIL import Image

pytestmark = pytest.mark.anyio

SIDES = st.integers(1, 700)
SEEDS = st.integers(0, 2**32)
# Of each mode that is converted, one that can be made into it, and that in which it comes back.
CONVERTED = {
    "CMYK": ("RGB", "RGB"),
    "YCbCr": ("RGB", "RGB"),
    "RGBX": ("RGB", "RGB"),
    "RGBa": ("RGBA", "RGBA"),
    "La": ("LA", "LA"),
    "PA": ("P", "RGBA"),
}

# Modes and options of encoders that keep what they are given apart from each other.
FILES = st.one_of(
    st.fixed_dictionaries(
        {
            "form": st.just("JPEG"),
            "mode": st.sampled_from(["L", "RGB", "CMYK"]),
            "quality": st.integers(1, 100),
            "subsampling": st.integers(0, 2),
            "progressive": st.booleans(),
            "optimize": st.booleans(),
            "restart_marker_rows": st.integers(0, 3),
        }
    ),
    st.fixed_dictionaries(
        {"form": st.just("PNG"), "mode": st.sampled_from(MODES), "compress_level": st.integers(0, 6)}
    ),
    st.fixed_dictionaries(
        {
            "form": st.just("WEBP"),
            "mode": st.sampled_from(["RGB", "RGBA"]),
            "quality": st.integers(0, 100),
            "lossless": st.booleans(),
            "method": st.integers(0, 2),
        }
    ),
)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def session() -> AsyncIterator[Session]:
    """Of a store that keeps nothing decoded, so that whatever is retrieved was stored."""
    async with open_store("memory://", cleanup_interval=None, cache_bytes=0) as store:
        yield await store.create_session()


def assert_same(one: Image.Image, other: Image.Image) -> None:
    assert (one.mode, one.size) == (other.mode, other.size)
    assert np.array_equal(np.asarray(one), np.asarray(other))
    assert one.convert("RGBA").tobytes() == other.convert("RGBA").tobytes(), "palette and transparency"


@settings(max_examples=60, deadline=None)
@given(mode=st.sampled_from([*MODES, *CONVERTED]), width=SIDES, height=SIDES, seed=SEEDS, transparent=st.booleans())
async def test_an_image_of_any_mode_and_size_comes_back_pixel_for_pixel(
    session: Session, mode: str, width: int, height: int, seed: int, transparent: bool
) -> None:
    made, returned = CONVERTED.get(mode, (mode, mode))
    image = noise(made, width, height, seed).convert(mode)
    if transparent and mode in ("1", "L", "P", "I;16"):
        image.info["transparency"] = 255 * (seed % 2)
    record = await session.store_image(image, "start")
    assert (record.mode, record.size) == (returned, (width, height))
    assert_same(await session.retrieve_image("start"), image.convert(returned))


@settings(max_examples=60, deadline=None)
@given(options=FILES, width=SIDES, height=SIDES, seed=SEEDS, orientation=st.integers(1, 8))
async def test_a_file_keeps_its_pixels_and_its_payload_byte_for_byte(
    session: Session, options: dict[str, Any], width: int, height: int, seed: int, orientation: int
) -> None:
    options = dict(options)
    form, mode = options.pop("form"), options.pop("mode")
    image = noise("RGB", width, height, seed).convert("CMYK") if mode == "CMYK" else noise(mode, width, height, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "MAXBLOCK", 8 * width * height + 65_536)  # Pillow's own is too small for noise
        data = encoded(image, form, exif=exif(orientation), **options)
    await session.store_image(data, "start")
    stored = await session.retrieve_bytes("start")
    assert payload(stored) == payload(data)
    assert_same(shown(stored), shown(data))
    assert_same(await session.retrieve_image("start"), shown(data))
