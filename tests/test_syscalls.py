"""The n-th system call fails, once or from then on: what was stored stays, what is told has a type, nothing is left."""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from PIL import Image

from async_sessions import Session, SessionStore, StorageError, StorageFullError, open_store
from async_sessions.blobs import _files
from tests.faults import files_below

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_cover,
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", ["asyncio"]),
]

ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EROFS, errno.EACCES, errno.EINTR)
RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


class Fault:
    """Fails the calls of one kind from the `at`th on, or only that one; counts them in any case."""

    def __init__(self, at: int, number: int, *, once: bool) -> None:
        self.calls = 0
        self._at = at
        self._number = number
        self._once = once

    def strike(self) -> None:
        self.calls += 1
        if self.calls == self._at or (self.calls > self._at and not self._once):
            raise OSError(self._number, os.strerror(self._number))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **options: Any) -> Any:
            self.strike()
            return call(*args, **options)

        return struck


class _Written:
    def __init__(self, file: BinaryIO, fault: Fault) -> None:
        self._file = file
        self._fault = fault

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        self._fault.strike()
        return self._file.write(data)


def _opened(fault: Fault, file: int, mode: str) -> _Written:
    return _Written(cast("BinaryIO", builtins.open(file, mode)), fault)


@contextlib.contextmanager
def struck(call: str, fault: Fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if call == "write":
            patch.setattr(_files, "open", partial(_opened, fault), raising=False)
        else:
            patch.setattr(os, call, fault.before(getattr(os, call)))
        yield


async def change(store: SessionStore, session: Session, crowded: Session, call: str, fault: Fault) -> str | None:
    """Under a fault: replace "start" by the blue image, clear "end", begin a session, empty the crowded one."""
    with struck(call, fault):
        try:
            await session.store_image(BLUE, "start")
            await session.clear_image("end")
            await store.session_of("somebody new").store_image(RED, "start")
            await crowded.clear_all_images()
        except StorageError as error:
            full = isinstance(error, StorageFullError)
            return f"{'full' if full else 'failed'}: {error}"
    return None


@pytest.mark.parametrize("once", [True, False], ids=["once", "for good"])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "mkdir", "unlink", "stat"])
async def test_whichever_system_call_fails_the_old_or_the_new_is_there(call: str, once: bool, tmp_path: Path) -> None:
    for at in range(1, 200):
        number = ERRORS[at % len(ERRORS)]
        root = tmp_path / str(at)
        async with open_store(root, cleanup_interval=None) as store:
            session, crowded = await store.create_session(), await store.create_session()
            for each in (session, crowded):
                await each.store_images({"start": RED, "end": RED})
            fault = Fault(at, number, once=once)
            told = await change(store, session, crowded, call, fault)
            if fault.calls < at:
                break  # it takes fewer calls than that
            if told is not None and "power cut" not in told:
                assert told.startswith("full") == (number == errno.ENOSPC), told
            found = (await session.retrieve_image("start")).tobytes()
            assert found == BLUE.tobytes() or (told is not None and found == RED.tobytes())
            assert told is not None or not await session.has_image("end")
            for slot in (await crowded.info()).images:
                assert (await crowded.retrieve_image(slot)).tobytes() == RED.tobytes()
            assert not once or files_below(root, "tmp") == []
            assert await change(store, session, crowded, call, Fault(1000, 0, once=True)) is None
            assert (await session.retrieve_image("start")).tobytes() == BLUE.tobytes()
            assert (await session.info()).images.keys() == {"start"}
            assert (await crowded.info()).images == {}
    assert at > 1
