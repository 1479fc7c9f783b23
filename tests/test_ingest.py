from __future__ import annotations

import hashlib
import io
import os
import threading
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from PIL import Image

from async_sessions._budget import PixelBudget
from async_sessions._codec import decode
from async_sessions._ingest import ImageSource, Ingested, ingest
from async_sessions.errors import ImageRejectedError, StorageError
from async_sessions.records import MIB, Limits
from tests.images import (
    CAMERA,
    PLACE,
    corners,
    encoded,
    exif,
    jpeg_with_exif,
    photo,
    photo_path,
    photograph,
    png_file,
    rgba_png,
    segment,
    turned,
)

pytestmark = pytest.mark.anyio

LIMITS = Limits()


async def take(source: ImageSource, name: str | None = None, limits: Limits = LIMITS) -> Ingested:
    return await take_within(anyio.CapacityLimiter(1), source, name, limits)


async def take_within(
    limiter: anyio.CapacityLimiter, source: ImageSource, name: str | None = None, limits: Limits = LIMITS
) -> Ingested:
    async with ingest({"x": source}, name=name, limits=limits, limiter=limiter, budget=PixelBudget()) as taken:
        return taken["x"]


async def refusal(source: ImageSource, limits: Limits = LIMITS) -> str:
    with pytest.raises(ImageRejectedError) as caught:
        await take(source, limits=limits)
    return caught.value.reason


def image_of(taken: Ingested) -> Image.Image:
    assert taken.image is not None
    return taken.image


async def chunks(data: bytes | bytearray | memoryview, size: int = 10_000) -> AsyncIterator[Any]:
    for start in range(0, len(data), size):
        await anyio.lowlevel.checkpoint()
        yield data[start : start + size]


async def test_a_camera_picture_is_stored_as_it_came_without_where_it_was_taken() -> None:
    upright = photograph(320, 240, seed=5)
    data = jpeg_with_exif(6, image=upright)
    taken = await take(data, "C:\\holidays\\beach.jpg")
    assert (taken.media_type, taken.mode, taken.has_alpha) == ("image/jpeg", "RGB", False)
    assert (taken.width, taken.height, taken.orientation) == (320, 240, 6)
    assert image_of(taken).size == (320, 240)
    assert taken.digest == hashlib.sha256(taken.data).hexdigest()
    assert taken.source_name == "beach.jpg"
    assert PLACE in data
    assert not [secret for secret in (PLACE, CAMERA.encode(), b"beach") if secret in taken.data]
    assert decode.load(taken.data, taken.media_type).tobytes() == image_of(taken).tobytes()
    difference = np.asarray(image_of(taken), int) - np.asarray(upright, int)
    assert np.abs(difference).mean() < 5
    with Image.open(io.BytesIO(taken.thumbnail)) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("WEBP", (320, 240))


async def test_a_png_with_alpha_is_stored_byte_for_byte() -> None:
    data = rgba_png()
    taken = await take(data)
    assert taken.data == data
    assert (taken.media_type, taken.mode, taken.has_alpha, taken.source_name) == ("image/png", "RGBA", True, None)


async def test_every_kind_of_source_gives_the_same_bytes(tmp_path: Path) -> None:
    data = photo("rocket.jpg")
    path = tmp_path / "rocket.jpg"
    path.write_bytes(data)
    link = tmp_path / "link.jpg"
    link.symlink_to(path)
    expected = await take(data)
    every_other = np.repeat(np.frombuffer(data, np.uint8), 2).data[::2]
    sources: list[ImageSource] = [bytearray(data), memoryview(data), every_other, path, link]
    sources += [
        chunks(data),
        chunks(data, 1 << 30),
        chunks(memoryview(data)),
        chunks(every_other),
        chunks(bytearray(data)),
    ]
    for source in sources:
        taken = await take(source)
        assert (taken.data, taken.digest) == (expected.data, expected.digest)


