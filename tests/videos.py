"""What an mp4 holds, decoded."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import av

if TYPE_CHECKING:
    import numpy as np


def frames_of(video: bytes) -> list[np.ndarray[Any, Any]]:
    """Height x width x 3, uint8 RGB."""
    with av.open(io.BytesIO(video), "r") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def comment_of(video: bytes) -> str:
    with av.open(io.BytesIO(video), "r") as container:
        return str(container.metadata["comment"])
