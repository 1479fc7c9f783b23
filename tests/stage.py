"""A store on disk with one session of everything, for runs that are cut short; and what must hold after each."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock

import anyio
from msgspec.structs import replace
from PIL import Image

from async_sessions import (
    Draft,
    ImageRecord,
    JobInfo,
    OutputRecord,
    Session,
    SessionNotFoundError,
    SessionStore,
    open_store,
)
from async_sessions._tasks import finish_in_thread
from async_sessions.bundle import export_session, import_session, stream_session
from async_sessions.testing.cancellation import Run, cancel_everywhere
from async_sessions.testing.clock import FrozenClock
from tests.faults import files_below, keys_of, named_blobs, open_files
from tests.images import encoded

HOUR: Final = timedelta(hours=1)
RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")
GREEN = Image.new("RGB", (20, 20), "green")
PINK = Image.new("RGB", (10, 50), "pink")
COLOURS = {image.size: image.getpixel((0, 0)) for image in (RED, BLUE, GREEN, PINK)}

Content = tuple[object, ...]
Act = Callable[["Stage"], Coroutine[Any, Any, object]]


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data[:20]
    await anyio.lowlevel.checkpoint()
    yield data[20:]


async def _export_session(stage: Stage) -> None:
    target = stage.scratch / "bundle.zip"
    try:
        await export_session(stage.session, target, jobs=True)
    finally:
        await finish_in_thread(
            partial(target.unlink, missing_ok=True)
        )  # whole, or not there; what is left beside it is a leak


async def _import_session(stage: Stage) -> None:
    await import_session(stage.store, stage.bundle)


async def bundle() -> bytes:
    """The ZIP of a session with two images and a finished job that made a film."""
    async with open_store("memory://", cleanup_interval=None) as store:
        session = await store.create_session(model="b")
        images = await session.store_images({"start": PINK, "end": BLUE})
        film = await session.store_output(bytes(3_000_000), name="film", media_type="video/mp4")
        job = finished_job(session.key, FrozenClock().now, {"start": images["start"]}, {"film": film})
        await session.edit_job(job.id, lambda _: job)
        return b"".join([chunk async for chunk in stream_session(session, jobs=True)])


def finished_job(key: str, at: datetime, inputs: dict[str, ImageRecord], outputs: dict[str, OutputRecord]) -> JobInfo:
    return JobInfo(
        id=f"{key}.{'0' * 16}",
        pipeline="p",
        inputs=inputs,
        params={},
        submitted_at=at,
        owner="o",
        status="succeeded",
        outputs=outputs,
    )


async def _draft(stage: Stage) -> None:
    async with stage.store.draft({"model": "b"}) as draft:
        await _put_together(draft, stage.clock.now)
        await draft.commit()


async def _draft_without_a_commit(stage: Stage) -> None:
    async with stage.store.draft() as draft:
        await _put_together(draft, stage.clock.now)


async def _put_together(draft: Draft, now: datetime) -> None:
    start = await draft.store_image(PINK, "start")
    unslotted = await draft.store_image(encoded(BLUE, "PNG"), None)
    film = b"film" * 100
    digest = hashlib.sha256(film).hexdigest()
    output = await draft.store_output(
        _chunks(film), name="film", media_type="video/mp4", digest=digest, byte_size=len(film)
    )
    draft.add_job(finished_job(draft.key, now, {"start": start, "end": unslotted}, {"film": output}))


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


class Stage:
    """`session` holds RED, BLUE, a GREEN that can be put back, state, a pin and a finished job with an output."""

    def __init__(self, store: SessionStore, root: Path, scratch: Path, clock: FrozenClock) -> None:
        self.store = store
        self.root = root
        self.scratch = scratch  # where temporary copies are made
        self.clock = clock
        self.session: Session
        self.job: JobInfo
        self.bundle = b""
        self.stores_outputs = False
        self._before: Content | None = None
        self._after: Content | None = None

    async def prepare(self) -> None:
        """Make the session as it was before, with nothing of it in memory."""
        manifests = await keys_of(self.store.blobs, "manifests/")
        if len(manifests) != 1 or await self.content() != self._before:
            for key in await keys_of(self.store.blobs):
                await self.store.blobs.delete(key)
            self.clock.advance(FrozenClock().now - self.clock.now)  # a disk's clock has gone on
            self.session = await self.store.create_session(model="a")
            await self.session.store_images({"start": GREEN, "end": BLUE})
            red = await self.session.store_image(RED, "start")
            await self.session.pin("me", until=self.clock.now + HOUR)
            output = await self.session.store_output(b"made", name="text", media_type="text/plain")
            self.job = finished_job(self.session.key, self.clock.now, {"start": red}, {"text": output})
            await self.session.edit_job(self.job.id, lambda _: self.job)
        self.bundle = self.bundle or await bundle()
        self._before = await self.content()
        self.store._context().cache._images.clear()
        self.stores_outputs = False

    async def content(self) -> Content | None:
        """What a user would see of the session; `None` if it is gone."""
        try:
            info = await self.session.info()
        except SessionNotFoundError:
            return None
        return (
            {slot: record.size for slot, record in info.images.items()},
            [recent.record.size for recent in info.recent],
            info.state,
            set(info.pins),
            {job.status for job in info.jobs.values()},
        )

    async def check(self, run: Run) -> None:
        """The content is the old or the new; memory and disk agree; nothing is left over."""
        content = await self.content()
        if run.point is None:
            self._after = content
        assert content in (self._before, self._after)
        assert run.ending == "cancelled" or content == self._after
        context = self.store._context()
        unnamed = set(context._in_flight)  # an output that its job's entry does not name yet; the sweep takes it later
        assert not unnamed or self.stores_outputs
        assert context.cpu.borrowed_tokens == context.manifests._coders.borrowed_tokens == 0
        assert context.budget.free == context.budget.pixels
        assert not any(lock.locked() for lock in context.cache._loading.values())
        assert not any(order.lock.locked() for order in context.manifests._orders._orders.values())
        named = await named_blobs(self.store)
        assert await keys_of(self.store.blobs, "blobs/") == named | unnamed
        assert {name.partition("#")[0] for name in context.cache._images} <= named
        await anyio.to_thread.run_sync(self._check_files)
        if content is not None:
            for slot, record in (await self.session.info()).images.items():
                image = await self.session.retrieve_image(slot)
                assert (image.size, image.getpixel((0, 0))) == (record.size, COLOURS[record.size])

    def _check_files(self) -> None:
        assert files_below(self.root, "tmp") == []
        assert list(self.scratch.iterdir()) == []
        for lock in files_below(self.root, "locks"):
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert not [path for path in open_files() if path.startswith(str(self.root))]


@asynccontextmanager
async def staged(folder: Path) -> AsyncIterator[Stage]:
    scratch, clock = folder / "scratch", FrozenClock()
    scratch.mkdir()
    # nobody cuts the power here, and a disk takes its time to be sure
    with mock.patch.object(tempfile, "tempdir", str(scratch)), mock.patch.object(os, "fsync"):
        async with open_store(folder / "root", cleanup_interval=None, clock=clock) as store:
            yield Stage(store, folder / "root", scratch, clock)


async def _read_stored(stage: Stage) -> None:
    stored = await stage.session.retrieve_stored("start")
    await stored.rendition((16, 16))
    await stored.thumbnail()
    await _drain(stored.stream())


async def _image_file(stage: Stage) -> None:
    async with stage.session.image_file("start") as path:
        assert await anyio.Path(path).read_bytes()


async def _output_file(stage: Stage) -> None:
    async with stage.session.output_file(stage.job.outputs["text"]) as path:
        assert await anyio.Path(path).read_bytes() == b"made"


async def _store_path(stage: Stage) -> None:
    source = anyio.Path(stage.root.parent / "upload.png")
    await source.write_bytes(encoded(PINK, "PNG"))
    await stage.session.store_image(Path(source), "start")


async def _touch(stage: Stage) -> None:
    stage.clock.advance(hours=2)
    await stage.session.touch()


async def _edit_job(stage: Stage) -> None:
    await stage.session.edit_job(stage.job.id, lambda job: replace(job, status="failed") if job else None)


async def _store_output(stage: Stage) -> None:
    stage.stores_outputs = True
    await stage.session.store_output(PINK, name="image", media_type="image/png")


async def _open_and_close(stage: Stage) -> None:
    async with open_store(stage.root, clock=stage.clock, delete_on_close=True) as store:
        await store.create_session()


async def _restore_recent(stage: Stage) -> None:
    recent = (await stage.session.info()).recent[0]
    await stage.session.restore_recent(recent.record.digest, "end")


ACTS: dict[str, Act] = {
    "store_image": lambda stage: stage.session.store_image(PINK, "start"),
    "store_image of bytes": lambda stage: stage.session.store_image(encoded(PINK, "PNG"), "start"),
    "store_image of chunks": lambda stage: stage.session.store_image(_chunks(encoded(PINK, "PNG")), "start"),
    "store_image of a path": _store_path,
    "store_images": lambda stage: stage.session.store_images({"start": PINK, "middle": BLUE}),
    "clear_image": lambda stage: stage.session.clear_image("start"),
    "clear_all_images": lambda stage: stage.session.clear_all_images(),
    "restore_recent": _restore_recent,
    "update_state": lambda stage: stage.session.update_state(model="b"),
    "touch": _touch,
    "pin": lambda stage: stage.session.pin("you", until=stage.clock.now + HOUR),
    "unpin": lambda stage: stage.session.unpin("me"),
    "edit_job": _edit_job,
    "store_output": _store_output,
    "delete": lambda stage: stage.session.delete(),
    "delete_session": lambda stage: stage.store.delete_session(stage.session.id or ""),
    "create_session": lambda stage: stage.store.create_session(model="b"),
    "opening and closing": _open_and_close,
    "restore_session": lambda stage: stage.store.restore_session(stage.session.id or ""),
    "session_for": lambda stage: stage.store.session_for("ada"),
    "open_by_key": lambda stage: stage.store.open_by_key(stage.session.key),
    "sessions": lambda stage: _drain(stage.store.sessions()),
    "retrieve_image": lambda stage: stage.session.retrieve_image("start"),
    "retrieve_bytes": lambda stage: stage.session.retrieve_bytes("start"),
    "retrieve_array": lambda stage: stage.session.retrieve_array("start"),
    "retrieve_rendition": lambda stage: stage.session.retrieve_rendition("start", (16, 16)),
    "retrieve_thumbnail": lambda stage: stage.session.retrieve_thumbnail("start"),
    "retrieve_stored": _read_stored,
    "image_file": _image_file,
    "output_file": _output_file,
    "stream_output": lambda stage: _drain(stage.session.stream_output(stage.job.outputs["text"])),
    "has_image": lambda stage: stage.session.has_image("start"),
    "info": lambda stage: stage.session.info(),
    "generation_request": lambda stage: stage.session.generation_request("p"),
    "cleanup of a replaced image": lambda stage: stage.store.cleanup(now=stage.clock.now + 2 * HOUR),
    "cleanup of a session": lambda stage: stage.store.cleanup(now=stage.clock.now + 100 * HOUR),
    "stats": lambda stage: stage.store.stats(),
    "verify": lambda stage: stage.store.verify(repair=True),
    "stream_session": lambda stage: _drain(stream_session(stage.session, jobs=True)),
    "export_session": _export_session,
    "import_session": _import_session,
    "draft": _draft,
    "draft without a commit": _draft_without_a_commit,
}


async def cancel_act(folder: Path, name: str, every: int = 1) -> list[Run]:
    """Cancel one of `ACTS` at every `every`th place; see `Stage.check`."""
    async with staged(folder) as stage:
        return await cancel_everywhere(partial(ACTS[name], stage), stage.check, prepare=stage.prepare, every=every)
