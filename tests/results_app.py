"""A page whose runs make images, for `test_gradio_results_browser` and `test_forgery`. Its argument: a store's root.

A run shows a preview at once, and goes on when there is a file `~/open`.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.from_thread
import gradio as gr
from PIL import Image, ImageOps

from async_sessions import open_store
from async_sessions.gradio import GradioSessions
from async_sessions.jobs import PipelineSpec
from tests.images import encoded
from tests.steps import local

if TYPE_CHECKING:
    from async_sessions.jobs import JobContext, Output

STEPS = 4


class Variations:
    """Four images of one: a PIL image, a path, two kinds of bytes; and words about them."""

    spec = PipelineSpec(name="variations", slots={"start": True}, defaults={"label": ""})

    def load(self, device: str) -> None:
        """Nothing."""

    def prepare(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> Image.Image:
        image: Image.Image = anyio.from_thread.run(inputs["start"].image)
        return image.convert("RGB")

    def generate(self, prepared: Image.Image, params: Mapping[str, Any], context: JobContext) -> Mapping[str, Output]:
        mirrored, grey = ImageOps.mirror(prepared), ImageOps.grayscale(prepared)
        context.report(1, STEPS, preview=encoded(grey.resize((48, 32)), "PNG"))
        while not Path("~/open").expanduser().exists():
            context.raise_if_cancelled()
            time.sleep(0.01)
        context.report(2, STEPS)
        file = Path(f"~/{context.job_id}.png").expanduser()
        ImageOps.flip(prepared).save(file)
        return {
            "words": (f"Four of one. {params['label']}".encode(), "text/plain"),
            "mirrored": mirrored,
            "flipped": file,
            "grey": (encoded(grey, "PNG"), "image/png"),
            "inverted": (_jpeg(ImageOps.invert(prepared)), "image/jpeg"),
        }


def _jpeg(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "JPEG")
    return target.getvalue()


if __name__ == "__main__":
    store = open_store(sys.argv[1], cleanup_interval=None)
    sessions = GradioSessions(store, dispatcher=local(store, [Variations()]))
    with gr.Blocks() as demo:
        with gr.Row():
            start = gr.Image(elem_id="start", sources=["upload"], height=240)
            first = gr.Image(elem_id="first", interactive=False, height=240)
        label = gr.Textbox(elem_id="label")
        with gr.Row():
            one = gr.Button("One", elem_id="one")
            every, cancel = gr.Button("Every", elem_id="every"), gr.Button("Stop", elem_id="cancel")
        progress = gr.HTML(elem_id="progress")
        gallery = gr.Gallery(elem_id="gallery", interactive=False, columns=4, height=260)
        sessions.bind(images={"start": start}, state={"label": label})
        options: dict[str, Any] = {"pipeline": "variations", "params": {"label": label}}
        sessions.bind_generate(every, gallery=gallery, cancel=cancel, progress=progress, **options)
        sessions.bind_generate(one, image=first, **options)
        with gr.Tabs():
            with gr.Tab("Queue"):
                sessions.queue()
            with gr.Tab("Your session"):
                sessions.panel()

        async def kept(request: gr.Request) -> dict[str, list[int]]:
            """For programs: the sizes of the images that the session holds."""
            return {slot: list(image.size) for slot, image in (await sessions.images(request)).items()}

        gr.api(kept)  # type: ignore[attr-defined]
    sessions.launch(demo)
