"""Pillow's own test images: a thousand files of every kind, many of them damaged on purpose. Only its sdist has them.

Deselected unless it is asked for, as `make pillow` does, since it downloads 45 MB.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import PIL
import pytest

from async_sessions import ImageRejectedError, open_store
from tests.corpus import LIMITS

pytestmark = [pytest.mark.pillow_images, pytest.mark.anyio, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pillow")
    name = f"pillow=={PIL.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=pillow", name]
    done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip can't download the source of {name}: {done.stderr.strip()[-500:]}")
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    return sorted(path for path in folder.glob("*/Tests/images/**/*") if path.is_file())


async def test_pillows_own_images_are_taken_or_refused_with_a_reason(images: list[Path]) -> None:
    outcomes = Counter[str]()
    async with open_store("memory://", limits=LIMITS, cleanup_interval=None, cache_bytes=0) as store:
        session = await store.create_session()
        for path in images:
            try:
                record = await session.store_image(path, "start")
            except ImageRejectedError as error:
                outcomes[error.reason] += 1
                sys.stdout.write(f"{error.reason:18} {path.name}: {error}\n")
            else:
                outcomes["taken"] += 1
                assert (await session.retrieve_image("start")).size == record.size
    counts = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
    sys.stdout.write(f"{len(images)} files of Pillow {PIL.__version__}: {counts}\n")
    assert len(images) > 900
    assert outcomes["taken"] > 400
