"""Files as a browser names them: anything may be in there but a path outside of Gradio's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import gradio as gr
from gradio.utils import get_upload_folder

from async_sessions._gradio import cache
from async_sessions.errors import ImageRejectedError

if TYPE_CHECKING:
    from gradio.components import Component

    from async_sessions._gradio.listeners import Payload
    from async_sessions.asgi import CookieSigner

_PATH_MAX: Final = 4096  # characters; no file has a longer one
_NAME_MAX: Final = 255
_URL_MAX: Final = 4 * _PATH_MAX


async def file_of(image: Component, payload: Payload | None, key: CookieSigner) -> Payload | None:
    """What the browser says that `image` shows, as one file: of an editor what all its layers make together.

    `StorageError` where that can't be written. `key` makes its path one that can't be guessed.
    """
    if payload is None or "path" in payload:
        return payload
    blobs = image.blob_storage.pop(str(payload.get("id")), None) if isinstance(image, gr.ImageEditor) else None
    if blobs is not None:  # as an app gets it that listens to each stroke: not as files
        data = blobs.composite or blobs.background
        return None if data is None else {"path": await cache.keep_drawing(data, folder=get_upload_folder(), key=key)}
    return payload.get("composite") or payload.get("background")


def path_of(payload: Payload) -> str:
    path = payload.get("path")
    if not isinstance(path, str) or not 0 < len(path) < _PATH_MAX:
        raise ImageRejectedError("unsupported_format", "That is not an image file; choose a JPEG, PNG or WebP.")
    return path


def brief(payload: Payload) -> Payload:
    """What is shown of an upload, and where it lies: it comes from a browser, and is remembered."""
    name, url = str(payload.get("orig_name") or ""), str(payload.get("url") or "")
    return {"path": path_of(payload), "orig_name": name[:_NAME_MAX], "url": url if len(url) <= _URL_MAX else ""}
