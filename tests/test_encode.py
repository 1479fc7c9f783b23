from __future__ import annotations

import io
import shutil
import struct
import subprocess
import threading
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from async_sessions._codec import filters, pngwrite
from async_sessions._codec.encode import png
from async_sessions.records import KIB
from tests.images import MODES, encoded, noise, photo, photograph, png_chunks, png_pixels, srgb_profile, take


def by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        return image


def by_opencv(data: bytes) -> Any:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def as_opencv_has_it(image: Image.Image) -> Any:
    if image.mode == "I;16":
        return np.asarray(image)
    if image.has_transparency_data:
        return cv2.cvtColor(np.asarray(image.convert("RGBA")), cv2.COLOR_RGBA2BGRA)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    return cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR)


def assert_written(image: Image.Image) -> bytes:
    data = png(image)
    again = by_pillow(data)
    assert (again.mode, again.size, again.tobytes()) == (image.mode, image.size, image.tobytes())
    assert np.array_equal(by_opencv(data), as_opencv_has_it(image))
    assert take(data)[0].data == data, "our own scanner finds nothing to drop"
    return data


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 3), (9, 8), (33, 17), (400, 1400)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_pillow_and_opencv_read_the_pixels_that_were_written(mode: str, size: tuple[int, int]) -> None:
    assert_written(noise(mode, *size))


@pytest.mark.parametrize("mode", MODES)
def test_a_photograph_of_many_strips_comes_back_in_every_mode(mode: str) -> None:
    colour = photograph(1210, 803, seed=2)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 200)
    else:
        image = colour.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = assert_written(image)
    assert sum(kind == b"IDAT" for kind, _ in png_chunks(data)) > 1 or mode == "1"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(MODES), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**32), st.integers(1, 256))
def test_an_image_of_chance_is_read_back_as_it_was(mode: str, width: int, height: int, seed: int, colours: int) -> None:
    assert_written(noise(mode, width, height, seed, colours=colours))


@pytest.mark.parametrize("kind", [filters.NONE, filters.SUB, filters.UP, filters.AVERAGE, filters.PAETH])
@pytest.mark.parametrize("deflater", [pngwrite.near, pngwrite.far, pngwrite.runs, pngwrite.search])
def test_every_way_to_write_is_read_back(kind: int, deflater: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pngwrite, "choose", lambda image, layout: pngwrite.Way(kind, deflater))
    for mode in ("L", "LA", "RGB", "RGBA", "I;16"):
        data = assert_written(noise(mode, 301, 1003))
        assert zlib.decompress(png_pixels(data))[0] == kind


def test_the_filters_are_those_of_the_specification() -> None:
    axis = np.array([0, 1, 2, 3, 50, 84, 85, 86, 127, 128, 170, 171, 253, 254, 255], np.uint8)
    left, above, corner = (part.reshape(-1) for part in np.meshgrid(axis, axis, axis))
    scratch = [np.empty(left.size, np.uint8) for _ in range(4)]
    filters.average(left, above, scratch)
    a, b, c = (part.astype(int) for part in (left, above, corner))
    assert np.array_equal(scratch[0], (a + b) // 2)
    filters.paeth(left, above, corner, scratch)
    to_a, to_b, to_c = (abs(a + b - c - part) for part in (a, b, c))
    expected = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    assert np.array_equal(scratch[0], expected)


def test_no_match_reaches_back_further_than_the_header_says() -> None:
    data = png_pixels(png(photograph(700, 500)))
    window = 8 + (data[0] >> 4)
    assert window < 15, "a photograph is written with a small window"
    reader, inflated = zlib.decompressobj(window), bytearray()
    waiting = data
    while not reader.eof:
        inflated += reader.decompress(waiting, 64)  # so little at a time that only the window knows what was before
        waiting = reader.unconsumed_tail
    assert inflated == zlib.decompress(data)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("1", 0), ("L", 7), ("I;16", 300), ("RGB", (1, 2, 3)), ("P", 2), ("P", b"\x00\x80\xff\x10")],
)
def test_transparency_is_kept(mode: str, transparency: Any) -> None:
    image = noise(mode, 20, 10)
    image.info["transparency"] = transparency
    assert by_pillow(png(image)).info["transparency"] == transparency


def test_transparency_is_that_which_pillow_writes() -> None:
    for mode, transparency in (("P", 300), ("P", -1), ("P", bytes(400)), ("L", 70_000), ("RGB", (1, 2, 65_535))):
        image = noise(mode, 20, 10, colours=20)
        image.info["transparency"] = transparency
        assert dict(png_chunks(png(image)))[b"tRNS"] == dict(png_chunks(encoded(image, "PNG")))[b"tRNS"]


def test_the_alpha_of_a_palette_is_kept() -> None:
    image = noise("P", 20, 10, colours=4)
    image.putpalette(bytes(range(16)), "RGBA")
    again = by_pillow(png(image))
    assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_a_colour_profile_is_kept_and_other_metadata_is_not() -> None:
    image = noise("RGB", 20, 10)
    image.info.update(icc_profile=srgb_profile(), comment="hidden", dpi=(72, 72))
    data = png(image)
    assert by_pillow(data).info["icc_profile"] == srgb_profile()
    assert [kind for kind, _ in png_chunks(data)] == [b"IHDR", b"iCCP", b"IDAT", b"IEND"]


