from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from async_sessions.renditions import GREY, to_tensor
from tests.images import photograph


def test_a_tensor_is_one_picture_of_three_planes_from_0_to_1() -> None:
    image = photograph(64, 48)
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype) == ((1, 3, 48, 64), torch.float32)
    assert tensor.is_contiguous()
    expected = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / np.float32(255)
    assert np.array_equal(tensor.numpy(), expected)


def test_black_is_0_and_white_is_1() -> None:
    assert torch.equal(to_tensor(Image.new("RGB", (3, 2), "black")), torch.zeros(1, 3, 2, 3))
    assert torch.equal(to_tensor(Image.new("1", (3, 2), 1)), torch.ones(1, 3, 2, 3))


def test_what_is_transparent_becomes_grey() -> None:
    tensor = to_tensor(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([sample / 255 for sample in GREY])


def test_a_transparent_colour_becomes_grey_too() -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.info["transparency"] = (1, 2, 3)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 2, 2)
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([sample / 255 for sample in GREY])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_has_three_planes(mode: str) -> None:
    assert to_tensor(Image.new(mode, (5, 4))).shape == (1, 3, 4, 5)


def test_a_tensor_is_its_owners() -> None:
    image = photograph(64, 48)
    before = image.tobytes()
    to_tensor(image).zero_()
    assert image.tobytes() == before


def test_memory_is_pinned_where_there_is_an_accelerator() -> None:
    tensor = to_tensor(photograph(64, 48), pin_memory=True)
    assert tensor.is_pinned() == torch.accelerator.is_available()
    assert torch.equal(tensor, to_tensor(photograph(64, 48)))
