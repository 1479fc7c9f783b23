from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from async_sessions._codec import decode, encode
from async_sessions._codec.sniff import sniff
from async_sessions.errors import ImageRejectedError
from async_sessions.records import Limits
from tests import damage
from tests.corpus import foreign
from tests.images import (
    cmyk_profile,
    corners,
    encoded,
    exif,
    jpeg_with_exif,
    photo,
    photograph,
    refusal,
    rgba_png,
    srgb_profile,
    take,
    turned,
)

if TYPE_CHECKING:
    from random import Random

LIMITS = Limits()


NOT_TAKEN = [
    *foreign.FILES,
    (foreign.ftyp(b"avif"), "an AVIF"),
    (foreign.ftyp(b"avis"), "an AVIF"),
    (foreign.ftyp(b"heic"), "a HEIC"),
    (foreign.ftyp(b"mif1"), "a HEIC"),
]


@pytest.mark.parametrize(("data", "name"), NOT_TAKEN, ids=[name for _, name in NOT_TAKEN])  # some hold the time
def test_what_is_not_taken_is_refused_by_its_name(data: bytes, name: str) -> None:
    with pytest.raises(ImageRejectedError, match=f"This is {name}.*it must be JPEG, PNG or WEBP\\.") as caught:
        sniff(data, Limits(formats=("JPEG", "PNG", "WEBP")))
    assert caught.value.reason == "unsupported_format"


@pytest.mark.parametrize("data", [b"\x89", b"\x89PNG\r\n", b"\xff", b"\xff\xd8"])
def test_the_beginning_of_a_signature_is_a_truncated_file(data: bytes) -> None:
    assert refusal(data) == "truncated"


def test_only_formats_that_are_allowed_are_taken() -> None:
    png, jpeg, webp = (encoded(corners(), form) for form in ("PNG", "JPEG", "WEBP"))
    only_png = Limits(formats=("PNG",))
    assert [refusal(data, only_png) for data in (png, jpeg, webp)] == [None, *["unsupported_format"] * 2]
    with pytest.raises(ImageRejectedError, match="a JPEG image; it must be PNG"):
        sniff(jpeg, only_png)
    with pytest.raises(ImageRejectedError, match="a PNG image; it must be JPEG or WEBP"):
        sniff(png, Limits(formats=("JPEG", "WEBP")))


def test_stored_bytes_are_read_back_upright() -> None:
    rebuilt, image = take(jpeg_with_exif(6))
    again = decode.load(rebuilt.data, "image/jpeg")
    assert again.size == (320, 240)
    assert again.tobytes() == image.tobytes()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_decoded_image_is_a_plain_one_that_holds_nothing_but_its_pixels(form: str) -> None:
    for orientation in (1, 6):
        _, image = take(encoded(photograph(64, 48), form, exif=exif(orientation)))
        assert type(image) is Image.Image
        assert "exif" not in image.info
        image.putpixel((0, 0), 0)


@pytest.mark.parametrize(
    ("media_type", "reason"), [("image/png", "corrupt"), ("image/webp", "corrupt"), ("image/gif", "unsupported_format")]
)
def test_stored_bytes_are_never_read_as_another_format(media_type: str, reason: str) -> None:
    with pytest.raises(ImageRejectedError) as caught:
        decode.load(photo("rocket.jpg"), media_type)
    assert caught.value.reason == reason


def test_stored_bytes_that_were_cut_are_truncated() -> None:
    for name, media_type in (("rocket.jpg", "image/jpeg"), ("chelsea.png", "image/png")):
        with pytest.raises(ImageRejectedError) as caught:
            decode.load(photo(name)[:50_000], media_type)
        assert caught.value.reason == "truncated"


@cache
def _modes() -> dict[str, Image.Image]:
    colour, alpha = photograph(640, 400), Image.open(io.BytesIO(rgba_png(640, 400)))
    cut = colour.quantize(32)
    cut.info["transparency"] = bytes(range(0, 256, 8))
    deep = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    return {
        "1": colour.convert("1"),
        "L": colour.convert("L"),
        "LA": alpha.convert("LA"),
        "P": colour.quantize(200),
        "P with transparency": cut,
        "RGB": colour,
        "RGBA": alpha,
        "I;16": deep,
        "CMYK": colour.convert("CMYK"),
    }


