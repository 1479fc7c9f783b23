"""An app for `test_tabs_browser`: every kind of image, on three pages. Its arguments: a root, and a port."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gradio as gr

from async_sessions import open_store
from async_sessions.gradio import GradioSessions
from tests.images import rgba_png


def kind_of(image: Any) -> str:
    """What the app's own handler is given."""
    image = image["composite"] if isinstance(image, dict) else image
    shape = getattr(image, "shape", None) or getattr(image, "size", "")
    return f"{type(image).__name__} {shape}"


def build(sessions: GradioSessions, example: Path) -> Any:
    with gr.Blocks() as demo:
        image = gr.Image(type="pil", elem_id="pil", height=220)
        prompt = gr.Textbox(elem_id="prompt", label="Prompt")
        with gr.Tabs():
            with gr.Tab("First"):
                gr.Markdown("first")
            with gr.Tab("Second"):  # not shown when the page opens
                sessions.bind(images={"pil": image}, state={"prompt": prompt})
                sessions.panel()
    with demo.route("Kinds", "/kinds"):
        images = {
            "array": gr.Image(type="numpy", elem_id="array", height=220),
            "pil": gr.Image(type="pil", elem_id="pil", height=220),
            "path": gr.Image(type="filepath", elem_id="path", height=220),
        }
        editor = gr.ImageEditor(elem_id="editor", type="pil")
        told = gr.Textbox(elem_id="told", label="Told")
        ask = gr.Button("Tell", elem_id="tell")
        ask.click(lambda *given: "\n".join(map(kind_of, given)), [*images.values(), editor], told)
        sessions.bind(images={**images, "drawn": editor})
    with demo.route("Other", "/other"):
        other = gr.Image(elem_id="pil", height=220)
        words = gr.Textbox(elem_id="prompt")
        sessions.bind(images={"pil": other}, state={"prompt": words})
        examples = gr.Examples([[str(example), "of the example"]], [other, words], elem_id="examples")
        sessions.keep_after(examples.load_input_event).panel()
    return demo


if __name__ == "__main__":
    sessions = GradioSessions(open_store(sys.argv[1], cleanup_interval=None), identity="browser_state")
    example = Path(sys.argv[1]).with_name("example.png")
    example.write_bytes(rgba_png(260, 130))
    sessions.launch(build(sessions, example), allowed_paths=[str(example)], server_port=int(sys.argv[2]))
