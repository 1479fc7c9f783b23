"""The models of the Wan2.2 family, and what a request asks of one of them. Pure: needs neither torch nor a model.

The numbers are those of the Wan2.2 repository (github.com/Wan-Video/Wan2.2, Apache-2.0): `generate.py` for the sizes,
`wan/configs/wan_*.py` for the rest. The arithmetic of sizes is that of the same repository and of the model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, Final

import msgspec
from msgspec.structs import asdict

from async_sessions.errors import InvalidRequestError
from async_sessions.pipelines._params import number, text, whole
from async_sessions.renditions import area_size

FRAME_STRIDE: Final = 4  # frames of one latent frame: a video has 4n+1

# Against slips of the hand and runs without end, wide enough for what the models can do beyond their table.
MAX_FRAMES, MAX_FPS, MAX_STEPS, MAX_GUIDANCE, MAX_SHIFT = 481, 120, 200, 30.0, 100.0
MIN_SIDE, MAX_SIDE, MAX_AREA = 32, 2560, 1920 * 1088
MAX_SEED: Final = 2**63 - 1

GUIDANCE: Final = ("guidance_scale", "guidance_scale_2")  # parameters: of the expert for high noise, of the other one

# `sample_neg_prompt` of the repository's shared configuration, which is what the models were tuned with.
NEGATIVE: Final = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"  # noqa: RUF001
    "杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


class WanModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model: the images that it takes (and whether it needs them), and its own defaults.

    `sizes` are width x height, the default first; their transposes are as good. `multiple` is what sides are multiples
    of: VAE stride times patch. `guidance` is that of each expert, the one for high noise first.
    """

    name: str
    slots: Mapping[str, bool]
    sizes: tuple[tuple[int, int], ...]
    num_frames: int
    fps: int
    steps: int
    shift: float
    guidance: tuple[float, ...]
    multiple: int

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters of a request, and their values unless it says otherwise."""
        width, height = self.sizes[0]
        return {
            "prompt": "",
            "negative_prompt": NEGATIVE,
            "seed": None,
            "steps": self.steps,
            "shift": self.shift,
            **dict(zip(GUIDANCE, self.guidance, strict=False)),
            "num_frames": self.num_frames,
            "fps": self.fps,
            "width": None,
            "height": None,
            "area": width * height,
        }


MODELS: Final = {
    model.name: model
    for model in (
        WanModel(
            name="t2v-A14B",
            slots={},
            sizes=((1280, 720), (832, 480)),
            num_frames=81,
            fps=16,
            steps=40,
            shift=12.0,
            guidance=(4.0, 3.0),
            multiple=16,
        ),
        WanModel(
            name="i2v-A14B",
            slots={"start": True, "end": False},
            sizes=((1280, 720), (832, 480)),
            num_frames=81,
            fps=16,
            steps=40,
            shift=5.0,
            guidance=(3.5, 3.5),
            multiple=16,
        ),
        WanModel(
            name="ti2v-5B",
            slots={"start": False},  # it would ignore an end image
            sizes=((1280, 704),),
            num_frames=121,
            fps=24,
            steps=50,
            shift=5.0,
            guidance=(5.0,),
            multiple=32,
        ),
    )
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, checked; `width` and `height` in pixels. Without a `seed` one is to be chosen."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    steps: int
    shift: float
    guidance: tuple[float, ...]
    seed: int | None

    @property
    def scales(self) -> dict[str, float]:
        """`guidance` by the names of its parameters."""
        return dict(zip(GUIDANCE, self.guidance, strict=False))

    def params(self, seed: int) -> dict[str, Any]:
        """The parameters of a request for the very same video."""
        found = {**asdict(self), **self.scales, "seed": seed}
        del found["guidance"]
        return found


def plan(model: WanModel, images: Mapping[str, tuple[int, int]], params: Mapping[str, Any]) -> Plan:
    """`images` are the sizes of the images by role, upright; `params` are complete. Raises `InvalidRequestError`."""
    frames = whole("num_frames", params["num_frames"], 1, MAX_FRAMES)
    if frames % FRAME_STRIDE != 1:
        below = frames - (frames - 1) % FRAME_STRIDE
        raise InvalidRequestError(
            f"num_frames must be 4n+1 for {model.name}, such as {below} or {below + FRAME_STRIDE}, not {frames}."
        )
    if "end" in images and frames == 1:
        raise InvalidRequestError(
            "num_frames must be 5 or more where there is an end image: a single frame has no end."
        )
    guidance = tuple(number(name, params[name], 0, MAX_GUIDANCE) for name in GUIDANCE[: len(model.guidance)])
    if guidance[0] <= 1 < guidance[-1]:  # diffusers looks at the first to decide whether there is guidance at all
        raise InvalidRequestError(
            f"guidance_scale_2 does nothing where guidance_scale is 1 or less; set it to 1, or the other above 1, "
            f"not {guidance[0]:g} and {guidance[1]:g}."
        )
    width, height = size(model, images.get("start"), params)
    return Plan(
        prompt=text("prompt", params["prompt"]),
        negative_prompt=text("negative_prompt", params["negative_prompt"]),
        width=width,
        height=height,
        num_frames=frames,
        fps=whole("fps", params["fps"], 1, MAX_FPS),
        steps=whole("steps", params["steps"], 1, MAX_STEPS),
        shift=number("shift", params["shift"], 0.01, MAX_SHIFT),
        guidance=guidance,
        seed=None if params["seed"] is None else whole("seed", params["seed"], 0, MAX_SEED),
    )


def size(model: WanModel, start: tuple[int, int] | None, params: Mapping[str, Any]) -> tuple[int, int]:
    """Width and height of the video: `width` x `height`, or about `area` pixels in the shape of the start image."""
    if params["width"] is not None or params["height"] is not None:
        if params["width"] is None or params["height"] is None:
            raise InvalidRequestError("width and height go together; give both, or neither and an area.")
        sides = tuple(whole(name, params[name], MIN_SIDE, MAX_SIDE) for name in ("width", "height"))
        for name, side in zip(("width", "height"), sides, strict=True):
            if side % model.multiple:
                below = max(side // model.multiple, 1) * model.multiple
                raise InvalidRequestError(
                    f"{name} must be a multiple of {model.multiple} for {model.name}, such as {below} or "
                    f"{below + model.multiple}, not {side}."
                )
        found = sides[0], sides[1]
    else:
        area = whole("area", params["area"], MIN_SIDE**2, MAX_AREA)
        found = _of_area(model, start, area)
    if found[0] * found[1] > MAX_AREA:
        raise InvalidRequestError(f"A video may have {MAX_AREA:,} pixels a frame, not {found[0]} x {found[1]}.")
    if max(found) > MAX_SIDE:
        raise InvalidRequestError(
            f"The start image is too long and narrow: its video would be {found[0]} x {found[1]}. Crop it, or give "
            f"width and height."
        )
    return found


def _of_area(model: WanModel, start: tuple[int, int] | None, area: int) -> tuple[int, int]:
    if start is None:
        for width, height in model.sizes:
            if width * height == area:
                return width, height
        return area_size(*model.sizes[0], area, model.multiple)
    if model.name == "ti2v-5B":
        return best_size(*start, area, model.multiple)
    return area_size(*start, area, model.multiple)


def best_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """Width and height of at most `area` pixels for an image of `width` x `height`, as TI2V-5B has them.

    Of the two ways to round down to multiples, one side first and the other one from what is left of the area, the one
    that comes closer to the image's ratio. At least one multiple a side.
    """
    ratio = width / height

    def down(side: float) -> int:
        return max(int(side // multiple), 1) * multiple

    def off(found: tuple[int, int]) -> float:
        return max(ratio * found[1] / found[0], found[0] / found[1] / ratio)

    across, along = down(sqrt(area * ratio)), down(sqrt(area / ratio))
    by_width = across, down(area / across)
    by_height = down(area / along), along
    return by_width if off(by_width) < off(by_height) else by_height
