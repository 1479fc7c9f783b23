"""The demo page: a Wan2.2-style image-to-video app whose images, settings and runs are kept.

It runs without weights: the preview pipeline stands in for each model that there are none of.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import gradio as gr

from async_sessions.dispatch.local import LocalDispatcher
from async_sessions.gradio import GradioSessions
from async_sessions.pipelines._wan import MODELS
from async_sessions.pipelines.preview import PreviewPipeline

if TYPE_CHECKING:
    from async_sessions.jobs import Pipeline
    from async_sessions.pipelines._wan import WanModel
    from async_sessions.store import SessionStore


QUICK: Final = (416, 240)
DEFAULT: Final = "i2v-A14B"
# no webcam: a picture that is taken there fires no `upload`
IMAGE: Final[dict[str, Any]] = {
    "type": "filepath",
    "image_mode": None,
    "height": 260,
    "sources": ["upload", "clipboard"],
}
DRAIN_TIMEOUT: Final = timedelta(seconds=3)  # a run goes on with the next start, so nobody waits long for its end
FRAMES: Final = 49  # of the preview: about three seconds of video, made in a few seconds on two cores

INTRODUCTION: Final = """
# async_sessions
Images, settings and runs that are still here after a refresh, in a second tab, after a restart.

"""
WITHOUT: Final = "*Without weights: the preview pipeline, which is no model, renders for every model.*"
WITH: Final = "*{model} is the model itself; the preview pipeline, which is no model, renders for the others.*"
CSS: Final = ".gradio-container {max-width: 1200px !important; width: 100% !important; margin: auto !important}"


def build_demo(
    store: SessionStore, *, wan: Pipeline | None = None, device: str = "cpu", hard_exit: bool = False
) -> tuple[gr.Blocks, GradioSessions]:
    """The page, and what `launch`es it. The store is entered and left with the page.

    `wan` is the pipeline of a model, which renders on `device` under its own name. `hard_exit` is the dispatcher's.
    """
    real = {} if wan is None else {wan.spec.name: wan}
    pipelines = [
        real.get(each.name) or PreviewPipeline(each.name, slots=each.slots, defaults={"fps": each.fps})
        for each in MODELS.values()
    ]
    devices = list(dict.fromkeys([device, "cpu"]))
    dispatcher = LocalDispatcher(store, pipelines, devices=devices, drain_timeout=DRAIN_TIMEOUT, hard_exit=hard_exit)
    sessions = GradioSessions(store, dispatcher=dispatcher)
    with gr.Blocks(title="async_sessions", delete_cache=(3600, 24 * 3600), analytics_enabled=False) as demo:
        gr.Markdown(INTRODUCTION + "\n" + (WITH.format(model=wan.spec.name) if wan else WITHOUT))
        with gr.Tabs():
            with gr.Tab("Generate"):
                if wan is None:
                    _generate_tab(sessions, MODELS[DEFAULT], FRAMES)
                else:
                    _generate_tab(sessions, MODELS[wan.spec.name], MODELS[wan.spec.name].num_frames)
            with gr.Tab("Queue"):
                sessions.queue()
            with gr.Tab("Your session"):
                sessions.panel()
    return demo, sessions


def serve(
    store: SessionStore,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    wan: Pipeline | None = None,
    device: str = "cpu",
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; what it leaves undone goes on with the next start."""
    demo, sessions = build_demo(store, wan=wan, device=device, hard_exit=True)
    sessions.launch(demo, server_name=host, server_port=port, css=CSS, footer_links=[])


def resolutions(model: WanModel) -> list[tuple[str, int]]:
    """Labels with the area in pixels, the smallest first; the video has the shape of its start image."""
    sizes = [(QUICK, " · quick"), *((size, "") for size in reversed(model.sizes))]
    return [(f"{width} × {height}{note}", width * height) for (width, height), note in sizes]  # noqa: RUF001


def takes(model: WanModel) -> str:
    """Which images the model takes, and what becomes of one that it does not."""
    match model.slots.get("start"), "end" in model.slots:
        case None, _:
            return "Renders from the prompt alone: it takes no image. One that you gave is kept for the other models."
        case True, _:
            return "Needs a start image; an end image is optional."
        case _:
            return "A start image is optional. It takes no end image, which it would ignore; one that you gave is kept."


def _start(model: WanModel) -> str:
    return "Start image" if model.slots.get("start", True) else "Start image (optional)"


def _shape(model: WanModel) -> str:
    return "The video takes the shape of the start image." if "start" in model.slots else "About as many pixels."


def _generate_tab(sessions: GradioSessions, default: WanModel, num_frames: int) -> None:
    with gr.Row():
        with gr.Column():
            model = gr.Radio(list(MODELS), value=default.name, label="Model", elem_id="model")
            prompt = gr.Textbox(label="Prompt", lines=2, placeholder="What happens in the video?", elem_id="prompt")
            images = gr.Markdown(takes(default), elem_id="images")
            with gr.Row():
                start = gr.Image(label=_start(default), elem_id="start", visible="start" in default.slots, **IMAGE)
                end = gr.Image(label="End image (optional)", elem_id="end", visible="end" in default.slots, **IMAGE)
            resolution = gr.Radio(
                resolutions(default),
                value=resolutions(default)[1][1],
                label="Resolution",
                info=_shape(default),
                elem_id="resolution",
            )
            with gr.Row():
                frames = gr.Slider(17, 121, num_frames, step=4, label="Frames", elem_id="frames")
                steps = gr.Slider(1, 60, default.steps, step=1, label="Steps", elem_id="steps")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
        with gr.Column():
            video = gr.Video(label="Video", interactive=False, height=420, elem_id="video")
            with gr.Row():  # above what grows
                generate = gr.Button("Generate", variant="primary", elem_id="generate")
                cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
            progress = gr.HTML(elem_id="progress")

    def for_model(name: str, area: int) -> list[Any]:
        chosen = MODELS.get(name, default)
        choices = resolutions(chosen)
        value: dict[str, Any] = {} if area in dict(choices).values() else {"value": choices[1][1]}
        return [
            takes(chosen),
            gr.update(visible="start" in chosen.slots, label=_start(chosen)),
            gr.update(visible="end" in chosen.slots),
            gr.update(choices=choices, info=_shape(chosen), **value),
        ]

    sessions.bind(
        images={"start": start, "end": end},
        state={
            "model": model,
            "prompt": prompt,
            "resolution": resolution,
            "frames": frames,
            "steps": steps,
            "seed": seed,
        },
    )
    # `change`, not `input`: a restored model changes the page too. Hiding a slot leaves its image where it is.
    # Not preprocessed: a restored resolution of another model is not among the choices yet, which Gradio refuses.
    model.change(
        for_model,
        [model, resolution],
        [images, start, end, resolution],
        preprocess=False,
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=None,
    )
    sessions.bind_generate(
        generate,
        pipeline=model,
        video=video,
        params={"prompt": prompt, "area": resolution, "num_frames": frames, "steps": steps, "seed": seed},
        slots={name: chosen.slots for name, chosen in MODELS.items()},
        cancel=cancel,
        progress=progress,
    )
