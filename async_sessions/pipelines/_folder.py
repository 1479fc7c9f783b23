"""Which Wan2.2 model a folder holds, and whether all of it is there: without torch, and without reading the weights.

What is said names the folder, not where it lies: it may be shown to users of the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from async_sessions.errors import ModelError
from async_sessions.pipelines._wan import MODELS, WanModel

_WEIGHTS: Final = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # of diffusers, of transformers
_LARGEST_HEADER: Final = 100 * 1024 * 1024  # bytes, as safetensors has it


def model_in(folder: Path) -> WanModel:
    """Which model lies in `folder`, as diffusers stores one. `ModelError` where there is none of this family.

    Also where a part, or a file of weights, is missing or shorter than it says: an interrupted download, or a copy.
    """
    name, found = folder.absolute().name, _index(folder)
    kind = found.get("_class_name")
    if (model := _model(kind, found)) is None:
        raise ModelError(f"{name!r} holds a {kind}, but none of the models {', '.join(MODELS)} of Wan2.2.")
    parts = [part for part, made_by in found.items() if isinstance(made_by, list) and any(made_by)]
    try:
        said = next((said for part in parts for said in _gaps(folder, part)), None)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{name!r} can't be read whole; see whether this server may, or download it again.") from error
    if said is not None:
        raise ModelError(f"{name!r} is not complete: {said}. Download the folder again.")
    return model


def expect_model(folder: Path, name: str) -> WanModel:
    """The model called `name`, which `folder` is to hold. `ModelError` where it holds another one, or none."""
    if (found := model_in(folder)).name != name:
        raise ModelError(f"{folder.absolute().name!r} holds {found.name}, not {name}.")
    return found


def _index(folder: Path) -> dict[str, Any]:
    index, name = folder / "model_index.json", folder.absolute().name
    try:
        return msgspec.json.decode(index.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{name!r} is no folder of a Wan2.2 model: it has no model_index.json. It should hold what a repository "
            f"such as Wan-AI/Wan2.2-I2V-A14B-Diffusers does."
        ) from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"The model_index.json of {name!r} can't be read.") from error


def _model(kind: Any, index: dict[str, Any]) -> WanModel | None:
    if kind in ("WanPipeline", "WanImageToVideoPipeline"):
        if index.get("expand_timesteps"):
            return MODELS["ti2v-5B"]
        if index.get("boundary_ratio") is not None:
            return MODELS["t2v-A14B" if kind == "WanPipeline" else "i2v-A14B"]
    return None


def _gaps(folder: Path, part: str) -> Iterator[str]:
    """What is missing of a part. A scheduler and a tokenizer have other files, of which the loader knows."""
    if not (folder / part).is_dir():
        yield f"{part} is missing"
        return
    names = [name for weights in _WEIGHTS for name in _files(folder / part, weights)]
    if not names and (folder / part / "config.json").is_file():
        yield f"{part} has no weights as safetensors"
    for name in names:
        path = folder / part / name
        if not path.is_file():
            yield f"{part}/{name} is missing"
        elif not _is_whole(path):
            yield f"{part}/{name} is cut short"


def _files(folder: Path, weights: str) -> list[str]:
    """The files that the weights lie in: one, or those that an index names."""
    if (folder / weights).exists():
        return [weights]
    index = folder / f"{weights}.index.json"
    if not index.exists():
        return []
    found = msgspec.json.decode(index.read_bytes(), type=_Shards)
    return sorted(set(found.weight_map.values()))


class _Shards(msgspec.Struct):
    weight_map: dict[str, str]


class _Tensor(msgspec.Struct):
    data_offsets: tuple[int, int] = (0, 0)  # what is not a tensor, the metadata, has none


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: eight bytes of length, JSON, then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            return False
        tensors = msgspec.json.decode(file.read(length), type=dict[str, _Tensor])
    return size == 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
