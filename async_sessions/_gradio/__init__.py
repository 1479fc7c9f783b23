"""What `async_sessions.gradio` is made of."""
