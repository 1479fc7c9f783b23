"""What a power cut leaves of a store: what was acknowledged, and of what was under way the old or the new."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import anyio
import pytest
from PIL import Image

from async_sessions import Session, SessionNotFoundError, SessionStore, open_store
from async_sessions.bundle import import_session
from async_sessions.testing.power import Acknowledge, PowerCuts, power_cuts
from tests.faults import files_below, keys_of, named_blobs
from tests.stage import bundle

pytestmark = [pytest.mark.no_cover, pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

ID = "of the session in these tests"
RED = Image.new("RGB", (4, 3), "red")
BLUE = Image.new("RGB", (3, 4), "blue")
PINK = Image.new("RGB", (5, 5), "pink")
HOUR = timedelta(hours=1)

Content = dict[str, tuple[int, int]] | None  # sizes by slot; None where there is no session


class Step(NamedTuple):
    act: Callable[[SessionStore, Session], Awaitable[object]]
    content: Content  # afterwards


OLD: Content = {"start": RED.size}
STEPS = {
    "store": Step(lambda store, session: session.store_image(BLUE, "end"), {"start": RED.size, "end": BLUE.size}),
    "replace": Step(lambda store, session: session.store_image(PINK, "start"), {"start": PINK.size}),
    "store two": Step(
        lambda store, session: session.store_images({"start": BLUE, "end": PINK}),
        {"start": BLUE.size, "end": PINK.size},
    ),
    "clear": Step(lambda store, session: session.clear_image("start"), {}),
    "clear all": Step(lambda store, session: session.clear_all_images(), {}),
    "update": Step(lambda store, session: session.update_state(model="a"), OLD),
    "sweep": Step(lambda store, session: store.cleanup(now=store.clock() + 2 * HOUR), OLD),
    "delete": Step(lambda store, session: session.delete(), None),
    "expire": Step(lambda store, session: store.cleanup(now=store.clock() + 100 * HOUR), None),
}
LIFE = (  # one after the other
    STEPS["store"],
    STEPS["replace"]._replace(content={"start": PINK.size, "end": BLUE.size}),
    STEPS["clear"]._replace(content={"end": BLUE.size}),
    STEPS["sweep"]._replace(content={"end": BLUE.size}),
    STEPS["store two"],
    STEPS["clear all"],
    STEPS["store"]._replace(content={"end": BLUE.size}),
    STEPS["delete"],
    STEPS["store"]._replace(content={"end": BLUE.size}),  # the next life of the same id
    STEPS["expire"],
)


async def content_of(store: SessionStore) -> Content:
    """Every image is read to its last pixel."""
    try:
        session = await store.restore_session(ID)
    except SessionNotFoundError:
        return None
    info = await session.info()
    for record in (*info.images.values(), *(recent.record for recent in info.recent)):
        stored = await session.read_record(record)
        assert (await stored.image()).size == record.size
        assert await stored.thumbnail()
    return {slot: record.size for slot, record in info.images.items()}


async def prepare(root: Path) -> None:
    async with open_store(root, cleanup_interval=None) as store:
        await store.session(ID).store_image(BLUE, "start")
        await store.session(ID).store_image(RED, "start")  # the blue one is to be swept


async def check_cuts(*steps: Step) -> PowerCuts:
    """Cut the power at any moment of these steps, taken one after the other."""
    contents = [OLD, *(step.content for step in steps)]

    async def operation(root: Path, acknowledge: Acknowledge) -> None:
        async with open_store(root, cleanup_interval=None) as store:
            for step in steps:
                await step.act(store, store.session(ID))
                await acknowledge(step.content)

    async def check(root: Path, acknowledged: Sequence[Any]) -> None:
        done = len(acknowledged)
        with mock.patch.object(os, "fsync"):  # the power stays on from here
            async with open_store(root, cleanup_interval=None) as store:
                content = await content_of(store)
                assert content in contents[done : done + 2]
                if done == len(steps):
                    assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
                await store.cleanup(now=store.clock() + 2 * HOUR)
                assert await content_of(store) == content
                assert await keys_of(store.blobs, "blobs/") == await named_blobs(store)
        assert await anyio.to_thread.run_sync(files_below, root, "tmp") == []

    return await power_cuts(operation, check, prepare=prepare)


@pytest.mark.parametrize("name", STEPS)
async def test_a_power_cut_loses_nothing_that_was_acknowledged(name: str) -> None:
    tried = await check_cuts(STEPS[name])
    assert tried.states > 5
    assert tried.sampled == 0


async def test_a_power_cut_loses_nothing_of_the_next_life_of_a_session() -> None:
    await check_cuts(STEPS["delete"], STEPS["store"]._replace(content={"end": BLUE.size}))


async def test_a_power_cut_leaves_all_of_an_import_or_nothing() -> None:
    source = await bundle()

    async def operation(root: Path, acknowledge: Acknowledge) -> None:
        async with open_store(root, cleanup_interval=None) as store:
            await import_session(store, source)
            await acknowledge("imported")

    async def check(root: Path, acknowledged: Sequence[Any]) -> None:
        with mock.patch.object(os, "fsync"):
            async with open_store(root, cleanup_interval=None) as store:
                assert await content_of(store) == OLD
                found = [info async for info in store.sessions()]
                assert len(found) == 2 if acknowledged else len(found) in (1, 2)
                for info in found:
                    session = await store.open_by_key(info.key)
                    for slot, record in info.images.items():
                        assert (await session.retrieve_image(slot)).size == record.size

    assert (await power_cuts(operation, check, prepare=prepare)).states > 5


async def test_a_power_cut_loses_nothing_of_two_writes_at_once() -> None:
    async def operation(root: Path, acknowledge: Acknowledge) -> None:
        async with open_store(root, cleanup_interval=None) as store, anyio.create_task_group() as group:

            async def put(image: Image.Image, slot: str) -> None:
                await store.session(ID).store_image(image, slot)
                await acknowledge((slot, image.size))

            group.start_soon(put, BLUE, "start")
            group.start_soon(put, PINK, "end")

    async def check(root: Path, acknowledged: Sequence[Any]) -> None:
        with mock.patch.object(os, "fsync"):
            async with open_store(root, cleanup_interval=None) as store:
                content = await content_of(store)
        assert content is not None
        assert content.items() >= set(acknowledged)
        assert content["start"] in (RED.size, BLUE.size)

    tried = await power_cuts(operation, check, prepare=prepare, limit=32)
    assert tried.states > 50
