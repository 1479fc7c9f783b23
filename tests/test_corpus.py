"""The corpus through the public door: what is refused leaves no trace, what is taken keeps its pixels and no secret."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from async_sessions import ImageRejectedError, Session, open_store
from tests import bounds, corpus
from tests.images import payload, shown

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]  # other tests measure it, at two thirds of the time


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(scope="module")
async def session(root: Path) -> AsyncIterator[Session]:
    """One for all tests, since none may change it; it holds an image."""
    async with open_store(root / "store", limits=corpus.LIMITS, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(Image.new("RGB", (8, 8), "red"), "start")
        yield session


def below(root: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file and folder, when it was changed and what it holds."""
    paths = [root, *root.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}


@pytest.mark.parametrize("name", corpus.REFUSED)
async def test_a_refusal_says_why_and_leaves_no_trace(name: str, root: Path, session: Session) -> None:
    make, reason = corpus.REFUSED[name]
    before, info = below(root), await session.info()
    with pytest.raises(ImageRejectedError) as caught:
        await session.store_image(make(), "start")
    assert caught.value.reason == reason
    assert str(caught.value).endswith("."), "a refusal is a sentence for the user"
    assert below(root) == before
    assert await session.info() == info


@pytest.mark.parametrize("name", [*corpus.TAKEN, *corpus.CLEANED])
async def test_a_good_file_keeps_its_pixels_and_loses_its_secrets(name: str) -> None:
    data = {**corpus.TAKEN, **corpus.CLEANED}[name]()
    assert any(secret in data for secret in corpus.SECRETS) == (name in corpus.CLEANED)
    async with open_store("memory://", limits=corpus.LIMITS, cleanup_interval=None, cache_bytes=0) as store:
        session = await store.create_session()
        record = await session.store_image(data, "start")
        stored, image = await session.retrieve_bytes("start"), await session.retrieve_image("start")
        thumbnail = await session.retrieve_thumbnail("start")
    expected = shown(data)
    assert (image.mode, image.size, record.size) == (expected.mode, expected.size, expected.size)
    assert image.info.get("icc_profile") == expected.info.get("icc_profile")
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert not [secret for secret in corpus.SECRETS if secret in stored + thumbnail]
    if not name.startswith("AVIF"):
        assert_in_order(payload(stored), data)


def assert_in_order(pieces: list[bytes], data: bytes) -> None:
    """Every piece is in `data`, one behind the other."""
    position = 0
    for piece in pieces:
        position = data.index(piece, position) + len(piece)


@pytest.mark.parametrize("name", corpus.FORGIVEN)
async def test_what_has_its_only_fault_in_what_is_dropped_is_taken(name: str) -> None:
    make, expected = corpus.FORGIVEN[name]
    async with open_store("memory://", limits=corpus.LIMITS, cleanup_interval=None) as store:
        session = await store.create_session()
        await session.store_image(make(), "start")
        assert await session.retrieve_bytes("start") == expected


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_no_refusal_takes_more_memory_than_it_may() -> None:
    assert not [cost for cost in bounds.costs() if cost.memory > cost.most_memory]