async def test_a_buffer_may_be_changed_once_it_was_taken() -> None:
    data = bytearray(photo("chelsea.png"))
    taken = await take(data)
    data[:] = bytes(len(data))
    assert hashlib.sha256(taken.data).hexdigest() == taken.digest
    array = np.asarray(photograph(64, 48)).copy()
    taken = await take(array)
    before = image_of(taken).tobytes()
    array[:] = 0
    assert image_of(taken).tobytes() == before


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
async def test_a_pillow_image_is_stored_as_png_and_not_changed(mode: str) -> None:
    image = photograph(64, 48).convert(mode)
    before = (image.mode, image.tobytes(), dict(image.info))
    taken = await take(image)
    assert (taken.media_type, taken.orientation) == ("image/png", 1)
    assert (image.mode, image.tobytes(), dict(image.info)) == before
    again = decode.load(taken.data, taken.media_type)
    assert (again.mode, again.tobytes()) == (taken.mode, image_of(taken).tobytes())
    image_of(taken).paste(0, (0, 0, 64, 48))
    assert image.tobytes() == before[1]


async def test_a_pillow_image_is_made_upright_and_loses_its_exif(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    path.write_bytes(jpeg_with_exif(8, image=corners(), subsampling=0, quality=95))
    with Image.open(path) as image:  # not loaded yet
        taken = await take(image)
        assert image.size == (32, 48)
    assert (taken.width, taken.height, taken.orientation) == (48, 32, 1)
    assert PLACE not in taken.data
    with Image.open(path) as image:
        expected = image.transpose(Image.Transpose.ROTATE_90)
    assert image_of(taken).tobytes() == expected.tobytes()


async def test_an_orientation_that_was_set_on_the_image_counts() -> None:
    image = turned(corners(), 3)
    image.getexif()[0x0112] = 3
    assert image_of(await take(image)).tobytes() == corners().tobytes()
    assert image.getexif()[0x0112] == 3


async def test_a_pillow_image_whose_file_was_cut_is_truncated(tmp_path: Path) -> None:
    for name in ("rocket.jpg", "chelsea.png"):
        path = tmp_path / name
        path.write_bytes(photo(name)[:50_000])
        with Image.open(path) as image:
            assert await refusal(image) == "truncated"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", "text"])
async def test_exif_that_cannot_be_read_says_nothing_about_the_pixels(block: Any) -> None:
    image = corners()
    image.info["exif"] = block
    assert image_of(await take(image)).tobytes() == corners().tobytes()


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [
        ("P", bytes(300)),
        ("P", 256),
        ("P", -1),
        ("L", -1),
        ("L", 256),
        ("I;16", 65_536),
        ("RGB", (0, 0, 256)),
        ("L", b"0"),
    ],
)
async def test_a_transparency_that_png_cannot_hold_is_none(mode: str, transparency: object) -> None:
    image = Image.new(mode, (64, 48))
    image.info["transparency"] = transparency
    taken = await take(image)
    assert not taken.has_alpha
    assert "transparency" not in decode.load(taken.data, taken.media_type).info


async def test_a_pillow_image_that_was_closed_is_refused() -> None:
    opened = Image.open(io.BytesIO(photo("chelsea.png")))
    closed = corners()
    for image in (opened, closed):
        image.close()
        with pytest.raises(ImageRejectedError, match="closed"):
            await take(image)


async def test_a_kind_of_image_of_the_apps_own_is_an_image() -> None:
    class Drawing(Image.Image):
        pass

    drawing = Drawing()
    drawing.__setstate__([{}, "RGB", corners().size, None, corners().tobytes()])
    assert image_of(await take(drawing)).tobytes() == corners().tobytes()


async def test_a_pillow_image_beyond_the_limits_is_not_even_loaded() -> None:
    with Image.open(io.BytesIO(png_file(9000, 9000, 1, 0))) as image:
        assert await refusal(image) == "too_many_pixels"
        assert getattr(image, "tile", None), "still to be loaded"