@pytest.mark.parametrize(("colours", "depth"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
def test_a_palette_takes_no_more_bits_than_it_needs(colours: int, depth: int) -> None:
    data = assert_written(noise("P", 37, 11, colours=colours))
    assert data[24] == depth
    assert len(dict(png_chunks(data))[b"PLTE"]) == 3 * colours


def test_an_index_beyond_its_palette_has_an_entry_in_the_file() -> None:
    image = noise("P", 37, 11, colours=3)
    image.putpixel((5, 5), 200)
    data = png(image)
    assert by_pillow(data).tobytes() == image.tobytes()
    assert len(dict(png_chunks(data))[b"PLTE"]) == 3 * 201


def _drawing() -> Image.Image:
    image = Image.new("RGB", (1920, 1080), "white")
    draw = ImageDraw.Draw(image)
    for row in range(0, 1080, 18):
        draw.text((10 + row % 5 * 7, row), f"{row * row} lines of text, and none of them like another " * 4, "black")
    return image


def _gradient(name: str) -> Image.Image:
    across, down = np.meshgrid(np.arange(1920), np.arange(1080))
    bands = {
        "across": [across // 8] * 3,
        "diagonal": [across * 255 // 1920, down * 255 // 1080, (across + down) * 255 // 3000],
        "checks": [(across // 8 + down // 8) % 2 * 255] * 3,
    }[name]
    return Image.fromarray(np.stack(bands, 2).astype(np.uint8))


def _tiles(side: int) -> Image.Image:
    """A square of noise, repeated."""
    tile = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(np.tile(tile, (1088 // side, 1920 // side, 1))[:1080])


def _rings() -> Image.Image:
    """A zone plate: rings that get finer up to two pixels."""
    across, down = np.meshgrid(np.arange(1920) - 960, np.arange(1080) - 540)
    rings = np.sin((across**2 + down**2) * np.pi / 1920)
    return Image.merge("RGB", [Image.fromarray((127.5 * (1 + rings)).astype(np.uint8))] * 3)


SIZES: dict[str, tuple[Any, float, int]] = {  # how to make the image; how many times as large, or by how much larger
    "astronaut": (lambda: by_pillow(photo("astronaut.png")), 1.2, 0),
    "chelsea": (lambda: by_pillow(photo("chelsea.png")), 1.2, 0),
    "rocket": (lambda: Image.open(io.BytesIO(photo("rocket.jpg"))), 1.2, 0),
    "coffee, resampled": (lambda: photograph(960, 540, seed=2), 1.2, 0),
    "chelsea, resampled": (lambda: photograph(960, 540, seed=1), 1.2, 0),
    "out of focus": (lambda: photograph(960, 540, seed=2).filter(ImageFilter.GaussianBlur(2)), 1.2, 0),
    "one colour": (lambda: Image.new("RGB", (1920, 1080), (12, 90, 200)), 1, 128 * KIB),
    "across": (partial(_gradient, "across"), 1, 128 * KIB),
    "diagonal": (partial(_gradient, "diagonal"), 1, 128 * KIB),
    "checks": (partial(_gradient, "checks"), 1, 128 * KIB),
    "text": (_drawing, 1, 128 * KIB),
    "four colours": (lambda: photograph(1920, 1080).quantize(4), 1, 128 * KIB),
    "a tile of noise, 16 x 16": (partial(_tiles, 16), 1, 128 * KIB),
    "a tile of noise, 64 x 64": (partial(_tiles, 64), 1, 128 * KIB),
    "noise in black and white, as RGB": (lambda: noise("1", 1920, 1080).convert("RGB"), 1, 128 * KIB),
    "a dithered page, as RGB": (lambda: photograph(1920, 1080).convert("1").convert("RGB"), 1, 128 * KIB),
    "rings": (_rings, 1, 128 * KIB),
    "black and white": (lambda: photograph(1920, 1080).convert("1"), 1, 128 * KIB),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.slow
def test_a_file_is_little_larger_than_the_smallest_that_pillow_makes(name: str) -> None:
    make, times, more = SIZES[name]
    image = make()
    assert len(png(image)) <= times * len(encoded(image, "PNG", optimize=True)) + more


def test_an_estimate_takes_zlib_where_it_gains_and_isal_elsewhere() -> None:
    for image, deflater in (
        (photograph(960, 540, seed=4), pngwrite.near),
        (photograph(1920, 1080, seed=2).filter(ImageFilter.GaussianBlur(4)), pngwrite.runs),
        (_drawing(), pngwrite.search),
        (Image.new("RGB", (1920, 1080)), pngwrite.near),
    ):
        assert pngwrite.choose(image, pngwrite.layout_of(image)).deflater is deflater


@pytest.mark.skipif(shutil.which("pngcheck") is None, reason="pngcheck is not installed")
@pytest.mark.parametrize("mode", MODES)
def test_pngcheck_finds_no_fault(mode: str, tmp_path: Path) -> None:
    image = noise(mode, 333, 1001)
    image.info["icc_profile"] = srgb_profile()
    for name, one in (("noise", image), ("flat", Image.new(mode, (700, 600)))):
        path = tmp_path / f"{name}.png"
        path.write_bytes(png(one))
        done = subprocess.run(["pngcheck", "-v", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        assert "No errors detected" in done.stdout


def test_threads_that_write_at_once_do_not_disturb_each_other() -> None:
    images = [photograph(640, 400, seed=seed) for seed in range(4)]
    alone, together = [png(image) for image in images], [b""] * 4

    def work(place: int) -> None:
        together[place] = png(images[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_the_header_states_depth_and_colour_type() -> None:
    expected = {"1": (1, 0), "L": (8, 0), "LA": (8, 4), "P": (8, 3), "RGB": (8, 2), "RGBA": (8, 6), "I;16": (16, 0)}
    for mode, fields in expected.items():
        assert struct.unpack_from(">II2B", png(noise(mode, 5, 3)), 16) == (5, 3, *fields)
