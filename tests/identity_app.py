"""An app for `test_identity_browser`. Its arguments: a root; options of `GradioSessions`, and of `launch`, as JSON."""

from __future__ import annotations

import json
import sys

import gradio as gr
from starlette.routing import Mount

from async_sessions import open_store
from async_sessions.gradio import GradioSessions

if __name__ == "__main__":
    root, options, launch = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    sessions = GradioSessions(open_store(root, cleanup_interval=None), **options)
    with gr.Blocks() as demo:
        start = gr.Image(elem_id="start", sources=["upload"])
        with gr.Tabs():
            with gr.Tab("First"):
                gr.Markdown("first")
            with gr.Tab("Second"):  # not shown when the page opens
                prompt = gr.Textbox(elem_id="prompt")
                sessions.bind(images={"start": start}, state={"prompt": prompt})
                sessions.panel()
    if "auth" in launch:
        launch["auth"] = [tuple(each) for each in launch["auth"]]
    routes = [Mount("/images", sessions.images_app())]
    sessions.launch(demo, app_kwargs={"routes": routes}, **launch)
