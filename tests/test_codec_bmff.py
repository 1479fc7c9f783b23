from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from async_sessions import ImageRejectedError, open_store
from async_sessions._codec import decode
from async_sessions.records import Limits
from tests.corpus import LIMITS
from tests.corpus.bmff import avif, heic
from tests.images import PLACE, corners, exif, photograph, refusal, rgba_png, srgb_profile, take, turned

MAKERS = pytest.mark.parametrize("make", [avif, heic])


@MAKERS
def test_a_still_image_is_decoded_with_its_colours_and_its_profile(make: Any) -> None:
    image = corners(64, 48)
    rebuilt, decoded = take(make(image, icc_profile=srgb_profile()) if make is avif else make(image), LIMITS)
    assert (rebuilt.width, rebuilt.height) == (
        (64, 48) if make is avif else (64, 64)
    )  # HEVC is cut out of whole blocks
    assert (decoded.mode, decoded.size) == ("RGB", (64, 48))
    assert np.abs(np.asarray(decoded, int) - np.asarray(image, int)).mean() < 4
    if make is avif:
        assert decoded.info == {"icc_profile": srgb_profile()}


@MAKERS
def test_transparency_is_kept(make: Any) -> None:
    source = Image.open(io.BytesIO(rgba_png(96, 64)))
    rebuilt, decoded = take(make(source), LIMITS)
    assert decoded.mode == "RGBA"
    assert rebuilt.coded == 2 * 96 * 64
    alpha = np.asarray(decoded.getchannel("A"), int) - np.asarray(source.getchannel("A"), int)
    assert np.abs(alpha).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_upright_and_says_nothing_more(orientation: int) -> None:
    data = avif(turned(corners(), orientation), exif=exif(orientation))
    _, decoded = take(data)
    assert decoded.size == (48, 32)
    assert np.abs(np.asarray(decoded, int) - np.asarray(corners(), int)).mean() < 6
    assert not {"exif", "xmp"} & decoded.info.keys()


def test_xmp_does_not_turn_an_avif() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    _, decoded = take(avif(corners(), xmp=xmp))
    assert decoded.size == (48, 32)


def test_a_general_brand_is_told_by_those_behind_it() -> None:
    assert refusal(avif(corners()).replace(b"ftypavif", b"ftypmif1", 1)) is None
    assert refusal(heic(corners()).replace(b"ftypheic", b"ftypmif1", 1)) == "unsupported_format"
    assert refusal(heic(corners()).replace(b"ftypheic", b"ftypmif1", 1), LIMITS) is None


def test_an_image_beyond_the_limits_is_refused_before_it_is_decoded() -> None:
    data = avif(photograph(320, 200))
    assert refusal(data, Limits(max_pixels=320 * 200)) is None
    assert refusal(data, Limits(max_pixels=320 * 200 - 1)) == "too_many_pixels"
    assert refusal(data, Limits(max_side=319)) == "too_many_pixels"


@pytest.mark.anyio
async def test_both_are_stored_as_png_without_metadata() -> None:
    async with open_store("memory://", limits=LIMITS) as store:
        session = await store.create_session()
        for make in (avif, heic):
            record = await session.store_image(make(photograph(96, 64), exif=exif(1)), "start", name="beach.avif")
            assert (record.media_type, record.size, record.orientation) == ("image/png", (96, 64), 1)
            data = await session.retrieve_bytes("start")
            assert data.startswith(b"\x89PNG")
            assert PLACE not in data
            assert (await session.retrieve_image("start")).size == (96, 64)


def test_heic_has_to_be_asked_for_and_the_refusal_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(corners())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for limits in (Limits(), LIMITS):
        with pytest.raises(ImageRejectedError, match=r"pip install 'async-sessions\[heif\]'") as caught:
            take(data, limits)
        assert caught.value.reason == "unsupported_format"


def test_pillow_heif_is_not_imported_until_a_heic_file_comes() -> None:
    code = "import sys, async_sessions; assert 'pillow_heif' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decoding_counts_three_times() -> None:
    assert decode.peak(b"", "AVIF", 100, 1) == 300


def test_where_warnings_are_errors_one_of_pillows_is_a_refusal() -> None:
    data = avif(corners(), exif=exif(1))
    assert refusal(data.replace(b"MM\0*\0\0\0\x08", b"MM\0*\0\0\xff\xff")) in ("corrupt", "truncated")
