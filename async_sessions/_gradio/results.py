"""What a run made, and the component of a page that shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import gradio as gr
from cachetools import LRUCache

from async_sessions._gradio.html import warn
from async_sessions.errors import StorageError

if TYPE_CHECKING:
    from gradio.components import Component

    from async_sessions._gradio.visits import PageKey, Visits
    from async_sessions.records import JobInfo, OutputRecord
    from async_sessions.session import Session

# What browsers show and what can hold no script; anything else that calls itself an image is a file to download.
_IMAGES: Final = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})
_REMEMBERED: Final = 4096  # open pages


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
        self._shown: LRUCache[PageKey, str] = LRUCache(_REMEMBERED)  # by page: the run that it shows

    def shows(self, page: PageKey, job_id: str) -> None:
        self._shown[page] = job_id

    async def news(self, visits: Visits, page: PageKey, session: Session | None, jobs: Sequence[JobInfo]) -> Any:
        """A value for the component of a page: the last result of its session, unless it shows that.

        `None` where its user has ended the session since.
        """
        if session is None:
            return gr.skip() if self._shown.pop(page, None) is None else None
        for job in reversed(jobs):
            if self._shown.get(page) == job.id:
                break
            try:
                made = await self.of(visits, session, job.outputs.values())
            except StorageError as error:
                warn("A result can't be shown", error)
                continue
            if made is not None:
                self._shown[page] = job.id
                return made
        return gr.skip()

    async def of(self, visits: Visits, session: Session, outputs: Iterable[OutputRecord]) -> Any:
        """A value for the component, from copies in Gradio's cache; `None` where there is nothing that it shows."""
        records = list(filter(self._shows, outputs))
        paths = [await visits.copy_result(session, record) for record in (records if self._all else records[:1])]
        return paths if self._all and paths else next(iter(paths), None)
