"""Writes frames as an mp4 that browsers play: H.264, `yuv420p`, BT.709, its index in front. Needs the extra `video`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import av
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

if TYPE_CHECKING:
    import numpy as np

# With mbtree the same frames made other files, on one thread too: its assembly does it (not where asm=0).
_REPEATABLE: Final = {"x264-params": "mbtree=0"}


def write_mp4(
    frames: Iterable[np.ndarray], size: tuple[int, int], fps: int, *, comment: str, encoder: Mapping[str, str]
) -> Path:
    """A temporary file of `frames` (height x width x 3, uint8 RGB; `size` is width, height), the caller's to remove.

    `comment` goes into the file's metadata, `encoder` to x264. The same frames are the same file. What `frames` raises
    leaves none behind.
    """
    handle, name = tempfile.mkstemp(prefix="async_sessions-", suffix=".mp4")
    os.close(handle)
    try:
        _write(Path(name), frames, size, fps, comment, encoder)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _write(
    path: Path, frames: Iterable[np.ndarray], size: tuple[int, int], fps: int, comment: str, encoder: Mapping[str, str]
) -> None:
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options={**encoder, **_REPEATABLE})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        # BT.709, and tagged as such: an untagged file has other colours in every player.
        stream.color_range, stream.colorspace = ColorRange.MPEG, Colorspace.ITU709
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