@pytest.mark.parametrize(
    ("shape", "dtype", "mode"),
    [
        ((4, 5), "uint8", "L"),
        ((4, 5, 1), "uint8", "L"),
        ((4, 5, 3), "uint8", "RGB"),
        ((4, 5, 4), "uint8", "RGBA"),
        ((4, 5), "<u2", "I;16"),
        ((4, 5), ">u2", "I;16"),
        ((4, 5, 1), "<u2", "I;16"),
        ((1, 1), "uint8", "L"),
    ],
)
async def test_an_array_is_stored_value_for_value(shape: tuple[int, ...], dtype: str, mode: str) -> None:
    array = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)
    for source in (array, np.asfortranarray(array), array[::-1, ::-1][::-1, ::-1], array[...]):
        taken = await take(source)
        assert taken.mode == mode
        again = np.asarray(decode.load(taken.data, "image/png"))
        assert np.array_equal(again, array.squeeze(2) if shape[2:] == (1,) else array)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 5), np.float32), "unsupported_format"),
        (np.zeros((4, 5), bool), "unsupported_format"),
        (np.zeros((4, 5), np.int8), "unsupported_format"),
        (np.zeros((4, 5), np.int64), "unsupported_format"),
        (np.zeros((4, 5, 3), np.uint16), "unsupported_format"),
        (np.zeros((4, 5, 2), np.uint8), "unsupported_format"),
        (np.zeros((3, 4, 5), np.uint8), "unsupported_format"),
        (np.zeros((1, 4, 5, 3), np.uint8), "unsupported_format"),
        (np.zeros(5, np.uint8), "unsupported_format"),
        (np.zeros((), np.uint8), "unsupported_format"),
        (np.array([[None]]), "unsupported_format"),
        (np.zeros((0, 5), np.uint8), "empty"),
        (np.zeros((4, 0, 3), np.uint8), "empty"),
        (np.broadcast_to(np.uint8(0), (9000, 9000)), "too_many_pixels"),
        (np.broadcast_to(np.uint8(0), (1, 20_000)), "too_many_pixels"),
    ],
)  # fmt: skip
async def test_an_array_that_is_no_image_is_refused(array: np.ndarray[Any, Any], reason: str) -> None:
    assert await refusal(array) == reason


@pytest.mark.parametrize("source", ["/etc/passwd", "picture.png", 5, None, [b"data"], iter([b"data"]), object()])
async def test_what_is_no_image_source_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match=r"pathlib\.Path"):
        await take(source)


async def test_chunks_that_are_not_bytes_are_a_type_error() -> None:
    async def texts() -> AsyncIterator[Any]:
        yield "text"

    with pytest.raises(TypeError, match="chunks of bytes, not str"):
        await take(texts())


async def test_nothing_at_all_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for source in (b"", bytearray(), memoryview(b""), tmp_path / "empty.png", chunks(b""), Image.new("RGB", (0, 5))):
        assert await refusal(source) == "empty"


async def test_a_file_is_taken_up_to_the_limit_and_not_a_byte_further(tmp_path: Path) -> None:
    data = photo("rocket.jpg")
    path = tmp_path / "rocket.jpg"
    path.write_bytes(data)
    for size, expected in ((len(data), None), (len(data) - 1, "too_many_bytes")):
        limits = Limits(max_bytes=size)
        for source in (data, bytearray(data), memoryview(data), path, chunks(data)):
            if expected is None:
                await take(source, limits=limits)
            else:
                assert await refusal(source, limits) == expected


async def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert await refusal(path) == "too_many_bytes"


async def test_an_endless_source_is_closed_once_it_is_too_large() -> None:
    given, closed = 0, False

    async def endless() -> AsyncIterator[bytes]:
        nonlocal given, closed
        try:
            while True:
                given += 1
                yield bytes(MIB)
        finally:
            closed = True

    assert await refusal(endless(), Limits(max_bytes=3 * MIB)) == "too_many_bytes"
    assert given == 4
    assert closed


async def test_an_error_of_the_source_reaches_the_caller() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"\x89PNG"
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError, match="gone"):
        await take(broken())


