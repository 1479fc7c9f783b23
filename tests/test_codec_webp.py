from __future__ import annotations

from tests.corpus.webp import ALPHA, PICTURE, header
from tests.images import (
    PLACE,
    encoded,
    exif,
    photograph,
    srgb_profile,
    take,
    webp_chunks,
    webp_file,
)


def test_exif_xmp_unknown_chunks_and_trailing_data_are_not_kept_and_the_flags_say_so() -> None:
    profile, alpha = (b"ICCP", srgb_profile()), webp_chunks(ALPHA)[1:]
    hidden = [(b"EXIF", exif(6)), (b"XMP ", b"<x:xmpmeta/>"), (b"abcd", b"hidden")]
    data = webp_file(header(0xFFFFFFFD), profile, *alpha, *hidden) + b"trailing"
    rebuilt, image = take(data)
    assert rebuilt.data == webp_file(header(0x30), profile, *alpha)
    assert PLACE in data
    assert PLACE not in rebuilt.data
    assert image.mode == "RGBA"


def test_a_last_byte_of_padding_may_be_left_out() -> None:
    data = webp_file(header(), PICTURE, (b"abcd", b"odd"))[:-1]
    assert take(data)[0].data == webp_file(header(), PICTURE)


def test_the_profile_flag_is_cleared_when_there_is_none() -> None:
    assert take(webp_file(header(0x20), PICTURE))[0].data == webp_file(header(), PICTURE)


def test_a_webp_is_shown_as_browsers_show_it_whatever_its_exif_says() -> None:
    data = encoded(photograph(64, 48), "WEBP", exif=exif(6))
    rebuilt, image = take(data)
    assert rebuilt.orientation == 1
    assert image.size == (64, 48)
