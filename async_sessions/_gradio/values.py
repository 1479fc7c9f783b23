"""Whether a component and a value belong together: it comes from a bundle, or from an older version of the app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import gradio as gr

if TYPE_CHECKING:
    from gradio.components import Component

_REFUSED: Final = (gr.Error, TypeError, ValueError, LookupError, AttributeError)  # what components say no with


def is_settable(component: Component | None, value: Any) -> bool:
    """Whether a user could have given it that value.

    No objects: Gradio takes some for updates of a component and others for files, which it would serve.
    """
    if component is None or not _is_plain(value):
        return False
    try:
        component.postprocess(value)  # type: ignore[no-untyped-call]
    except _REFUSED:
        return False
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
