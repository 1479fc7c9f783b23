"""What an mp4 holds, decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import av

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


def frames_of(video: bytes, path: Path) -> list[np.ndarray]:
    """Height x width x 3, uint8 RGB; `path` is where the file is written to be read."""
    path.write_bytes(video)
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def comment_of(path: Path) -> str:
    with av.open(path) as container:
        return container.metadata["comment"]
