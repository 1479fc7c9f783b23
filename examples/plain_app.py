"""A Gradio app that keeps nothing: after a reload, photo and mirror image are gone. See the README for three lines."""

import gradio as gr
import numpy as np


def mirror(photo: np.ndarray) -> np.ndarray:
    return np.fliplr(photo)


with gr.Blocks() as demo:
    gr.Markdown("Mirror a photo.")
    with gr.Row():
        photo = gr.Image(label="Photo")
        mirrored = gr.Image(label="Mirrored", interactive=False)
    gr.Button("Mirror").click(mirror, inputs=photo, outputs=mirrored)

if __name__ == "__main__":
    demo.launch()
