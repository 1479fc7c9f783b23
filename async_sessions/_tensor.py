"""Images as PyTorch tensors. Needs the extra `wan`, so it is imported where it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from async_sessions._codec import encode

if TYPE_CHECKING:
    from PIL import Image


def of_rgb(image: Image.Image, *, pinned: bool) -> torch.Tensor:
    """1 x 3 x height x width of float32 in [0, 1], contiguous."""
    samples = torch.from_numpy(encode.to_array(image)).permute(2, 0, 1).unsqueeze(0)
    pinned = pinned and torch.accelerator.is_available()  # without one there is nothing to pin it for
    tensor = torch.empty(samples.shape, dtype=torch.float32, pin_memory=pinned)
    return torch.div(samples, 255, out=tensor)
