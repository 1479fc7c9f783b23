"""A video without a model: what a page shows before, or instead of, weights (extra `video`).

The start image is eased into the end image, or slowly pushed into where it is alone; with no image at all a moving
gradient is drawn from the prompt. The file is a real H.264 mp4, so everything around a model can be built on it.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import anyio.from_thread
import msgspec
import numpy as np
from PIL import Image

from async_sessions.jobs import PipelineSpec
from async_sessions.pipelines._params import whole
from async_sessions.pipelines._video import write_mp4
from async_sessions.renditions import fit

if TYPE_CHECKING:
    from async_sessions._reading import StoredImage
    from async_sessions.jobs import JobContext, Output

COMMENT: Final = "async_sessions preview: made without a model"
DEFAULTS: Final[Mapping[str, Any]] = {
    "prompt": "",
    "negative_prompt": "",
    "seed": 0,
    "steps": 40,
    "num_frames": 81,
    "fps": 16,
    "width": None,
    "height": None,
    "area": 832 * 480,
}
MULTIPLE = 16  # sides are multiples of it, as those of the models that the preview stands in for
MAX_FRAMES, MAX_FPS, MIN_SIDE, MAX_SIDE = 1000, 120, 16, 4096
MORPH_ZOOM, PUSH_IN = 0.05, 0.15  # how much closer a frame gets to its image at most
ENCODER = {"crf": "16", "preset": "veryfast"}


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What `generate` draws: images cropped to `size` (width, height), or the colours that stand in for them."""

    start: Image.Image | None
    end: Image.Image | None
    colours: tuple[tuple[float, float, float], ...]
    size: tuple[int, int]
    frames: int
    fps: int


class PreviewPipeline:
    """Renders `{"video": <mp4>}` on a CPU, without a model, and says so in the file's `comment`.

    Parameters: `num_frames` (1 to 1000), `fps` (1 to 120), `width` and `height` in pixels, or one of them, or neither:
    then the size has about `area` pixels and the first image's aspect ratio. Sides are rounded to multiples of 16. An
    image is cropped, never stretched. `prompt` and `seed` colour the gradient; the other defaults are accepted and
    change nothing. `slots` and `defaults` let it stand in for a model: the roles of images that it takes, and whether
    it needs them; parameters that the model has, and its values. A value that can't be used fails the job with an
    `InvalidRequestError`.
    """

    def __init__(
        self,
        name: str = "preview",
        *,
        slots: Mapping[str, bool] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        slots = {"start": True, "end": False} if slots is None else slots
        if unknown := set(slots) - {"start", "end"}:
            raise ValueError(f"The preview draws a start and an end image; it has no use for {', '.join(unknown)}.")
        self.spec = PipelineSpec(name=name, slots=dict(slots), defaults={**DEFAULTS, **(defaults or {})})

    def load(self, device: str) -> None:
        """Nothing to load: there is no model."""

    def prepare(self, inputs: Mapping[str, StoredImage], params: Mapping[str, Any]) -> Scene:
        frames = _integer(params, "num_frames", 1, MAX_FRAMES)
        fps = _integer(params, "fps", 1, MAX_FPS)
        images = {role: anyio.from_thread.run(image.image) for role, image in inputs.items()}
        first = images.get("start") or images.get("end")
        size = _size(params, first.size if first else (832, 480))
        start, end = (fit(images[role], size) if role in images else None for role in ("start", "end"))
        return Scene(start=start, end=end, colours=_colours(params), size=size, frames=frames, fps=fps)

    def generate(self, prepared: Scene, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        def drawn() -> Iterator[np.ndarray]:
            for number, image in enumerate(_frames(prepared), start=1):
                context.raise_if_cancelled()
                yield np.asarray(image)
                context.report(number, prepared.frames)

        return {"video": write_mp4(drawn(), prepared.size, prepared.fps, comment=COMMENT, encoder=ENCODER)}


def _frames(scene: Scene) -> Iterator[Image.Image]:
    """The first frame is the start image and the last the end image, where there is one."""
    for number in range(scene.frames):
        time = number / max(scene.frames - 1, 1)
        eased = time * time * (3 - 2 * time)  # smoothstep
        if scene.start is not None and scene.end is not None:
            leaving = _zoomed(scene.start, 1 + MORPH_ZOOM * eased)
            arriving = _zoomed(scene.end, 1 + MORPH_ZOOM * (1 - eased))
            yield Image.blend(leaving, arriving, eased)
        elif scene.start is not None:
            yield _zoomed(scene.start, 1 + PUSH_IN * eased)
        elif scene.end is not None:
            yield _zoomed(scene.end, 1 + PUSH_IN * (1 - eased))
        else:
            yield _gradient(scene, time)


def _zoomed(image: Image.Image, factor: float) -> Image.Image:
    """The middle of `image`, `factor` times as large, in the same size."""
    width, height = image.size
    x, y = width * (1 - 1 / factor) / 2, height * (1 - 1 / factor) / 2
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, width - x, height - y))


def _gradient(scene: Scene, time: float) -> Image.Image:
    """Three colours that drift into each other, once around from `time` 0 to 1; drawn small and enlarged."""
    width, height = scene.size
    columns, rows = max(2, width // MULTIPLE), max(2, height // MULTIPLE)
    x, y = np.linspace(0, 1, columns)[None, :], np.linspace(0, height / width, rows)[:, None]
    turn = 2 * math.pi * time
    weights = np.stack(
        [1.2 + np.sin(3 * x + turn) + np.cos(4 * y - turn + phase) for phase in (0.0, 2.1, 4.2)][: len(scene.colours)]
    )
    weights = np.maximum(weights, 0.05) ** 2
    weights /= weights.sum(axis=0)
    pixels = np.einsum("cyx,cr->yxr", weights, np.asarray(scene.colours)) * 255
    return Image.fromarray(pixels.astype(np.uint8)).resize(scene.size, Image.Resampling.BICUBIC)


def _colours(params: Mapping[str, Any]) -> tuple[tuple[float, float, float], ...]:
    digest = hashlib.sha256(f"{params.get('seed')}:{params.get('prompt')}".encode()).digest()
    hue = digest[0] / 256
    spread = 0.08 + digest[1] / 256 / 4
    return tuple(
        colorsys.hsv_to_rgb((hue + index * spread) % 1, 0.45 + byte / 600, 0.55 + 0.15 * index)
        for index, byte in enumerate(digest[2:5])
    )


def _size(params: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the video for a first image of `shape`."""
    ratio = shape[0] / shape[1]
    width, height = (
        None if params.get(name) is None else _integer(params, name, MIN_SIDE, MAX_SIDE) for name in ("width", "height")
    )
    if width is not None:
        return _side(width), _side(width / ratio if height is None else height)
    if height is not None:
        return _side(height * ratio), _side(height)
    area = _integer(params, "area", MIN_SIDE**2, MAX_SIDE**2)
    return _side(math.sqrt(area * ratio)), _side(math.sqrt(area / ratio))


def _side(length: float) -> int:
    return min(max(round(length / MULTIPLE) * MULTIPLE, MIN_SIDE), MAX_SIDE)


def _integer(params: Mapping[str, Any], name: str, least: int, most: int) -> int:
    return whole(name, params.get(name, DEFAULTS.get(name)), least, most)
