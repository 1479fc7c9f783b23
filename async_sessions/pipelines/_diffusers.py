"""A Wan2.2 model on a device, as diffusers loads and runs it. Needs the extra `wan`."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import diffusers
import torch
from safetensors import SafetensorError

from async_sessions.errors import ModelError
from async_sessions.pipelines._latents import LatentColours
from async_sessions.pipelines._wan import FRAME_STRIDE, Plan, WanModel

if TYPE_CHECKING:
    from pathlib import Path

    from async_sessions.jobs import JobContext

Offload: TypeAlias = Literal["none", "model", "sequential"]

PREVIEW_INTERVAL: Final = 0.5  # seconds between two looks at the latents


@dataclass(frozen=True)
class Prepared:
    """What `generate` starts from; `start` and `end` are 1 x 3 x height x width, float32 in [0, 1], on the CPU."""

    plan: Plan
    seed: int
    start: torch.Tensor | None
    end: torch.Tensor | None


class LoadedWan:
    """A model on a device, in that device's thread."""

    def __init__(
        self,
        folder: Path,
        model: WanModel,
        device: torch.device,
        dtype: torch.dtype,
        offload: Offload,
        *,
        vae_tiling: bool,
    ) -> None:
        if device.type != "cpu" and not _is_there(device):
            raise ModelError(f"There is no {device.type} device here, or this torch can't use it; try device='cpu'.")
        self.device = device
        self._offload = offload
        self._pipes = _pipes(folder, model, dtype)
        self._placed: Any = None
        any_pipe = next(iter(self._pipes.values()))
        _check_sides(folder, model, any_pipe)
        self._scheduler = any_pipe.scheduler
        if vae_tiling:
            any_pipe.vae.enable_tiling()
        for pipe in self._pipes.values():
            pipe.set_progress_bar_config(disable=True)
        self._place(any_pipe)
        self._colours = LatentColours(any_pipe.vae, device)
        any_pipe.maybe_free_model_hooks()

    def close(self) -> None:
        for pipe in self._pipes.values():
            pipe.remove_all_hooks()
        self._pipes.clear()
        self._placed = None

    def run(self, prepared: Prepared, context: JobContext) -> torch.Tensor:
        """frames x 3 x height x width in [0, 1], on the device. Raises `JobCancelledError` at the end of a step."""
        wanted = prepared.plan
        pipe = self._pipes[prepared.start is not None]
        self._place(pipe)
        # A scheduler of its own for each run: it remembers what it has seen.
        shift = "flow_shift" if "flow_shift" in self._scheduler.config else "shift"
        pipe.scheduler = type(self._scheduler).from_config(self._scheduler.config, **{shift: wanted.shift})
        images = {"image": prepared.start, "last_image": prepared.end}
        shown_at = -PREVIEW_INTERVAL

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal shown_at
            preview, now = None, time.monotonic()
            if now - shown_at >= PREVIEW_INTERVAL:
                shown_at = now
                preview = self._colours.webp(_clean(pipe.scheduler, tensors["latents"])[0])
            context.report(step + 1, wanted.steps, "Step" if step + 1 < wanted.steps else "Decoding", preview)
            return tensors

        context.raise_if_cancelled()
        try:
            made = pipe(
                prompt=wanted.prompt,
                negative_prompt=wanted.negative_prompt,
                width=wanted.width,
                height=wanted.height,
                num_frames=wanted.num_frames,
                num_inference_steps=wanted.steps,
                **wanted.scales,
                **{
                    name: image.to(self.device, non_blocking=True)
                    for name, image in images.items()
                    if image is not None
                },
                generator=torch.Generator().manual_seed(prepared.seed),  # of the CPU: the same noise on every device
                output_type="pt",
                callback_on_step_end=after_step,
            )
        except BaseException as error:  # noqa: BLE001 - it goes on
            # Without the frames that it came through, but for their text: what is in them would fill the memory for as
            # long as somebody looks at the error and, since they refer to each other, on until a collection.
            error.add_note("".join(traceback.format_exception(error)).rstrip())
            error.__context__ = None
            raise error.with_traceback(None) from None
        finally:
            pipe.scheduler = self._scheduler  # without what it has seen
            pipe.maybe_free_model_hooks()
        video: torch.Tensor = made.frames[0]
        return video

    def _place(self, pipe: Any) -> None:
        """Two pipelines of one model share its modules: the hooks that offload them belong to the one that runs."""
        if pipe is self._placed:
            return
        if self._offload == "none":
            pipe.to(self.device)
        elif self._offload == "model":
            pipe.enable_model_cpu_offload(device=self.device)
        else:
            pipe.enable_sequential_cpu_offload(device=self.device)
        self._placed = pipe


def _is_there(device: torch.device) -> bool:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is not None and found.type == device.type


def _pipes(folder: Path, model: WanModel, dtype: torch.dtype) -> dict[bool, Any]:
    """The pipelines for a request without (`False`) and with (`True`) a start image, of one set of weights."""
    options: dict[str, Any] = {
        "dtype": {"default": dtype, "vae": torch.float32},
        "local_files_only": True,
        "use_safetensors": True,  # weights as a pickle are a program
    }
    try:
        if model.slots.get("start"):
            return {True: diffusers.WanImageToVideoPipeline.from_pretrained(folder, **options)}
        pipe = diffusers.WanPipeline.from_pretrained(folder, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{model.name} can't be loaded from {folder.absolute().name!r}: a file is missing or damaged; the log says "
            f"which. Download the folder again."
        ) from error
    if "start" not in model.slots:
        return {False: pipe}
    with_image = diffusers.WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    return {False: pipe, True: with_image}


def _check_sides(folder: Path, model: WanModel, pipe: Any) -> None:
    """What a request was checked against is what the model does."""
    multiple = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[-1]
    if (multiple, pipe.vae_scale_factor_temporal) != (model.multiple, FRAME_STRIDE):
        raise ModelError(
            f"{folder.absolute().name!r} is not {model.name}: its videos have sides in multiples of {multiple} and "
            f"{pipe.vae_scale_factor_temporal}n+1 frames, not {model.multiple} and {FRAME_STRIDE}n+1."
        )


def _clean(scheduler: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the latents will be without their noise, where the scheduler has just estimated that; else as they are."""
    estimates = getattr(scheduler, "model_outputs", None)
    if scheduler.config.get("predict_x0") and estimates and estimates[-1] is not None:
        return estimates[-1]  # type: ignore[no-any-return]
    return latents
