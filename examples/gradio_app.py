"""An ordinary Gradio app with three lines added: photo and levels are still there after a refresh."""

import gradio as gr
import numpy as np

from async_sessions.gradio import GradioSessions  # added


def posterize(photo: np.ndarray | None, levels: int) -> np.ndarray:
    """The photo in `levels` shades of each colour."""
    if photo is None:
        raise gr.Error("Choose a photo first.")
    step = 256 // levels
    return photo // step * step + step // 2


with gr.Blocks(title="Poster") as demo:
    gr.Markdown("# Poster\nA photo in few colours.")
    with gr.Row():
        photo = gr.Image(label="Photo", elem_id="photo")
        poster = gr.Image(label="Poster", elem_id="poster", interactive=False)
    levels = gr.Slider(2, 16, value=4, step=1, label="Levels", elem_id="levels")
    gr.Button("Make the poster", variant="primary").click(posterize, [photo, levels], poster)
    sessions = GradioSessions("~/poster-sessions").bind(images={"photo": photo}, state={"levels": levels})  # added

if __name__ == "__main__":
    sessions.launch(demo)  # added, in place of demo.launch()
