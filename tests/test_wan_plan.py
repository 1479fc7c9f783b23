"""What a request may ask of a Wan2.2 model, and what a folder holds: neither needs torch."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from async_sessions import InvalidRequestError, ModelError
from async_sessions.pipelines._folder import model_in
from async_sessions.pipelines._wan import MODELS, best_size, plan

I2V, T2V, TI2V = MODELS["i2v-A14B"], MODELS["t2v-A14B"], MODELS["ti2v-5B"]


def test_the_defaults_are_those_of_the_models_table() -> None:
    table = {
        name: (*(each.defaults[key] for key in ("area", "num_frames", "fps", "steps", "shift")), each.guidance)
        for name, each in MODELS.items()
    }
    assert table == {
        "t2v-A14B": (1280 * 720, 81, 16, 40, 12.0, (4.0, 3.0)),
        "i2v-A14B": (1280 * 720, 81, 16, 40, 5.0, (3.5, 3.5)),
        "ti2v-5B": (1280 * 704, 121, 24, 50, 5.0, (5.0,)),
    }
    assert "guidance_scale_2" not in TI2V.defaults


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_the_models_own_sizes_are_made_as_they_are(model: Any) -> None:
    images = {"start": (1920, 1080)} if model.slots else {}
    for width, height in model.sizes:
        chosen = plan(model, {}, {**model.defaults, "area": width * height})
        assert (chosen.width, chosen.height) == (width, height)
        chosen = plan(model, images, {**model.defaults, "width": height, "height": width})
        assert (chosen.width, chosen.height) == (height, width)


@pytest.mark.parametrize(
    ("model", "image", "area", "size"),
    [
        (I2V, (1920, 1080), 1280 * 720, (1280, 720)),
        (I2V, (1080, 1920), 1280 * 720, (720, 1280)),
        (I2V, (4000, 3000), 832 * 480, (720, 544)),
        (I2V, (512, 512), 832 * 480, (624, 624)),
        (TI2V, (1920, 1080), 1280 * 704, (1248, 704)),
        (TI2V, (512, 512), 1280 * 704, (960, 928)),
        (TI2V, (1080, 1920), 1280 * 704, (704, 1248)),
    ],
)
def test_a_start_image_gives_the_video_its_shape(
    model: Any, image: tuple[int, int], area: int, size: tuple[int, int]
) -> None:
    chosen = plan(model, {"start": image}, {**model.defaults, "area": area})
    assert (chosen.width, chosen.height) == size
    assert chosen.width * chosen.height <= area
    assert not chosen.width % model.multiple
    assert not chosen.height % model.multiple


@pytest.mark.parametrize("area", [99_840, 399_360, 901_120])
def test_the_better_of_two_roundings_is_taken(area: int) -> None:
    for width, height in [(w, h) for w in range(100, 2000, 190) for h in range(100, 2000, 170)]:
        found = best_size(width, height, area, 32)
        assert found[0] * found[1] <= area
        assert not found[0] % 32
        assert not found[1] % 32
        ratio = found[0] / found[1] / (width / height)
        assert 2 / 3 < ratio < 3 / 2 or min(found) < 64


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_frames": 80}, "4n+1 for i2v-A14B, such as 77 or 81, not 80"),
        ({"num_frames": 0}, "from 1 to 481, not 0"),
        ({"num_frames": 10**9}, "from 1 to 481"),
        ({"num_frames": "81"}, "whole number from 1 to 481, not '81'"),
        ({"num_frames": True}, "whole number"),
        ({"num_frames": math.nan}, "whole number from 1 to 481, not nan"),
        ({"num_frames": math.inf}, "whole number from 1 to 481, not inf"),
        ({"shift": math.nan}, "shift must be a number from 0.01 to 100, not nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a number from 0 to 30, not inf"),
        ({"steps": -1}, "steps must be a whole number from 1 to 200, not -1"),
        ({"num_frames": 1}, "5 or more where there is an end image"),
        ({"width": 832}, "width and height go together"),
        ({"width": 830, "height": 480}, "multiple of 16 for i2v-A14B, such as 816 or 832, not 830"),
        ({"width": 10**6, "height": 480}, "from 32 to 2560"),
        ({"width": 2560, "height": 2560}, "2,088,960 pixels a frame"),
        ({"area": 10**9}, "area must be a whole number"),
        ({"area": None}, "area must be a whole number"),
        ({"fps": 0}, "fps must be"),
        ({"steps": 2.5}, "steps must be"),
        ({"steps": 100_000}, "from 1 to 200"),
        ({"shift": 0}, "shift must be a number from 0.01 to 100"),
        ({"guidance_scale": "strong"}, "guidance_scale must be a number from 0 to 30, not 'strong'"),
        ({"guidance_scale_2": -1}, "guidance_scale_2 must be a number"),
        ({"guidance_scale": 1.0}, "guidance_scale_2 does nothing where guidance_scale is 1 or less"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"prompt": None}, "prompt must be text, not None"),
        ({"negative_prompt": ["ugly"]}, "negative_prompt must be text"),
        ({"prompt": 10**60}, "prompt must be text"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_sentence(params: dict[str, Any], said: str) -> None:
    images = {"start": (640, 480), "end": (640, 480)}
    with pytest.raises(InvalidRequestError, match=re.escape(said)) as raised:
        plan(I2V, images, {**I2V.defaults, **params})
    assert str(raised.value).endswith(".")
    assert len(str(raised.value)) < 200


def test_numbers_as_a_page_sends_them_are_taken() -> None:
    chosen = plan(T2V, {}, {**T2V.defaults, "num_frames": 17.0, "seed": 3.0, "shift": 3})
    assert (chosen.num_frames, chosen.seed, chosen.shift) == (17, 3, 3.0)


def test_an_image_that_is_too_long_is_refused_before_anything_is_made_of_it() -> None:
    with pytest.raises(InvalidRequestError, match="too long and narrow"):
        plan(I2V, {"start": (8000, 100)}, I2V.defaults)


def folder(path: Path, **index: Any) -> Path:
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    ("index", "name"),
    [
        ({"_class_name": "WanPipeline", "boundary_ratio": 0.875, "expand_timesteps": False}, "t2v-A14B"),
        ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": 0.9, "expand_timesteps": False}, "i2v-A14B"),
        ({"_class_name": "WanPipeline", "boundary_ratio": None, "expand_timesteps": True}, "ti2v-5B"),
        ({"_class_name": "WanImageToVideoPipeline", "boundary_ratio": None, "expand_timesteps": True}, "ti2v-5B"),
    ],
)
def test_a_folder_says_which_model_it_holds(index: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert model_in(folder(tmp_path, **index)).name == name


@pytest.mark.parametrize(
    "index", [{"_class_name": "FluxPipeline"}, {"_class_name": "WanPipeline", "boundary_ratio": None}, {}]
)
def test_a_folder_of_another_model_is_refused(index: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none of the models t2v-A14B, i2v-A14B, ti2v-5B of Wan2\.2\.$"):
        model_in(folder(tmp_path, **index))


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        model_in(tmp_path)
    for missing in (tmp_path / "nothing", tmp_path / "model_index.json"):
        with pytest.raises(ModelError, match="it has no model_index"):
            model_in(missing)


def weights(path: Path, values: int = 3) -> None:
    """A safetensors file of that many bytes."""
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}
    )
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(values))
    (path.parent / "config.json").write_text("{}")


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A folder of ti2v-5B as diffusers stores one: a part in two files, one in a single one, one without weights."""
    parts = {"text_encoder": ["transformers", "UMT5EncoderModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    index = {"expand_timesteps": True, "image_encoder": [None, None], "scheduler": ["diffusers", "Any"], **parts}
    folder(tmp_path, _class_name="WanPipeline", **index)
    shards = [f"model-{number}-of-2.safetensors" for number in (1, 2)]
    for shard in shards:
        weights(tmp_path / "text_encoder" / shard)
    named = {"metadata": {}, "weight_map": dict(zip("abc", [*shards, shards[0]], strict=True))}
    (tmp_path / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(named))
    weights(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "scheduler").mkdir()
    return tmp_path


SHARD, WEIGHTS = "text_encoder/model-2-of-2.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "scheduler").rmdir(), "scheduler is missing."),
        (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing."),
        (lambda folder: (folder / WEIGHTS).unlink(), "vae has no weights as safetensors."),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]), "cut short."),
        (lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:20]), f"{SHARD} is cut short."),
        (lambda folder: (folder / SHARD).write_bytes(b""), f"{SHARD} is cut short."),
    ],
    ids=["part", "shard", "weights", "tensor", "header", "empty"],
)
def test_a_download_that_was_interrupted_is_told_by_the_file_that_it_lacks(
    complete: Path, damage: Any, said: str
) -> None:
    assert model_in(complete) is TI2V
    damage(complete)
    with pytest.raises(ModelError, match=re.escape(said)) as raised:
        model_in(complete)
    assert str(raised.value).startswith(f"{complete.name!r} is not complete: ")
    assert str(complete.parent) not in str(raised.value)


@pytest.mark.parametrize("file", ["text_encoder/model.safetensors.index.json", SHARD])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"\x03" + bytes(7) + b"[1]"])
def test_a_folder_whose_files_say_nonsense_is_refused(complete: Path, file: str, content: bytes) -> None:
    (complete / file).write_bytes(content)
    with pytest.raises(ModelError, match="ownload"):
        model_in(complete)


def test_the_table_needs_no_torch() -> None:
    code = "import sys, async_sessions.pipelines._folder; assert not {'torch', 'diffusers', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
