"""`Session`: one user's images, state and jobs. A cheap handle: it holds no bytes and no lock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from async_sessions import _keys
from async_sessions._ingest import ImageSource, ingest, pixels_of, png_of
from async_sessions._life import Life
from async_sessions._reading import StoredImage, measure
from async_sessions.errors import CorruptBlobError, InvalidOutputError, SessionNotFoundError, SlotEmptyError
from async_sessions.records import (
    JSON,
    GenerationRequest,
    ImageRecord,
    JobInfo,
    OutputRecord,
    SessionInfo,
    check_output,
    check_state,
)
from async_sessions.renditions import GREY, Colour, Fit

if TYPE_CHECKING:
    import numpy as np

    from async_sessions._context import StoreContext
    from async_sessions._ingest import Ingested
    from async_sessions._manifest import Manifest
    from async_sessions._tasks import Tickets

T = TypeVar("T")


class Session:
    """A handle to one session of an open store.

    `id` is the bearer secret, or `None` when the session was opened by its key; `key` is its storage name and may be
    logged. Every method raises `SessionNotFoundError` once the session is unknown, expired or deleted; only a handle
    from `SessionStore.session` or `session_of` creates it, at its first `store_image`, `store_images`, `update_state`
    or `pin`. Storage failures are `StorageError`s; slot names that are not well formed, `InvalidKeyError`. What reads
    or makes an image raises `OutOfMemoryError` where there is no memory for it.
    """

    def __init__(self, context: StoreContext, key: str, *, session_id: str | None, incarnation: str | None) -> None:
        self._context = context
        self._life = Life(context, key, incarnation)
        self.id = session_id
        self.key = key

    def __repr__(self) -> str:
        return f"Session(key={self.key!r})"

    async def store_image(
        self,
        image: ImageSource,
        slot: str,
        *,
        name: str | None = None,
        if_revision: str | None = None,
        replaces: str | None = None,
    ) -> ImageRecord:
        """Keep `image` in `slot`, durably; the one that was there moves to `SessionInfo.recent`.

        `image` is a PIL image, the bytes of a JPEG, PNG, WebP, AVIF or (extra `heif`) HEIC file, a `Path` to one, an
        async iterator of its chunks, a uint8 array HxW or HxWxC (C 1, 3 or 4) or a uint16 array HxW;
        `ImageRejectedError` says what is wrong with it. PIL's modes 1, L, LA, P, RGB, RGBA and I;16 come back as they
        are; I;16B and I;16L as I;16, La as LA, PA and RGBa as RGBA, RGBX, YCbCr and CMYK (through its ICC profile) as
        RGB; others, such as F or HSV, are refused. A file's pixels are stored as they came, but for AVIF and HEIC,
        which become PNG; a PNG of 16-bit colours comes back rounded to 8 bits.

        Of two calls for one slot, the later call wins, however long the other's decoding takes. A clear is such a call:
        what it overtakes was stored for an instant and is gone when its record is returned. `name` is shown to people
        and is no path. `RevisionConflictError` if `if_revision` is not the session's revision any more, or if the slot
        holds neither the image whose digest is `replaces` nor this one; whatever else changed, and a slot that is
        empty, is no conflict then.
        """
        tickets = self._draw([slot])
        async with self._ingest({slot: image}, name) as ingested:
            return (await self._life.commit_images(ingested, tickets, if_revision, replaces))[slot]

    async def store_images(self, images: Mapping[str, ImageSource]) -> Mapping[str, ImageRecord]:
        """Keep several images, all of them or none; see `store_image`."""
        tickets = self._draw(images)
        async with self._ingest(images, None) as ingested:
            return await self._life.commit_images(ingested, tickets)

    async def retrieve_image(self, slot: str) -> Image.Image:
        """The image, upright, loaded, yours to draw on. `SlotEmptyError`, `CorruptBlobError`."""
        return await self._retrieve(slot, self._context.reader.image)

    async def retrieve_bytes(self, slot: str) -> bytes:
        """The stored file: the pixels as they came, upright only with its EXIF orientation."""
        return await self._retrieve(slot, self._context.reader.data)

    async def retrieve_array(self, slot: str) -> np.ndarray:
        """HxWxC uint8, RGB or RGBA, upright, your own copy; of 16-bit samples the upper 8 bits."""
        return await self._retrieve(slot, self._context.reader.array)

    async def retrieve_rendition(
        self, slot: str, size: tuple[int, int], mode: Fit = "cover", background: Colour = GREY
    ) -> Image.Image:
        """The image as RGB of exactly that size, see `renditions.fit`; kept in memory as the image itself is.

        `ValueError` for more than 64 million pixels.
        """
        reader = self._context.reader
        return await self._retrieve(slot, partial(reader.rendition, size=size, mode=mode, background=background))

    async def retrieve_stored(self, slot: str) -> StoredImage:
        """What the slot holds now, to be read in whichever way is wanted, whatever the slot holds by then."""
        return StoredImage(await self._use(slot), self._context.reader)

    async def retrieve_thumbnail(self, slot: str) -> bytes:
        """A WebP file, upright, at most 320 pixels on its longer side; it was made when the image was stored."""
        return await self._retrieve(slot, self._context.reader.thumbnail)

    @asynccontextmanager
    async def image_file(self, slot: str) -> AsyncIterator[Path]:
        """`async with session.image_file("start") as path`: a private temporary copy, for code that wants a path."""
        record = await self._use(slot)
        async with self._context.reader.file(record) as path:
            yield path

    async def has_image(self, slot: str) -> bool:
        """Whether the slot holds an image; asking is no use of the session, unlike retrieving."""
        return self._context.check_slot(slot) in (await self._life.read()).images

    async def clear_image(self, slot: str, *, if_revision: str | None = None) -> None:
        """Empty the slot; no error where it is empty. `restore_recent` undoes it within the store's `grace`."""
        tickets = self._draw([slot])
        now = self._context.clock()
        await self._life.edit(
            lambda manifest: manifest.without_image(slot, now) if tickets.fate(slot) == "current" else None,
            if_revision=if_revision,
            held=tickets.spend,
        )

    async def restore_recent(self, digest: str, slot: str, *, replaces: str | None = None) -> ImageRecord:
        """Put a recent image back; `replaces` as in `store_image`. `SlotEmptyError` once it is past the `grace`."""
        tickets = self._draw([slot])
        now, grace = self._context.now(), self._context.lifetime.grace
        restored: list[ImageRecord] = []

        def change(manifest: Manifest) -> Manifest | None:
            manifest.check_replaces(slot, digest, replaces)
            changed = manifest.with_restored(slot, digest, now, grace)
            restored.append(changed.images[slot])
            return changed if tickets.fate(slot) == "current" else None

        await self._life.edit(change, held=tickets.spend)
        return restored[-1]

    async def clear_all_images(self) -> None:
        """Remove every image for good, on disk too, with the recent ones and what finished jobs made of them.

        What an unfinished job names stays for that job alone and goes when it ends.
        """
        tickets = self._context.manifests.order(self.key).draw_all()
        now = self._context.clock()
        await self._life.edit(lambda manifest: manifest.cleared(now), held=partial(tickets.spend, purge=True))

    async def read_record(self, record: ImageRecord) -> StoredImage:
        """The image that `record` names, whatever its slot holds by now."""
        self._context.check_open()
        return StoredImage(record, self._context.reader)

    async def info(self) -> SessionInfo:
        """One consistent snapshot."""
        return (await self._life.read()).info(self._context.lifetime, self._context.now())

    async def update_state(self, /, **values: JSON) -> SessionInfo:
        """Merge `values` into the session's state. `QuotaExceededError` above `Limits.max_state_bytes` of JSON.

        `TypeError` for a value that JSON can't hold, `ValueError` for NaN, infinity or nesting deeper than 32. Calls
        take effect in the order in which they are made. A name stays once it is given; give it `None` to empty it.
        """
        self._context.check_open()
        limit = self._context.limits.max_state_bytes

        def merged(manifest: Manifest) -> Manifest:
            changed = manifest.with_state(values)
            check_state(changed.state, limit)
            return changed

        order = self._context.manifests.order(self.key)
        async with order.states:
            await self._context.manifests.code(partial(check_state, values, limit))
            manifest = await self._life.edit(merged, creates=True)
        return manifest.info(self._context.lifetime, self._context.now())

    async def touch(self) -> None:
        """Record a use, so that the session lives on; written at most every 24th part of the store's `ttl`."""
        await self._life.touch()

    async def delete(self) -> None:
        """Remove the session with all that it holds, jobs and pins notwithstanding; no error where it is gone."""
        with suppress(SessionNotFoundError):
            await self._life.bury()

    async def pin(self, owner: str, *, until: datetime) -> None:
        """Keep the session, its replaced images too, from every sweep before `until` (timezone-aware)."""
        if until.tzinfo is None:
            raise ValueError("`until` needs a time zone, for example datetime.now(UTC) + timedelta(hours=1).")
        await self._life.edit(lambda manifest: manifest.with_pin(owner, until), creates=True)

    async def unpin(self, owner: str) -> None:
        """Let go of a pin; no error where there is none."""
        await self._life.edit(lambda manifest: manifest.without_pin(owner))

    async def generation_request(
        self,
        pipeline: str,
        *,
        slots: Iterable[str] = ("start", "end"),
        params: Mapping[str, JSON] | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> GenerationRequest:
        """What `Dispatcher.submit` takes: the images that `slots` hold now (an empty slot is left out) and `params`."""
        if isinstance(slots, str):
            raise TypeError(f"`slots` is a collection of slot names, for example [{slots!r}].")
        wanted = [_keys.check_slot(slot) for slot in slots]
        images = (await self._life.use()).images
        return GenerationRequest(
            session_key=self.key,
            pipeline=pipeline,
            inputs={slot: images[slot] for slot in wanted if slot in images},
            params=dict(params or {}),
            priority=priority,
            idempotency_key=idempotency_key,
        )

    async def store_output(self, data: bytes | Path | Image.Image, *, name: str, media_type: str) -> OutputRecord:
        """Write a job's result; it belongs to the session once `edit_job` puts the record into the job's entry.

        An image is stored as PNG, whatever `media_type` says. `InvalidOutputError` for an empty one, a path that is not
        that of a regular file, a `name` that no slot could have, a malformed `media_type`.
        """
        check_output(name, media_type)
        context = self._context
        incarnation = (await self._life.read()).incarnation
        async with context.budget.lent(pixels_of(data)):
            if isinstance(data, Image.Image):
                data, media_type = await context.in_thread(partial(png_of, data, context.limits)), "image/png"
            digest, size = await context.in_thread(partial(measure, data))
            if not size:
                raise InvalidOutputError(f"The output {name!r} is empty. Let the pipeline put out something.")
            blob = _keys.new_blob(incarnation, digest)
            await context.write(blob, data, size)
            context.writing([blob])  # for as long as a commit may take, which is to name it
        return OutputRecord(
            name=name, media_type=media_type, digest=digest, byte_size=size, stored_at=context.clock(), blob=blob
        )

    def stream_output(self, record: OutputRecord, *, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of a result from `start` up to but not including `end`. `CorruptBlobError` where it is gone."""
        self._context.check_open()
        return self._context.reader.stream(record, start, end)

    def output_file(self, record: OutputRecord) -> AbstractAsyncContextManager[Path]:
        """A private temporary copy of a result, for code that wants a path."""
        self._context.check_open()
        return self._context.reader.file(record)

    async def edit_job(self, job_id: str, change: Callable[[JobInfo | None], JobInfo | None]) -> JobInfo | None:
        """One compare-and-swap on a job's entry, for dispatchers; returns the entry as it is then.

        `change` is pure, may be called again and may raise; where it returns `None` nothing is written. A new entry may
        only name images that the session still holds, else `SlotEmptyError`.
        """

        def changed(manifest: Manifest) -> Manifest | None:
            old = manifest.jobs.get(job_id)
            new = change(old)
            if new is None or new is old:
                return None
            if old is None and not all(map(manifest.available, new.inputs.values())):
                raise SlotEmptyError("An image of this request was removed meanwhile; store it and submit again.")
            changed = manifest.with_job(new)
            return changed if new.unfinished else changed.remembering(self._context.limits.keep_jobs)

        return (await self._life.edit(changed)).jobs.get(job_id)

    def _draw(self, slots: Iterable[str]) -> Tickets:
        """Take this call's place in the order of each slot; to be done before anything is awaited."""
        self._context.check_open()
        return self._context.manifests.order(self.key).draw([self._context.check_slot(slot) for slot in slots])

    def _ingest(
        self, images: Mapping[str, ImageSource], name: str | None
    ) -> AbstractAsyncContextManager[dict[str, Ingested]]:
        limits, cpu, budget = self._context.limits, self._context.cpu, self._context.budget
        return ingest(images, name=name, limits=limits, limiter=cpu, budget=budget, keep=self._context.cache.own)

    async def _retrieve(self, slot: str, read: Callable[[ImageRecord], Awaitable[T]]) -> T:
        record = await self._use(slot)
        while True:
            try:
                return await read(record)
            except CorruptBlobError:
                damaged, record = record, await self._use(slot)
                if record == damaged:
                    raise
                # the image was removed for good while it was read; the slot holds another one by now

    async def _use(self, slot: str) -> ImageRecord:
        self._context.check_slot(slot)
        record = (await self._life.use()).images.get(slot)
        if record is None:
            raise SlotEmptyError(f"Slot {slot!r} holds no image; store one first.")
        return record