@pytest.mark.parametrize("name", _modes())
def test_a_thumbnail_of_any_mode_is_a_small_webp_that_looks_like_it(name: str) -> None:
    image = _modes()[name]
    before = (image.mode, image.tobytes(), dict(image.info))
    with Image.open(io.BytesIO(decode.thumbnail(image)), formats=["WEBP"]) as small:
        assert small.size == (320, 200)
        assert small.has_transparency_data == image.has_transparency_data
        found = np.asarray(small.convert("RGBA").resize((32, 20), Image.Resampling.BOX), float)
    shown = Image.fromarray(encode.to_array(image)).convert("RGBA")
    expected = np.asarray(shown.resize((32, 20), Image.Resampling.BOX), float)
    visible = expected[..., 3:] / 255
    assert np.abs((found[..., :3] - expected[..., :3]) * visible).mean() < 12
    assert np.abs(found[..., 3] - expected[..., 3]).mean() < 4
    assert (image.mode, image.tobytes(), dict(image.info)) == before


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((4000, 3000), (320, 240)),
        ((99, 50), (99, 50)),
        ((16_000, 10), (320, 1)),
        ((3, 9000), (1, 320)),
        ((1, 1), (1, 1)),
    ],
)
def test_a_thumbnail_keeps_the_ratio_and_never_enlarges(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for mode in ("RGB", "P"):
        with Image.open(io.BytesIO(decode.thumbnail(Image.new(mode, size)))) as small:
            assert small.size == expected


def test_a_thumbnail_keeps_a_small_colour_profile_only() -> None:
    image = photograph(640, 400)
    for profile, kept in ((srgb_profile(), True), (srgb_profile(100_000), False), (bytes(500), False)):
        image.info["icc_profile"] = profile
        with Image.open(io.BytesIO(decode.thumbnail(image))) as small:
            assert ("icc_profile" in small.info) == kept


def _stored(image: Image.Image) -> Image.Image:
    """What is read back of an image that was stored as a PNG."""
    copy = encode.upright_copy(image, LIMITS)
    data = encode.png(copy)
    again = take(data)[1]
    assert (again.mode, again.size, again.tobytes()) == (copy.mode, copy.size, copy.tobytes())
    assert again.has_transparency_data == copy.has_transparency_data
    return again


@pytest.mark.parametrize("name", [name for name in _modes() if name != "CMYK"])
def test_a_mode_that_png_holds_is_kept_pixel_for_pixel(name: str) -> None:
    image = _modes()[name]
    again = _stored(image)
    assert (again.mode, again.size, again.tobytes()) == (image.mode, image.size, image.tobytes())
    assert again.info.get("transparency") == image.info.get("transparency")
    assert np.array_equal(encode.to_array(again), encode.to_array(image))


@pytest.mark.parametrize(
    ("mode", "stored"), [("La", "LA"), ("PA", "RGBA"), ("RGBa", "RGBA"), ("RGBX", "RGB"), ("YCbCr", "RGB")]
)
def test_a_mode_that_has_an_equal_is_stored_as_that(mode: str, stored: str) -> None:
    colour = photograph(64, 40).convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB"))
    image = colour.convert(mode)
    again = _stored(image)
    assert again.mode == stored
    assert again.tobytes() == image.convert(stored).tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_stay_sixteen_bits(mode: str) -> None:
    values = np.arange(64 * 40, dtype=np.uint16).reshape(40, 64) * 25
    image = Image.frombytes(mode, (64, 40), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    again = _stored(image)
    assert again.mode == "I;16"
    assert np.array_equal(np.asarray(again), values)
    assert np.array_equal(encode.to_array(again)[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("mode", ["F", "I", "HSV", "LAB"])
def test_a_mode_that_png_cannot_hold_is_refused_by_its_name(mode: str) -> None:
    with pytest.raises(ImageRejectedError, match=f"mode {mode};") as caught:
        encode.upright_copy(Image.new(mode, (4, 4)), LIMITS)
    assert caught.value.reason == "unsupported_format"


def test_a_palette_with_alpha_of_its_own_is_kept() -> None:
    image = Image.new("P", (4, 1))
    image.putpalette(bytes(range(16)), "RGBA")
    image.putdata([0, 1, 2, 3])
    assert _stored(image).convert("RGBA").tobytes() == bytes(range(16))


def test_cmyk_goes_through_its_profile_or_else_through_pillow() -> None:
    image = photograph(64, 40).convert("CMYK")
    plain = image.convert("RGB").tobytes()
    assert _stored(image).tobytes() == plain
    for profile in (b"no profile", srgb_profile(), 5):  # damaged, of another colour space, of another type
        image.info["icc_profile"] = profile
        assert _stored(image).tobytes() == plain
        assert "icc_profile" not in _stored(image).info


def test_the_thumbnail_of_a_cmyk_image_does_not_tell_when_it_was_made() -> None:
    image = photograph(64, 40).convert("CMYK")
    image.info["icc_profile"] = cmyk_profile()
    with Image.open(io.BytesIO(decode.thumbnail(image))) as thumbnail:
        assert "icc_profile" not in thumbnail.info


def test_cmyk_is_converted_by_its_profile() -> None:
    image = Image.new("CMYK", (2, 1))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.info["icc_profile"] = cmyk_profile()
    white, black = np.asarray(_stored(image))[0].tolist()
    assert min(white) > 250
    assert all(100 < sample < 140 for sample in black), "the profile says that black ink is grey"
    assert "icc_profile" not in _stored(image).info


def test_a_profile_is_kept_where_it_describes_the_pixels() -> None:
    image = photograph(64, 40)
    image.info["icc_profile"] = srgb_profile()
    assert _stored(image).info["icc_profile"] == srgb_profile()
    assert _stored(image.quantize(16)).info.get("icc_profile") in (None, srgb_profile())
    assert "icc_profile" not in _stored(image.convert("L")).info
    image.info["icc_profile"] = cmyk_profile()  # as `Image.open(cmyk).convert("RGB")` leaves it
    assert "icc_profile" not in _stored(image).info


def test_of_what_pillow_calls_a_profile_only_a_profile_is_kept() -> None:
    image = photograph(64, 40)
    image.info["icc_profile"] = srgb_profile() + b"hidden"
    assert _stored(image).info["icc_profile"] == srgb_profile()
    for none in (bytes(16) + b"RGB " + b"hidden" * 99, srgb_profile()[:-1], bytes(4) + srgb_profile()[4:], "hidden"):
        image.info["icc_profile"] = none
        assert "icc_profile" not in _stored(image).info


def test_a_profile_that_could_not_be_read_back_is_refused() -> None:
    image = photograph(64, 40)
    image.info["icc_profile"] = srgb_profile(2_000_000)
    with pytest.raises(ImageRejectedError) as caught:
        encode.png(encode.upright_copy(image, LIMITS))
    assert caught.value.reason == "metadata_bomb"


@pytest.mark.parametrize("transparency", [300, (1, 2), b"abc", "x", (1, 2, 3), 4.0, None])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_transparency_that_the_mode_cannot_have_does_no_harm(mode: str, transparency: Any) -> None:
    image = photograph(8, 8).convert(mode)
    image.info["transparency"] = transparency
    assert _stored(image).tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pillow_image_is_stored_upright_without_its_exif(orientation: int) -> None:
    image = turned(corners(), orientation)
    image.info.update(exif=exif(orientation), comment=b"hidden", xmp=b"hidden")
    before = image.tobytes()
    again = _stored(image)
    assert again.tobytes() == corners().tobytes()
    assert encode.upright_copy(image, LIMITS).info == {}
    assert image.tobytes() == before
    assert image.info["exif"] == exif(orientation)


def test_an_array_of_any_image_is_eight_bit_rgb_or_rgba_of_its_own() -> None:
    for name, image in _modes().items():
        array = encode.to_array(image)
        assert array.dtype == np.uint8
        assert array.shape == (400, 640, 4 if image.has_transparency_data else 3), name
        assert array.flags.writeable
        before = image.tobytes()
        array[:] = 0
        assert image.tobytes() == before


def test_a_transparent_grey_of_sixteen_bits_is_one_grey_not_256() -> None:
    image = Image.fromarray(np.array([[0x1234, 0x1235, 0xFFFF]], np.uint16))
    image.info["transparency"] = 0x1234
    assert encode.to_array(image).tolist() == [[[0x12, 0x12, 0x12, 0], [0x12, 0x12, 0x12, 255], [255] * 4]]


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.sampled_from([*damage.SEEDS]))
def test_a_damaged_file_is_either_refused_or_an_image_that_can_be_stored_again(chance: Random, form: str) -> None:
    damage.check(damage.damaged(chance, form))