async def test_a_path_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    open_files = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "none.png", tmp_path, fifo, Path("/dev/null"), tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(StorageError, match=r"(cannot be read|is not a regular file).*\."):
            await take(path)
    assert len(os.listdir("/dev/fd")) == open_files
    with pytest.raises(StorageError) as caught:
        await take(tmp_path / "none.png")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("beach.jpg", "beach.jpg"),
        ("/tmp/gradio/beach.jpg", "beach.jpg"),
        ("..\\..\\beach.jpg", "beach.jpg"),
        ("../../etc/passwd", "passwd"),
        ("be\0ac\nh\x1b[31m.jpg\x7f\x85", "beach[31m.jpg"),
        ("\u202egpj.exe", "gpj.exe"),
        ("caf\xe9 \u6d77.png", "caf\xe9 \u6d77.png"),
        ("lone \udce9.png", "lone .png"),
        ("x" * 300 + ".png", "x" * 200),
        ("  spaced.png  ", "spaced.png"),
        ("", None),
        ("folder/", None),
        ("..", None),
        ("\n\t", None),
        ("n" * 199 + " n", "n" * 199),  # a name that was kept is kept again as it is
    ],
)  # fmt: skip
async def test_a_name_is_kept_short_printable_and_without_its_folders(name: str, expected: str | None) -> None:
    assert (await take(png_file(4, 4, 8, 0), name)).source_name == expected


async def test_a_path_gives_its_name_unless_there_is_another() -> None:
    path = photo_path("chelsea.png")
    assert (await take(path)).source_name == "chelsea.png"
    assert (await take(path, "cat.png")).source_name == "cat.png"
    assert (await take(photo("chelsea.png"))).source_name is None


async def test_pixels_beyond_pillows_own_limit_are_a_matter_of_ours() -> None:
    limits = Limits(max_pixels=200_000_000, max_side=20_000)
    filters = list(warnings.filters)
    taken = await take(png_file(20_000, 9000, 1, 0), limits=limits)
    assert (taken.width, taken.height) == (20_000, 9000)
    assert warnings.filters == filters


async def test_work_is_done_in_worker_threads_within_the_limiter() -> None:
    limiter = anyio.CapacityLimiter(2)
    borrowed: list[int] = []
    threads: set[int] = set()

    class Watched(bytearray):
        """Bytes that note who copies them."""

        def __bytes__(self) -> bytes:
            borrowed.append(int(limiter.borrowed_tokens))
            threads.add(threading.get_ident())
            return bytes(memoryview(self))

    async with anyio.create_task_group() as group:
        for seed in range(6):
            data = Watched(encoded(photograph(200, 100, seed), "JPEG"))
            group.start_soon(take_within, limiter, data)
    assert len(borrowed) == 6
    assert max(borrowed) <= 2
    assert threading.get_ident() not in threads
    assert limiter.borrowed_tokens == 0


async def test_a_cancelled_ingest_gives_its_slot_back() -> None:
    limiter = anyio.CapacityLimiter(1)
    data = encoded(photograph(2000, 1500), "JPEG")
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(take_within, limiter, data)
            group.start_soon(take_within, limiter, data)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert limiter.borrowed_tokens == 0
    assert (await take_within(limiter, data)).width == 2000


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
async def test_with_keep_metadata_a_file_is_kept_to_the_last_byte_and_looks_the_same(form: str) -> None:
    data = encoded(photograph(64, 48), form, exif=exif(6)) + b"<script>trailing</script>"
    kept = await take(data, limits=Limits(keep_metadata=True))
    cleaned = await take(data)
    assert kept.data == data
    assert kept.digest == hashlib.sha256(data).hexdigest()
    assert PLACE in kept.data
    assert PLACE not in cleaned.data
    assert (kept.verbatim, cleaned.verbatim) == (True, False)
    assert (kept.width, kept.height, kept.orientation) == (cleaned.width, cleaned.height, cleaned.orientation)
    assert kept.orientation == (1 if form == "WEBP" else 6)
    loaded = decode.load(kept.data, kept.media_type, verbatim=True)
    for image in (image_of(kept), loaded):
        assert (image.size, image.tobytes()) == (image_of(cleaned).size, image_of(cleaned).tobytes())
        assert image.info == image_of(cleaned).info


async def test_a_file_without_metadata_is_not_called_verbatim() -> None:
    taken = await take(rgba_png(), limits=Limits(keep_metadata=True))
    assert (taken.data, taken.verbatim) == (rgba_png(), False)


async def test_with_keep_metadata_the_same_files_are_refused() -> None:
    limits = Limits(keep_metadata=True)
    assert await refusal(photo("chelsea.png")[:-100], limits) == "truncated"
    bomb = jpeg_with_exif()[:2] + 20 * segment(0xFE, bytes(60_000)) + jpeg_with_exif()[2:]
    assert await refusal(bomb, limits) == "metadata_bomb"
