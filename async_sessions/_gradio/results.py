"""What a run made, and the component of a page that shows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import gradio as gr
    from gradio.components import Component

    from async_sessions._gradio.visits import Visits
    from async_sessions.records import OutputRecord
    from async_sessions.session import Session

# What browsers show and what can hold no script; anything else that calls itself an image is a file to download.
_IMAGES: Final = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})


def is_video(record: OutputRecord) -> bool:
    return record.media_type.startswith("video/")


def is_image(record: OutputRecord) -> bool:
    return record.media_type in _IMAGES


class Result:
    """Shows the video of a run in a `gr.Video`, or its first image in a `gr.Image`, or all its images in a gallery."""

    def __init__(self, *, video: gr.Video | None, image: gr.Image | None, gallery: gr.Gallery | None) -> None:
        given: list[Component] = [each for each in (video, image, gallery) if each is not None]
        if len(given) != 1:
            raise TypeError("bind_generate() shows what a run made in one component: pass video=, image= or gallery=.")
        (self.component,) = given
        self._shows = is_image if video is None else is_video
        self._all = gallery is not None

    async def of(self, visits: Visits, session: Session, outputs: Iterable[OutputRecord]) -> Any:
        """A value for the component, from copies in Gradio's cache; `None` where there is nothing that it shows."""
        records = list(filter(self._shows, outputs))
        paths = [await visits.copy_result(session, record) for record in (records if self._all else records[:1])]
        return paths if self._all and paths else next(iter(paths), None)
