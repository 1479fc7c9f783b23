"""Wan2.2 through diffusers' own classes (extra `wan`): t2v-A14B, i2v-A14B and ti2v-5B."""

from __future__ import annotations

import gc
import json
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import anyio.from_thread
import torch

from async_sessions.jobs import PipelineSpec
from async_sessions.pipelines._diffusers import LoadedWan, Offload, Prepared
from async_sessions.pipelines._folder import expect_model
from async_sessions.pipelines._video import write_mp4
from async_sessions.pipelines._wan import MODELS, WanModel, plan
from async_sessions.renditions import to_tensor

if TYPE_CHECKING:
    import numpy as np

    from async_sessions._reading import StoredImage
    from async_sessions.jobs import JobContext, Output
    from async_sessions.records import ImageRecord

ENCODER: Final = {"crf": "18", "preset": "veryfast"}


class WanPipeline:
    """Renders `{"video": <mp4>}` with a Wan2.2 model from `model_dir`, a folder as diffusers stores one.

    `model` is "t2v-A14B" (no image), "i2v-A14B" (a start image, perhaps an end image) or "ti2v-5B" (perhaps a start
    image; it would ignore an end image, so it takes none). Nothing is ever downloaded. A folder without that model, or
    a device that is not there, fails the jobs with a `ModelError`.

    Parameters, with the model's own values as defaults: `prompt`, `negative_prompt`, `seed` (by default one of chance),
    `steps`, `shift`, `guidance_scale` (A14B: of the expert for high noise, and `guidance_scale_2` for low noise),
    `num_frames` (4n+1), `fps`; `width` and `height` in pixels (multiples of 16, ti2v-5B: 32), or neither: then the size
    has at most about `area` pixels and the shape of the start image, by the model's own arithmetic. Images are cropped
    to that size, never stretched. What does not fit is an `InvalidRequestError`, see `check`.

    The file's `comment` is JSON: the parameters as they were used, the seed, the model. `dtype` is bfloat16 unless the
    device is a CPU, then float32; the VAE is always float32, as the model cards have it. `offload` and `vae_tiling`
    are diffusers' own ways to take less memory: whole models, or each layer, wait in the machine's memory until they
    are used. One object may serve several devices.
    """

    def __init__(
        self,
        model_dir: str | Path,
        model: str = "i2v-A14B",
        *,
        device: str = "cuda",
        dtype: torch.dtype | None = None,
        offload: Offload = "none",
        vae_tiling: bool = False,
        name: str | None = None,
    ) -> None:
        if model not in MODELS:
            raise ValueError(f"There is no Wan2.2 model {model!r} here; there are: {', '.join(MODELS)}.")
        if offload not in get_args(Offload):
            raise ValueError(f"`offload` is one of {', '.join(get_args(Offload))}; not {offload!r}.")
        kind = device.partition(":")[0]
        if offload == "sequential" and kind == "cpu":
            raise ValueError("Sequential offload is from a device to the CPU; a CPU has nowhere to offload to.")
        self.model: WanModel = MODELS[model]
        self.spec = PipelineSpec(name=name or model, slots=self.model.slots, defaults=self.model.defaults, device=kind)
        self._folder = Path(model_dir).expanduser()
        self._dtype = dtype or (torch.float32 if kind == "cpu" else torch.bfloat16)
        self._offload: Offload = offload
        self._vae_tiling = vae_tiling
        self._pinned = kind == "cuda"
        self._of_thread = threading.local()  # a device is a thread: what it has loaded is its own

    def load(self, device: str) -> None:
        """Called in the device's thread, which is to call the rest but for `prepare` and `check`. `ModelError`."""
        expect_model(self._folder, self.model.name)
        self._of_thread.loaded = LoadedWan(
            self._folder, self.model, torch.device(device), self._dtype, self._offload, vae_tiling=self._vae_tiling
        )

    def release(self) -> None:
        """Let go of the model and of the device's memory; it can be loaded again."""
        loaded: LoadedWan | None = self._of_thread.__dict__.pop("loaded", None)
        if loaded is not None:
            device = loaded.device
            loaded.close()
            del loaded
            gc.collect()  # a diffusers pipeline and its hooks refer to each other
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def check(self, inputs: Mapping[str, ImageRecord], params: Mapping[str, Any]) -> None:
        """Raise `InvalidRequestError` for what `prepare` would refuse; `params` are complete. Cheap, in any thread."""
        plan(self.model, {role: record.size for role, record in inputs.items()}, params)

    def prepare(self, inputs: Mapping[str, StoredImage], params: Mapping[str, Any]) -> Prepared:
        chosen = plan(self.model, {role: image.record.size for role, image in inputs.items()}, params)
        size = chosen.width, chosen.height
        tensors = {
            role: to_tensor(anyio.from_thread.run(image.rendition, size), pin_memory=self._pinned)
            for role, image in inputs.items()
        }
        return Prepared(
            plan=chosen,
            seed=secrets.randbelow(2**32) if chosen.seed is None else chosen.seed,
            start=tensors.get("start"),
            end=tensors.get("end"),
        )

    def generate(self, prepared: Prepared, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        loaded: LoadedWan = self._of_thread.loaded
        wanted = prepared.plan
        video = loaded.run(prepared, context)

        def frames() -> Iterator[np.ndarray]:
            for frame in video:
                context.raise_if_cancelled()
                yield frame.permute(1, 2, 0).mul(255).round().to(torch.uint8).cpu().numpy()

        # Without the session, the job and the attempt: a file is passed on.
        used = {"model": self.model.name, **wanted.params(prepared.seed)}
        comment = json.dumps(used, ensure_ascii=False)
        size = wanted.width, wanted.height
        return {"video": write_mp4(frames(), size, wanted.fps, comment=comment, encoder=ENCODER)}
